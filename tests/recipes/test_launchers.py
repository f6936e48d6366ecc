"""deepspeed, torchrun and accelerate launch start the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipe import ROOT, command, launch, save_model, text_rows, write_jsonl


@pytest.mark.conformance
def test_every_launcher_trains_the_same(tmp_path: Path) -> None:
    """The recipe finds its rank under each of them, and losses and norms are equal bit by bit."""
    model, data = save_model(tmp_path / "tiny"), write_jsonl(tmp_path / "train.jsonl", text_rows(16))
    flags = {"max_steps": 3, "logging_steps": 1, "save_steps": 3, "report_to": "none"}
    curves = {}
    for name in ("deepspeed", "torchrun", "accelerate"):
        out = tmp_path / name
        ended = launch(command(model, data, ROOT / "ds_configs/zero1_ep2.json", out, **flags), tmp_path, name=name)
        assert ended.code == 0, ended
        assert (out / "model" / "model.safetensors").exists()
        history = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        curves[name] = [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert len(curves["deepspeed"]) == 3
    assert curves["torchrun"] == curves["accelerate"] == curves["deepspeed"]


def test_a_complete_run_survives_the_teardown_of_its_interpreter() -> None:
    """Handlers that others register are called, and what would abort the interpreter afterwards is not reached."""
    script = """
import atexit, os, finetune
class Abort:
    def __del__(self): os._exit(6)
abort = Abort()
atexit.register(print, "handler called")
finetune.complete = {complete}
"""
    for complete, code in ((True, 0), (False, 6)):
        words = [sys.executable, "-c", script.format(complete=complete)]
        done = subprocess.run(words, cwd=ROOT / "recipes", capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        if complete:
            assert done.stdout == "handler called\n"
