"""Damaged model folders: recipes/finetune.py refuses each with one line and exit code 2, before a weight is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_reading import sharded
from tests.support.cluster import free_port
from tests.support.recipe import ROOT, ForkedRecipe, command, save_model, text_rows, write_jsonl

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
ABSENT = " weights are missing or incomplete ("
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(save_model(tmp_path_factory.mktemp("olmoe"), "olmoe", dtype="bfloat16"))


@pytest.fixture(scope="module")
def recipe() -> ForkedRecipe:
    return ForkedRecipe()


# ------------------------------------------------------------------------------------------------------------- damage


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the tensors that hold the projections of expert 3 in layer 0, in whichever files they are."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"format": "pt"})

    return apply


def of(tensors: dict[str, Any], part: str) -> list[str]:
    return [name for name in tensors if name.startswith("model.layers.0.") and part in name]


def without(*parts: str) -> Callable[[Path], None]:
    """Tensors are gone from the files and from the index."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for part in parts for name in of(tensors, part)]:
            del tensors[name]

    def apply(folder: Path) -> None:
        edit(change)(folder)
        index = json.loads((folder / INDEX).read_text())
        for name in [name for part in parts for name in of(index["weight_map"], part)]:
            del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def shorter(part: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in of(tensors, part):
            tensors[name] = tensors[name][:-1].clone()

    return edit(change)


def as_type(part: str, dtype: str) -> Callable[[Path], None]:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        for name in of(tensors, part):
            tensors[name] = tensors[name].to(getattr(torch, dtype))

    return edit(change)


def cut_short(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size // 2)


def empty(folder: Path) -> None:
    (folder / SECOND).write_bytes(b"")


def header_cut(folder: Path) -> None:
    os.truncate(folder / SECOND, 100)


def text(folder: Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


def gone(folder: Path) -> None:
    (folder / SECOND).unlink()


def all_gone(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def index_of_another(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file.replace("00003", "00009") for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def index_is_text(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def file_of_another(folder: Path) -> None:
    shutil.copyfile(folder / FIRST, folder / SECOND)


def folder_of_another(folder: Path) -> None:
    """config.json of this model, weights of another family."""
    from safetensors.torch import save_file

    all_gone(folder)
    from tests.support.tiny import make_model

    tensors = {f"gpt.{name}": tensor.clone() for name, tensor in make_model("mixtral").state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "file cut short": (cut_short, f"{SECOND}: cut short or damaged ("),
    "file cut in its header": (header_cut, f"{SECOND}: cut short or damaged (100 bytes; "),
    "file empty": (empty, f"{SECOND}: cut short or damaged (0 bytes; "),
    "file is text": (text, f"{SECOND}: cut short or damaged ("),
    "file gone": (gone, f"{INDEX}: names 1 files that are not there ({SECOND}); download or copy the model again"),
    "all files gone": (all_gone, "no file named model.safetensors"),
    "index of another": (index_of_another, f"{INDEX}: names 3 files that are not there ("),
    "index is text": (index_is_text, f"{INDEX}: not valid JSON"),
    "index without a map": (index_without_map, f"{INDEX}: has no weight_map that names a file for each tensor"),
    "file of another": (file_of_another, f"{SECOND}: lacks "),
    "folder of another": (folder_of_another, ABSENT),
    "expert's gate missing": (
        without("experts.3.gate_proj"),
        ": 1 weights of experts are missing or incomplete (model.layers.0.mlp.experts.3.gate_proj.weight is",
    ),
    "expert's gate and up missing": (
        without("experts.3.gate_proj", "experts.3.up_proj"), ": 2 weights of experts are missing or incomplete ("
    ),
    "expert's down missing": (
        without("experts.3.down_proj"), f"experts are missing or incomplete ({LAYER}mlp.experts.3.down_proj.weight"
    ),
    "last expert missing": (
        without("experts.7."), f": 2{ABSENT}{LAYER}mlp.experts.down_proj, model.layers.0"
    ),
    "dense weight missing": (without("q_proj"), f": 1{ABSENT}{LAYER}self_attn.q_proj"),
    "one gate too short": (
        shorter("experts.3.gate_proj"), "mlp.experts.3.gate_proj.weight is [47, 32], others are [48, 32])"
    ),
    "every gate too short": (
        shorter("gate_proj"), f": 1{ABSENT}{LAYER}mlp.experts.gate_up_proj)"
    ),
    "dense weight too short": (shorter("q_proj"), f": 1{ABSENT}{LAYER}self_attn.q_proj"),
    "expert in fp8": (as_type("experts.3.gate_proj", "float8_e4m3fn"), ": 1 weights are stored as F8_E4M3 ("),
    "dense weight in int8": (as_type("q_proj", "int8"), ": 1 weights are stored as I8 ("),
}  # fmt: skip


@pytest.mark.parametrize("preset", ["zero1_ep1", "zero3"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models_are_refused(name: str, preset: str, whole: Path, recipe: ForkedRecipe, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    damage(model)
    ended = run(recipe, model, preset, tmp_path)
    assert ended.code == 2, ended
    (line,) = ended.errors
    assert words in line, line
    assert str(model) in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["zero1_ep1", "zero3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_expert_of_another_float_type_is_cast(
    dtype: str, preset: str, whole: Path, recipe: ForkedRecipe, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    as_type("experts.3.gate_proj", dtype)(model)
    ended = run(recipe, model, preset, tmp_path)
    assert ended.code == 0, ended


def run(recipe: ForkedRecipe, model: Path, preset: str, tmp_path: Path) -> Any:
    ds_json = ROOT / "ds_configs" / f"{preset}.json"
    if preset == "zero1_ep1":
        ds = json.loads((ROOT / "ds_configs" / "zero1_ep2.json").read_text())
        ds["expert_parallel"]["autoep_size"] = 1
        ds_json = tmp_path / "zero1_ep1.json"
        ds_json.write_text(json.dumps(ds))
    data = write_jsonl(tmp_path / "train.jsonl", text_rows(8))
    words = command(model, data, ds_json, tmp_path / "out", max_steps=1, save_strategy="no", report_to="none")
    return recipe(
        words, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )  # fmt: skip
