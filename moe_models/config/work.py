"""What a rank computes in one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank computes in one optimizer step."""

    micro_batch: int
    """Sequences in one forward pass."""
    length: int
    """Tokens in one sequence (the longest, for an upper bound)."""
    accumulation: int = 1
    """Micro-batches in one optimizer step: each has one forward and one backward pass."""
    element_bytes: int = 2
    """Bytes of one activation or weight: 2 in bf16 and fp16, 4 in fp32."""
    recompute: bool = True
    """Activation checkpointing of each decoder layer: the backward pass repeats its forward pass."""

    @property
    def forwards(self) -> int:
        """Forward passes in one optimizer step, repeated ones too."""
        once = 2 if self.recompute else 1
        return self.accumulation * once

    @property
    def compute_factor(self) -> float:
        """Compute of a step over that without recomputation: a backward pass costs two forward passes."""
        return 4 / 3 if self.recompute else 1.0
