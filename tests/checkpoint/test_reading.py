"""Each rank reads only what it keeps, and has what it has today.

"Today" is the ordinary way, by which every rank reads the whole model (``why_ordinary`` says so). Equal means the bits:
CRC-32 of every parameter, partition, buffer and fp32 master, and the next losses.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support import reading_memory
from tests.support.cluster import ChildError, Cluster, free_port
from tests.support.parity import daily, planted
from tests.support.recipe import (
    ROOT,
    SCRIPT,
    ForkedRecipe,
    command,
    launch,
    save_model,
    start_in_cluster,
    text_rows,
    word_tokenizer,
    write_jsonl,
)
from tests.support.tiny import TINY

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


def cut_from_the_first(right: Any, runs: Any, start: int, stop: int) -> Any:
    """A slice that forgets where a rank's experts begin; what joins tensors is as it should be."""
    if sys._getframe(1).f_code.co_name == "_slice":
        return right(runs, 0, stop - start)
    return right(runs, start, stop)


def two_steps(arguments: list[str], ordinary: bool, plant: str = "") -> dict[str, Any]:
    """Start as recipes/finetune.py does, and train two steps; ``plant`` is a fault."""
    arguments = [*arguments, "--output_dir", f"{arguments[0]}/{'today' if ordinary else 'own share' + plant}"]
    arguments = arguments[1:]
    from contextlib import nullcontext

    from moe_models.checkpoint import on_disk, reading

    way: Any = nullcontext()
    if ordinary:
        way = planted(reading, "why_ordinary", lambda *_, **__: "this test")
    elif plant == "the first experts":
        way = planted(on_disk, "cut", partial(cut_from_the_first, on_disk.cut))
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
            made[family] = sharded(save(tmp_path_factory.mktemp(family), family))
        return made[family]

    return get


def save(folder: Path, family: str) -> Path:
    """A tiny model of any family, in bf16."""
    if family != "prmoe":
        return save_model(folder, family, dtype="bfloat16", **MORE[family])
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)

    torch.manual_seed(0)
    config = AutoConfig.for_model("prmoe", **TINY["mixtral"] | MORE["prmoe"])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


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
    "qwen2_moe": {"norm_topk_prob": True},
    "qwen3_moe": {"tie_word_embeddings": True},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "prmoe": {"num_local_experts": [2, 4], "num_experts_per_tok": 1},
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


def test_a_rank_that_reads_the_experts_of_another_is_seen(models: Any, clusters: Clusters, tmp_path: Path) -> None:
    """Without the check of the conversion, which would end the run first."""
    words = [*flags(models, "mixtral", "zero1_ep2", {}, tmp_path), "--check_conversion", "none"]
    wrong, right = (clusters(2).run(two_steps, words, False, plant) for plant in ("the first experts", ""))
    differ = [
        {name for name in b["held"] if a["held"][name] != b["held"][name]} for a, b in zip(wrong, right, strict=True)
    ]
    assert not [name for name in differ[0] if ".experts." in name]
    assert [name for name in differ[1] if ".experts." in name]
    assert wrong[1]["losses"] != right[1]["losses"]


def test_what_nothing_reads_ends_the_run(models: Any, clusters: Clusters, tmp_path: Path) -> None:
    words = flags(models, "mixtral", "zero1_ep2", {}, tmp_path)
    with pytest.raises(ChildError, match=r"still on disk|never read"):
        clusters(2).run(two_steps, words, False, "left on disk")


# ------------------------------------------------------------------------------------------------------- host memory

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256,
}  # fmt: skip
LARGE = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_local_experts": 8}
"""154 MB; Mixtral's proportions, and an expert of half a megabyte."""
MOST = 1.3
"""What all ranks together may hold over their own, in multiples of the checkpoint, until the optimizer is built. One
copy of the experts is 1.0 of it; the rest is dense tensors, which every rank has, and one layer in the making."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """(a small one, a large one, bytes of the large one)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    reading_memory.write_checkpoint(folder / "small", **SMALL)
    size = reading_memory.write_checkpoint(folder / "large", **LARGE)
    return str(folder / "small"), str(folder / "large"), size


def held_by_all(clusters: Clusters, ranks: int, checkpoints: tuple[str, str, int], *rest: Any) -> float:
    """The sum of the ranks' peaks, which is no less than the peak of their sum, in multiples of the checkpoint."""
    small, large, size = checkpoints
    measured = clusters(ranks).run(reading_memory.measure, small, large, *rest)
    return float(sum(rank["bytes"] for rank in measured) / size)


IN_MEMORY: list[tuple[int, dict[str, Any]]] = [
    (2, {"stage": 1, "ep": 2}),
    (2, {"stage": 3, "ep": 2}),
    (2, {"stage": 3}),
    (2, {"stage": 1, "native": 2}),
    (2, {"stage": 2, "ep": 2}),
    (2, {"stage": 3, "zero": OFFLOAD}),
    (4, {"stage": 1, "ep": 4}),
    (4, {"stage": 3, "ep": 4}),
    (4, {"stage": 3}),
    (4, {"stage": 1, "native": 4}),
]


