"""One run for one output folder: rank 0 holds a lock on it as long as it lives.

The lock is the kernel's (``flock``), so a killed run leaves none behind. The file says who holds it: host, process,
since when. On a file system without locks there is no protection.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from moe_models.errors import UserError

LOCK_FILE = ".held"
"""In the output folder; gone when a run has ended by itself."""
SECONDS_TO_WAIT = 10
"""For the last moments of a run that was killed: workers of its data loader live some seconds longer."""

_descriptor: int | None = None
_path: Path | None = None
_made: list[Path] = []
"""The folders that :func:`hold` made, the innermost first."""


def hold(folder: Path) -> None:
    """Hold ``folder``, which is made, until :func:`let_go` or the end of this process.

    Raises UserError that names the holder if another process has it.
    """
    global _descriptor, _path, _made
    _made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder ended just now, and removed the folder that it had made
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline or not _looks_dead(path):
                raise UserError(held_line(folder)) from None
            time.sleep(0.5)
            continue
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder removed it in between
    text = f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{text}\n".encode(), 0)
    _descriptor = descriptor
    _path = path
    os.register_at_fork(after_in_child=_not_the_childs)
    atexit.register(give_up)


def let_go() -> None:
    """The run is at its end: remove the file, and the lock with it."""
    global _descriptor
    if _descriptor is not None and _path is not None:
        _path.unlink(missing_ok=True)
        os.close(_descriptor)
        _descriptor = None


def give_up() -> None:
    """Leave nothing of :func:`hold`, and no folder that it made, unless something is in it. Called at exit, too."""
    let_go()
    with suppress(OSError):
        for folder in _made:
            folder.rmdir()
    _made.clear()


def holder(folder: Path) -> str | None:
    """Who holds ``folder``: host, process, since when; None if nothing does."""
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _text(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def held_line(folder: Path) -> str:
    """The refusal of a second run."""
    who = _text(folder / LOCK_FILE)
    return f"--output_dir {folder}: another run is writing there ({who}); wait for its end, or give another folder"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip() or "it has just started"
    except OSError:
        return "it has just ended"


def _looks_dead(path: Path) -> bool:
    """Whether the holder is a process of this machine that has ended; what it forked may live a little longer."""
    host, _, rest = _text(path).partition(", process ")
    pid = rest.partition(",")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the file that ``descriptor`` has open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _not_the_childs() -> None:
    """A forked child closes its copy, else it would hold the lock after the run's end."""
    global _descriptor
    if _descriptor is not None:
        os.close(_descriptor)
        _descriptor = None
