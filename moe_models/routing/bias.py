"""The selection bias: balancing without a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_models.engine.blocks import Block, own_bias


class SelectionBias:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): a bias on the scores that choose experts, not on their weights.

    After each optimizer step the bias of an overloaded expert falls by ``rate``, that of an underloaded one rises. It
    lives where the router looks for it: in ``e_score_correction_bias`` (DeepSeek-V3), or in AutoEP's ``expert_bias``.
    Kept in fp32: in bf16 a step of 0.001 on a bias of 1 would be lost.
    """

    def __init__(self, blocks: Sequence[Block], num_experts: int, rate: float, device: Any) -> None:
        self._blocks = blocks
        self._rate = rate
        self.bias_LE = torch.zeros(len(blocks), num_experts, device=device)
        own = [own_bias(block) for block in blocks]
        for row_E, bias_E in zip(self.bias_LE, own, strict=True):
            if bias_E is not None:
                row_E.copy_(bias_E)
        self.exportable = all(bias_E is not None for bias_E in own)
        self.connect()

    def connect(self) -> None:
        """Let every router choose with its row."""
        for row_E, block in zip(self.bias_LE, self._blocks, strict=True):
            block.set_bias(row_E)

    def disconnect(self) -> None:
        """Route as the exported model will, where its architecture has no place for the bias."""
        if not self.exportable:
            for block in self._blocks:
                block.set_bias(None)

    @torch.no_grad()
    def update(self, counts_LE: torch.Tensor) -> None:
        """Move by the sign of the load error; ``counts_LE`` are those of all ranks."""
        error_LE = counts_LE.mean(-1, keepdim=True) - counts_LE
        self.bias_LE += self._rate * error_LE.sign().to(self.bias_LE.dtype)

    def state(self) -> dict[str, list[float]]:
        """The bias of each block, [E], for a checkpoint; fp32 survives the way through Python floats exactly."""
        return {block.path: row_E.tolist() for block, row_E in zip(self._blocks, self.bias_LE, strict=True)}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Go on from :meth:`state`. Raises KeyError for a block that it lacks."""
        for block, row_E in zip(self._blocks, self.bias_LE, strict=True):
            row_E.copy_(torch.tensor(state[block.path]))
