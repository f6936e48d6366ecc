"""recipes/export.py as a user meets it: in a process of its own, killed on the way, short of memory, or misused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError, run
from recipes.export import main as export_main
from tests.support import export_stress, roundtrip
from tests.support.cluster import Cluster
from tests.support.roundtrip import apart_from_measured, files_of, load_tensors

Clusters = Callable[[int], Cluster]
ROOT = Path(__file__).parents[2]
MB = 10**6


def run_python(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def run_dirs(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs from different weights, each with checkpoint-2 and the live export in ``model``."""
    made = []
    for seed, stage in enumerate((1, 3)):
        out = tmp_path_factory.mktemp(f"run{seed}")
        source = roundtrip.save_source(out / "source", "mixtral", seed=seed)
        clusters(2).run(roundtrip.train_and_export, str(source), str(out), roundtrip.ds_config(stage, 2))
        made.append(out)
    return made


def test_success(run_dirs: list[Path], tmp_path: Path) -> None:
    done = run_python(
        "recipes/export.py", "--checkpoint", run_dirs[1] / "checkpoint-2", "--output_dir", tmp_path / "hf"
    )
    assert done.returncode == 0, done.stderr
    *_, written, compared = done.stdout.strip().splitlines()
    assert written == f"{tmp_path / 'hf'}: 0.00 GB, torch.float32, complete; load it with from_pretrained"
    assert compared == "source: 41 of 41 tensors changed"
    offline, live = files_of(tmp_path / "hf"), files_of(run_dirs[1] / "model")
    assert apart_from_measured(offline) == apart_from_measured(live)
    assert b"Not compared with a running model" in offline["README.md"]
    assert b"equal bit by bit" in live["README.md"]
    assert b"| optimizer steps | 2 |" in offline["README.md"]


def lines_of_refusal(code: object, stdout: str, stderr: str) -> list[str]:
    """What the recipe said about input that cannot work, one line per problem, and nothing but that."""
    assert code == 2, stdout + stderr
    assert stdout.strip() == ""
    lines = stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines), stderr
    return lines


def test_all_wrong_flags_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    flags = ["--checkpoint", tmp_path / "nowhere", "--output_dir", tmp_path / "mine", "--max_shard_size", "5 elephants"]
    done = run_python("recipes/export.py", *flags)
    lines = lines_of_refusal(done.returncode, done.stdout, done.stderr)
    assert len(lines) == 3
    assert "--max_shard_size '5 elephants' is not a size; write it as 5GB" in lines[0]
    assert (
        f"--output_dir {tmp_path / 'mine'}: is not empty and is not an earlier export (it holds thesis.txt)" in lines[1]
    )
    assert f"--checkpoint {tmp_path / 'nowhere'}: no such folder" in lines[2]
    assert files_of(tmp_path) == {"mine/thesis.txt": b"years of work"}


