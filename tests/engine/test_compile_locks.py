"""Locks of a killed compilation, as torch makes them: recognised and removed, or named; never a living builder's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from moe_models.engine import compile_locks

BUILD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
sys.stdin.readline()
baton.release()
"""


def builder(lock: Path) -> subprocess.Popen[str]:
    """A process that compiles until a line, or its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(lock)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "fused_adam").mkdir()
    return tmp_path / "fused_adam" / "lock"


def look(lock: Path, capsys: pytest.CaptureFixture[str], named: set[Path] | None = None) -> str:
    compile_locks.look_at(lock, set() if named is None else named)
    return capsys.readouterr().err


def test_a_killed_builders_lock_is_removed(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_locks, "is_ours_alone", lambda lock: True)
    process = builder(lock)
    process.kill()
    process.wait()
    assert compile_locks.locks() == [lock]
    assert not FileBaton(str(lock)).try_acquire(), "torch would wait for it"
    assert look(lock, capsys) == f"warning: {lock}: left behind by a compilation that was killed; removed\n"
    assert FileBaton(str(lock)).try_acquire()


def test_a_living_builders_lock_stays_whatever_its_age(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_locks, "is_ours_alone", lambda lock: True)
    process = builder(lock)
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 86400,) * 2)
    named: set[Path] = set()
    said = look(lock, capsys, named)
    assert said == f"warning: {lock}: process {process.pid} compiles fused_adam; a run that needs it waits\n"
    assert look(lock, capsys, named) == "", "once"
    assert lock.exists()
    process.communicate("\n", timeout=20)
    assert not lock.exists()
    assert look(lock, capsys) == ""


def test_one_that_another_machine_may_hold_is_named_and_removed_when_it_is_old(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_locks, "is_ours_alone", lambda lock: False)
    lock.touch()
    assert "no process of this machine holds it; a run that needs fused_adam waits for it. Remove" in look(lock, capsys)
    assert lock.exists()
    old = time.time() - compile_locks.SECONDS_OF_QUIET - 60
    (lock.parent / "a.o").touch()
    for path in (lock, lock.parent):
        os.utime(path, (old, old))
    look(lock, capsys)
    assert lock.exists(), "something in the folder is new"
    os.utime(lock.parent / "a.o", (old, old))
    assert "removed" in look(lock, capsys)
    assert not lock.exists()


def test_the_folders_are_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = Path(_get_build_directory("x", verbose=False))
    assert folder.parent in compile_locks.extension_folders()
    assert compile_locks.file_system_of(Path("/proc/self/mounts")) == "proc"
