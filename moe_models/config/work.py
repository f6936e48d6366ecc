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
    """Forward passes in one optimizer step."""
    element_bytes: int = 2
    """Bytes of one activation or weight: 2 in bf16 and fp16, 4 in fp32."""
    recompute: bool = True
    """Activation checkpointing of each decoder layer: the backward pass repeats its forward."""
