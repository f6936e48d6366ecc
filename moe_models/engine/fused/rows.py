"""What happens to the rows of an MoE layer around its matrix products: ordered by expert, gathered, weighed, summed.

Each function is written here in plain torch. That is what CPU processes run, and what the kernels are compared with. On
a GPU the Triton kernel of the same name (``kernels.py``) does the same in one launch, or in three (:func:`order`).
Nothing here waits for the device, and every shape follows from the shapes of the arguments.

Shapes: T tokens, K choices of each, R = T x K rows, E experts that this rank holds, D hidden size, F FFN size. A choice
of an expert that this rank does not hold has no row. So rows behind the last expert's are empty: they hold anything,
and nothing reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu


class Order(NamedTuple):
    """Which row belongs to which choice of which token. Rows of one expert are neighbours, in the order of tokens."""

    ends_E: torch.Tensor
    """Where each expert's rows end; int32. The last one counts the rows that are in use."""
    token_R: torch.Tensor
    """The token of each row; int32."""
    choice_R: torch.Tensor
    """The choice of each row, t x K + k; int32."""
    row_TK: torch.Tensor
    """The row of each choice, -1 for none; int32."""


def order(ids_TK: torch.Tensor, E: int) -> Order:
    """Rows by expert. ``ids_TK`` below 0 or from E on are choices of experts that other ranks hold."""
    if ids_TK.is_cuda:
        from moe_models.engine.fused import kernels

        return Order(*kernels.order(ids_TK, E))
    # 1. What this rank does not hold goes behind everything else.
    T, K = ids_TK.shape
    expert_R = ids_TK.reshape(-1)
    expert_R = torch.where((expert_R >= 0) & (expert_R < E), expert_R, E)
    # 2. Stable: a token that comes earlier has the earlier row.
    choice_R = torch.argsort(expert_R, stable=True)
    counts = torch.zeros(E + 1, dtype=torch.int32, device=ids_TK.device)
    counts.scatter_add_(0, expert_R.long(), torch.ones_like(expert_R, dtype=torch.int32))
    ends_E = counts[:E].cumsum(0, dtype=torch.int32)
    # 3. The way back.
    row_R = torch.empty_like(choice_R)
    row_R[choice_R] = torch.arange(T * K, device=ids_TK.device)
    row_R = torch.where(row_R < ends_E[-1], row_R, -1)
    return Order(ends_E, (choice_R // K).int(), choice_R.int(), row_R.view(T, K).int())


def gather(x_TD: torch.Tensor, order: Order) -> torch.Tensor:
    """Each row's token, [R, D]."""
    if x_TD.is_cuda:
        from moe_models.engine.fused import kernels

        return kernels.gather(x_TD, order.token_R, order.ends_E)
    return x_TD.index_select(0, order.token_R)


def combine(
    rows_RD: torch.Tensor, order: Order, scores_TK: torch.Tensor | None = None, more_RD: torch.Tensor | None = None
) -> torch.Tensor:
    """Each token's rows (with ``more_RD`` added), weighed by ``scores_TK`` and summed in fp32, [T, D]."""
    if rows_RD.is_cuda:
        from moe_models.engine.fused import kernels

        return kernels.combine(rows_RD, order.row_TK, scores_TK, more_RD)
    there_TK = order.row_TK >= 0
    row_TK = order.row_TK.clamp_min(0)
    rows_TKD = rows_RD[row_TK].float()
    if more_RD is not None:
        rows_TKD = rows_TKD + more_RD[row_TK].float()
    if scores_TK is not None:
        rows_TKD = rows_TKD * scores_TK[..., None]
    kept_TKD = torch.where(there_TK[..., None], rows_TKD, 0.0)  # an empty row may hold a NaN, and NaN x 0 is NaN
    return kept_TKD.sum(1).to(rows_RD.dtype)


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor, order: Order) -> torch.Tensor:
    """silu(gate) x up, computed in fp32."""
    if gate_RF.is_cuda:
        from moe_models.engine.fused import kernels

        return kernels.swiglu(gate_RF, up_RF, order.ends_E)
    return (silu(gate_RF.float()) * up_RF.float()).to(gate_RF.dtype)


def swiglu_backward(
    dh_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor, scores_TK: torch.Tensor, order: Order
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of h = :func:`swiglu` before the score weighs it: (dgate, dup, score x h, dscores).

    The output of a row is score x down(h). So the score's gradient is <dout, down(h)> = <dh, h>, and the output of the
    down projection need not be kept. ``score x h`` is what the down projection's own gradient needs.
    """
    if gate_RF.is_cuda:
        from moe_models.engine.fused import kernels

        return kernels.swiglu_backward(dh_RF, gate_RF, up_RF, scores_TK, order.choice_R, order.ends_E)
    # 1. h once more.
    gate = gate_RF.float()
    up = up_RF.float()
    sigmoid = gate.sigmoid()
    h = gate * sigmoid * up
    # 2. The scores' gradients; a choice without a row has none.
    dh = dh_RF.float()
    in_use_R = torch.arange(len(h), device=h.device) < order.ends_E[-1]
    dscore_R = torch.where(in_use_R, (dh * h).sum(-1), 0.0)
    dscores_TK = torch.empty_like(scores_TK)
    dscores_TK.view(-1)[order.choice_R.long()] = dscore_R
    # 3. The rows' own gradients: d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g).
    score_R1 = scores_TK.reshape(-1)[order.choice_R.long(), None]
    dweighted = dh * score_R1
    dgate = dweighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dweighted * gate * sigmoid
    dtype = gate_RF.dtype
    return dgate.to(dtype), dup.to(dtype), (h * score_R1).to(dtype), dscores_TK
