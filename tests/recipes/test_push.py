"""``--push_to_hub``: the proven folder with its card, as one commit, to a stand-in for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import free_port
from tests.support.hub import Hub, hub
from tests.support.recipe import ENVIRONMENT, ROOT, command, run_alone, save_model, text_rows, write_jsonl
from tests.support.roundtrip import files_of


def environment(stand_in: Hub) -> dict[str, str]:
    return {
        "HF_ENDPOINT": stand_in.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


def upload(stand_in: Hub, folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom pathlib import Path\nfrom moe_models.checkpoint.hub import upload\n"
        "from moe_models.errors import run\n"
        "run(lambda words: print(upload(Path(words[0]), words[1], private=True)) or 0)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), name],
        env={**os.environ, **ENVIRONMENT, **environment(stand_in)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_folder_goes_up_whole(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    with hub() as stand_in:
        done = upload(stand_in, folder, "org/mine")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{stand_in.address}/org/mine/commit/{'0' * 40}"
        assert stand_in.files == files_of(folder)
        assert stand_in.commits == ["org/mine main: Upload by moe-recipes"]
        assert set(stand_in.cards) == {(folder / "README.md").read_text()}
        assert stand_in.tokens == {"Bearer hf_secret"}
        (asked,) = stand_in.created
        assert (asked["name"], asked["organization"]) == ("mine", "org")
        assert asked.get("private") is True or asked.get("visibility") == "private"

        stand_in.refuses_with = 403
        done = upload(stand_in, folder, "org/mine")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {folder}: is whole, but was not uploaded to org/mine: ")
    assert line.endswith(f"try again with: hf upload org/mine {folder}")
    assert "Traceback" not in done.stderr
    assert "hf_secret" not in done.stderr


def test_a_hub_that_is_not_there_gets_one_line(tmp_path: Path) -> None:
    """Its HTTP client has exceptions of its own for that."""
    folder = save_model(tmp_path / "model")
    with hub() as stand_in:
        pass
    done = upload(stand_in, folder, "org/mine")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {folder}: is whole, but was not uploaded to org/mine: ")
    assert line.endswith(f"try again with: hf upload org/mine {folder}")


@pytest.mark.conformance
def test_a_run_uploads_what_it_proved(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "data.jsonl", text_rows(16))
    out = tmp_path / "mine"
    flags = {"max_steps": 2, "save_steps": 1, "report_to": "none", "push_to_hub": True}
    with hub() as stand_in:
        one = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        words = command(model, data, ROOT / "ds_configs" / "zero3.json", out, **flags)
        ended = run_alone(words, timeout=200, **one, **environment(stand_in))
        assert ended.code == 0, ended
        assert stand_in.commits == ["somebody/mine main: Upload by moe-recipes"], "no checkpoint goes up"
        assert stand_in.files == files_of(out / "model")
    assert b"## What was measured" in stand_in.files["README.md"]
    assert f"uploaded      {stand_in.address}/somebody/mine/commit/" in ended.stdout
    assert json.loads((out / "summary.json").read_text())["base_model"] == str(model)
