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
        """Start from the bias that the routers have, or from zero.

        Args:
            blocks: the MoE blocks, in layer order.
            num_experts: E, the same in all layers.
            rate: how far the bias moves in a step (``bias_update_rate`` of the JSON).
            device: where the routers compute.

        Raises:
            ValueError: a router has no place for a bias.
        """
        self._blocks = blocks
        self._rate = rate
        self.bias_LE = torch.zeros(len(blocks), num_experts, device=device)
        own_biases = [own_bias(block) for block in blocks]
        for row_E, own_E in zip(self.bias_LE, own_biases, strict=True):
            if own_E is not None:
                row_E.copy_(own_E)
        self.exportable = all(own_E is not None for own_E in own_biases)
        self.connect()

    def connect(self) -> None:
        """Let every router choose with its row of ``bias_LE``: it holds a view, so an update reaches it."""
        for row_E, block in zip(self.bias_LE, self._blocks, strict=True):
            block.set_bias(row_E)

    def disconnect(self) -> None:
        """Route as the exported model will, where its architecture has no place for the bias."""
        if not self.exportable:
            for block in self._blocks:
                block.set_bias(None)

    @torch.no_grad()
    def update(self, counts_LE: torch.Tensor) -> None:
        """One step of the paper's algorithm 1; ``counts_LE`` are the choices of all ranks in one optimizer step."""
        # 1. Positive for an expert that got less than the mean of its layer.
        error_LE = counts_LE.mean(-1, keepdim=True) - counts_LE
        # 2. Only the sign counts: how far off an expert is does not change the step.
        self.bias_LE += self._rate * error_LE.sign().to(self.bias_LE.dtype)

    def state(self) -> dict[str, list[float]]:
        """The bias of each block, [E], for a checkpoint; Python floats hold fp32 exactly."""
        return {block.path: row_E.tolist() for block, row_E in zip(self._blocks, self.bias_LE, strict=True)}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Go on from :meth:`state`. Raises KeyError for a block that it lacks."""
        for block, row_E in zip(self._blocks, self.bias_LE, strict=True):
            row_E.copy_(torch.tensor(state[block.path]))
