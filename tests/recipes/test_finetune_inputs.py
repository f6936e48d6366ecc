"""recipes/finetune.py refuses bad data and model folders before it reads a weight."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes import test_finetune_cli
from tests.recipes.test_finetune_cli import PRESETS, alone, ds_json, refused
from tests.support import parity
from tests.support.recipe import (
    ForkedRecipe,
    command,
    save_model,
    write_jsonl,
)

data = test_finetune_cli.data
model = test_finetune_cli.model
recipe = test_finetune_cli.recipe


def bad_data(folder: Path) -> dict[str, tuple[Path, str]]:
    """name -> (file, the line about it)."""
    (folder / "empty.jsonl").write_text("")
    (folder / "none.json").write_text("[]")
    (folder / "cut.jsonl").write_text('{"text": "w5 w6"}\n{"text": "w7 \n')
    (folder / "not.parquet").write_bytes(b"PAR0" + bytes(64))
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "table.csv").write_text("text\nw5\n")
    (folder / "folder").mkdir()
    columns = write_jsonl(folder / "columns.jsonl", [{"question": "w5", "answer": "w6"}])
    null = write_jsonl(folder / "null.jsonl", [{"text": "w5"}, {"text": None}, {"text": None}])
    numbers = write_jsonl(folder / "numbers.jsonl", [{"text": 5}])
    allowed = "allowed: a hub id, a folder, or a file ending in .txt, .jsonl, .json, .parquet"
    train = "split 'train'"
    return {
        "empty file": (folder / "empty.jsonl", f"data set {folder}/empty.jsonl: the file is empty; {allowed}"),
        "empty folder": (folder / "folder", f"data set {folder}/folder: the folder is empty; {allowed}"),
        "ending": (folder / "table.csv", f'data set {folder}/table.csv: unknown ending ".csv"; {allowed}'),
        "no rows": (
            folder / "none.json", f"data set {folder}/none.json, {train}: has no rows; give one with at least one row"
        ),
        "half a record": (folder / "cut.jsonl", f"data set {folder}/cut.jsonl, {train}: cannot be read (JSON parse"),
        "not parquet": (folder / "not.parquet", f"data set {folder}/not.parquet, {train}: cannot be read (Parquet"),
        "not UTF-8": (folder / "latin.txt", f"data set {folder}/latin.txt, {train}: cannot be read ('utf-8' codec"),
        "columns": (
            columns,
            f"data set {columns}: has columns question, answer; one of these is needed: text: text; messages (chat): "
            "messages; prompt and completion: prompt, completion; already tokenised: input_ids",
        ),
        "null": (null, f"data set {null}, {train}: text is null in 2 of 3 rows; remove them"),
        "numbers": (numbers, f"data set {numbers}, {train}: text holds int64; it must be text"),
    }  # fmt: skip


BAD_DATA = [
    "empty file", "empty folder", "ending", "no rows", "half a record", "not parquet", "not UTF-8", "columns", "null",
    "numbers",
]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "name"),
    parity.daily([(flag, name) for flag in ("dataset_name", "eval_dataset") for name in BAD_DATA], {*range(10), 13}),
)
def test_data_is_refused(name: str, flag: str, recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    cases = bad_data(tmp_path)
    assert sorted(cases) == sorted(BAD_DATA)
    path, line = cases[name]
    out = tmp_path / "out"
    ended = recipe(command(model, data, PRESETS / "zero3.json", out, **{flag: path}), **alone())
    assert len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(line), ended
    refused(ended, out, *ended.errors)


@pytest.mark.parametrize(
    ("flags", "split", "has"),
    [
        ({"dataset_train_split": "all"}, "all", "'train'"),
        # Evaluating on a split of a file that has none would silently be evaluating on the training data.
        ({"eval_strategy": "epoch"}, "test", "'train'"),
    ],
)
def test_missing_split(
    flags: dict[str, str], split: str, has: str, recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = recipe(command(model, data, PRESETS / "zero3.json", out, **flags), **alone())
    refused(ended, out, f"data set {data}, split {split!r}: no such split; it has {has}")


def test_conversations_need_a_chat_template(recipe: ForkedRecipe, model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    plain, out = tmp_path / "plain", tmp_path / "out"
    subprocess.run(["cp", "-r", str(model), str(plain)], check=True)
    (plain / "chat_template.jinja").unlink()
    ended = recipe(command(plain, chat, PRESETS / "zero3.json", out), **alone())
    refused(
        ended, out,
        f"{plain}: the data set holds conversations, and the tokenizer has no chat template; give one with "
        "--chat_template_path (a file, or a model folder whose tokenizer has one), or use data with `text`",
    )  # fmt: skip


def test_assistant_only_loss_needs_conversations(recipe: ForkedRecipe, data: Path, tmp_path: Path) -> None:
    source, out = save_model(tmp_path / "whole"), tmp_path / "out"
    arguments = command(source, data, PRESETS / "zero3.json", out, assistant_only_loss=True)
    ended = recipe(arguments, **alone())
    refused(
        ended, out,
        "You set `assistant_only_loss=True`, but the dataset is not conversational. This option is only supported for "
        "conversational datasets.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- the model folder


def test_folder_without_weights(recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = recipe(command(model, data, PRESETS / "zero3.json", out), **alone())
    assert len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(f"{model}: Error no file named model.safetensors"), ended
    refused(ended, out, *ended.errors)


def drop_an_expert(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.block_sparse_moe.experts.3" not in name}
    assert len(kept) == len(tensors) - 3
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def keep_one_rank(folder: Path) -> None:
    """What HF's own save_model leaves behind under AutoEP: rank 0's experts, under names that HF does not know."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in (0, 1):
        for w in ("w1", "w2", "w3"):
            old = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{w}.weight"
            kept[f"model.layers.{layer}.mlp.experts.{w}"] = torch.stack([tensors[old.format(e)] for e in (0, 1)])
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [drop_an_expert, keep_one_rank])
@pytest.mark.parametrize("preset", ["zero2_ep2", "zero3"])
def test_folder_that_lacks_experts(
    damage: Callable[[Path], None], preset: str, recipe: ForkedRecipe, data: Path, tmp_path: Path
) -> None:
    """transformers fills what is missing with random numbers and a warning; training on those is never meant."""
    source, out = save_model(tmp_path / "whole"), tmp_path / "out"
    damage(source)
    path = ds_json(tmp_path, preset, **({} if preset == "zero3" else {"expert_parallel": {"autoep_size": 1}}))
    ended = recipe(command(source, data, path, out), **alone())
    assert len(ended.errors) == 1, ended
    assert "model.layers.1.mlp.experts" in ended.errors[0], ended
    assert "; give the whole model" in ended.errors[0], ended
    refused(ended, out, *ended.errors)