@pytest.mark.parametrize(("ranks", "layout"), daily(IN_MEMORY, {0, 1, 2, 3}), ids=str)
def test_all_ranks_together_hold_the_model_once(
    ranks: int, layout: dict[str, Any], clusters: Clusters, checkpoints: tuple[str, str, int]
) -> None:
    assert held_by_all(clusters, ranks, checkpoints, layout, False) < MOST


def test_the_ordinary_way_holds_it_once_for_each_rank(clusters: Clusters, checkpoints: tuple[str, str, int]) -> None:
    """Else the measurement above would see nothing."""
    assert held_by_all(clusters, 2, checkpoints, {"stage": 1, "ep": 2}, True) > 1.8


# --------------------------------------------------------------------------------------------- where it cannot be done

NVME = {"offload_param": {"device": "nvme", "nvme_path": "/nvme"}}


@pytest.mark.parametrize(
    ("zero", "why"),
    [
        ({"stage": 1}, None),
        ({"stage": 3}, None),
        ({"stage": 3, **OFFLOAD}, None),
        ({"stage": 3, **NVME}, 'zero_optimization.offload_param.device = "nvme"'),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size = 2"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights = True"),
        ({"stage": 3, "mics_shard_size": 2}, "zero_optimization.mics_shard_size = 2"),
    ],
)
def test_layouts_that_read_in_the_ordinary_way(zero: dict[str, Any], why: str | None, models: Any) -> None:
    from moe_models.checkpoint.reading import why_ordinary
    from tests.support.layouts import from_raw

    ds = from_raw({"zero_optimization": zero})
    assert why_ordinary(ds, str(models("mixtral"))) == why
    assert why_ordinary(ds, str(models("mixtral")), quantized=True) == "its weights are quantized (quantization_config)"


def alone(words: list[str], script: Path | None = None) -> Any:
    """The recipe as one rank, in a fork."""
    environment = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return ForkedRecipe(script or SCRIPT)(words, RANK="0", **environment)


