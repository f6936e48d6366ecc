"""Tokens to their experts' ranks and back, in the two ways that a fused layer knows.

*All-to-all*: each rank sends a row for each choice to the rank that holds its expert, and gets it back. It has to learn
first how many rows come, and so the host waits for the device once in each forward pass.

*All-gather and reduce-scatter*: every rank gets the tokens of all, computes what its experts have to say about them,
and the parts are summed on the way back. The shapes follow from how many tokens the ranks have, which the hosts tell
each other. So nothing waits for a device. It moves (EP - 1) rows for each token where the all-to-all moves
K x (EP - 1) / EP: fewer where EP is below K.

Shapes: T tokens of this rank, P = EP x the most tokens of a rank of the group, R rows.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import SplitPlan
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from moe_models.engine.fused import rows

ELSEWHERE = -1
"""Expert of a token that only fills up."""


class Lengths:
    """How many tokens the ranks of an EP group have in this forward pass, so that all can send the same number.

    Batches are padded to their own longest row, so ranks differ. The hosts tell each other over gloo: a count that came
    over the GPUs would make each host wait for its GPU.
    """

    def __init__(self, ep_group: Any) -> None:
        ranks = torch.distributed.get_process_group_ranks(ep_group)
        self._group = ep_group
        if torch.distributed.get_backend(ep_group) != "gloo":
            self._group = torch.distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._counts = torch.zeros(len(ranks), dtype=torch.int64)
        self.longest = 0
        """The most tokens that a rank of the group has."""

    def exchange(self, tokens: int) -> None:
        """Tell the others, and learn theirs; collective."""
        mine = torch.full((1,), tokens, dtype=torch.int64)
        torch.distributed.all_gather(list(self._counts.chunk(len(self._counts))), mine, group=self._group)
        self.longest = int(self._counts.numpy().max())  # numpy() reads host memory only: this can wait for no GPU


def _from_all(mine: torch.Tensor, longest: int, group: Any, filler: float = 0) -> torch.Tensor:
    """Every rank's rows below each other, filled up to ``longest`` rows each."""
    missing = longest - mine.shape[0]
    if missing:
        mine = pad(mine, (0, 0, 0, missing), value=filler)
    everything = mine.new_empty(longest * dist.get_world_size(group), mine.shape[1])
    dist.all_gather_into_tensor(everything, mine.contiguous(), group=group)
    return everything


def _summed(parts: torch.Tensor, longest: int, own: int, group: Any) -> torch.Tensor:
    """The sum over ranks of this rank's ``own`` rows."""
    mine = parts.new_empty(longest, parts.shape[1])
    dist.reduce_scatter_tensor(mine, parts.contiguous(), group=group)
    return mine[:own]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, longest: int, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.sizes = (longest, x_TD.shape[0], group)
        x_PD = _from_all(x_TD, longest, group)
        ids_PK = _from_all(ids_TK, longest, group, ELSEWHERE)
        scores_PK = _from_all(scores_TK, longest, group)
        ctx.mark_non_differentiable(ids_PK)
        return x_PD, ids_PK, scores_PK

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dx_PD: torch.Tensor, _: Any, dscores_PK: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return _summed(dx_PD, *ctx.sizes), None, _summed(dscores_PK, *ctx.sizes), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, longest: int, own: int, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.sizes = (longest, group)
        return _summed(y_PD, longest, own, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _from_all(dy_TD, *ctx.sizes), None, None, None


def all_gather(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, longest: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All ranks' tokens, their experts and their scores, in the order of ranks: [P, D], [P, K], [P, K]."""
    gathered: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Gather.apply(  # type: ignore[no-untyped-call]
        x_TD, ids_TK, scores_TK, longest, group
    )
    return gathered


def reduce_scatter(y_PD: torch.Tensor, longest: int, own: int, group: Any) -> torch.Tensor:
    """The sum of all ranks' parts of this rank's ``own`` tokens, [T, D]."""
    y_TD: torch.Tensor = _ReduceScatter.apply(y_PD, longest, own, group)  # type: ignore[no-untyped-call]
    return y_TD


def _to_ranks(rows_RX: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """All-to-all of rows."""
    arrived = rows_RX.new_empty(sum(received), *rows_RX.shape[1:])
    dist.all_to_all_single(
        arrived, rows_RX.contiguous(), output_split_sizes=received, input_split_sizes=sent, group=group
    )
    return arrived


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: torch.Tensor, scores_TK: torch.Tensor, order: rows.Order, plan: SplitPlan, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*order)
        ctx.back = (plan.output_splits, plan.input_splits, group)
        there = (plan.input_splits, plan.output_splits, group)
        score_R = scores_TK.reshape(-1)[order.choice_R.long()]
        return _to_ranks(rows.gather(x_TD, order), *there), _to_ranks(score_R, *there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RD: torch.Tensor, dscore_R: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        order = rows.Order(*ctx.saved_tensors)
        dx_TD = rows.combine(_to_ranks(dx_RD, *ctx.back), order)
        dscore_R = _to_ranks(dscore_R, *ctx.back)
        dscores_TK = dscore_R.new_empty(order.row_TK.shape)
        dscores_TK.view(-1)[order.choice_R.long()] = dscore_R
        return dx_TD, dscores_TK, None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: torch.Tensor, order: rows.Order, plan: SplitPlan, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(*order)
        ctx.there = (plan.input_splits, plan.output_splits, group)
        return rows.combine(_to_ranks(y_RD, plan.output_splits, plan.input_splits, group), order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        dy_RD = rows.gather(dy_TD, rows.Order(*ctx.saved_tensors))
        return _to_ranks(dy_RD, *ctx.there), None, None, None


def dispatch(
    x_TD: torch.Tensor, scores_TK: torch.Tensor, order: rows.Order, plan: SplitPlan, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row for each choice to its expert's rank: (rows [R, D], their experts [R, 1], their scores [R, 1]).

    Experts count from the receiving rank's first. Rows come in the order of ranks, and of experts within each.
    """
    x_RD, score_R = _Dispatch.apply(x_TD, scores_TK, order, plan, group)  # type: ignore[no-untyped-call]
    counts = plan.local_counts_by_source
    expert = torch.arange(counts.shape[1], device=counts.device, dtype=torch.int32).repeat(counts.shape[0])
    id_R = expert.repeat_interleave(counts.reshape(-1), output_size=x_RD.shape[0])
    return x_RD, id_R[:, None], score_R[:, None]


def give_back(y_RD: torch.Tensor, order: rows.Order, plan: SplitPlan, group: Any) -> torch.Tensor:
    """The weighed rows back to their tokens' ranks, and summed there, [T, D]."""
    y_TD: torch.Tensor = _Return.apply(y_RD, order, plan, group)  # type: ignore[no-untyped-call]
    return y_TD
