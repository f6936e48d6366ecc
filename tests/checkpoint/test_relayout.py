"""A run that stops in one layout and goes on in another is the run that never stopped.

Six AdamW steps with a cosine schedule, clipping, weight decay and an epoch's end in between; the second half in another
layout, from the checkpoint after step 3. Losses and norms as in tests/training/test_parity.py (two layouts are never
bit-equal:
they sum in another order), and the exported weights at the end. A checkpoint that was only loaded exports every bit.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from tests.support import parity
from tests.support.cluster import Cluster
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
from tests.training.test_tensor_parallel import tp_config

Clusters = Callable[[int], Cluster]

Where = tuple[Any, ...]
"""(ranks, ZeRO stage, experts, EP), and TP and pipeline stages where there are any."""


def layout(stage: int, experts: str, ep_size: int = 1, tp_size: int = 1, stages: int = 1) -> dict[str, Any]:
    if tp_size > 1:
        return tp_config(stage, ep_size)
    pipeline: dict[str, Any] = {"pipeline": {"stages": stages}} if stages > 1 else {}
    if experts == "native":
        return parity.ds_config(stage, None, moe={"layer": {"ep_size": ep_size}}, **pipeline)
    config = parity.ds_config(stage, ep_size if experts == "autoep" else None, **pipeline)
    if stage == 3:  # norms stay whole between steps, all else is cut into shares
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return config


# Where the first half runs, and where the second
MOVES: list[tuple[Where, Where]] = [
    ((2, 1, "autoep", 2), (4, 2, "autoep", 4)),
    ((4, 1, "autoep", 4), (2, 1, "autoep", 1)),
    ((4, 1, "autoep", 2), (2, 1, "autoep", 2)),
    ((2, 1, "autoep", 2), (2, 3, "autoep", 2)),
    ((2, 3, "autoep", 2), (2, 1, "autoep", 2)),
    ((2, 3, "autoep", 2), (4, 2, "autoep", 4)),
    ((4, 3, "autoep", 4), (2, 3, "plain", 1)),
    ((2, 2, "plain", 1), (2, 2, "autoep", 2)),
    ((2, 3, "plain", 1), (4, 3, "autoep", 2)),
    ((2, 1, "native", 2), (2, 1, "autoep", 2)),
    ((2, 2, "autoep", 2), (2, 1, "native", 2)),
    ((2, 1, "native", 2), (4, 2, "native", 4)),
    ((4, 1, "autoep", 2, 2), (2, 1, "autoep", 2)),
    ((2, 3, "autoep", 2), (4, 2, "autoep", 4, 2)),
    ((4, 2, "autoep", 4, 2), (2, 1, "native", 2)),
    # to stages, from stages, and with other ones
    ((4, 1, "autoep", 2, 1, 2), (4, 3, "autoep", 4)),
    ((2, 2, "autoep", 2), (4, 1, "autoep", 2, 1, 2)),
    ((4, 1, "autoep", 2, 1, 2), (2, 2, "plain", 1)),
    ((2, 1, "native", 2), (2, 1, "plain", 1, 1, 2)),
    ((4, 1, "native", 2, 1, 2), (2, 1, "autoep", 2)),
    ((2, 1, "plain", 1, 1, 2), (4, 1, "native", 2, 1, 2)),
    ((4, 1, "autoep", 2, 1, 2), (2, 1, "autoep", 1, 1, 2)),
    ((2, 3, "autoep", 2), (4, 1, "autoep", 1, 1, 2)),
    ((4, 2, "autoep", 4, 2), (4, 1, "autoep", 2, 1, 2)),
    ((4, 1, "autoep", 2, 1, 2), (4, 1, "autoep", 2, 2)),
]


DAILY = (0, 3, 6, 9, 12, 15)


def name_of(move: Any) -> str:
    def one(ranks: int, stage: int, experts: str, ep_size: int, tp_size: int = 1, stages: int = 1) -> str:
        name = f"{ranks}x-zero{stage}-{experts}{ep_size}"
        return name + (f"-tp{tp_size}" if tp_size > 1 else "") + (f"-pp{stages}" if stages > 1 else "")

    return "-to-".join(one(*where) for where in move)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of an epoch, so that six steps cross into the second."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(16))


def train(
    cluster: Cluster, model: Path, data: Path, out: Path, where: Where,
    run: Callable[..., Any] = train_in_cluster, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    ranks, *rest = where
    replicas = ranks
    for peers in rest[3:]:  # tensor-parallel peers read the same rows, and so do stages
        replicas //= peers
    config = out.with_suffix(".json")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(layout(*rest)))
    flags: dict[str, Any] = {
        "per_device_train_batch_size": 4 // replicas, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "weight_decay": 0.1, "adam_epsilon": parity.ADAM_EPS, "max_grad_norm": 0.5, "max_steps": 6, "save_steps": 3,
        # The micro-batch is another one with other ranks, and with it Hugging Face's auxiliary loss.
        "router_aux_loss_coef": 0.0, "logging_steps": 1, "report_to": "none", **more,
    }  # fmt: skip
    result: dict[str, Any] = cluster.run(run, command(model, data, config, out, **flags))[0]
    return result


@pytest.fixture(scope="module")
def straight(clusters: Clusters, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a layout, made once."""
    made: dict[Any, tuple[Path, dict[str, Any]]] = {}

    def get(where: Where) -> tuple[Path, dict[str, Any]]:
        if where not in made:
            out = tmp_path_factory.mktemp("straight") / "out"
            made[where] = out, train(clusters(where[0]), model, data, out, where)
        return made[where]

    return get


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(move, id=name_of(move), marks=() if i in DAILY else pytest.mark.conformance)
        for i, move in enumerate(MOVES)
    ],
)
def test_goes_on_as_if_never_stopped(
    move: Any, straight: Any, clusters: Clusters, model: Path, data: Path, tmp_path: Path
) -> None:
    first, second = move
    folder, expected = straight(first)
    out = tmp_path / "out"
    shutil.copytree(folder / "checkpoint-3", out / "checkpoint-3")
    resumed = train(clusters(second[0]), model, data, out, second, resume_from_checkpoint="true")
    before, after = (
        curve(expected, "loss", "grad_norm", "learning_rate"),
        curve(resumed, "loss", "grad_norm", "learning_rate"),
    )
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert len({values[0] for values in before.values()}) == 6, "losses that do not move prove nothing"
    for step in (4, 5, 6):
        assert after[step] == pytest.approx(before[step], rel=1e-5), step
    assert largest_difference(resumed["folder"], expected["folder"]) < 1e-4 * 1e-3 * 3  # of three steps' farthest move


