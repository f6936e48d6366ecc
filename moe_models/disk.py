"""Disks that are full: how much room there is, which exceptions mean that there is none, and the line that says so."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = "the disk is full"
"""What the messages of this module say; so an exception that was raised again on another rank is recognised."""
_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = (FULL, os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "os error 28)", "os error 122)")
"""safetensors and datasets put the operating system's words into exceptions of their own."""
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""upstream: torch 2.13.0: torch.save says of a failed write only that a file has not the length that it should have, in
a RuntimeError. Remove when: it raises OSError with errno."""


def free_bytes(path: str | Path) -> int:
    """What this user can still write below ``path``, which need not exist yet."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def size(nbytes: int) -> str:
    """``12.3 GB``, in decimal units as file systems are sold."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1000:.1f} kB"


def is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it was raised from, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_failed_write(error: BaseException) -> bool:
    """Whether ``error`` comes from a file that could not be written, and not from the program."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_WRITER)
    return isinstance(error, OSError)


def full_line(path: str | Path, needed: int | None = None) -> str:
    """One line: the path, what is needed (where it is known) and what is free."""
    wanted = ""
    if needed is not None:
        wanted = f"{size(needed)} needed, "
    return f"{path}: {FULL}: {wanted}{size(free_bytes(path))} free; make room, or give a folder on another disk"


@contextmanager
def ends_if_full(path: str | Path, kind: Callable[[str], Exception], needed: int | None = None) -> Iterator[None]:
    """Turn an exception that means a full disk into ``kind``, with :func:`full_line`; leave all others alone."""
    try:
        yield
    except Exception as error:
        if not is_full(error) or FULL in str(error):
            raise
        where = getattr(error, "filename", None) or path
        raise kind(full_line(where, needed)) from error
