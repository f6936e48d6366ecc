"""Finite or stop: a loss, gradient or weight that is NaN or infinite must not reach a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moe_models.errors import RunError


class TrainingStoppedError(RunError):
    """The run ended itself to protect what it had; the message says why and what to do."""


class FiniteWatch:
    """Remembers whether everything was finite so far, without making the host wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)

    def see(self, loss: torch.Tensor) -> None:
        """Remember one micro-batch's loss; stays on the device."""
        self._all_finite &= torch.isfinite(loss)

    def is_finite(self, grad_norm: Any = None, weights_of: torch.nn.Module | None = None) -> bool:
        """Whether all losses, ``grad_norm`` and the weights of a model are finite on every rank (collective).

        Args:
            grad_norm: a number or tensor; None where it does not count.
            weights_of: the model to look at. A finite gradient can still take a weight beyond what its dtype holds.
        """
        finite = self._all_finite.float()
        if grad_norm is not None:
            norm = torch.as_tensor(grad_norm, device=finite.device)
            finite *= torch.isfinite(norm).float().squeeze()
        if weights_of is not None:
            for parameter in weights_of.parameters():
                held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this rank's partition
                finite *= torch.isfinite(held.detach()).all().to(finite.device)
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite.item() == 1.0)
