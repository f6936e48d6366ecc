"""What one optimizer step sends over which process group, in bytes: integer arithmetic, torch-free.

A flow's ``payload`` is the tensor bytes that a rank hands to a collective in one optimizer step (for a gather: that it
ends up with), and ``sent`` what a rank puts on the wire for it, with g ranks in the group:

- all-to-all of evenly routed rows, all-gather, reduce-scatter: payload x (g-1)/g;
- all-reduce by rings: 2 x payload x (g-1)/g (Patarasuk and Yuan 2009; NCCL's "bus bandwidth").

What DeepSpeed 0.19.8 does when was read from its source, named at each function, and ``tests/planner/test_traffic.py``
compares the payloads with what a live run hands to torch.distributed. Left out: scalars, split sizes (a few integers
for each expert), padding of ZeRO partitions, and the integer indices that tensor-parallel peers exchange with expert
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Groups, Layout
from moe_models.config.tp_plan import kind_of, layer_specs
from moe_models.config.work import Work
from moe_models.families.sizes import ModelSizes
from moe_models.planner.shares import share_of_one_rank

Collective = Literal["all-to-all", "all-reduce", "all-gather", "reduce-scatter"]
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of message, all of one optimizer step together, for one rank."""

    what: str
    collective: Collective
    group: Literal["EP", "EDP", "DP", "TP", "SP"]
    size: int
    """Ranks in the group."""
    payload: int
    """Bytes handed to the collective."""
    across: bool
    """Whether some group of this kind spans nodes."""

    @property
    def sent(self) -> int:
        """Bytes that a rank puts on the wire."""
        once = self.payload * (self.size - 1) // self.size
        return 2 * once if self.collective == "all-reduce" else once


