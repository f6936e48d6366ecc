"""The main job on GPUs, in bf16 over NCCL: train, checkpoint, export, reload, for each ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import free_port
from tests.support.roundtrip import apart_from_measured, files_of

ROOT = Path(__file__).parents[2]


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A bf16 Mixtral of a few million parameters and text that it can learn."""
    from tests.support.parity import tokenizer
    from tests.support.tiny import save_tiny

    model = save_tiny(
        folder / "model", "mixtral", dtype="bfloat16", hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_local_experts=8, initializer_range=0.02, max_position_embeddings=256,
    )  # fmt: skip
    tokenizer().save_pretrained(model)
    data = folder / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"input_ids": [3 + (i * k) % 61 for i in range(128)]}) + "\n" for k in range(1, 257))
    )
    return model, data


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("gpu"))


def finetune(model: Path, data: Path, out: Path, ds_config: str, *flags: str, gpus: int = 2) -> dict[str, Any]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus),
               "--master_port", str(free_port()), "recipes/finetune.py",
               "--model_name_or_path", str(model), "--dataset_name", str(data),
               "--deepspeed", ds_config, "--output_dir", str(out), "--max_length", "128", "--max_steps", "12",
               "--save_steps", "12", "--logging_steps", "1", "--learning_rate", "1e-3",
               "--report_to", "none", *flags]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return dict(json.loads((out / "summary.json").read_text()))


def losses(out: Path) -> list[float]:
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.gpu(2)
def test_each_zero_stage_trains_exports_and_reloads(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    curves = {}
    for name in ("zero1_ep2", "zero2_ep2", "zero3_ep2", "zero3"):
        out = tmp_path / name
        summary = finetune(*inputs, out, f"ds_configs/{name}.json")
        assert summary["device"] == "cuda"
        assert summary["dtype"] == "bfloat16"
        assert summary["verified"]["missing_keys"] == summary["verified"]["unexpected_keys"] == 0
        curves[name] = losses(out)
        assert curves[name][-1] < curves[name][0] - 0.1, curves
        offline = tmp_path / f"{name}-offline"
        exported = subprocess.run(
            [sys.executable, "recipes/export.py", "--checkpoint", str(out / "checkpoint-12"),
             "--output_dir", str(offline)],
            cwd=ROOT, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert exported.returncode == 0, exported.stderr[-4000:]
        live_files, offline_files = (apart_from_measured(files_of(folder)) for folder in (out / "model", offline))
        assert sorted(live_files) == sorted(offline_files)
        assert [file for file in live_files if live_files[file] != offline_files[file]] == [], name
        print(name, json.dumps(summary))
    # bf16 rounds 2^-8 per operation and ZeRO-3 sums gradients in another order; the curve is the same function.
    for name, curve in curves.items():
        worst = max(abs(a - b) / b for a, b in zip(curve, curves["zero3"], strict=True))
        assert worst < 0.02, (name, worst, curves)


@pytest.mark.gpu(2)
def test_kernels_of_the_presets_keep_the_function(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """In fp32, where another function cannot hide behind rounding: AutoEP's fused combine, and Liger's kernels."""
    curves = {}
    for name, flags in (("zero3", ()), ("zero1_ep2", ()), ("zero1_ep2", ("--use_liger_kernel",))):
        raw = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        del raw["bf16"]
        ds_config, out = tmp_path / f"{name}.json", tmp_path / "-".join([name, *flags])
        ds_config.write_text(json.dumps(raw))
        summary = finetune(*inputs, out, str(ds_config), *flags)
        assert summary["dtype"] == "float32"
        curves[out.name] = losses(out)
    print(json.dumps(curves))
    for name, curve in curves.items():
        worst = max(abs(a - b) / b for a, b in zip(curve, curves["zero3"], strict=True))
        assert worst < 1e-4, (name, worst, curves)


@pytest.mark.gpu(2)
def test_native_layers_are_the_same_function(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The same flags with DeepSpeed's explicit layers instead of AutoEP: the same curve, a folder that reloads."""
    curves = {}
    for name in ("zero1_ep2", "zero1_ep2_native"):
        summary = finetune(*inputs, tmp_path / name, f"ds_configs/{name}.json")
        assert summary["verified"]["missing_keys"] == summary["verified"]["unexpected_keys"] == 0
        curves[name] = losses(tmp_path / name)
        print(name, json.dumps(summary))
    worst = max(abs(a - b) / b for a, b in zip(*curves.values(), strict=True))
    assert worst < 0.02, (worst, curves)  # as above; the layers multiply in another order, in bf16


@pytest.mark.gpu(2)
def test_a_checkpoint_goes_on_in_another_layout(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """ZeRO-1 with EP 2, then ZeRO-3 without EP: the last steps as if never stopped, with DeepSpeed's FusedAdam."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finetune(*inputs, whole, "ds_configs/zero1_ep2.json", "--save_steps", "6")
    shutil.copytree(whole / "checkpoint-6", moved / "checkpoint-6")
    flags = ("--save_steps", "6", "--resume_from_checkpoint", str(moved / "checkpoint-6"))
    finetune(*inputs, moved, "ds_configs/zero3.json", *flags)
    curves = losses(whole), losses(moved)
    print(curves)
    assert curves[0][:6] == curves[1][:6]  # those were read with the checkpoint
    worst = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    # A wrong step count would make Adam's first steps up to three times too long: far more than bf16 rounds.
    assert worst < 0.005, (worst, curves)


@pytest.mark.gpu(4)
@pytest.mark.parametrize("preset", ["zero1_ep2_tp2", "zero1_ep2_sp2"])
def test_peers_that_share_rows_are_the_same_function(preset: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """TP 2 or SP 2 beside EP 2 on 4 GPUs is EP 2 on 2, with the same global batch: the same curve."""
    finetune(*inputs, tmp_path / "ep", "ds_configs/zero1_ep2.json")
    summary = finetune(*inputs, tmp_path / preset, f"ds_configs/{preset}.json", gpus=4)
    assert summary["verified"]["missing_keys"] == summary["verified"]["unexpected_keys"] == 0
    curves = losses(tmp_path / "ep"), losses(tmp_path / preset)
    print(json.dumps(summary), curves)
    worst = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    assert worst < 0.02, (worst, curves)
