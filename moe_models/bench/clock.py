"""The clock of one benchmark row: times between the ends of optimizer steps, peak memory, and a profile afterwards.

Warm-up steps, timed steps, then profiled steps, in this order: the profiler slows what it watches. On CUDA the ends of
steps are events on the stream, so that nothing waits for the clock.
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


class Clock:
    """Call :meth:`begin` when the engine stands, and :meth:`step_end` after each optimizer step."""

    def __init__(self, device: torch.device, warmup: int, steps: int, profiled: int) -> None:
        self.device, self.warmup, self.steps, self.profiled = device, warmup, steps, profiled
        self.on_profile: Callable[[], None] = lambda: None
        """Called before the profiled steps."""
        self.figures: dict[str, Any] = {}
        self._marks: list[Any] = []
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
                self._marks[-1] = self._mark()
        elif done == self.total and self._profiler is not None:
            self._wait()
            profiler, self._profiler = self._profiler, None
            try:
                profiler.__exit__(None, None, None)
                self._read_profile(profiler)
            except Exception as error:  # of kineto: the times above stand without it
                self.figures["profile_error"] = f"{type(error).__name__}: {error}"

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return end - start if self.device.type != "cuda" else float(start.elapsed_time(end)) / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _read_times(self) -> None:
        self._wait()
        ends = self._marks[self.warmup :]
        seconds = [self._seconds(a, b) for a, b in pairwise(ends)]
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
        self._profiler = torch.profiler.profile(
            activities=[activity.CUDA if self.device.type == "cuda" else activity.CPU]
        )
        self._profiler.__enter__()

    def _read_profile(self, profiler: Any) -> None:
        whole = self._seconds(self._marks[-1 - self.profiled], self._marks[-1])
        optimizer = sum(self._seconds(start, end) for start, end in self._optimizer_spans)
        self.figures |= {"profiled_step_seconds": whole / self.profiled, "optimizer_share": optimizer / whole}
        on_gpu = self.device.type == "cuda"
        prefix = "nccl" if on_gpu else "gloo:"
        talking: list[tuple[float, float]] = []
        named: list[tuple[float, float, str]] = []
        working: list[tuple[float, float]] = []
        by_name: dict[str, float] = {}
        for event in profiler.events():
            if on_gpu != (event.device_type.name == "CUDA"):
                continue
            if on_gpu and (event.name.startswith("Mem") or getattr(event, "is_user_annotation", False)):
                continue  # copies take no multiprocessor; annotations span kernels that are listed themselves
            span = (event.time_range.start, event.time_range.end)
            if event.name.lower().startswith(prefix):
                talking.append(span)
            elif on_gpu:
                working.append(span)
            name = event.name[:120]  # templates that begin alike count as one kernel
            named.append((*span, name))
            if on_gpu or event.name.startswith(prefix):
                by_name[name] = by_name.get(name, 0.0) + span[1] - span[0]
        together = covered(talking + working)
        self.figures["communication_share"] = covered(talking) / 1e6 / whole
        if on_gpu:  # what no other kernel hides, and the time in which the GPU had nothing to do
            self.figures["exposed_communication_share"] = (together - covered(working)) / 1e6 / whole
            self.figures["idle_share"] = max(0.0, 1 - together / 1e6 / whole)
            waited = sorted(waits(named).items(), key=lambda item: -item[1])[:25]
            self.figures["waited_for"] = {name: round(us / 1e6 / whole, 4) for name, us in waited}
        longest = sorted(by_name.items(), key=lambda item: -item[1])[:25]
        self.figures["longest_kernels"] = {name: round(us / 1e6 / whole, 4) for name, us in longest}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
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
