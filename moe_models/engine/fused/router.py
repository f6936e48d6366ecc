"""AutoEP's router with everything behind its gate in one kernel: softmax, choice, scores, counts.

Only on GPUs, and only for what the kernel computes. Elsewhere DeepSpeed's own code runs, which is also what the kernel
is compared with. Where two scores are equal, the kernel takes the expert that comes first, and torch's top-k any.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch.autograd.function import once_differentiable

MOST_EXPERTS = 1024
"""Scores of a token that one warp holds."""


class _Route(torch.autograd.Function):
    """Logits [T, E] to (scores [T, K] fp32, experts [T, K], tokens of each expert [E])."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, K: int, normalise: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from moe_models.engine.fused import kernels

        logits_TE = logits_TE.contiguous()
        scores_TK, ids_TK, counts_E, log_sum_T = kernels.route(logits_TE, bias_E, K, normalise=normalise, scale=scale)
        ctx.options = {"normalise": normalise, "scale": scale}
        ctx.save_for_backward(logits_TE, log_sum_T, ids_TK)
        ctx.mark_non_differentiable(ids_TK, counts_E)
        return scores_TK, ids_TK, counts_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores_TK: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        from moe_models.engine.fused import kernels

        logits_TE, log_sum_T, ids_TK = ctx.saved_tensors
        return kernels.route_backward(logits_TE, log_sum_T, ids_TK, dscores_TK, **ctx.options), None, None, None, None


class FusedRouter(TokenChoiceTopKRouter):  # type: ignore[misc]
    """AutoEP's router; its gate is called as before, so that hooks see the logits."""

    def forward(self, x_TD: torch.Tensor, expert_bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """(scores [T, K] fp32, experts [T, K], tokens of each expert [E])."""
        if not (x_TD.is_cuda and len(x_TD) and self._in_one_kernel()):
            plain: tuple[torch.Tensor, ...] = super().forward(x_TD, expert_bias)
            return plain
        logits_TE = self.gate(x_TD)
        routed: tuple[torch.Tensor, ...] = _Route.apply(  # type: ignore[no-untyped-call]
            logits_TE, expert_bias, self.top_k, bool(self.route_norm), float(self.route_scale)
        )
        return routed

    def _in_one_kernel(self) -> bool:
        """Whether the kernel computes this router: softmax, without groups of experts and without DeepSeek's bias."""
        plain = self.num_expert_groups is None and self.e_score_correction_bias is None
        return plain and self.score_func == "softmax" and self.num_experts <= MOST_EXPERTS
