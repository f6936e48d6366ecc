"""JSON read with one-line errors; files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_models.disk import full_line, is_full
from moe_models.errors import UserError, show, warn


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises UserError for a path that cannot be read, malformed JSON (with line, column and the line itself), a key that
    stands twice in one object (JSON keeps the last one silently), and a top level that is not an object.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file{beside_run_sh(path)}")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give the path of one JSON file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = (text.splitlines() or [""])[error.lineno - 1 : error.lineno]
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON: {error.msg} at {where}: {' '.join(line).strip()!r}") from None
    problems = [f'{path}: key "{key}" stands twice in one object; keep one' for key in twice]
    if not isinstance(data, dict):
        raise UserError([*problems, f"{path}: the top level is {show(data)}; it must be an object {{...}}"])
    if problems:
        raise UserError(problems)
    return data


HERE = Path(__file__).parents[1]
"""The folder of run.sh; of an installed package, the one it is installed in."""


def beside_run_sh(path: str | Path) -> str:
    """The end of a line about a path that is not there: where it is, if run.sh's folder has it. Else nothing.

    Relative paths start where the command was given, as everywhere.
    """
    found = HERE / path
    if Path(path).is_absolute() or not (HERE / "run.sh").is_file() or not found.exists():
        return ""
    return f"; there is one beside run.sh: {found}"


def parse_size(text: str) -> int:
    """Bytes in ``"5GB"`` (decimal) or ``"5GiB"`` (binary). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def replace_folder(staging: Path, final: Path) -> None:
    """Give ``staging`` the name ``final``. Each state that a crash can leave holds at least one whole folder."""
    previous = _previous(final)
    if previous.exists():
        shutil.rmtree(previous)
    if final.exists():
        os.replace(final, previous)
    os.replace(staging, final)
    _sync(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def restore_previous(folder: Path) -> None:
    """Put an earlier export back that a process had moved away when it died between two renames."""
    if _previous(folder).exists() and not folder.exists():
        os.replace(_previous(folder), folder)


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path``, a file or a folder, that gets the name ``path`` when the block ends well.

    If the block raises, the draft is removed and ``path`` is what it was. A file that was there before is replaced. Two
    processes that write the same path have drafts of their own.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Add text to a file, whole or not at all. Raises OSError where the disk refuses."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


class RunLog:
    """A file of a run that lines are added to. A full disk is one warning: the other ranks do not write, and go on.

    Args:
        what: what is missing then, for the warning: "the load of the experts is not logged".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._warned = False

    def add(self, path: Path, text: str) -> None:
        """Add text, whole or not at all. Raises OSError for anything but a full disk."""
        try:
            append(path, text)
        except OSError as error:
            if not is_full(error):
                raise
            if not self._warned:
                warn([f"{full_line(path)}; until then {self._what}"])
            self._warned = True


def write(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with whole(path) as draft:
        draft.write_text(text)
