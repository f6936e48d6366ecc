"""recipes/finetune.py refuses layouts: in which words, with which exit code, and nothing read or written before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_models.families.table import FAMILIES
from tests.support.cluster import free_port
from tests.support.recipe import (
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
        f'model_type = "jamba": expert_parallel knows {", ".join(sorted(set(FAMILIES) - {"prmoe"}))}; '
        "for another MoE family add a row to moe_models/families/table.py, or remove expert_parallel "
        "(ds_configs/zero3.json)",
    ),
    "unknown family without expert parallelism": (
        {"expert_parallel": None}, 2, {"model_type": "llama"},
        f'model_type = "llama": known are {", ".join(sorted(FAMILIES))}; turn '
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
