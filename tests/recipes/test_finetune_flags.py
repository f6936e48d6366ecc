"""recipes/finetune.py: flags, paths and the numbers that flags and JSON share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import test_finetune_cli
from tests.recipes.test_finetune_cli import PRESETS, alone, ds_json, refused
from tests.support.recipe import ForkedRecipe, command

data = test_finetune_cli.data
model = test_finetune_cli.model
recipe = test_finetune_cli.recipe


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


def test_a_model_that_is_not_there_says_nothing_of_kernels(recipe: ForkedRecipe, data: Path, tmp_path: Path) -> None:
    where, out = tmp_path / "no/model", tmp_path / "out"
    ended = recipe(command(where, data, PRESETS / "zero1_ep2.json", out, use_liger_kernel=True), WORLD_SIZE="2")
    refused(
        ended, out,
        f"{where}: no such folder; give a model folder or a hub id such as mistralai/Mixtral-8x7B-v0.1",
        "--use_liger_kernel: Liger's kernels need a GPU; drop it",
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
    "no YAML file": (
        {"config": "x.yaml"},
        ["--config x.yaml: no such file; give a YAML file with one `flag: value` on each line"],
    ),
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
    "quantised weights": (
        {"load_in_4bit": True},
        ["--load_in_4bit, --load_in_8bit: not supported; weights are held in the precision of the JSON"],
    ),
    "adapters": (
        {"use_peft": True, "lora_dropout": 0.1, "use_dora": True, "lora_r": 0},
        [
            "--lora_r 0: must be 1 or more",
            "--use_dora: not built for spread experts; drop it",
            "--lora_dropout 0.1: PEFT has no dropout for experts; set it to 0, or name modules only (",
        ],
    ),
    "flags of adapters without them": (
        {"lora_target_modules": "q_proj", "export_merged": True},
        [
            "--lora_target_modules: does nothing without --use_peft; add the flag, or drop this one",
            "--export_merged: does nothing without --use_peft; add the flag, or drop this one",
        ],
    ),
    "transformers' checkpoint on SIGTERM": (
        {"enable_jit_checkpoint": True},
        [
            "--enable_jit_checkpoint: each rank would stop at a step of its own; drop it, SIGTERM and SIGUSR1 save the "
            "step without it"
        ],
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
    "Liger without a GPU": (
        {"use_liger_kernel": True, "report_to": "none"},
        ["--use_liger_kernel: Liger's kernels need a GPU; drop it"],
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


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_does_not_wait_for_data(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_models.engine import cpu
    from tests.bench.test_bench import recipe as module

    command_line = module("command_line")
    monkeypatch.setattr(cpu, "on_cpu", lambda: not gpu)
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--bf16", "false"]
    parser, given, problems = command_line.parse_flags(words, "", command_line.FROM_CHECKPOINT)
    assert problems == []
    args = parser.parse_dict(vars(given))[2]
    assert args.dataloader_num_workers == (2 if gpu else 0)
    assert args.accelerator_config.non_blocking is gpu
    if gpu:
        words += ["--dataloader_num_workers", "5"]
        assert command_line.parse_flags(words, "", command_line.FROM_CHECKPOINT)[1].dataloader_num_workers == 5