def test_a_damaged_checkpoint_gets_one_line(run_dirs: list[Path], tmp_path: Path) -> None:
    """Found late, with shards already on the disk: as clear as what is found early, and nothing stays."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run_dirs[0] / "checkpoint-2", checkpoint)
    file = next(checkpoint.glob("global_step*/layer_1_expert_3_*"))
    file.write_bytes(file.read_bytes()[:1000])
    flags = ["--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", "--max_shard_size", "20KB"]
    done = run_python("recipes/export.py", *flags)
    lines = lines_of_refusal(done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1
    assert "layer_1_expert_3_mp_rank_00_model_states.pt: cannot be read as plain tensors" in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]


@pytest.mark.parametrize("wrong", ["dense model", "hf folder", "unusable config", "read-only place", "damaged source"])
def test_wrong_input_gets_one_line(
    wrong: str,
    run_dirs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, out = tmp_path / "checkpoint-2", tmp_path / "hf"
    shutil.copytree(run_dirs[0] / ("model" if wrong == "hf folder" else "checkpoint-2"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    if wrong == "dense model":
        config["model_type"] = "llama"
    if wrong == "unusable config":
        config["num_attention_heads"] = "four"
    (checkpoint / "config.json").write_text(json.dumps(config))
    if wrong == "read-only place":
        out = Path("/proc/self/hf")
    source = []
    if wrong == "damaged source":
        source = ["--source", str(shutil.copytree(run_dirs[0] / "model", tmp_path.parent / f"{tmp_path.name}-source"))]
        weights = Path(source[1]) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    words = {
        "damaged source": "the model that training started from cannot be read: ",
        "dense model": "model_type 'llama' is not one of deepseek_v2, ",
        "hf folder": "not a DeepSpeed checkpoint (no file named latest)",
        "unusable config": "config.json cannot be used",
        "read-only place": "cannot be exported: ",
    }[wrong]
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", str(checkpoint), "--output_dir", str(out), *source])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(export_main)
    lines = lines_of_refusal(caught.value.code, *capsys.readouterr())
    assert len(lines) == 1
    assert words in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]


def test_killed_at_any_moment_one_whole_export_remains(run_dirs: list[Path], tmp_path: Path) -> None:
    """SIGKILL at every step that changes the disk, and at random moments; the next export cleans up."""
    done = run_python(
        "-m", "tests.support.export_stress", "kill", *(d / "checkpoint-2" for d in run_dirs), tmp_path, 15
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["events"] > 30, report
    assert report["old"] > 20, report
    assert report["new"] > 3, report
    assert 0 < report["moved"] < 5, "the window between two renames must exist and be small"


@pytest.mark.parametrize(("stage", "layers"), [pytest.param(1, 48, marks=pytest.mark.conformance), (3, 24)])
def test_memory_of_the_offline_export(stage: int, layers: int, tmp_path: Path) -> None:
    """300 MB in the files (ZeRO-3 keeps fp32), 5 MB shards: one projection, one shard and some slack are enough."""
    done = run_python("-m", "tests.support.export_stress", "memory", tmp_path, stage, layers)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["size"] > (290 if stage == 1 else 145) * MB
    stacked = 8 * 512 * 256 * 4  # in fp32, as ZeRO-3 keeps it
    assert measured["growth"] < 2 * stacked + 5 * MB + 8 * MB, measured


@pytest.mark.parametrize("stage", [1, 3])
def test_memory_of_the_live_export(stage: int, clusters: Clusters, tmp_path: Path) -> None:
    sizes = {**export_stress.SIZES, "num_hidden_layers": 9}
    source = roundtrip.save_source(tmp_path / "source", "mixtral", "bfloat16", **sizes)
    writer, other = clusters(2).run(export_stress.live_memory, str(source), str(tmp_path / "out"), stage)
    size = sum(t.numel() * t.element_size() for t in load_tensors(tmp_path / "out").values())
    assert size > 55 * MB
    stacked = 8 * 512 * 256 * 2
    assert writer < 2 * stacked + 5 * MB + 4 * MB, (writer, other)
    assert other < stacked + 4 * MB, (writer, other)


class _ByGetattr:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enum, whichever Python runs this."""

    def __init__(self, owner: Any, name: str) -> None:
        self.what = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.what


def test_an_enum_that_python_3_11_2_wrote(tmp_path: Path) -> None:
    """Its members come back; any other attribute is code, and refused."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from moe_models.checkpoint.from_folder import load_states

    torch.save({"zero_stage": _ByGetattr(ZeroStageEnum, "weights")}, tmp_path / "states.pt")
    assert load_states(tmp_path / "states.pt") == {"zero_stage": ZeroStageEnum.weights}
    torch.save({"zero_stage": _ByGetattr(ZeroStageEnum, "mro")}, tmp_path / "other.pt")
    torch.save({"zero_stage": _ByGetattr(torch.Tensor, "numpy")}, tmp_path / "code.pt")
    for name in ("other.pt", "code.pt"):
        with pytest.raises(UserError, match="cannot be read as plain tensors"):
            load_states(tmp_path / name)