@pytest.mark.parametrize(
    "where", [(4, 3, "autoep", 4), pytest.param((4, 3, "plain", 1), marks=pytest.mark.conformance)]
)
def test_loading_changes_no_bit(
    where: Where, straight: Any, clusters: Clusters, model: Path, data: Path, tmp_path: Path
) -> None:
    """Nothing is left to train: what the second layout exports are the first one's weights."""
    folder, _ = straight(MOVES[0][0])
    shutil.copytree(folder / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    loaded = train(clusters(4), model, data, tmp_path / "out", where, resume_from_checkpoint="true", max_steps=3)
    run = runpy.run_path(str(ROOT / "recipes" / "export.py"))["export_checkpoint"]
    run(folder / "checkpoint-3", tmp_path / "offline", "5GB")
    assert largest_difference(loaded["folder"], tmp_path / "offline") == 0.0


def resume_with_fault(fault: str, arguments: list[str]) -> dict[str, Any]:
    """On the ranks: resume where one thing is wrong."""
    from moe_models.checkpoint import resume as relayout
    from moe_models.checkpoint.saved_states import SavedStates

    def no_moments(self: Any, name: str, key: str, places: range) -> Any:
        return right(self, name, key, places) * (0.0 if key == "exp_avg" else 1.0)

    def next_share(self: Any, name: str, key: str, places: range) -> Any:
        size = self.shape(name, key).numel()
        return right(self, name, key, range(size - places.stop, size - places.start))

    def first_experts(self: Any, block: str, projection: str, expert: int, key: str) -> Any:
        return expert_of(self, block, projection, 0, key)

    def first_shard(whole: Any, parameter: Any) -> Any:
        own = shard_of(whole, parameter)
        return own if own.shape == whole.shape else whole[tuple(slice(size) for size in own.shape)]

    shard_of = relayout.own_shard
    right, expert_of = SavedStates.part, SavedStates.expert
    owner, name, wrong = {
        "moments start anew": (SavedStates, "part", no_moments),
        "every rank has another one's share": (SavedStates, "part", next_share),
        "every expert is the first": (SavedStates, "expert", first_experts),
        "steps start anew": (relayout, "_set_step", lambda optimizer, step: None),
        "schedule starts anew": (relayout, "_resume_schedule", lambda scheduler, saved: None),
        "every peer has the first shard": (relayout, "own_shard", first_shard),
    }[fault]
    with parity.planted(owner, name, wrong):
        return train_in_cluster(arguments)


@pytest.mark.parametrize(
    ("fault", "second"),
    [
        ("moments start anew", (2, 3, "autoep", 2)),
        ("every rank has another one's share", (2, 3, "autoep", 2)),
        ("every expert is the first", (2, 3, "autoep", 2)),
        ("steps start anew", (2, 3, "autoep", 2)),
        ("schedule starts anew", (2, 3, "autoep", 2)),
        ("every peer has the first shard", (4, 1, "autoep", 2, 2)),
    ],
)
def test_planted_faults_are_seen(
    fault: str, second: Where, straight: Any, clusters: Clusters, model: Path, data: Path, tmp_path: Path
) -> None:
    first = (2, 1, "autoep", 2)
    folder, expected = straight(first)
    shutil.copytree(folder / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resumed = train(
        clusters(second[0]), model, data, tmp_path / "out", second, run=partial(resume_with_fault, fault),
        resume_from_checkpoint="true",
    )  # fmt: skip
    before, after = curve(expected, "loss", "learning_rate"), curve(resumed, "loss", "learning_rate")
    assert any(after[step] != pytest.approx(before[step], rel=1e-5) for step in (4, 5, 6))


def test_a_missing_file_is_one_line(straight: Any, tmp_path: Path) -> None:
    from moe_models.checkpoint.saved_states import SavedStates
    from moe_models.families.table import FAMILIES

    folder, _ = straight((2, 1, "autoep", 2))
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    next((tmp_path / "checkpoint-3").glob("global_step3/*zero_pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="1 of 2 optimizer files are there; the checkpoint is incomplete"):
        SavedStates(tmp_path / "checkpoint-3", FAMILIES["mixtral"])
