"""Real processes for distributed tests: started once, reused by every test, killed when one of them misbehaves.

A cold ``import deepspeed`` costs about ten seconds, so a cluster of N gloo ranks lives for the whole test session and
runs one module-level function after another on all ranks (:meth:`Cluster.run`). A rank that raises sends its traceback;
a rank that dies or does not answer in time ends the whole cluster, and the next call starts a fresh one. Ranks are
forked from a server process that has the imports behind it (tests/support/warm.py), so a fresh cluster costs a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def forking() -> Any:
    """A multiprocessing context whose processes start with the heavy imports done. For CPU processes only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    return context


class ChildError(AssertionError):
    """A rank failed; the message holds its traceback."""


def free_port() -> int:
    """A TCP port that was free a moment ago.

    It lies below those that the kernel hands out, so no process group of another test takes it before a launcher, which
    imports for seconds, binds it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    choose = random.SystemRandom()  # tests seed the other one
    while True:
        port = choose.randrange(10_000, max(lowest, 20_000))
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Cluster:
    """``world_size`` worker processes joined in one gloo process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        # Where DeepSpeed finds a GPU, the server would settle for it before a rank can say that it wants none.
        on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        context = forking() if on_cpu else multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="moe-recipes-store-")  # a file store needs no port
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, rank, self.world_size, store, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Kill every worker."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180, **kwargs: Any) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on every rank; returns the results in rank order.

        Raises :class:`ChildError` with the traceback of the first rank that failed, died or timed out.
        """
        if not self._processes:
            self._start()
            timeout += 120  # the imports
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * self.world_size
        waiting = set(range(self.world_size))
        failures: dict[int, str] = {}
        while waiting and time.monotonic() < deadline and not failures:
            # A child that a rank leaves behind may keep both open, so a look at the process itself each second.
            opened = [end for rank in waiting for end in (self._pipes[rank], self._processes[rank].sentinel)]
            ready = wait(opened, timeout=1)
            for rank in sorted(waiting):
                pipe, process = self._pipes[rank], self._processes[rank]
                if pipe not in ready and process.is_alive():
                    continue
                try:
                    ok, payload = pipe.recv() if pipe.poll() else (False, _death(process))
                except EOFError:
                    ok, payload = False, _death(process)
                waiting.discard(rank)
                if ok:
                    results[rank] = payload
                else:
                    failures[rank] = payload
        if failures:
            failures.update(self._late_failures(waiting))
        if waiting and not failures:
            failures = dict.fromkeys(waiting, f"no answer within {timeout:.0f} s (a hang?)")
        if failures:
            self.stop()
            raise ChildError(
                "\n".join(f"--- rank {rank} of {self.world_size}:\n{text}" for rank, text in failures.items())
            )
        return results

    def _late_failures(self, waiting: set[int]) -> dict[int, str]:
        """What the other ranks have to say within two seconds of the first failure."""
        found = {}
        for rank in waiting:
            if self._pipes[rank].poll(2.0 / max(1, len(waiting))):
                try:
                    ok, payload = self._pipes[rank].recv()
                except EOFError:
                    continue
                if not ok:
                    found[rank] = payload
        return found


def _death(process: Any) -> str:
    process.join(5)
    return f"process died with exit code {process.exitcode}"


def _worker(pipe: Connection, rank: int, world_size: int, store: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
        TQDM_DISABLE="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    serve(pipe)


def serve(pipe: Connection) -> None:
    """Run what comes through the pipe, one after another, until it is closed."""
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
