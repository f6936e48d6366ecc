"""The experts of an MoE layer as one autograd node, from tokens to the weighted sum of their experts' outputs.

One node for all of it has three merits over a chain of small operations. It launches a third of the kernels. Tokens are
gathered and summed by their order in both directions, where the backward pass of an indexed read would sort. And it
keeps what the backward pass needs, no more: gate and up, but neither their product nor the output of the down
projection, of which only the scores' gradient would make use (``rows.swiglu_backward``).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moe_models.engine.fused import rows


class _Experts(torch.autograd.Function):
    """Shapes are those of ``rows.py``: w1 (gate) and w3 (up) are [E, F, D], w2 (down) is [E, D, F]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor,
        w1_EFD: torch.Tensor, w2_EDF: torch.Tensor, w3_EFD: torch.Tensor, keep_rows: bool,
    ) -> torch.Tensor:  # fmt: skip
        # 1. Which row belongs to which token.
        order = rows.order(ids_TK, w1_EFD.shape[0])
        x_RD = rows.gather(x_TD, order)
        # 2. down(silu(gate(x)) * up(x)), for each expert with its own rows.
        gate_RF = grouped_mm(x_RD, w1_EFD.transpose(1, 2), offs=order.ends_E)
        up_RF = grouped_mm(x_RD, w3_EFD.transpose(1, 2), offs=order.ends_E)
        h_RF = rows.swiglu(gate_RF, up_RF, order)
        y_RD = grouped_mm(h_RF, w2_EDF.transpose(1, 2), offs=order.ends_E)
        # 3. Back to tokens.
        y_TD = rows.combine(y_RD, order, scores_TK)
        kept = x_RD if keep_rows else x_TD
        ctx.keep_rows = keep_rows
        ctx.save_for_backward(kept, gate_RF, up_RF, scores_TK, w1_EFD, w2_EDF, w3_EFD, *order)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, gate_RF, up_RF, scores_TK, w1_EFD, w2_EDF, w3_EFD, *ordered = ctx.saved_tensors
        order = rows.Order(*ordered)
        needs_x, _, _, needs_w1, needs_w2, needs_w3, _ = ctx.needs_input_grad
        dx_TD = dw1 = dw2 = dw3 = None

        # 1. Through the down projection. The score weighs in step 2.
        dy_RD = rows.gather(dy_TD, order)
        dh_RF = grouped_mm(dy_RD, w2_EDF, offs=order.ends_E)

        # 2. Through SwiGLU, with the scores' gradients.
        dgate_RF, dup_RF, weighted_RF, dscores_TK = rows.swiglu_backward(dh_RF, gate_RF, up_RF, scores_TK, order)
        del dh_RF, gate_RF, up_RF
        if needs_w2:
            dw2 = grouped_mm(dy_RD.t(), weighted_RF, offs=order.ends_E)
        del dy_RD, weighted_RF

        # 3. Through gate and up.
        if needs_x:
            dx_RD = grouped_mm(dgate_RF, w1_EFD, offs=order.ends_E)
            more_RD = grouped_mm(dup_RF, w3_EFD, offs=order.ends_E)
            dx_TD = rows.combine(dx_RD, order, more_RD=more_RD)
            del dx_RD, more_RD
        if needs_w1 or needs_w3:
            x_RD = x if ctx.keep_rows else rows.gather(x, order)
            if needs_w1:
                dw1 = grouped_mm(dgate_RF.t(), x_RD, offs=order.ends_E)
            if needs_w3:
                dw3 = grouped_mm(dup_RF.t(), x_RD, offs=order.ends_E)
        return dx_TD, None, dscores_TK, dw1, dw2, dw3, None


class FusedExperts(GroupedExperts):  # type: ignore[misc]
    """AutoEP's experts, with their parameters as they are, and :class:`_Experts` as their forward pass."""

    def forward(  # type: ignore[override]
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, keep_rows: bool = True
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, [T, D], as far as this rank holds them.

        Args:
            x_TD: tokens.
            ids_TK: experts of each token, counted from this rank's first. Others (below 0, from E on) are left out.
            scores_TK: their weights, fp32.
            keep_rows: keep gathered rows for the backward pass. False keeps the tokens and gathers again.
        """
        weights = [weight.to(x_TD.dtype) for weight in (self.w1, self.w2, self.w3)]
        if ids_TK.numel() == 0:  # no token came here; the graph must still lead to the exchange and to the weights
            nothing: torch.Tensor = scores_TK.sum() + sum(weight[:0].sum() for weight in weights)
            return x_TD * nothing
        y_TD: torch.Tensor = _Experts.apply(x_TD, ids_TK, scores_TK, *weights, keep_rows)  # type: ignore[no-untyped-call]
        return y_TD
