"""How a recipe ends: which lines, on which stream, with which code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_models.errors import Problems, RunError, UserError, one_line, some_of
from moe_models.files import whole, write


def end_of(body: str) -> tuple[int, str, str]:
    code = f"from moe_models.errors import *\ndef main(words):\n    {body}\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise UserError(['a', 'b'])", 2, "error: a\nerror: b\n"),
        ("raise RunError('disk full')", 1, "error: disk full\n"),
        ("warn(['slow']); return 0", 0, "warning: slow\n"),
    ],
)
def test_end(body: str, code: int, stderr: str) -> None:
    assert end_of(body) == (code, "", stderr)


def test_a_bug_keeps_its_traceback() -> None:
    code, _, stderr = end_of("raise KeyError('x')")
    assert code == 1
    assert "Traceback" in stderr


def test_problems_are_collected() -> None:
    problems = Problems(["first"])
    with problems.note():
        raise UserError(["second", "third"])
    problems.add("fourth")
    with pytest.raises(UserError) as refused:
        problems.refuse()
    assert refused.value.problems == ["first", "second", "third", "fourth"]
    Problems().refuse()
    with pytest.raises(RunError), Problems().note():  # what is no UserError is not noted
        raise RunError("x")


def test_lines() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert some_of("abc") == "a, b, c"
    assert some_of("abcdef", 4) == "a, b, c, d and 2 more"


def test_whole_file_or_none(tmp_path: Path) -> None:
    write(tmp_path / "x.json", "old")

    def fail() -> None:
        with whole(tmp_path / "x.json") as draft:
            draft.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"
    write(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"


def test_whole_folder_or_none(tmp_path: Path) -> None:
    def interrupt() -> None:
        with whole(tmp_path / "model") as draft:
            draft.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not list(tmp_path.iterdir())
