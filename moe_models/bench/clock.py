"""The clock of one benchmark row: times between the ends of optimizer steps, peak memory, and a profile afterwards.

Warm-up steps, timed steps, then profiled steps, in this order: the profiler slows what it watches. On CUDA the ends of
steps are events on the stream, so that nothing waits for the clock.

Times are seconds, except those of the profiler's events, which are microseconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

GIB = 2**30
MOST_KERNELS = 25
"""Kernels that are listed by name, those with the most time first."""
NAME_LENGTH = 120
"""Characters of a kernel's name: templates that begin alike count as one kernel."""

Span = tuple[float, float]
"""(start, end) in microseconds."""


class Clock:
    """Call :meth:`begin` when everything is built, and :meth:`step_end` after each optimizer step."""

    def __init__(self, device: torch.device, warmup: int, steps: int, profiled: int) -> None:
        self.device = device
        self.warmup = warmup
        self.steps = steps
        self.profiled = profiled
        self.on_profile: Callable[[], None] = lambda: None
        """Called before the profiled steps."""
        self.figures: dict[str, Any] = {}
        """What was measured. ``*_share`` are parts of the time of the profiled steps."""
        self._marks: list[Any] = []  # the beginning, then the end of every step
        self._profiler: Any = None
        self._optimizer_spans: list[tuple[Any, Any]] = []

    @property
    def total(self) -> int:
        """Optimizer steps of the row."""
        return self.warmup + self.steps + self.profiled

    def begin(self, optimizer: Any) -> None:
        """Everything is built: memory is counted from here, and ``optimizer.step`` is timed while profiling."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        take_step = optimizer.step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            if self._profiler is None:
                return take_step(*args, **kwargs)
            start = self._mark()
            result = take_step(*args, **kwargs)
            self._optimizer_spans.append((start, self._mark()))
            return result

        # upstream: deepspeed 0.19.8: its engine offers no hook around optimizer.step, only timers that wait for the GPU
        # in each step; torch's hooks of an optimizer are not called for ZeRO's. Remove when: it has such a hook.
        optimizer.step = timed_step
        self._marks.append(self._mark())

    def step_end(self) -> None:
        """One optimizer step is over, or on CUDA: queued."""
        self._marks.append(self._mark())
        done = len(self._marks) - 1
        if done == self.warmup + self.steps:
            self._read_times()
            if self.profiled:
                self.on_profile()
                self._start_profiler()
                self._marks[-1] = self._mark()  # the profiled steps begin here, after the profiler's own start
        elif done == self.total and self._profiler is not None:
            self._wait()
            profiler = self._profiler
            self._profiler = None
            try:
                profiler.__exit__(None, None, None)
                self._read_profile(profiler)
            except Exception as error:  # of kineto: the times above hold without it
                self.figures["profile_error"] = f"{type(error).__name__}: {error}"

    def _mark(self) -> Any:
        """Now: a number of seconds, or on CUDA an event on the stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""
        if self.device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _read_times(self) -> None:
        """Step times and memory of the timed steps."""
        self._wait()
        ends = self._marks[self.warmup :]
        seconds = [self._seconds(start, end) for start, end in pairwise(ends)]
        self.figures |= {
            "step_seconds": median(seconds),
            "step_seconds_mean": sum(seconds) / len(seconds),
            "step_seconds_all": [round(value, 6) for value in seconds],
        }
        if self.device.type == "cuda":
            self.figures |= {
                "peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
            }

    # --- where the time goes

    def _start_profiler(self) -> None:
        activity = torch.profiler.ProfilerActivity
        watched = activity.CUDA if self.device.type == "cuda" else activity.CPU
        self._profiler = torch.profiler.profile(activities=[watched])
        self._profiler.__enter__()

    def _read_profile(self, profiler: Any) -> None:
        """Shares of the profiled steps, all of them together."""
        # 1. The whole, between marks of our own; the profiler's events lie within.
        whole = self._seconds(self._marks[-1 - self.profiled], self._marks[-1])
        optimizer = sum(self._seconds(start, end) for start, end in self._optimizer_spans)
        self.figures |= {"profiled_step_seconds": whole / self.profiled, "optimizer_share": optimizer / whole}

        # 2. The events: those that talk to other ranks, those that work, and the time under each name. On CUDA these
        #    are kernels. On CPU only gloo's are counted: everything else there is nested in one another.
        on_gpu = self.device.type == "cuda"
        prefix = "nccl" if on_gpu else "gloo:"
        talking: list[Span] = []
        working: list[Span] = []
        named: list[tuple[float, float, str]] = []
        time_of: dict[str, float] = {}
        for event in profiler.events():
            if on_gpu != (event.device_type.name == "CUDA"):
                continue
            if on_gpu and (event.name.startswith("Mem") or getattr(event, "is_user_annotation", False)):
                continue  # copies take no multiprocessor; annotations span kernels that are listed themselves
            start = event.time_range.start
            end = event.time_range.end
            name = event.name[:NAME_LENGTH]
            if event.name.lower().startswith(prefix):
                talking.append((start, end))
            elif on_gpu:
                working.append((start, end))
            named.append((start, end, name))
            if on_gpu or event.name.startswith(prefix):
                time_of[name] = time_of.get(name, 0.0) + end - start

        # 3. Communication: overlapping events count once. On CUDA also what no other kernel hides, and the time in
        #    which the GPU had nothing to do, by the kernel that it waited for.
        microseconds = whole * 1e6
        self.figures["communication_share"] = covered(talking) / microseconds
        if on_gpu:
            busy = covered(talking + working)
            self.figures["exposed_communication_share"] = (busy - covered(working)) / microseconds
            self.figures["idle_share"] = max(0.0, 1 - busy / microseconds)
            self.figures["waited_for"] = _largest_shares(waits(named), microseconds)
        self.figures["longest_kernels"] = _largest_shares(time_of, microseconds)


def _largest_shares(time_of: dict[str, float], whole: float) -> dict[str, float]:
    """Name -> share of ``whole``, the largest first."""
    ranked = sorted(time_of.items(), key=lambda item: -item[1])
    return {name: round(spent / whole, 4) for name, spent in ranked[:MOST_KERNELS]}


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of intervals."""
    total = 0.0
    reached = float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def waits(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Time in which nothing ran, by the name of what ran next: what the GPU was waiting for."""
    found: dict[str, float] = {}
    reached: float | None = None
    for start, end, name in sorted(spans):
        if reached is not None and start > reached:
            found[name] = found.get(name, 0.0) + start - reached
        reached = end if reached is None else max(reached, end)
    return found
