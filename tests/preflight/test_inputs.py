"""What is read before a run: config.json, the output folder, the data's path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_models.errors import UserError
from moe_models.families.config_json import read_model_config
from moe_models.preflight.paths import check_dataset_path, check_output_dir
from tests.preflight.test_preflight import MIXTRAL, one


def test_read_model_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in it; give the folder that save_pretrained wrote"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert read_model_config(str(tmp_path)) == MIXTRAL
    with pytest.raises(UserError, match="is a file; give the model folder"):
        read_model_config(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"/no/such: no such folder; give a model folder or a hub id"):
        read_model_config("/no/such")


def test_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def gone(name: str, file: str) -> str:
        raise OSError(f"{name} is gone. And more.\nAnd a second line")

    monkeypatch.setattr(hub, "hf_hub_download", gone)
    with pytest.raises(UserError) as caught:
        read_model_config("some-org/some-model")
    assert caught.value.problems == [
        "some-org/some-model: no such folder here, and the hub did not give its config.json (OSError: "
        "some-org/some-model is gone); check the name, log in, or give a folder"
    ]
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert read_model_config("some-org/some-model") == {"model_type": "mixtral"}


def test_what_a_killed_run_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    from moe_models.checkpoint.whole_checkpoints import STAGING_FOLDER
    from moe_models.engine.step_log import LOG_FILE
    from moe_models.held import LOCK_FILE
    from moe_models.preflight.paths import UNFINISHED
    from moe_models.routing.callback import LOAD_FILE
    from moe_models.trainer import MODEL_FOLDER

    assert set(UNFINISHED) == {LOCK_FILE, STAGING_FOLDER, f".{MODEL_FOLDER}.writing", LOAD_FILE, LOG_FILE}
    for name in UNFINISHED:
        (tmp_path / name).mkdir()
    assert check_output_dir(tmp_path) == []
    assert one(check_output_dir(tmp_path, True)).endswith("drop --resume_from_checkpoint")
    (tmp_path / "thesis.txt").touch()
    assert "not empty, and no checkpoint to go on from" in one(check_output_dir(tmp_path))


def test_output_dir(tmp_path: Path) -> None:
    assert check_output_dir(tmp_path / "new") == []
    assert check_output_dir(tmp_path) == []
    assert "nothing to resume from" in one(check_output_dir(tmp_path, True))
    (tmp_path / "checkpoint-5").mkdir()  # by hand, or left by something else
    assert "not empty, and no checkpoint to go on from; give another folder, or" in one(check_output_dir(tmp_path))
    assert one(check_output_dir(tmp_path, True)).endswith("drop --resume_from_checkpoint and remove that folder")
    assert "no trainer_state.json in it" in one(check_output_dir(tmp_path, str(tmp_path / "checkpoint-5")))
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert "not empty; give another folder, or go on from it with" in one(check_output_dir(tmp_path))
    assert check_output_dir(tmp_path, True) == []
    assert check_output_dir(tmp_path, str(tmp_path / "checkpoint-5")) == []
    assert "no such checkpoint folder" in one(check_output_dir(tmp_path, str(tmp_path / "checkpoint-6")))
    (tmp_path / "file").write_text("")
    assert one(check_output_dir(tmp_path / "file")).endswith("is a file; give a folder")


def test_dataset_path(tmp_path: Path) -> None:
    allowed = "allowed: a hub id, a folder, or a file ending in .txt, .jsonl, .json, .parquet"
    (tmp_path / "empty").mkdir()
    for name, text in (("a.jsonl", "{}"), ("a.csv", "1,2"), ("b.txt", "")):
        (tmp_path / name).write_text(text)
    assert check_dataset_path("trl-lib/Capybara") == check_dataset_path("wikitext") == []
    assert check_dataset_path(tmp_path / "a.jsonl") == check_dataset_path(tmp_path) == []
    for name, words in (
        ("a.csv", f'unknown ending ".csv"; {allowed}'),
        ("b.txt", f"the file is empty; {allowed}"),
        ("empty", f"the folder is empty; {allowed}"),
        ("none.jsonl", f"no such file or folder; {allowed}"),
        ("none", f"no such file or folder; {allowed}"),
    ):
        assert one(check_dataset_path(tmp_path / name)) == f"data set {tmp_path / name}: {words}"
    assert "no such file" in one(check_dataset_path("train.parquet"))
    assert "no such file" in one(check_dataset_path("~/data/x"))


def test_torch_free() -> None:
    code = "import sys; import moe_models.preflight.run; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
