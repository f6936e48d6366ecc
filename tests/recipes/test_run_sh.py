"""run.sh refuses what it can see by itself, before it installs anything."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_models import files
from moe_models.errors import UserError
from moe_models.families.config_json import read_model_config
from moe_models.files import read_json
from moe_models.preflight.paths import check_dataset_path
from tests.support.recipe import ROOT


@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
@pytest.mark.parametrize("gpus", ["0", "abc", "-2", "2.5", "08", "1 2"])
def test_numbers_of_gpus_that_are_none(tmp_path: Path, verb: str, gpus: str) -> None:
    shutil.copy2(ROOT / "run.sh", tmp_path / "run.sh")
    done = subprocess.run(
        ["./run.sh", verb], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "GPUS": gpus}, capture_output=True, text=True
    )
    line = f"error: GPUS={gpus}: must be a number from 1 on: of GPUs, or without one of CPU processes\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"], "nothing was installed"


def test_a_path_that_is_beside_run_sh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is given elsewhere: its relative paths start there, and the line says where the file is."""
    here = tmp_path / "recipes-folder"
    (here / "data" / "model").mkdir(parents=True)
    (here / "run.sh").touch()
    (here / "mine.json").write_text("{}")
    (here / "data" / "my.jsonl").write_text("{}")
    (here / "data" / "model" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(files, "HERE", here)
    with pytest.raises(UserError, match=f"^mine.json: no such file; there is one beside run.sh: {here}/mine.json$"):
        read_json("mine.json")
    with pytest.raises(UserError, match=f"^data/model: no such folder here; there is one beside run.sh: {here}/data/m"):
        read_model_config("data/model")
    there = f"there is one beside run.sh: {here}"
    assert check_dataset_path("data/my.jsonl")[0].startswith(
        f"data set data/my.jsonl: no such file or folder; {there}/"
    )
    assert check_dataset_path("data/model") == [f"data set data/model: no such file or folder here; {there}/data/model"]
    assert check_dataset_path("owner/data") == [], "a hub id"
    with pytest.raises(UserError, match=r"^none\.json: no such file$"):
        read_json("none.json")
    monkeypatch.chdir(here)
    assert read_json("mine.json") == {}
