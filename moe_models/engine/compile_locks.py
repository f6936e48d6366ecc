"""Locks that a killed compilation left: every later run would wait for them, without a word and without end.

torch compiles an extension (DeepSpeed's optimizers, for one) under ``TORCH_EXTENSIONS_DIR/NAME/lock``. The file says
nothing; that it exists is the lock. Its builder keeps it open, which is how a lock is recognised that has none:

- no process of this machine has it open, and no other machine or container could (a local file system, and this process
  sees all of this machine's processes): it is removed;
- no process here has it open, and nothing in its folder has changed for a quarter of an hour: it is removed as well;
- else it is named: whom the run waits for, or what to remove if nothing builds there.

A thread looks, because the main thread is the one that waits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import psutil

from moe_models.errors import warn

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_OF_QUIET = 15 * 60
"""After which a lock counts as left behind whose builder could be on another machine. A file of CUDA takes minutes."""
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the namespace whose processes see all others (linux/proc_ns.h)."""


def extension_folders() -> list[Path]:
    """Where torch builds: below ``TORCH_EXTENSIONS_DIR``, or in its cache, one folder deeper for each version."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return [Path(given)]
    # upstream: torch 2.13.0: the path that torch.utils.cpp_extension makes of its default; its function creates the
    # folder. Remove when: a public function tells the path.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return [folder for folder in cache.glob("*") if folder.is_dir()]


def locks() -> list[Path]:
    """The locks that are there."""
    return sorted(lock for folder in extension_folders() for lock in folder.glob("*/lock"))


def builder_of(lock: Path) -> psutil.Process | None:
    """The process of this machine that has ``lock`` open: torch's builder does, until it removes it."""
    try:
        wanted = os.stat(lock)
    except FileNotFoundError:
        return None
    for process in psutil.process_iter():
        folder = f"/proc/{process.pid}/fd"
        try:
            for name in os.listdir(folder):
                # By inode: in a container the same file may have another path.
                if os.path.samestat(os.stat(f"{folder}/{name}"), wanted):
                    return process
        except OSError:  # another user's, or it has just ended
            continue
    return None


def is_ours_alone(lock: Path) -> bool:
    """Whether any builder of ``lock`` would be a process that :func:`builder_of` sees."""
    try:
        own = lock.stat().st_uid in (os.getuid(), 0) or os.getuid() == 0
        sees_all = os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE
    except OSError:
        return False
    kind = file_system_of(lock)
    if kind == "overlay":  # a container's own
        return own
    return own and sees_all and kind in LOCAL_FILE_SYSTEMS


def file_system_of(path: Path) -> str:
    """The kind of the file system that holds ``path``; empty where the machine does not say."""
    path = path.resolve()
    best = (0, "")
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, point, kind, *_ = line.split()
        if path.is_relative_to(point):
            best = max(best, (len(point), kind))
    return best[1]


def quiet_seconds(lock: Path) -> float:
    """For how long nothing in the lock's folder has changed."""
    times = [file.stat().st_mtime for file in (lock.parent, *lock.parent.iterdir())]
    return time.time() - max(times)


def look_at(lock: Path, named: set[Path]) -> None:
    """Remove ``lock`` if nothing can be building there; else name it, once."""
    try:
        builder = builder_of(lock)
        if builder is None:
            left_behind = is_ours_alone(lock) or quiet_seconds(lock) > SECONDS_OF_QUIET
            if left_behind and builder_of(lock) is None and lock.exists():
                lock.unlink()
                warn([f"{lock}: left behind by a compilation that was killed; removed"])
                return
    except OSError:  # it has just been removed
        return
    if lock in named or not lock.exists():
        return
    named.add(lock)
    if builder is not None:
        line = f"{lock}: process {builder.pid} compiles {lock.parent.name}; a run that needs it waits"
    else:
        line = (
            f"{lock}: no process of this machine holds it; a run that needs {lock.parent.name} waits for it. Remove it "
            "if no other machine or container compiles there"
        )
    warn([line])


def watch_compile_locks() -> None:
    """Look at the locks that are there now, and at those that appear, as long as this process lives."""

    def look() -> None:
        named: set[Path] = set()
        while True:
            for lock in locks():
                builder = builder_of(lock)
                if builder is None or builder.ppid() != os.getppid():  # the ranks' own builds are no news
                    look_at(lock, named)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    if sys.platform == "linux":
        threading.Thread(target=look, daemon=True, name="compile locks").start()
