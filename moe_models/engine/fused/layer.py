"""``"moe": {"kernels": "fused"}``: AutoEP's layers with another forward pass, put in after ``deepspeed.initialize``.

A layer keeps its parameters, buffers, hooks, groups and names. Only its class changes, and that of its router and
experts, to a subclass. So ZeRO's partitions, checkpoints, the export, load counters and selection bias see the layer
that they saw. What a fused layer computes is what AutoEP's computes; sums may be taken in another order.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, compute_split_plan
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import nn

from moe_models.config.moe_section import Dispatch, resolve_dispatch
from moe_models.engine.blocks import find_blocks
from moe_models.engine.fused import exchange, rows
from moe_models.engine.fused.experts import FusedExperts
from moe_models.engine.fused.router import FusedRouter


class FusedLayer(AutoEPMoELayer):  # type: ignore[misc]
    """AutoEP's layer with fused kernels. :func:`fuse` makes one of a layer that exists."""

    lengths: exchange.Lengths | None
    """Shared by the layers of a model; None where tokens go by all-to-all, or nowhere."""
    tells_lengths: bool
    """Whether this layer is the first of its model: the ranks' numbers of tokens are those of the whole pass."""

    def _forward(self, hidden_BTD: torch.Tensor) -> Any:
        D = hidden_BTD.shape[-1]
        x_TD = hidden_BTD.reshape(-1, D)
        # 1. Route, and count.
        scores_TK, ids_TK, counts_E = self.router(x_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        # 2. The experts, on the ranks that hold them.
        if self.ep_size == 1:
            y_TD = self.experts(x_TD, ids_TK, scores_TK)
        elif self.lengths is not None:
            y_TD = self._by_all_gather(x_TD, ids_TK, scores_TK, self.lengths)
        else:
            y_TD = self._by_all_to_all(x_TD, ids_TK, scores_TK, counts_E)
        # 3. Shared experts, the shape and the logits that the model's family expects.
        return self._finalize_output(y_TD.view(hidden_BTD.shape), x_TD, hidden_BTD, D)

    def _by_all_gather(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, lengths: exchange.Lengths
    ) -> torch.Tensor:
        T = x_TD.shape[0]
        if self.tells_lengths:
            lengths.exchange(T)
        longest = lengths.longest
        x_PD, ids_PK, scores_PK = exchange.all_gather(x_TD, ids_TK, scores_TK, longest, self.ep_group)
        first = self.ep_rank * self.num_local_experts
        # Most rows are other ranks', and have places all the same: gathering again takes less memory than keeping them.
        y_PD = self.experts(x_PD, ids_PK - first, scores_PK, keep_rows=False)
        return exchange.reduce_scatter(y_PD, longest, T, self.ep_group)

    def _by_all_to_all(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        order = rows.order(ids_TK, self.num_experts)
        plan = compute_split_plan(
            selected_experts=ids_TK,
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            num_local_experts=self.num_local_experts,
            ep_group=self.ep_group,
            num_tokens_per_expert=counts_E,
        )
        x_RD, ids_R1, scores_R1 = exchange.dispatch(x_TD, scores_TK, order, plan, self.ep_group)
        y_RD = self.experts(x_RD, ids_R1, scores_R1)
        return exchange.give_back(y_RD, order, plan, self.ep_group)


def why_not(layer: Any) -> str | None:
    """Why this layer of AutoEP has to stay as it is, or None."""
    experts = layer.experts
    if layer.folding_group_handles is not None and layer.folding_group_handles.spec.tp_size > 1:
        return "tensor-parallel peers share its rows"
    if layer.comm_backend != COMM_BACKEND:
        return f"its tokens travel by {layer.comm_backend}"
    if layer.score_apply != "post":
        return "scores weigh its tokens before the experts"
    if experts.activation != "swiglu":
        return f"its experts' activation is {experts.activation}"
    if experts.use_triton_grouped_mm:
        return "this GPU has no grouped product that does without the host (compute capability below 9.0)"
    if type(experts) is not GroupedExperts:
        return f"its experts are {type(experts).__name__}"
    if type(layer.router) not in (TokenChoiceTopKRouter, FusedRouter):
        return f"its router is {type(layer.router).__name__}"
    return None


def fuse(model: nn.Module, dispatch: Dispatch = "auto") -> list[str]:
    """Make AutoEP's layers of ``model`` :class:`FusedLayer`; returns a line for each reason why some cannot be.

    Call it after ``deepspeed.initialize``, on every rank: with ``dispatch`` by all-gather it makes a process group.
    """
    kept: Counter[str] = Counter()
    layers = [block.module for block in find_blocks(model) if block.kind == "autoep"]
    lengths: exchange.Lengths | None = None
    for layer in layers:
        reason = why_not(layer)
        if reason is not None:
            kept[reason] += 1
            continue
        layer.__class__ = FusedLayer
        layer.router.__class__ = FusedRouter
        layer.experts.__class__ = FusedExperts
        layer.lengths = None
        layer.tells_lengths = False
        if resolve_dispatch(dispatch, layer.ep_size, layer.top_k) == "all_gather":
            if lengths is None:
                lengths = exchange.Lengths(layer.ep_group)
                layer.tells_lengths = True
            layer.lengths = lengths
    return [
        f'moe.kernels = "fused": {count} of {len(layers)} layers stay DeepSpeed\'s own, because {reason}'
        for reason, count in kept.items()
    ]
