"""Each rank reads only what it keeps, and has what it has today.

"Today" is the ordinary way, by which every rank reads the whole model (``why_ordinary`` says so). Equal means the bits:
CRC-32 of every parameter, partition, buffer and fp32 master, and the next losses.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.cluster import Cluster
from tests.support.parity import daily, planted
from tests.support.recipe import ROOT, command, save_model, start_in_cluster, text_rows, write_jsonl

Clusters = Callable[[int], Cluster]


# ------------------------------------------------------------------------------------------------------ on each rank


def crc(tensor: Any) -> list[Any]:
    """dtype, shape and checksum."""
    import torch

    values = tensor.detach().cpu().contiguous().view(-1)
    checksum = zlib.crc32(values.view(torch.uint8).numpy()) if values.numel() else 0
    return [str(tensor.dtype), list(tensor.shape), checksum]


def fingerprints(engine: Any) -> dict[str, list[Any]]:
    """Everything that this rank of an engine holds of the model."""
    found = {}
    for name, tensor in [*engine.module.named_parameters(), *engine.module.named_buffers()]:
        held = tensor
        if hasattr(tensor, "ds_tensor"):
            # What follows the end of the tensor in the last partition is not defined.
            start = tensor.ds_tensor.ds_numel * tensor.ds_process_group.rank()
            held = tensor.ds_tensor[: max(0, min(tensor.ds_tensor.ds_numel, tensor.ds_numel - start))]
            found[f"{name} whole"] = [list(tensor.ds_shape)]
        found[name] = [*crc(held), tensor.requires_grad]
    for masters in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for group, flat in enumerate(getattr(engine.optimizer, masters, [])):
            found[f"{masters} {group}"] = crc(flat)
    return found


class AtTheStart(TrainerCallback):  # type: ignore[misc]
    """Takes the fingerprints before the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.found: dict[str, list[Any]] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.found = fingerprints(self.trainer.model_wrapped)


def two_steps(arguments: list[str], ordinary: bool, plant: str = "") -> dict[str, Any]:
    """Start as recipes/finetune.py does, and train two steps; ``plant`` is a fault."""
    arguments = [*arguments, "--output_dir", f"{arguments[0]}/{'today' if ordinary else 'own share' + plant}"]
    arguments = arguments[1:]
    from contextlib import nullcontext

    from moe_models.checkpoint import on_disk, reading

    way: Any = nullcontext()
    if ordinary:
        way = planted(reading, "why_ordinary", lambda *_, **__: "this test")
    elif plant == "one value later":
        right = on_disk.Run.part
        way = planted(on_disk.Run, "part", lambda run, start, stop: right(run, start + (stop < run.count), stop))
    elif plant == "left on disk":
        way = planted(reading, "read_dense", lambda *_: None)
    with way:
        trainer, *_ = start_in_cluster(arguments)
        unread = len(reading.unread_tensors(trainer.model))
        start = AtTheStart(trainer)
        trainer.add_callback(start)
        trainer.train()
    losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    trainer.model_wrapped.destroy()
    return {"held": start.found, "losses": losses, "unread": unread}


# --------------------------------------------------------------------------------------- equal to the ordinary way


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each family, in bf16 (so that reading casts) and in three files."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = sharded(
                save_model(tmp_path_factory.mktemp(family), family, dtype="bfloat16", **MORE[family])
            )
        return made[family]

    return get


def sharded(folder: Path) -> Path:
    """The same folder with its weights in several files and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{k + 1:05d}-of-00003.safetensors": names[k::3] for k in range(3)}  # an expert's in all of them
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, inside in files.items() for name in inside}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


MORE: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"tie_word_embeddings": True},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "prmoe": {},
}
OFFLOAD = {"offload_param": {"device": "cpu"}}

CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("mixtral", "zero1_ep2", 2, {}),
    ("mixtral", "zero3_ep2", 2, {}),
    ("qwen3_moe", "zero3", 2, {}),
    ("qwen2_moe", "zero1_ep2_native", 2, {}),
    ("mixtral", "zero2_ep2", 2, {}),
    ("mixtral", "zero3", 2, OFFLOAD),
    ("mixtral", "zero3_ep2", 2, OFFLOAD),
    ("mixtral", "zero1_ep2", 4, {}),
    ("mixtral", "zero1_ep4", 4, {}),
    ("mixtral", "zero3_ep2", 4, {}),
    ("mixtral", "zero3_ep4", 4, {}),
    ("mixtral", "zero3", 4, {}),
    ("mixtral", "zero1_ep4_native", 4, {}),
    ("mixtral", "zero1_ep2_tp2", 4, {}),
    ("mixtral", "zero1_ep2_sp2", 4, {}),
    *(
        (family, preset, 2, {})
        for family in MORE
        if family != "prmoe"
        for preset in ("zero1_ep2", "zero3_ep2", "zero3")
    ),
    *((family, "zero1_ep2_native", 2, {}) for family in ("mixtral", "qwen2_moe", "prmoe")),
]
CASES = [case for place, case in enumerate(CASES) if case not in CASES[:place]]


def flags(models: Callable[[str], Path], family: str, preset: str, zero: dict[str, Any], tmp_path: Path) -> list[str]:
    ds = json.loads((ROOT / "ds_configs" / f"{preset}.json").read_text())
    ds["zero_optimization"].update(zero)
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    data = write_jsonl(tmp_path / "train.jsonl", text_rows(32))
    more = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-3}
    words = command(models(family), data, tmp_path / "ds.json", tmp_path / "out", **more)
    return [str(tmp_path), *words]  # two_steps puts its output below the first


@pytest.mark.parametrize(("family", "preset", "ranks", "zero"), daily(CASES, {0, 1, 2, 3}))
def test_every_rank_has_what_it_has_when_it_reads_everything(
    family: str, preset: str, ranks: int, zero: dict[str, Any], models: Any, clusters: Clusters, tmp_path: Path
) -> None:
    words = flags(models, family, preset, zero, tmp_path)
    ours = clusters(ranks).run(two_steps, words, False)
    today = clusters(ranks).run(two_steps, words, True)
    for rank, (new, old) in enumerate(zip(ours, today, strict=True)):
        assert new["held"].keys() == old["held"].keys()
        wrong = [name for name in old["held"] if new["held"][name] != old["held"][name]]
        assert wrong == [], f"rank {rank}"
        assert new["losses"] == old["losses"]
        assert len(old["losses"]) == 2
        spread = "ep" in preset and "native" not in preset
        assert bool(new["unread"]) == spread, "experts stay on disk until AutoEP takes them"
        assert old["unread"] == 0


def test_a_rank_that_reads_one_value_too_late_is_seen(models: Any, clusters: Clusters, tmp_path: Path) -> None:
    words = flags(models, "mixtral", "zero1_ep2", {}, tmp_path)
    wrong, right = (clusters(2).run(two_steps, words, False, plant)[0] for plant in ("one value later", ""))
    assert any(wrong["held"][name] != right["held"][name] for name in right["held"])
