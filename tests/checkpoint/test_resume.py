"""A run that was interrupted and resumed is the run that was not: same losses, same norms, same weights.

Bit for bit, on the same layout: schedule (cosine), optimizer state, data order across an epoch's end, and the random
numbers of attention dropout all go on where they stopped. What a checkpoint folder holds, and which are kept, too.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support import parity
from tests.support.cluster import ChildError, Cluster
from tests.support.recipe import (
    ROOT,
    command,
    curve,
    largest_difference,
    save_model,
    text_rows,
    train_in_cluster,
    write_jsonl,
)

LOGGED = ("loss", "aux_loss", "grad_norm", "learning_rate", "epoch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of an epoch on two ranks, so that six steps cross into the second."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(16))


def flags(model: Path, data: Path, preset: str, out: Path, world_size: int = 2, **more: Any) -> list[str]:
    return command(
        model, data, ROOT / "ds_configs" / f"{preset}.json", out,
        **{
            "per_device_train_batch_size": 4 // world_size, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
            "max_steps": 6, "save_steps": 3, "logging_steps": 1, "report_to": "none", **more,
        },
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    """What lies in an output folder beside the log of expert load (which native layers do not write)."""
    return sorted({path.name for path in folder.iterdir()} - {"expert_load.jsonl", "log.jsonl"})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("preset", "world_size"),
    [("zero1_ep2", 2), ("zero2_ep2", 2), ("zero3_ep2", 2), ("zero1_ep2", 4), ("zero1_ep2_native", 2)],
)
def test_resumed_equals_uninterrupted(
    preset: str, world_size: int, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    cluster = clusters(world_size)
    straight = cluster.run(train_in_cluster, flags(model, data, preset, tmp_path / "straight", world_size))[0]
    assert names(tmp_path / "straight") == ["checkpoint-3", "checkpoint-6", "model"]
    check_contents(tmp_path / "straight" / "checkpoint-3", preset, world_size)

    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    (tmp_path / "resumed" / ".writing" / "checkpoint-6").mkdir(parents=True)  # what a crash while saving leaves
    again = flags(model, data, preset, tmp_path / "resumed", world_size, resume_from_checkpoint="true")
    resumed = cluster.run(train_in_cluster, again)[0]
    expected, got = curve(straight, *LOGGED), curve(resumed, *LOGGED)
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert len({values[0] for values in expected.values()}) == 6, "losses that do not move prove nothing"
    assert got == expected
    assert largest_difference(resumed["folder"], straight["folder"]) == 0.0
    assert names(tmp_path / "resumed") == ["checkpoint-3", "checkpoint-6", "model"]


def check_contents(checkpoint: Path, preset: str, world_size: int) -> None:
    """Config, tokenizer and DeepSpeed's states, all ranks' random numbers, and no weights in HF's files."""
    found = files(checkpoint)
    assert not [name for name in found if name.endswith((".safetensors", ".bin", ".safetensors.index.json"))]
    assert {"config.json", "tokenizer.json", "trainer_state.json", "latest"} <= found
    assert {f"rng_state_{rank}.pth" for rank in range(world_size)} <= found
    optimizers = [name for name in found if name.startswith("global_step3/") and name.endswith("optim_states.pt")]
    experts = [name for name in found if "_expert_" in name and name.endswith("model_states.pt")]
    assert len(optimizers) >= world_size
    assert len(experts) == (0 if preset.startswith("zero3") else 2 * 4)  # ZeRO-3 keeps them in its partitions


# ---------------------------------------------------------------------------- what is in the files is read, never run


class Evil:
    """Unpickling this makes a folder: code execution."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def resume_refused(arguments: list[str], as_before: bool = False) -> list[str]:
    """On the ranks: the problems of a resume that is refused; ``as_before``: with DeepSpeed's own way of reading."""
    from moe_models.checkpoint import resume
    from moe_models.errors import UserError

    with ExitStack() as faults:
        if as_before:
            faults.enter_context(parity.planted(resume, "require_readable", lambda *_: None))
            faults.enter_context(parity.planted(resume, "reads_with", lambda *_: nullcontext()))
        try:
            train_in_cluster(arguments)
        except UserError as error:
            return error.problems
    return []


