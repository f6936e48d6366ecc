"""What a run measured about itself: speed and memory, over all ranks."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Seconds spent inside optimizer steps; evaluation and saving are outside."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """One number for each optimizer step."""
        self._begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it. CUDA work that is still queued counts in the next step."""
        self.seconds.append(time.perf_counter() - self._begun)

    def tokens_per_second(self, tokens: int) -> float:
        """Tokens per second over all ranks, if ``tokens`` were trained on in all steps of equal size.

        The first step is left out where there are others: it pays for compilation and lazy buffers.
        """
        steady = self.seconds[1:] or self.seconds
        if not steady:
            return 0.0
        steady_tokens = tokens * (len(steady) / len(self.seconds))
        return steady_tokens / sum(steady)


def peak_memory_gib() -> float:
    """Largest memory of any rank so far in GiB: allocated on the GPU, or resident where there is none. Collective."""
    if torch.cuda.is_available():
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device="cuda")
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
        peak = torch.tensor(kib / 2**20)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)
