"""A few threads for work that releases Python's lock: reads, writes, checksums of tensors.

A launcher gives each rank one core for torch's own loops (``OMP_NUM_THREADS``), while a node has many for each GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

THREADS = 4
"""For one rank; more do not make a disk faster."""


def each(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """``[function(item) for item in items]``, several at a time; ``function`` must not call :func:`each` itself.

    Raises what the first of them raised, when all have ended.
    """
    work = list(items)
    if len(work) == 1:
        return [function(work[0])]
    running = [_threads(os.getpid()).submit(function, item) for item in work]
    problems = [problem for problem in (task.exception() for task in running) if problem is not None]
    if problems:
        raise problems[0]
    return [task.result() for task in running]


@cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """The threads of this process; they do not survive a fork."""
    # upstream: torch 2.13.0: in a forked process the first threads that compute race to replace the pool that the fork
    # broke, and one finds none ("Invalid thread pool!"). Remove when: that is done under a lock.
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="tensors")