FILES = {
    "zero1_ep2": ["mp_rank_00_model", "layer_1_expert_2_mp_rank_00_model", "zero_pp_rank_1_mp_rank_00_optim"],
    "zero3_ep2": ["zero_pp_rank_1_mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim"],
    "zero1_ep2_native": ["layer_0_expert_3_mp_rank_00_model"],
}


@pytest.mark.parametrize("preset", parity.daily([(preset,) for preset in FILES], {0, 1}))
def test_code_in_a_checkpoint_is_not_run(
    preset: str, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """In each kind of file, resumed in the same layout and in another: one line on every rank, the same."""
    import torch

    short = {"max_steps": 3, "lr_scheduler_type": "constant"}
    clusters(2).run(train_in_cluster, flags(model, data, preset, tmp_path / "out", **short))
    whole = tmp_path / "whole"
    shutil.move(tmp_path / "out" / "checkpoint-3", whole)
    others = {"zero1_ep2": "zero2_ep2", "zero3_ep2": "zero1_ep2", "zero1_ep2_native": "zero1_ep2"}
    for name in FILES[preset]:
        for asked in (preset, others[preset]):
            out, target = tmp_path / f"{name}-{asked}", tmp_path / "executed"
            shutil.copytree(whole, out / "checkpoint-3")
            step = out / "checkpoint-3" / "global_step3"
            (file,) = [path for path in step.iterdir() if path.name.removeprefix("bf16_") == f"{name}_states.pt"]
            states = torch.load(file, weights_only=False)
            torch.save({**states, "ds_version": Evil(target)}, file)
            again = flags(model, data, asked, out, resume_from_checkpoint="true", **short)
            told = clusters(2).run(resume_refused, again)
            assert told[0] == told[1]
            (line,) = told[0]
            assert f"{file.name}: cannot be read as plain tensors" in line
            assert not target.exists(), "the code in the file was executed"
    # The fault is real: read as DeepSpeed reads it, the last of these files is executed.
    if preset == "zero1_ep2":
        again = flags(model, data, preset, out, resume_from_checkpoint="true", **short)
        with suppress(ChildError):
            clusters(2).run(resume_refused, again, as_before=True)
        assert target.exists()


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "layer_1_expert_2_mp_rank_00_model_states.pt"]
)
def test_a_missing_file_is_one_line_on_every_rank(
    name: str, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    clusters(2).run(train_in_cluster, flags(model, data, "zero1_ep2", out, max_steps=3))
    shutil.rmtree(out / "model")
    next(out.glob(f"checkpoint-3/global_step3/*{name}")).unlink()
    told = clusters(2).run(resume_refused, flags(model, data, "zero1_ep2", out, resume_from_checkpoint="true"))
    assert told[0] == told[1]
    (line,) = told[0]
    assert "the checkpoint is incomplete, use an earlier one" in line


class Mapped(TrainerCallback):
    """Notes which files of a checkpoint are still mapped when the first step begins."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        gc.collect()
        self.files += [line for line in Path("/proc/self/maps").read_text().splitlines() if "_states.pt" in line]


def resume_and_look(arguments: list[str]) -> list[str]:
    """On the ranks: files of checkpoints that stay mapped in a resumed run."""
    seen = Mapped()
    train_in_cluster(arguments, (seen,))
    return seen.files


@pytest.mark.parametrize("preset", ["zero1_ep2", "zero3_ep2"])
def test_no_file_stays_mapped(
    preset: str, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """A mapped file that is removed (--save_total_limit) keeps its place on the disk until the run ends."""
    clusters(2).run(train_in_cluster, flags(model, data, preset, tmp_path / "out", max_steps=3))
    again = flags(model, data, preset, tmp_path / "out", resume_from_checkpoint="true")
    assert clusters(2).run(resume_and_look, again) == [[], []]


def test_without_its_random_numbers_a_resumed_run_differs(
    clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """The test above would see it if dropout started anew."""
    straight = clusters(2).run(train_in_cluster, flags(model, data, "zero1_ep2", tmp_path / "straight"))[0]
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    for path in (tmp_path / "resumed" / "checkpoint-3").glob("rng_state_*"):
        path.unlink()
    again = flags(model, data, "zero1_ep2", tmp_path / "resumed", resume_from_checkpoint="true")
    resumed = clusters(2).run(train_in_cluster, again)[0]
    expected, got = curve(straight, "loss"), curve(resumed, "loss")
    assert [got[step] == expected[step] for step in (3, 4)] == [True, False]


def test_a_finished_run_can_be_resumed(
    clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """Nothing is left to train, and the export is made again, as after a crash between the two."""
    first = clusters(2).run(train_in_cluster, flags(model, data, "zero1_ep2", tmp_path / "out"))[0]
    shutil.copytree(first["folder"], tmp_path / "before")
    shutil.rmtree(first["folder"])
    again = flags(model, data, "zero1_ep2", tmp_path / "out", resume_from_checkpoint="true")
    second = clusters(2).run(train_in_cluster, again)[0]
    assert second["steps"] == 6
    assert largest_difference(second["folder"], tmp_path / "before") == 0.0


def test_longer_training_goes_on_from_a_finished_run(
    clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    constant = {"lr_scheduler_type": "constant"}
    clusters(2).run(train_in_cluster, flags(model, data, "zero2_ep2", tmp_path / "out", max_steps=3, **constant))
    again = flags(model, data, "zero2_ep2", tmp_path / "out", resume_from_checkpoint="true", **constant)
    longer = clusters(2).run(train_in_cluster, again)[0]
    straight = clusters(2).run(train_in_cluster, flags(model, data, "zero2_ep2", tmp_path / "straight", **constant))[0]
    assert curve(longer, *LOGGED) == curve(straight, *LOGGED)
    assert largest_difference(longer["folder"], straight["folder"]) == 0.0


def test_save_total_limit_keeps_the_last(
    clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    limit = flags(model, data, "zero1_ep2", tmp_path / "out", save_steps=2, save_total_limit=2)
    clusters(2).run(train_in_cluster, limit)
    assert names(tmp_path / "out") == ["checkpoint-4", "checkpoint-6", "model"]


@pytest.mark.parametrize("preset", ["zero1_ep2", "zero3_ep2"])
def test_best_model_is_kept_and_exported(
    preset: str, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """The best is made an early one (greater_is_better, falling loss), so it must survive rotation and come back."""
    out = tmp_path / "out"
    arguments = flags(
        model, data, preset, out, save_steps=2, save_total_limit=2, eval_dataset=data, eval_strategy="steps",
        eval_steps=2, eval_on_start=False, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    result = clusters(2).run(train_in_cluster, arguments)[0]
    losses = {entry["step"]: entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry}
    assert losses[2] > losses[4] > losses[6] or max(losses, key=lambda step: losses[step]) == 2
    assert result["best"] == str(out / "checkpoint-2")
    assert names(out) == ["checkpoint-2", "checkpoint-6", "model"]
    for step in (2, 6):
        state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / "checkpoint-2")
    export = runpy.run_path(str(ROOT / "recipes" / "export.py"))["export_checkpoint"]
    export(out / "checkpoint-2", tmp_path / "best", "5GB")
    export(out / "checkpoint-6", tmp_path / "last", "5GB")
    assert largest_difference(result["folder"], tmp_path / "best") == 0.0
    assert largest_difference(result["folder"], tmp_path / "last") > 0.0
