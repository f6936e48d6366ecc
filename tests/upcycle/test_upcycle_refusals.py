"""Upcycling refused: spoiled checkpoints, wrong options, no room; all at once, and nothing written. And the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_models.checkpoint.hf_folder import HFFolderWriter
from moe_models.errors import UserError
from moe_models.upcycle.upcycle import _parse_size, upcycle
from tests.support.parity import planted
from tests.upcycle import test_upcycle
from tests.upcycle.test_upcycle import ROOT, load, tensors

dense = test_upcycle.dense


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(dense: Path) -> None:
        file = dense / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(dense: Path) -> None:
        file = dense / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, {"format": "pt"})

    return edit


def name_a_missing_shard(dense: Path) -> None:
    (dense / "model.safetensors").rename(dense / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(dense: Path) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SPOILED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "is missing"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json", "is not JSON"]),
    "config of another kind": (edit_config(num_attention_heads="many"), ["config.json", "transformers refuses it"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["has no model.safetensors", "save_pretrained"]),
    "missing shard": (name_a_missing_shard, ["model-00002-of-00002.safetensors", "is missing", "index.json"]),
    "broken index": (
        lambda d: [(d / "model.safetensors").unlink(), (d / "model.safetensors.index.json").write_text("{}")],
        ["index.json", "weight_map"],
    ),
    "truncated": (truncate, ["model.safetensors", "cannot be read"]),
    "missing tensor": (edit_tensors(lambda s: s.pop(UP)), ["lacks 1 tensors", UP]),
    "extra tensor": (
        edit_tensors(lambda s: s.update({"model.extra": torch.ones(2)})),
        ["does not know", "model.extra"],
    ),
    "wrong shape": (edit_tensors(lambda s: s.update({NORM: torch.ones(31)})), [NORM, "(31,)", "(32,)"]),
    "int8 weights": (
        edit_tensors(lambda s: s.update({NORM: torch.ones(32).char()})),
        [NORM, "I8", "BF16", "dequantize"],
    ),
    "unknown family": (edit_config(model_type="gemma2"), ["model_type='gemma2'", "llama, mistral, qwen2, qwen3"]),
    "already a MoE": (edit_config(model_type="mixtral"), ["model_type='mixtral'", "llama"]),
    "mlp bias": (edit_config(mlp_bias=True), ["mlp_bias=true", "must be false"]),
    "attention bias": (edit_config(attention_bias=True), ["attention_bias=true", "o_proj"]),
    "activation": (edit_config(hidden_act="gelu"), ["hidden_act='gelu'", "must be 'silu'"]),
    "layer types": (
        edit_config(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        ["layer_types", "sliding"],
    ),
    "sliding": (edit_config(use_sliding_window=True), ["use_sliding_window=true", "must be false"]),
    "quantized": (edit_config(quantization_config={"quant_method": "fp8"}), ["quantization_config", "dequantize"]),
    "own code": (edit_config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}), ["auto_map", "stock classes"]),
}


def nothing_was_written(folder: Path) -> bool:
    """No output, and no scratch folder left beside it."""
    return {path.name for path in folder.iterdir()} <= {"dense"}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoints_are_refused(tmp_path: Path, dense: Path, name: str) -> None:
    spoil, words = SPOILED[name]
    spoil(dense)
    with pytest.raises(UserError) as caught:
        upcycle(dense, tmp_path / "moe")
    assert any(all(word in problem for word in words) for problem in caught.value.problems), caught.value.problems
    assert all("\n" not in problem for problem in caught.value.problems)
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 1}, ["num_experts=1", "2 or more"]),
        ({"num_experts": 4, "num_experts_per_tok": 5}, ["num_experts_per_tok=5", "1 to num_experts=4"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0"]),
        ({"router_init": "ones"}, ["router_init='ones'", "normal, zeros"]),
        ({"noise": -0.1}, ["noise=-0.1", "0 to 1"]),
        ({"noise": float("nan")}, ["noise=nan"]),
        ({"max_shard_size": "big"}, ["max_shard_size='big'", "5GB"]),
        ({"max_shard_size": 0}, ["max_shard_size=0"]),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, dense: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        upcycle(dense, tmp_path / "moe", **options)
    (problem,) = caught.value.problems
    assert all(word in problem for word in words), problem
    assert nothing_was_written(tmp_path)


def test_all_problems_come_at_once(tmp_path: Path, dense: Path) -> None:
    edit_config(hidden_act="gelu", mlp_bias=True)(dense)
    edit_tensors(lambda state: state.pop(NORM))(dense)
    (tmp_path / "moe").write_text("a file")
    with pytest.raises(UserError) as caught:
        upcycle(dense, tmp_path / "moe", num_experts=0, noise=2.0)
    text = str(caught.value)
    assert all(w in text for w in ("hidden_act", "mlp_bias", "lacks", "num_experts=0", "noise=2.0", "output_dir="))


def test_missing_dense_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        upcycle(tmp_path / "dense", tmp_path / "moe")


def test_output_folder(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "moe").mkdir()
    upcycle(dense, tmp_path / "moe", num_experts=2)  # an empty folder is fine
    before = tensors(tmp_path / "moe")
    with pytest.raises(UserError, match="not an empty folder"):
        upcycle(dense, tmp_path / "moe", num_experts=3)
    assert tensors(tmp_path / "moe").keys() == before.keys()
    with pytest.raises(UserError, match="not an empty folder"):
        upcycle(dense, dense)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder that can be written"):
        upcycle(dense, tmp_path / "file" / "moe")


def test_an_interruption_leaves_nothing(tmp_path: Path, dense: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(dense, tmp_path / "moe", max_shard_size="10KB", progress=stop)
    assert nothing_was_written(tmp_path)


def test_a_full_disk_is_said_before_writing(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB, the disk has 0\.0; free some"):
        upcycle(dense, tmp_path / "moe", progress=lambda done, total: pytest.fail("a tensor was read"))
    assert nothing_was_written(tmp_path)


def test_what_was_written_is_checked(tmp_path: Path, dense: Path) -> None:
    """A shard that disappears once the weights are written is noticed."""
    close_weights = HFFolderWriter.close_weights

    def lose_a_shard(writer: HFFolderWriter) -> None:
        close_weights(writer)
        next(writer.staging.glob("model-00001-*")).unlink()

    with (
        planted(HFFolderWriter, "close_weights", lose_a_shard),
        pytest.raises(UserError, match="is not what was planned"),
    ):
        upcycle(dense, tmp_path / "moe", max_shard_size="10KB")
    assert nothing_was_written(tmp_path)


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, dense: Path) -> None:
    edit_tensors(lambda state: state[UP].fill_(float("nan")))(dense)
    with pytest.raises(UserError, match=r"experts\.0\.w3\.weight: 1536 of 1536 values are NaN or infinite"):
        upcycle(dense, tmp_path / "moe")
    assert nothing_was_written(tmp_path)


def test_an_export_that_died_between_its_renames_is_not_written_over(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", num_experts=2)
    before = tensors(tmp_path / "moe")
    (tmp_path / "moe").rename(tmp_path / ".moe.previous")
    with pytest.raises(UserError, match="not an empty folder"):
        upcycle(dense, tmp_path / "moe", num_experts=3)
    assert tensors(tmp_path / "moe").keys() == before.keys()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 MiB", 1572864),
        ("200kb", 200_000),
        (77, 77),
        ("77", 77),
        ("-1", 0),
        ("GB", 0),
        ("1XB", 0),
    ],
)
def test_sizes(text: int | str, nbytes: int) -> None:
    assert _parse_size(text) == nbytes


# Command line --------------------------------------------------------------------------------------------------------


def run_recipe(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "upcycle.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_recipe(tmp_path: Path, dense: Path) -> None:
    words = ["--model_name_or_path", dense, "--output_dir", tmp_path / "moe"]
    done = run_recipe(*words, "--num_experts", 4, "--num_experts_per_tok", 2, "--router_init", "normal", "--noise", 0.0)
    assert done.returncode == 0, done.stderr
    assert "mixtral" in done.stdout
    load(tmp_path / "moe")

    again = run_recipe(*words, "--num_experts", 1)
    assert again.returncode == 2
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "num_experts=1" in again.stderr
    assert "not an empty folder" in again.stderr
    assert "Traceback" not in again.stderr


def test_recipe_without_the_hub(tmp_path: Path) -> None:
    done = run_recipe("--model_name_or_path", "some/model", "--output_dir", tmp_path / "moe")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "some/model" in line
    assert "Traceback" not in done.stderr
