"""The selection bias: balancing without a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_models.routing.tap import Router


class SelectionBias:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): a bias on the scores that choose experts, not on their weights.

    After each optimizer step the bias of an overloaded expert falls by ``rate``, that of an underloaded one rises. It
    lives where the router looks for it: in ``e_score_correction_bias`` (DeepSeek-V3), or in AutoEP's ``expert_bias``.
    Kept in fp32: in bf16 a step of 0.001 on a bias of 1 would be lost.
    """

    def __init__(self, routers: list[Router], num_experts: int, rate: float, device: Any) -> None:
        self._routers, self._rate = routers, rate
        self.bias_LE = torch.zeros(len(routers), num_experts, device=device)
        for row_E, router in zip(self.bias_LE, routers, strict=True):
            own = getattr(router.module, "e_score_correction_bias", None)
            if own is not None:
                row_E.copy_(own)
        self.exportable = all(getattr(router.module, "e_score_correction_bias", None) is not None for router in routers)
        self.connect()

    def connect(self) -> None:
        """Let every router choose with its row."""
        for row_E, router in zip(self.bias_LE, self._routers, strict=True):
            if self.exportable:
                router.module._buffers["e_score_correction_bias"] = row_E
            elif router.is_autoep:
                router.layer.expert_bias = row_E
            else:
                raise ValueError(f"{router.block}: its router has no place for a selection bias")

    def disconnect(self) -> None:
        """Route as the exported model will, where its architecture has no place for the bias."""
        if not self.exportable:
            for router in self._routers:
                router.layer.expert_bias = None

    @torch.no_grad()
    def update(self, counts_LE: torch.Tensor) -> None:
        """Move by the sign of the load error; ``counts_LE`` are those of all ranks."""
        error_LE = counts_LE.mean(-1, keepdim=True) - counts_LE
        self.bias_LE += self._rate * error_LE.sign().to(self.bias_LE.dtype)

    def state(self) -> dict[str, list[float]]:
        """The bias of each block, [E], for a checkpoint; fp32 survives the way through Python floats exactly."""
        return {router.block: row_E.tolist() for router, row_E in zip(self._routers, self.bias_LE, strict=True)}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Go on from :meth:`state`. Raises KeyError for a block that it lacks."""
        for router, row_E in zip(self._routers, self.bias_LE, strict=True):
            row_E.copy_(torch.tensor(state[router.block]))
