"""What one optimizer step sends over which process group, in bytes: integer arithmetic, torch-free.

A flow's ``payload`` is the tensor bytes that a rank hands to a collective in one optimizer step (for a gather: that it
ends up with). ``sent`` is what a rank puts on the wire for it, with g ranks in the group:

- all-to-all of evenly routed rows, all-gather, reduce-scatter: payload x (g-1)/g;
- all-reduce by rings: 2 x payload x (g-1)/g (Patarasuk and Yuan 2009; NCCL's "bus bandwidth").

What DeepSpeed 0.19.8 does when was read from its source, named at each function. ``tests/planner/test_traffic.py``
compares the payloads with what a live run hands to torch.distributed. Left out: scalars, split sizes (a few integers
for each expert), padding of ZeRO partitions, and the integer indices that tensor-parallel peers exchange with expert
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from moe_models.config.layout import Groups, Layout
from moe_models.config.moe_section import resolve_dispatch
from moe_models.config.tp_plan import kind_of, layer_specs
from moe_models.planner.case import Case
from moe_models.planner.zero_states import FP32
from moe_models.preflight.fused import experts_per_token

Collective = Literal["all-to-all", "all-reduce", "all-gather", "reduce-scatter", "send"]
Group = Literal["EP", "EDP", "DP", "TP", "SP", "PP"]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of message, all of one optimizer step together, for one rank."""

    what: str
    collective: Collective
    group: Group
    size: int
    """Ranks in the group."""
    payload: int
    """Bytes handed to the collective."""
    across: bool
    """Whether some group of this kind spans nodes."""
    overlaps: bool
    """Whether it travels beside the compute: gradients as they are made, ZeRO-3's weights ahead of their layer."""

    @property
    def sent(self) -> int:
        """Bytes that a rank puts on the wire."""
        if self.collective == "send":
            return self.payload
        once = self.payload * (self.size - 1) // self.size
        times = 2 if self.collective == "all-reduce" else 1
        return times * once