def spans_nodes(groups: Groups, gpus_per_node: int | None) -> bool:
    """Whether any of ``groups`` has ranks in two nodes; nodes hold ``gpus_per_node`` neighbouring ranks each."""
    return gpus_per_node is not None and any(len({r // gpus_per_node for r in group}) > 1 for group in groups)


def traffic(ds: DsConfig, sizes: ModelSizes, layout: Layout, work: Work, gpus_per_node: int | None) -> list[Flow]:
    """Every flow of one optimizer step, those with one rank in the group left out. Pipeline stages are not covered."""
    plan = _Plan(ds, sizes, layout, work)
    groups = _groups(layout, gpus_per_node)
    rows = [*plan.experts(), *plan.gradients(), *plan.weights(), *plan.tensor_parallel(), *plan.sequence_parallel()]
    return [
        Flow(what=what, collective=kind, group=group, size=groups[group][0], payload=n, across=groups[group][1])  # type: ignore[arg-type]
        for what, kind, group, n in rows
        if groups[group][0] > 1 and n > 0
    ]


@lru_cache(maxsize=512)
def _groups(layout: Layout, gpus_per_node: int | None) -> dict[str, tuple[int, bool]]:
    """Ranks in a group of each kind, and whether some group spans nodes. The planner asks thousands of times."""
    kinds = {
        "EP": layout.ep_groups(),
        "EDP": layout.edp_groups(),
        "DP": layout.zero_groups(),
        "TP": layout.tp_groups(),
        "SP": layout.sp_groups(),
    }
    return {name: (len(groups[0]), spans_nodes(groups, gpus_per_node)) for name, groups in kinds.items()}


_Row = tuple[str, Collective, str, int]


class _Plan:
    def __init__(self, ds: DsConfig, sizes: ModelSizes, layout: Layout, work: Work) -> None:
        self._ds, self._sizes, self._layout, self._work = ds, sizes, layout, work
        self._specs = layer_specs(ds.raw) if layout.tp_size > 1 else []
        self._tokens = work.micro_batch * work.length // layout.sp_size  # of one rank in one forward pass
        self._split = [(name, shape) for name, shape in sizes.dense if kind_of(name, self._specs) != "skip"]
        self._share = share_of_one_rank(ds, sizes, layout)
        self._spread = ds.expert_parallel is not None or ds.moe.layer is not None
        self._forwards = work.accumulation * (2 if work.recompute else 1)
        self._zero = ds.raw.get("zero_optimization", {})
        self._reduces = work.accumulation if ds.zero_stage in (2, 3) else 1  # times that gradients travel in a step

    def _routes(self) -> int:
        """Rows [D] that one rank dispatches in one MoE layer (``deepspeed/moe/sharded_moe.py`` for native layers)."""
        native = self._ds.moe.layer
        top_k = self._sizes.top_k if native is None or native.k is None else native.k
        if self._ds.expert_parallel is not None and self._ds.expert_parallel.top_k != "auto":
            top_k = self._ds.expert_parallel.top_k
        if native is not None and native.drop_tokens:
            share = -(-self._tokens * top_k * native.capacity_factor // self._sizes.num_experts)
            return self._sizes.num_experts * max(int(share), native.min_capacity)
        return self._tokens * top_k // self._layout.tp_size

    def experts(self) -> Iterator[_Row]:
        """Tokens to their experts and back (``module_inject/auto_ep_layer.py``: ``_AllToAllV``, before and after).

        With tensor parallelism each peer dispatches its share of the rows (``moe/ep_tp_dispatch.py``). Native layers
        without a capacity pad every expert to the fullest one, so that this is their least; DeepEP sends a token once
        to each rank that has one of its experts, so that it is DeepEP's most.
        """
        if not self._spread:
            return
        once = self._routes() * self._sizes.hidden * self._work.element_bytes * self._sizes.moe_layers
        yield "dispatch, combine: forward", "all-to-all", "EP", 2 * once * self._work.accumulation
        yield "dispatch, combine: backward", "all-to-all", "EP", 2 * once * self._work.accumulation
        if self._work.recompute:
            yield "dispatch, combine: recomputed", "all-to-all", "EP", 2 * once * self._work.accumulation

    def gradients(self) -> Iterator[_Row]:
        """Gradients averaged over the replicas (``runtime/zero/stage_1_and_2.py``: ``average_tensor``; ``stage3.py``).

        Stages 1 and 2 all-reduce whole buckets and each rank keeps its part; stage 1 does so once in an optimizer step,
        stages 2 and 3 after each backward pass. Stage 3 reduce-scatters. fp32 under sequence parallelism.
        """
        element = FP32 if self._layout.sp_size > 1 else self._work.element_bytes
        kind: Collective = "reduce-scatter" if self._ds.zero_stage == 3 else "all-reduce"
        yield "gradients, dense part", kind, "DP", self._share.dense * element * self._reduces
        yield "gradients, experts", kind, "EDP", self._share.expert * element * self._reduces

    def weights(self) -> Iterator[_Row]:
        """Weights gathered from their ZeRO partitions.

        Stages 1 and 2: once after the optimizer's step (``runtime/utils.py``: ``all_gather_dp_groups``). Stage 3
        (``runtime/zero/partitioned_param_coordinator.py``): for the forward and for the backward pass; tensors of up to
        ``stage3_param_persistence_threshold`` elements once in a step. The recomputed forward takes a gather of its own
        where two decoder layers have more elements than ``stage3_max_reuse_distance``, but for the experts of plain HF
        blocks: they come last in it, and stay. A model that fits into ``stage3_prefetch_bucket_size`` needs fewer.
        """
        element, accumulation = self._work.element_bytes, self._work.accumulation
        if self._ds.zero_stage in (1, 2):
            yield "updated weights, dense part", "all-gather", "DP", self._share.dense * element
            yield "updated weights, experts", "all-gather", "EDP", self._share.expert * element
        if self._ds.zero_stage != 3:
            return
        threshold = self._zero.get("stage3_param_persistence_threshold", 100_000)
        threshold = 10 * self._sizes.hidden if threshold == "auto" else threshold  # as the HF Trainer fills it
        big = {name: prod(shape) for name, shape in self._sizes.dense if prod(shape) > threshold}
        small = self._sizes.dense_params - sum(big.values())
        layer = (self._share.dense + self._share.expert) // max(1, self._sizes.layers)
        dense, again = 2 * sum(big.values()), False
        if self._work.recompute and 2 * layer > self._zero.get("stage3_max_reuse_distance", 1_000_000_000):
            again = self._spread
            dense += sum(count for name, count in big.items() if name.startswith("model.layers."))
        yield "weights, dense part", "all-gather", "DP", (dense * accumulation + small) * element
        group = "EDP" if self._spread else "DP"
        experts = self._sizes.expert_params // self._layout.ep_size
        yield "weights, experts", "all-gather", group, (3 if again else 2) * experts * accumulation * element

    def tensor_parallel(self) -> Iterator[_Row]:
        """Sums over tensor-parallel peers (``module_inject/layers.py``, ``moe/ep_tp_dispatch.py``).

        Row-parallel layers sum their output, column-parallel ones the gradient of their input, one by one. An MoE layer
        gathers all peers' rows again, sums their gradients, and averages its input's gradient. Gradients of what is not
        split are averaged in fp32 (``module_inject/auto_ep_folding.py``).
        """
        if self._layout.tp_size == 1:
            return
        token = self._tokens * self._work.element_bytes
        rows = {name: shape[0] for name, shape in self._split if kind_of(name, self._specs) == "row"}
        columns = [s[1] for name, s in self._split if kind_of(name, self._specs) == "column" and len(s) == 2]
        # Recomputation ends where the last thing that the gradient needs is there, before the last sum of a layer.
        last = sum(width for name, width in rows.items() if name.endswith("mlp.down_proj.weight"))
        summed = (sum(rows.values()) - last) * self._forwards + last * self._work.accumulation
        yield "row-parallel outputs", "all-reduce", "TP", summed * token
        yield "column-parallel gradients", "all-reduce", "TP", sum(columns) * token * self._work.accumulation
        if self._ds.expert_parallel is None:
            return
        routed = (self._sizes.hidden + 1) * self._sizes.top_k  # each row with its weight
        layers = self._sizes.moe_layers * token
        yield "expert outputs", "all-gather", "TP", routed * layers * self._forwards
        back = (routed + self._sizes.hidden) * layers * self._work.accumulation
        yield "gradients of expert outputs", "all-reduce", "TP", back
        yield "gradients of unsplit weights", "all-reduce", "TP", self._share.replicated * FP32 * self._reduces

    def sequence_parallel(self) -> Iterator[_Row]:
        """Ulysses (``runtime/sequence_parallel/ulysses_sp.py``): queries, keys, values to heads, outputs back.

        Fewer key-value heads than ranks are repeated first.
        """
        sp, sizes = self._layout.sp_size, self._sizes
        if sp == 1:
            return
        keys = max(sizes.kv_heads, sp)
        widths = (sizes.heads + keys) * sizes.head_dim + (sizes.heads + keys) * sizes.value_dim
        once = self._tokens * widths * self._work.element_bytes * sizes.layers
        yield "attention heads: forward", "all-to-all", "SP", once * self._forwards
        yield "attention heads: backward", "all-to-all", "SP", once * self._work.accumulation
