"""Two runs into one output folder: the second is refused, and told who is there; a dead run holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_models import held
from moe_models.errors import UserError
from moe_models.preflight.paths import check_output_dir
from tests.support.recipe import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from moe_models.held import hold, let_go
hold(Path(sys.argv[1]))
if "fork" in sys.argv:
    told, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, b".")  # here it has let go of the lock
        time.sleep(60)
    os.read(told, 1)
print("held", flush=True)
sys.stdin.readline()
let_go()
"""


def holding(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A process that holds ``folder`` until a line, or its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = holding(out)
    try:
        who = f"{socket.gethostname()}, process {first.pid}, since {time.strftime('%Y-%m-%d')}"
        before = time.monotonic()
        with pytest.raises(UserError) as refused:
            held.hold(out)
        assert time.monotonic() - before < 2, "a living holder is not waited for"
        (line,) = refused.value.problems
        assert line.startswith(f"--output_dir {out}: another run is writing there ({who}"), line
        assert line.endswith("); wait for its end, or give another folder")
        assert check_output_dir(out) == [line] == check_output_dir(out, True)
    finally:
        first.communicate("\n", timeout=20)
    assert not out.exists(), "a run that wrote nothing leaves nothing"
    assert check_output_dir(out) == []


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_run_holds_nothing(forks: bool, tmp_path: Path) -> None:
    """Not even while a worker that it forked lives on; the file that it left is no reason to refuse."""
    out = tmp_path / "out"
    first = holding(out, *(["fork"] if forks else []))
    try:
        first.kill()
        first.wait(10)
        assert (out / held.LOCK_FILE).exists()
        assert check_output_dir(out) == []
        second = holding(out)
        assert held.holder(out) is not None
        second.communicate("\n", timeout=20)
        assert held.holder(out) is None
    finally:
        if forks:
            os.killpg(first.pid, signal.SIGKILL)


def test_a_lock_file_that_its_holder_removed_is_none(tmp_path: Path) -> None:
    """Opened by one run, removed by another that ends, locked by the first: a third could lock a new one beside it."""
    descriptor = os.open(tmp_path / held.LOCK_FILE, os.O_RDWR | os.O_CREAT)
    assert held._is_still(tmp_path / held.LOCK_FILE, descriptor)
    (tmp_path / held.LOCK_FILE).unlink()
    assert not held._is_still(tmp_path / held.LOCK_FILE, descriptor)
    (tmp_path / held.LOCK_FILE).touch()
    assert not held._is_still(tmp_path / held.LOCK_FILE, descriptor)
    os.close(descriptor)
