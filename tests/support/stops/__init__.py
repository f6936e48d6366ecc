"""Points of a run at which a test acts: a function that one of its processes is about to call.

:func:`environment` makes the processes of a launcher stop there (``sitecustomize.py`` in this folder).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.recipe import ENVIRONMENT
from tests.support.stops.sitecustomize import GO, HELD, VARIABLE


@dataclass(frozen=True)
class Point:
    """Before the ``call``-th call of ``at`` (``module:Class.function``) in the process ``who``.

    ``who``: ``launcher``, ``launch.py`` or ``rank N``. ``text``: only calls count that are given a word it matches.
    """

    at: str
    who: str = "rank 0"
    call: int = 1
    text: str = ""


def environment(point: Point, folder: Path, until: str) -> dict[str, str]:
    """What stops a process of a run at ``point``.

    ``until``: "told" lets it go on when the rank has heard its signal, "go" only when :func:`let_go` says so. "full"
    does not hold it: it fills the disk of ``folder`` and goes on.
    """
    folder.mkdir(exist_ok=True)
    stop = {**point.__dict__, "folder": str(folder), "until": until}
    path = os.pathsep.join((str(Path(__file__).parent), ENVIRONMENT["PYTHONPATH"]))
    return {VARIABLE: json.dumps(stop), "PYTHONPATH": path}


def wait_until_held(folder: Path, seconds: float, ended: Callable[[], object]) -> None:
    """Return when the process has come to its point; ``ended()`` says in a word if it never will."""
    deadline = time.monotonic() + seconds
    while not (folder / HELD).exists():
        assert not (why := ended()), f"ended before the point: {why}"
        assert time.monotonic() < deadline, "the point never came"
        time.sleep(0.01)


def let_go(folder: Path) -> None:
    """Let the process go on."""
    (folder / GO).touch()
