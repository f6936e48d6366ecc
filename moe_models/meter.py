"""What a run measured about itself: speed and memory, over all ranks."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Seconds spent inside optimizer steps, the first apart: it pays for compilation and lazy buffers."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock (evaluation and saving lie outside of it)."""
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it; CUDA work still queued is counted in the next step."""
        self.seconds.append(time.perf_counter() - self._begun)

    def tokens_per_second(self, tokens: int) -> float:
        """Tokens per second over all ranks, if ``tokens`` were trained on in all steps of equal size."""
        steady = self.seconds[1:] or self.seconds
        return tokens * (len(steady) / len(self.seconds)) / sum(steady) if steady else 0.0


def peak_memory_gib() -> float:
    """Largest memory any rank has had so far in GiB: allocated on the GPU, or resident where there is none."""
    if torch.cuda.is_available():
        mine = torch.cuda.max_memory_allocated() / 2**30
    else:
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
    peak = torch.tensor(mine, device="cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)