def spans_nodes(groups: Groups, gpus_per_node: int | None) -> bool:
    """Whether any of ``groups`` has ranks in two nodes; nodes hold ``gpus_per_node`` neighbouring ranks each."""
    if gpus_per_node is None:
        return False
    for group in groups:
        nodes = {rank // gpus_per_node for rank in group}
        if len(nodes) > 1:
            return True
    return False


def traffic(case: Case) -> list[Flow]:
    """Every flow of one optimizer step, those with one rank in the group left out. Of a pipeline: ``pipeline.py``."""
    groups = _group_shapes(case.layout, case.gpus_per_node)
    payloads = [
        *_expert_rows(case),
        *_gradients(case),
        *_weights(case),
        *_tensor_parallel_sums(case),
        *_attention_heads(case),
    ]
    flows = []
    for payload in payloads:
        shape = groups[payload.group]
        if shape.size > 1 and payload.size > 0:
            flows.append(
                Flow(
                    what=payload.what,
                    collective=payload.collective,
                    group=payload.group,
                    size=shape.size,
                    payload=payload.size,
                    across=shape.across,
                    overlaps=payload.overlaps,
                )
            )
    return flows


class GroupShape(NamedTuple):
    """What all groups of one kind have in common."""

    size: int
    """Ranks in each."""
    across: bool
    """Whether some group spans nodes."""


@lru_cache(maxsize=512)
def _group_shapes(layout: Layout, gpus_per_node: int) -> dict[Group, GroupShape]:
    """The shape of each kind of group. The planner asks thousands of times."""
    kinds: dict[Group, Groups] = {
        "EP": layout.ep_groups(),
        "EDP": layout.edp_groups(),
        "DP": layout.zero_groups(),
        "TP": layout.tp_groups(),
        "SP": layout.sp_groups(),
    }
    return {name: GroupShape(len(groups[0]), spans_nodes(groups, gpus_per_node)) for name, groups in kinds.items()}


class Payload(NamedTuple):
    """A flow before it is known how its groups lie on the nodes."""

    what: str
    collective: Collective
    group: Group
    size: int
    """Bytes handed to the collective in one optimizer step."""
    overlaps: bool = False


def _expert_rows(case: Case) -> Iterator[Payload]:
    """Tokens to their experts and back (``module_inject/auto_ep_layer.py``: ``_AllToAllV``, before and after).

    With tensor parallelism each peer dispatches its share of the rows (``moe/ep_tp_dispatch.py``). Native layers
    without a capacity pad every expert to the fullest one, so that this is their least. DeepEP sends a token once to
    each rank that has one of its experts, so that this is DeepEP's most.
    """
    if not case.spread:
        return
    work = case.work
    if case.ds.moe.kernels == "fused":
        yield from _fused_rows(case)
        return
    one_way = _dispatched_rows(case) * case.sizes.hidden * work.element_bytes * case.sizes.moe_layers
    there_and_back = 2 * one_way * work.accumulation
    yield Payload("dispatch, combine: forward", "all-to-all", "EP", there_and_back)
    yield Payload("dispatch, combine: backward", "all-to-all", "EP", there_and_back)
    if work.recompute:
        yield Payload("dispatch, combine: recomputed", "all-to-all", "EP", there_and_back)


def _fused_rows(case: Case) -> Iterator[Payload]:
    """The same in our fused layers (``engine/fused/exchange.py``), with the scores that go along.

    Choices, which are integers, are left out. Scores are fp32 whatever the model is.
    """
    sizes = case.sizes
    work = case.work
    ep_size = case.layout.ep_size
    top_k = experts_per_token(case.ds, case.model.config)
    gathers = resolve_dispatch(case.ds.moe.dispatch, ep_size, top_k) == "all_gather"

    # 1. One way, of all layers in one pass. A gather hands out the tokens of all ranks, an all-to-all a row for each
    #    choice.
    tokens = case.tokens * sizes.moe_layers
    scores = tokens * top_k * FP32
    if gathers:
        rows = tokens * ep_size * sizes.hidden * work.element_bytes
        scores *= ep_size
    else:
        rows = tokens * top_k * sizes.hidden * work.element_bytes

    # 2. There with the scores, and back; the backward pass goes the other way round.
    passes = ["forward", "backward"]
    if work.recompute:
        passes.append("recomputed")
    for name in passes:
        what = f"dispatch, combine: {name}"
        if not gathers:
            yield Payload(what, "all-to-all", "EP", (2 * rows + scores) * work.accumulation)
            continue
        gathered = rows
        scattered = rows
        if name == "backward":
            scattered += scores
        else:
            gathered += scores
        if name == "recomputed" and case.model.family.shared is None:
            scattered = 0  # recomputation ends at the last tensor that the gradient needs, which is before
        yield Payload(what, "all-gather", "EP", gathered * work.accumulation)
        yield Payload(what, "reduce-scatter", "EP", scattered * work.accumulation)


def _dispatched_rows(case: Case) -> int:
    """Rows [D] that one rank dispatches in one MoE layer (``deepspeed/moe/sharded_moe.py`` for native layers)."""
    num_experts = case.sizes.num_experts
    native = case.ds.moe.layer
    autoep = case.ds.expert_parallel

    # 1. Experts per token: the JSON's, else the model's.
    top_k = case.sizes.top_k
    if native is not None and native.k is not None:
        top_k = native.k
    if autoep is not None and autoep.top_k != "auto":
        top_k = autoep.top_k

    # 2. Native layers with a capacity send full slots for every expert, filled or not.
    if native is not None and native.drop_tokens:
        capacity = -(-case.tokens * top_k * native.capacity_factor // num_experts)  # rounded up
        return num_experts * max(int(capacity), native.min_capacity)
    return case.tokens * top_k // case.layout.tp_size


def _reductions(case: Case) -> int:
    """How often gradients travel in one optimizer step: ZeRO 2 and 3 reduce after each backward pass."""
    return case.work.accumulation if case.ds.zero_stage in (2, 3) else 1


def _gradients(case: Case) -> Iterator[Payload]:
    """Gradients averaged over the replicas (``runtime/zero/stage_1_and_2.py``: ``average_tensor``; ``stage3.py``).

    Stages 1 and 2 all-reduce whole buckets and each rank keeps its part; stage 3 reduce-scatters. In fp32 under
    sequence parallelism.
    """
    share = case.trained.share
    element = FP32 if case.layout.sp_size > 1 else case.work.element_bytes
    kind: Collective = "reduce-scatter" if case.ds.zero_stage == 3 else "all-reduce"
    times = _reductions(case)
    yield Payload("gradients, dense part", kind, "DP", share.dense * element * times, overlaps=True)
    yield Payload("gradients, experts", kind, "EDP", share.expert * element * times, overlaps=True)


def _weights(case: Case) -> Iterator[Payload]:
    """Weights gathered from their ZeRO partitions.

    Stages 1 and 2: once after the optimizer's step (``runtime/utils.py``: ``all_gather_dp_groups``), when nothing is
    computed. Stage 3: see :func:`_sharded_weights`.
    """
    if case.ds.zero_stage in (1, 2):
        share = case.trained.share
        element = case.work.element_bytes
        yield Payload("updated weights, dense part", "all-gather", "DP", share.dense * element)
        yield Payload("updated weights, experts", "all-gather", "EDP", share.expert * element)
    if case.ds.zero_stage == 3:
        yield from _sharded_weights(case)


def _sharded_weights(case: Case) -> Iterator[Payload]:
    """ZeRO-3's gathers (``runtime/zero/partitioned_param_coordinator.py``): for each forward and backward pass.

    A model that fits into ``stage3_prefetch_bucket_size`` needs fewer.
    """
    sizes = case.sizes
    share = case.states.share
    work = case.work

    # 1. Tensors of up to `threshold` elements are gathered once in a step and stay.
    threshold = case.zero_number("stage3_param_persistence_threshold", default=100_000, auto=10 * sizes.hidden)
    large = {name: prod(shape) for name, shape in sizes.dense if prod(shape) > threshold}
    small = sizes.dense_params - sum(large.values())

    # 2. The others are gathered for the forward and for the backward pass of each micro-batch.
    dense = 2 * sum(large.values())
    expert_gathers = 2

    # 3. The recomputed forward pass takes a gather of its own where two decoder layers have more elements than
    #    `reused`. The experts of plain HF blocks come last in it, and stay.
    reused = case.ds.zero("stage3_max_reuse_distance", 1_000_000_000)
    layer = (share.dense + share.expert) // max(1, sizes.layers)
    if work.recompute and 2 * layer > reused:
        dense += sum(numel for name, numel in large.items() if name.startswith("model.layers."))
        if case.spread:
            expert_gathers = 3

    # 4. Bytes.
    experts = sizes.expert_params // case.layout.ep_size
    expert_group: Group = "EDP" if case.spread else "DP"
    dense_bytes = (dense * work.accumulation + small) * work.element_bytes
    expert_bytes = expert_gathers * experts * work.accumulation * work.element_bytes
    yield Payload("weights, dense part", "all-gather", "DP", dense_bytes, overlaps=True)
    yield Payload("weights, experts", "all-gather", expert_group, expert_bytes, overlaps=True)


def _tensor_parallel_sums(case: Case) -> Iterator[Payload]:
    """Sums over tensor-parallel peers (``module_inject/layers.py``, ``moe/ep_tp_dispatch.py``)."""
    if case.layout.tp_size == 1:
        return
    sizes = case.sizes
    work = case.work
    specs = layer_specs(case.ds.raw)
    column = case.tokens * work.element_bytes  # bytes of one number for each token

    # 1. Row-parallel layers sum their outputs. Recomputation ends where the last thing that the gradient needs is
    #    there, before the last sum of a layer.
    outputs = {name: shape[0] for name, shape in sizes.dense if kind_of(name, specs) == "row"}
    last = sum(width for name, width in outputs.items() if name.endswith("mlp.down_proj.weight"))
    summed = (sum(outputs.values()) - last) * work.forwards + last * work.accumulation
    yield Payload("row-parallel outputs", "all-reduce", "TP", summed * column)

    # 2. Column-parallel layers sum the gradients of their inputs, one by one.
    inputs = [shape[1] for name, shape in sizes.dense if kind_of(name, specs) == "column" and len(shape) == 2]
    yield Payload("column-parallel gradients", "all-reduce", "TP", sum(inputs) * column * work.accumulation)

    # 3. An MoE layer gathers all peers' rows again, each with its weight, sums their gradients, and averages the
    #    gradient of its input.
    if case.ds.expert_parallel is None:
        return
    routed = (sizes.hidden + 1) * sizes.top_k
    moe_column = sizes.moe_layers * column
    backward = (routed + sizes.hidden) * moe_column * work.accumulation
    yield Payload("expert outputs", "all-gather", "TP", routed * moe_column * work.forwards)
    yield Payload("gradients of expert outputs", "all-reduce", "TP", backward)

    # 4. Gradients of what is not split are averaged in fp32 (``module_inject/auto_ep_folding.py``).
    unsplit = case.states.share.replicated * FP32 * _reductions(case)
    yield Payload("gradients of unsplit weights", "all-reduce", "TP", unsplit)


def _attention_heads(case: Case) -> Iterator[Payload]:
    """Ulysses (``runtime/sequence_parallel/ulysses_sp.py``): queries, keys, values to heads, outputs back."""
    sizes = case.sizes
    work = case.work
    if case.layout.sp_size == 1:
        return
    kv_heads = max(sizes.kv_heads, case.layout.sp_size)  # fewer than ranks are repeated first
    queries_and_keys = (sizes.heads + kv_heads) * sizes.head_dim
    values_and_outputs = (sizes.heads + kv_heads) * sizes.value_dim
    once = case.tokens * (queries_and_keys + values_and_outputs) * work.element_bytes * sizes.layers
    yield Payload("attention heads: forward", "all-to-all", "SP", once * work.forwards)
    yield Payload("attention heads: backward", "all-to-all", "SP", once * work.accumulation)
