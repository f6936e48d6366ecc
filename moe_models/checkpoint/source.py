"""Where an export takes its tensors from: a live engine, or a saved checkpoint folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_models.checkpoint.threads import each


class TensorSource(Protocol):
    """Where an export takes its tensors from. A collective source returns None on ranks that do not write."""

    dtype: torch.dtype
    spread: bool
    """Whether :meth:`experts` leaves the experts on the ranks that hold them, for these to write."""

    def writers(self) -> list[int]:
        """The ranks that hold one copy of the experts together, rank 0 among them; just rank 0 where it holds all."""

    def dense(self, name: str) -> torch.Tensor | None:
        """The full tensor with this module-layout name, on CPU."""

    def experts(self, block: str, projection: str) -> tuple[torch.Tensor, range] | None:
        """(experts of ``block`` for ``projection``, which of the E they are), on CPU: all of them, or this rank's.

        ``block`` is the module path; ``projection`` is gate, up or down.
        """

    def unasked(self) -> Iterable[str]:
        """Names of trained tensors that were not asked for so far."""


def is_writer() -> bool:
    """Whether this process writes the folder: rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def fingerprints(tensors: Iterable[torch.Tensor]) -> list[int]:
    """:func:`fingerprint` of each."""
    return each(fingerprint, tensors)


def fingerprint(tensor: torch.Tensor) -> int:
    """CRC-32 of the tensor's bytes: equal for equal bits, whatever device, stride or rank they come from."""
    content: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)
