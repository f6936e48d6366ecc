"""Holds a process of a run at a named function, so that a test can act on it right there.

Python imports a module of this name at its start. :mod:`tests.support.stops` puts this folder on ``PYTHONPATH`` of a
launcher, from which all processes of the run have it, and says in :data:`VARIABLE` which one is held and where. Without
the variable nothing happens. No part of the product knows of it.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

VARIABLE = "MOE_RECIPES_TEST_STOP"
HELD = "held"
"""In the folder of the stop: this process waits; the file holds its number."""
GO = "go"
"""Likewise: it may go on."""
FILLER = "filler"
"""On a disk that :func:`fill` has filled."""


class _Finder(importlib.abc.MetaPathFinder):
    """Calls ``then`` with the module ``name`` when it has been imported, before anything can take a name from it."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_call(module: Any) -> None:
            execute(module)
            self._then(module)

        loader.exec_module = execute_and_call
        return spec


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call ``then`` with the module ``name``, now or when it is imported."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


def act_before(owner: Any, path: str, call: int, text: str, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` before the ``call``-th call of ``path`` in ``owner`` with a word that ``text`` matches.

    Of an object that it is given, a method's own for example, the word is its ``name``; a list holds words. Returns
    what undoes it.
    """
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    before = getattr(owner, name)
    pid = os.getpid()
    calls = 0

    @functools.wraps(before)
    def first_act(*args: Any, **options: Any) -> Any:
        nonlocal calls
        words = [*args, *options.values()]
        for word in list(words):
            words += [getattr(word, "name", ""), *(word if isinstance(word, list) else [])]
        meant = not text or any(re.search(text, str(word)) for word in words if isinstance(word, str | os.PathLike))
        if meant and os.getpid() == pid:
            calls += 1
            if calls == call:
                act()
        return before(*args, **options)

    setattr(owner, name, first_act)
    return lambda: setattr(owner, name, before)


def who_am_i() -> str:
    """``launcher``, ``launch.py`` or ``rank N``; empty in all other processes."""
    words = sys.orig_argv[:4]
    if "deepspeed.launcher.launch" in words:
        return "launch.py"
    if "moe_models.nodes.launcher" in words or "deepspeed.launcher.runner" in words:
        return "launcher"
    if any(word.endswith("finetune.py") for word in words):
        return f"rank {os.environ.get('RANK')}"
    return ""


def hold(folder: str, until: str) -> None:
    """Say so, and wait: for the file ``go``, and with ``until`` "told" at most until this rank has heard its signal."""
    rename = getattr(os.replace, "__wrapped__", os.replace)
    draft = os.path.join(folder, f"{HELD}.draft")
    with open(draft, "w") as file:
        file.write(str(os.getpid()))
    rename(draft, os.path.join(folder, HELD))
    while not os.path.exists(os.path.join(folder, GO)):
        ear = getattr(sys.modules.get("moe_models.engine.signals"), "_ear", None)
        if until == "told" and ear is not None and ear.reason:
            return
        time.sleep(0.01)


def fill(folder: str) -> None:
    """Take all the room that is left on the file system of ``folder``."""
    with open(os.path.join(folder, FILLER), "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _read_variable() -> None:
    stop = json.loads(os.environ.get(VARIABLE, "{}"))
    if not stop or who_am_i() != stop["who"]:
        return
    module, _, path = stop["at"].partition(":")

    def act() -> None:
        if stop["until"] == "full":
            fill(stop["folder"])
        else:
            hold(stop["folder"], stop["until"])

    def install(found: Any) -> None:
        act_before(found, path, stop["call"], stop["text"], act)

    when_imported(module, install)


_read_variable()
