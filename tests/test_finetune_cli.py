"""What recipes/finetune.py refuses: in which words, with which exit code, and that nothing was read or written before.

The model folder of this page has a config.json and a tokenizer and no weights, so a refusal that came after reading
them would be another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.cluster import free_port
from tests.recipe import (
    ENVIRONMENT,
    ROOT,
    Ended,
    ForkedRecipe,
    command,
    launch,
    run_alone,
    save_model,
    text_rows,
    write_jsonl,
)

PRESETS = ROOT / "ds_configs"


@pytest.fixture(scope="module")
def recipe() -> ForkedRecipe:
    return ForkedRecipe()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(8))


def alone() -> dict[str, str]:
    """The environment of a run of one rank, which needs a port for its process group."""
    return {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def ds_json(folder: Path, preset: str = "zero1_ep2", **edits: Any) -> Path:
    """A copy of a preset with sections updated (a dict), replaced (anything else) or removed (None)."""
    config = json.loads((PRESETS / f"{preset}.json").read_text())
    for key, value in edits.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, dict):
            config[key] = {**config.get(key, {}), **value}
        else:
            config[key] = value
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


def with_config(model: Path, folder: Path, **edits: Any) -> Path:
    """A model folder that holds nothing but an edited config.json."""
    (folder / "edited").mkdir()
    config = {**json.loads((model / "config.json").read_text()), **edits}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "edited" / "config.json").write_text(json.dumps(config))
    return folder / "edited"


def refused(ended: Ended, output_dir: Path, *lines: str) -> None:
    """``ended`` said exactly ``lines`` (after ``error: ``), nothing else on stderr, and left nothing behind."""
    assert ended.errors == list(lines), ended
    assert ended.code == 2, ended
    assert "Traceback" not in ended.stdout + ended.stderr, ended
    assert not output_dir.exists(), ended


# ------------------------------------------------------------------------------------- layout: JSON, model, world size

LAYOUT_CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], str]] = {
    # name: (edits of zero1_ep2.json, world size, edits of config.json, the line)
    "experts are not divided": (
        {"expert_parallel": {"autoep_size": 8}}, 8, {},
        "expert_parallel.autoep_size = 8 does not divide the model's 4 experts; with 8 ranks use one of [1, 2, 4]",
    ),
    "ranks are not divided": (
        {}, 3, {},
        "expert_parallel.autoep_size = 2 does not divide the world size 3; use one of [1, 3], or start a multiple of 2 "
        "ranks",
    ),
    "misspelt key in expert_parallel": (
        {"expert_parallel": {"autoep_sizes": 2}}, 2, {},
        '{json}: expert_parallel.autoep_sizes = 2: unknown key; did you mean "autoep_size"?',
    ),
    "misspelt section": (
        {"zero_optimisation": {"stage": 1}}, 2, {},
        '{json}: zero_optimisation = {{"stage": 1}}: unknown key; did you mean "zero_optimization"?',
    ),
    "ZeRO-0": (
        {"zero_optimization": {"stage": 0}}, 2, {},
        "expert_parallel with zero_optimization.stage = 0: DeepSpeed 0.19.8 then clips with a wrong gradient norm "
        "(3.8% too low in fp32, without the experts in bf16); set stage to 1, 2 or 3",
    ),
    "dense model": (
        {}, 2, {"model_type": "llama", "num_local_experts": None},
        'expert_parallel with a dense model (model_type = "llama"): there are no experts to spread; make a MoE of it '
        "first (recipes/upcycle.py), or remove expert_parallel (ds_configs/zero3.json)",
    ),
    "unknown family": (
        {}, 2, {"model_type": "jamba"},
        'model_type = "jamba": expert_parallel knows deepseek_v2, deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3_moe; '
        "for another MoE family add a row to moe_models/families.py, or remove expert_parallel (ds_configs/zero3.json)",
    ),
    "unknown family without expert parallelism": (
        {"expert_parallel": None}, 2, {"model_type": "llama"},
        'model_type = "llama": known are deepseek_v2, deepseek_v3, mixtral, olmoe, prmoe, qwen2_moe, qwen3_moe; turn '
        "a dense model into one of them with recipes/upcycle.py",
    ),
    "unfilled auto": (
        {"expert_parallel": {"autoep_size": "auto"}}, 2, {},
        '{json}: expert_parallel.autoep_size = "auto": must be a whole number; remove the key for the default 1',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layout_is_refused(name: str, recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    edits, world_size, config, line = LAYOUT_CASES[name]
    source = with_config(model, tmp_path, **config) if config else model
    path, out = ds_json(tmp_path, **edits), tmp_path / "out"
    ended = recipe(command(source, data, path, out), RANK="0", WORLD_SIZE=str(world_size))
    refused(ended, out, line.format(json=path))


def test_malformed_json_is_refused_with_its_place(
    recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "ds.json", tmp_path / "out"
    path.write_text('{\n  "zero_optimization": {"stage": 1},\n  "bf16": {"enabled": tru}\n}\n')
    place = f"""{path}: not valid JSON: Expecting value at line 3, column 23: '"bf16": {{"enabled": tru}}'"""
    refused(recipe(command(model, data, path, out), WORLD_SIZE="2"), out, place)


@pytest.mark.parametrize(
    ("version", "said"),
    [("5.23.0", True), pytest.param("4.57.0", True, marks=pytest.mark.conformance), ("5.20.2", False)],
)
def test_transformers_versions_that_break_autoep(
    version: str, said: bool, model: Path, data: Path, tmp_path: Path
) -> None:
    """Metadata of another version, found before the installed one; imports still find the installed package."""
    metadata = tmp_path / "site" / f"transformers-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    out, path = tmp_path / "out", os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    ended = run_alone(
        command(model, data, PRESETS / "zero1_ep2.json", out, max_length=99), WORLD_SIZE="2", PYTHONPATH=path
    )
    lines = {
        "5.23.0": "transformers 5.23.0: AutoEP of deepspeed 0.19.8 fails there (_CanRecordRegistry.get() takes 2 "
        "positional arguments but 3 were given); install 5.17.0 or 5.20.2",
        "4.57.0": "transformers 4.57.0: expert_parallel needs the fused experts of 5.0 and later; install 5.17.0 or "
        "5.20.2",
    }
    too_long = "--max_length 99: longer than the model's context; use at most 64"
    refused(ended, out, *([lines[version]] if said else []), too_long)


# ----------------------------------------------------------------------------------------------------- files and flags


def test_missing_paths_are_all_named(recipe: ForkedRecipe, tmp_path: Path) -> None:
    here, out = tmp_path, tmp_path / "out"
    allowed = "allowed: a hub id, a folder, or a file ending in .txt, .jsonl, .json, .parquet"
    ended = recipe(command(here / "no/model", here / "no.jsonl", here / "no.json", out, eval_dataset=here / "no.txt"))
    refused(
        ended, out,
        f"{here}/no/model: no such folder; give a model folder or a hub id such as mistralai/Mixtral-8x7B-v0.1",
        f"{here}/no.json: no such file",
        f"data set {here}/no.jsonl: no such file or folder; {allowed}",
        f"data set {here}/no.txt: no such file or folder; {allowed}",
    )  # fmt: skip


def test_required_flags(recipe: ForkedRecipe, tmp_path: Path) -> None:
    names = ("model_name_or_path", "dataset_name", "deepspeed", "output_dir")
    refused(recipe([]), tmp_path / "out", *(f"--{name}: is required; see --help" for name in names))


def test_output_folder_that_holds_something(recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", PRESETS / "zero1_ep2.json"
    out.mkdir()
    (out / "notes").write_text("mine")
    ended = recipe(command(model, data, path, out), WORLD_SIZE="2")
    text = f"--output_dir {out}: not empty, and no checkpoint to go on from; give another folder, or remove it"
    assert (ended.code, ended.errors) == (2, [text]), ended
    ended = recipe(command(model, data, path, out, resume_from_checkpoint="true"), WORLD_SIZE="2")
    text = f"--output_dir {out}: nothing to resume from (no checkpoint-* in it); drop --resume_from_checkpoint"
    assert (ended.code, ended.errors) == (2, [f"{text} and remove that folder"]), ended
    (out / "checkpoint-3").mkdir()
    (out / "checkpoint-3" / "trainer_state.json").write_text("{}")
    ended = recipe(command(model, data, path, out), WORLD_SIZE="2")
    text = f"--output_dir {out}: not empty; give another folder, or go on from it with --resume_from_checkpoint true"
    assert (ended.code, ended.errors) == (2, [text]), ended
    assert sorted(p.name for p in out.rglob("*")) == ["checkpoint-3", "notes", "trainer_state.json"]


def test_nothing_to_resume(recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", PRESETS / "zero1_ep2.json"
    for value, line in (
        ("true", f"--output_dir {out}: nothing to resume from (no checkpoint-* in it); drop --resume_from_checkpoint"),
        (f"{out}/checkpoint-9", f"--resume_from_checkpoint {out}/checkpoint-9: no such checkpoint folder"),
        (
            f"{tmp_path}",
            f"--resume_from_checkpoint {tmp_path}: no trainer_state.json in it; give a checkpoint-N folder",
        ),
    ):
        ended = recipe(command(model, data, path, out, resume_from_checkpoint=value), WORLD_SIZE="2")
        refused(ended, out, line)


FLAG_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # name: (flags, the beginning of every line)
    "unknown flag": ({"learning_rat": 1}, ["--learning_rat: no such flag; see --help"]),
    "abbreviation": ({"model_name": "x"}, ["--model_name: no such flag; see --help"]),
    "YAML beside the JSON": ({"config": "x.yaml"}, ["--config: no such flag; see --help"]),
    "bad choice": ({"lr_scheduler_type": "nope"}, ["--lr_scheduler_type: invalid choice: 'nope' (choose from "]),
    "bad number": ({"max_steps": "many"}, ["--max_steps: invalid int value: 'many'"]),
    "several bad values": (
        {"max_steps": "many", "seed": "x", "bf16": "perhaps", "typo": 1},
        [
            "--max_steps: invalid int value: 'many'",
            "--seed: invalid int value: 'x'",
            "--bf16: Truthy value expected: got perhaps",
            "--typo: no such flag; see --help",
        ],
    ),
    "beyond the context": (
        {"max_length": 65}, ["--max_length 65: longer than the model's context; use at most 64"],
    ),
    "adapters": (
        {"use_peft": True},
        ["--use_peft, --load_in_4bit, --load_in_8bit: not supported; all weights are trained whole"],
    ),
    "remote code": (
        {"trust_remote_code": True},
        ["--trust_remote_code: not supported; every family of this recipe is part of transformers or of this package"],
    ),
    "shard size": (
        {"export_max_shard_size": "5 apples"},
        ["--export_max_shard_size '5 apples' is not a size; write it as 5GB, 500MB or 2GiB"],
    ),
    "stream of unknown length": (
        {"dataset_streaming": True},
        ["--dataset_streaming: the number of rows is not known then; set --max_steps"],
    ),
    "beside sequence parallelism": (
        {
            "deepspeed": PRESETS / "zero1_ep2_sp2.json", "packing": True, "attn_implementation": "eager",
            "label_smoothing_factor": 0.1, "dataset_streaming": True, "max_steps": 3,
        },
        [
            "--packing, --padding_free with sequence_parallel_size = 2: a row of several documents would attend",
            "--attn_implementation eager: not with sequence_parallel_size = 2; use sdpa or flash attention",
            "--label_smoothing_factor 0.1: not with sequence_parallel_size = 2; drop it",
            "--dataset_streaming: with tensor or sequence parallelism accelerate would give all ranks the same rows",
        ],
    ),
    "a compiler for the whole model": (
        {"torch_compile_backend": "aot_eager", "report_to": "none"},
        ["--torch_compile with expert_parallel: the experts' grouped product cannot be traced"],
    ),
    "an auxiliary loss without gradient": (
        {"gradient_checkpointing_kwargs": '{"use_reentrant": true}', "report_to": "none"},
        ['--gradient_checkpointing_kwargs {{"use_reentrant": true}}: the auxiliary loss would have no gradient'],
    ),
    "precision beside the JSON": (
        {"fp16": True},
        ["--fp16: the precision of {json} is bf16; set fp16.enabled to true or \"auto\" there, or drop --fp16"],
    ),
}  # fmt: skip
PRECISIONS = {
    # sections of the JSON, flags, what is said; the model has no weights, which is said when all else is in order
    "fp16 in both": ({"fp16": {"enabled": "auto"}}, {"fp16": True}, "no file named model.safetensors"),
    "a flag for each": (
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, {"fp16": True, "bf16": True},
        "--bf16 and --fp16: a run has one precision; drop one of them",
    ),
    "no section for the flag": (
        {"bf16": {"enabled": "auto"}}, {"fp16": True},
        '--fp16: {json} has no fp16 section; add "fp16": {{"enabled": "auto"}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_of_the_flags(name: str, recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    sections, flags, words = PRECISIONS[name]
    path, out = ds_json(tmp_path, expert_parallel=None, **{"bf16": None, **sections}), tmp_path / "out"
    ended = recipe(command(model, data, path, out, max_steps=1, report_to="none", **flags), **alone())
    assert len(ended.errors) == 1, ended
    assert words.format(json=path) in ended.errors[0]
    assert ('fp16.enabled "auto" -> false' in ended.stdout) == (name == "fp16 in both")


@pytest.mark.parametrize("name", FLAG_CASES)
def test_flags_are_refused(name: str, recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    flags, beginnings = FLAG_CASES[name]
    out, path = tmp_path / "out", PRESETS / "zero1_ep2.json"
    ended = recipe(command(model, data, path, out, **flags), WORLD_SIZE="2")
    assert len(ended.errors) == len(beginnings), ended
    for line, beginning in zip(ended.errors, beginnings, strict=True):
        assert line.startswith(beginning.format(json=path)), ended
    refused(ended, out, *ended.errors)


def test_flags_with_an_equals_sign_and_hyphens_are_understood(
    recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        f"--model-name-or-path={model}", f"--dataset_name={data}", f"--deepspeed={PRESETS / 'zero1_ep2.json'}",
        f"--output-dir={out}", "--max_length=65",
    ]  # fmt: skip
    ended = recipe(arguments, WORLD_SIZE="2")
    refused(ended, out, "--max_length 65: longer than the model's context; use at most 64")


def test_numbers_that_differ_between_json_and_flags(
    recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path
) -> None:
    path = ds_json(
        tmp_path, expert_parallel=None, optimizer={"params": {"lr": 0.5, "weight_decay": 0.25}}, gradient_clipping=3.0
    )
    out = tmp_path / "out"
    flags = {"learning_rate": 1e-4, "weight_decay": 0.25}
    ended = recipe(command(model, data, path, out, **flags), **alone())
    mend = 'make them equal, or write "auto"'
    refused(
        ended, out,
        f"{path}: ds gradient_clipping=3.0 vs hf max_grad_norm=1.0; {mend}",
        f"{path}: ds optimizer.params.lr=0.5 vs hf learning_rate=0.0001; {mend}",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the data itself


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
    # Under ZeRO-3 transformers raises by itself where shapes differ, and names them too.
    by_transformers = preset == "zero3" and damage is drop_an_expert
    assert ("size mismatch for" if by_transformers else "; give the whole model") in ended.errors[0], ended
    refused(ended, out, *ended.errors)


# ---------------------------------------------------------------------------------- how it says so, and how soon


def test_all_problems_at_once_and_paths_at_once(model: Path, tmp_path: Path) -> None:
    """Every kind of problem together; what concerns paths is on the screen before the heavy imports begin."""
    path, out = ds_json(tmp_path, expert_parallel={"autoep_size": 8}), tmp_path / "out"
    arguments = command(model, tmp_path / "no.jsonl", path, out, typo=1, optim="nope", max_length=99)
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "finetune.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "6"},
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    after_first = time.monotonic() - begun
    stdout, rest = process.communicate(timeout=90)
    after_all = time.monotonic() - begun
    ended = Ended(process.returncode, stdout, first + rest)
    assert len(ended.errors) == 6, ended
    for line, part in zip(
        ended.errors,
        (
            "no.jsonl: no such file or folder",
            "--optim: invalid choice: 'nope'",
            "--typo: no such flag",
            "autoep_size = 8 does not divide the world size 6",
            "autoep_size = 8 does not divide the model's 4 experts; with 6 ranks use one of [1, 2]",
            "--max_length 99: longer than",
        ),
        strict=True,
    ):
        assert part in line, ended
    refused(ended, out, *ended.errors)
    assert after_first < after_all / 2, (after_first, after_all)


def test_help_names_our_flags_and_writes_nothing(recipe: ForkedRecipe) -> None:
    ended = recipe(["--help"])
    assert ended.code == 0, ended
    for flag in ("--eval_dataset", "--export_max_shard_size", "--learning_rate", "--attn_implementation"):
        assert flag in ended.stdout, ended
    assert ended.stderr == ""


def test_under_the_launcher_rank_0_speaks_alone(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(command(model, data, PRESETS / "zero1_ep4.json", out), tmp_path)
    line = "expert_parallel.autoep_size = 4 does not divide the world size 2; use one of [1, 2], or start a multiple"
    assert len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(line), ended
    refused(ended, out, *ended.errors)