def test_a_folder_of_pickles_is_read_with_a_warning(models: Any, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(models("mixtral"), pickled)
    tensors = {name: tensor for file in pickled.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.save(tensors, pickled / "pytorch_model.bin")
    for file in pickled.glob("model*"):
        file.unlink()
    _, *words = flags(lambda _: pickled, "mixtral", "zero3", {}, tmp_path)
    ended = alone(words)
    assert ended.code == 0, ended
    warning = (
        f"warning: {pickled}: each rank reads the whole model (1 x 0.00 GB of host memory here) instead of its own"
    )
    assert warning in ended.stderr
    assert "no safetensors files; model.save_pretrained writes them" in ended.stderr


# ------------------------------------------------------------------------------------------------ a disk that fails


def failing(folder: Path, rank: int, after: int) -> Path:
    """The recipe on a machine whose disk fails on one rank, when that has read ``after`` bytes."""
    script = folder / "finetune.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'recipes')!r}]\n"
        "from moe_models.checkpoint import on_disk\n"
        "right = os.preadv\n"
        "def preadv(*args):\n"
        f"    if os.environ['RANK'] == '{rank}' and on_disk.TALLY.bytes >= {after}:\n"
        "        raise OSError(5, 'Input/output error')\n"
        "    return right(*args)\n"
        "os.preadv = preadv\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return script


def dense_bytes(folder: Path) -> int:
    from moe_models.checkpoint.on_disk import LazyFile

    files = [LazyFile(path) for path in folder.glob("*.safetensors")]
    return sum(f.get_tensor(name).stored_bytes for f in files for name in f.keys() if ".experts." not in name)  # noqa: SIM118


@pytest.mark.parametrize(("preset", "moment"), [("zero3", "dense"), ("zero1_ep1", "dense"), ("zero1_ep1", "experts")])
def test_a_disk_that_fails_is_one_line(preset: str, moment: str, models: Any, tmp_path: Path) -> None:
    _, *words = flags(models, "mixtral", preset.replace("ep1", "ep2"), {}, tmp_path)
    if preset == "zero1_ep1":
        ds = json.loads((tmp_path / "ds.json").read_text())
        ds["expert_parallel"]["autoep_size"] = 1
        (tmp_path / "ds.json").write_text(json.dumps(ds))
    after = dense_bytes(models("mixtral")) if moment == "experts" else 100
    ended = alone(words, failing(tmp_path, 0, after))
    assert ended.code == 1, ended
    (line,) = ended.errors
    assert "cannot be read at byte" in line
    assert "Input/output error" in line
    assert ".safetensors" in line
    assert "Traceback" not in ended.stderr


@pytest.mark.conformance
@pytest.mark.parametrize("moment", ["dense", "experts"])
def test_a_disk_that_fails_on_one_rank_ends_all(moment: str, models: Any, tmp_path: Path) -> None:
    """The others wait in a collective; the rank that knows says so, and the launcher ends them."""
    _, *words = flags(models, "mixtral", "zero1_ep2", {}, tmp_path)
    after = dense_bytes(models("mixtral")) if moment == "experts" else 100
    ended = launch(words, tmp_path, script=failing(tmp_path, 1, after))
    assert ended.code == 1, ended
    (line,) = ended.errors
    assert "Input/output error" in line
    assert not list((tmp_path / "out").glob("model*"))


# ------------------------------------------------------------------------------------------------ the tensor on its own


def test_what_is_done_to_a_tensor_on_disk_is_done_to_its_values(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from moe_models.checkpoint.on_disk import TALLY, LazyFile, OnDisk

    values = {
        "a": torch.randn(6, 4, 5), "b": torch.randn(6, 4, 5), "m": torch.randn(7, 5).bfloat16(), "v": torch.randn(9),
        "s": torch.tensor(2.5), "i": torch.arange(12).reshape(3, 4), "none": torch.empty(0, 4),
        "flag": torch.ones(3) > 0,
    }  # fmt: skip
    save_file(values, tmp_path / "x.safetensors")
    file = LazyFile(tmp_path / "x.safetensors")
    lazy = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    operations: dict[str, Callable[[dict[str, Any]], Any]] = {
        "stack": lambda t: torch.stack([t["a"], t["b"]]),
        "cat 0": lambda t: torch.cat([t["a"], t["b"]]),
        "cat 1": lambda t: torch.cat([t["a"], t["b"]], dim=1),
        "cat -1": lambda t: torch.cat([t["a"], t["b"]], dim=-1),
        "cat of a part": lambda t: torch.cat([t["a"][2:5], t["b"][1:4]], dim=1)[1],
        "part of a stack": lambda t: torch.stack([t["m"], t["m"]])[1, 2:4],
        "chunk": lambda t: t["a"][3].chunk(2, dim=-2)[1],
        "split": lambda t: t["m"].split(3)[2],
        "cast": lambda t: t["m"].float()[3],
        "cast down": lambda t: t["a"].to(torch.bfloat16)[1:2],
        "all of it": lambda t: t["v"][...],
        "negative": lambda t: t["a"][-2][-3:],
    }
    before = TALLY.bytes
    kept = {name: operation(lazy) for name, operation in operations.items()}
    assert TALLY.bytes == before, "none of these needs values"
    for name, operation in operations.items():
        assert isinstance(kept[name], OnDisk), name
        assert torch.equal(kept[name].clone(), operation(values)), name
    read = {
        "columns": lambda t: t["a"][:, 1:3],
        "sum": lambda t: t["a"].sum() + t["s"],
        "product": lambda t: t["m"].t() @ t["m"],
        "transposed": lambda t: t["a"].transpose(1, 2).contiguous(),
        "integers": lambda t: t["i"] + 1,
        "empty": lambda t: t["none"].clone(),
        "flags": lambda t: t["flag"].clone(),
    }
    for name, operation in read.items():
        assert torch.equal(operation(lazy), operation(values)), name
    target = torch.zeros(3, 4, 5)
    target.copy_(lazy["a"][3:])
    assert torch.equal(target, values["a"][3:])
    with pytest.raises(RuntimeError, match="still on disk"):
        lazy["a"].add_(1)
    flat = torch.zeros(11, dtype=torch.bfloat16)
    lazy["m"].read_range(flat, 13)
    assert torch.equal(flat, values["m"].flatten()[13:24])


def test_only_the_bytes_that_are_needed_are_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from moe_models.checkpoint.on_disk import TALLY, LazyFile

    save_file({"x": torch.randn(8, 100)}, tmp_path / "x.safetensors")
    before = TALLY.bytes
    LazyFile(tmp_path / "x.safetensors").get_tensor("x")[2:4].clone()
    assert TALLY.bytes - before == 2 * 100 * 4


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    import os

    import torch
    from safetensors.torch import save_file

    from moe_models.checkpoint.on_disk import LazyFile, ReadError

    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(8, 100)}, path)
    tensor = LazyFile(path).get_tensor("x")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ReadError) as caught:
        tensor.clone()
    assert caught.value.problems[0].startswith(f"{path}: ends before its header says")


def test_a_tensor_that_no_layer_took_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from moe_models.checkpoint.on_disk import LazyFile
    from moe_models.checkpoint.reading import refuse_unread
    from moe_models.errors import RunError

    save_file({"x": torch.randn(4, 4)}, tmp_path / "x.safetensors")
    model = nn.Linear(4, 4, bias=False)
    refuse_unread(model)
    model.weight = nn.Parameter(LazyFile(tmp_path / "x.safetensors").get_tensor("x"))
    with pytest.raises(RunError, match=r"1 tensors of the model were never read \(weight\)"):
        refuse_unread(model)
