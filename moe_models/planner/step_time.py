"""Seconds of one optimizer step on one rank: compute, all-to-all, reduce and gather, optimizer. Torch-free.

A model, not a measurement. Bytes on the wire are those of ``traffic.py``, which its test compares with live runs; rates
are the device's (``devices.json`` or a calibration). What no rate says stands here as a constant. They were fitted
together to runs on 2 and 4 H200s, bf16, and rounded; those of ``recipes/bench.py`` counted more
(``tests/support/layouts.py`` has them all, ``test_step_time.py`` holds the fit, ``benchmarks/plan.md`` says how good it
is).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.families.flops import train_flops
from moe_models.families.sizes import ModelSizes
from moe_models.planner.devices import Device, Link, interpolate
from moe_models.planner.memory import rank_load
from moe_models.planner.shares import offloaded
from moe_models.planner.traffic import Flow, traffic
from moe_models.planner.zero_states import BF16, StateBytes

MATMUL_SHARE = 0.74
"""Of ``matmul_tflops``, in the dense matrices of a model (attention included)."""
GROUPED_SHARE, GROUPED_ROWS = 0.95, 170
"""The experts' grouped product alone: share at many rows of one expert, and the rows at which half of it is reached
(``benchmarks/alltoall.md``); a calibration replaces both."""
IN_STEP = 0.86
"""Of that share, inside of a training step."""
NORM_BYTES = {False: 165, True: 24}
"""For each element that passes an RMSNorm (with the residual sum beside it) or RoPE, forward and backward; eager
(False) and Liger's kernels (True)."""
ROW_BYTES = {"bf16": 80, "fp32": 150, "fused": 68}
"""For each element of a routed row [D]: gather, permute, un-permute, weigh and sum, forward and backward. Plain blocks
weigh in the dtype of the router's scores (``Family.fp32_scores``), AutoEP always weighs an fp32 copy, unless
``combine_impl`` says ``fused_weighted_sum``: one kernel without copies."""
INNER_BYTES = {False: 54, True: 26}
"""For each element of an expert's inner activation [F], forward and backward: transformers' SwiGLU out of several
kernels that read strided halves of one tensor (False), AutoEP's single kernel (True)."""
LOGIT_BYTES = {False: 60, True: 14}
"""For each logit; with all logits at once (False) and tile by tile (True)."""
ADAM_BYTES, OWN_NORM_BYTES, CHECK_BYTES = 72, 38, 14
"""For each parameter a rank updates: the norm in one pass, flat copies, fp32 gradient, AdamW's reads and writes; what
DeepSpeed's own norm takes beside that, with its fp64 copies and its waits (``grad_norm.py``); and what
``bf16.check_grad_overflow`` reads before them."""
LAYER_SECONDS = {False: 1.5e-3, True: 1.85e-3}
"""One decoder layer, forward and backward, in which the GPU has nothing to do: plain, and with AutoEP (True), whose
layers read split sizes back to the host before they go on."""
TIMER_SECONDS = 1.4e-3
"""In each forward and backward pass: DeepSpeed's throughput timer waits for the GPU before and after."""
HOST_SECONDS = {"AutoEP": 12.5e-3, "AutoEP, Liger": 11e-3, "ZeRO-3": 20e-3}
"""What Python needs for one layer, forward and backward, with AutoEP (Liger's kernels are fewer) and under ZeRO-3,
whose hooks fetch and release each module: a step takes no less, whatever the GPU does meanwhile. Hosts differ by a
fifth."""
SHARD_BYTES = 13
"""Moved in the GPU's memory for each parameter in each forward and backward pass under ZeRO-3: gradients divided,
flattened and added to the partition, gathered weights put together."""
STEAL = 0.23
"""Share of the time of a collective beside the compute that the compute takes longer for it."""
GATHER_CALLS = 4
"""All-gathers of one layer in one pass under ZeRO-3."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    all_to_all: float
    """Dispatch and combine of experts, attention heads under sequence parallelism."""
    reduce_gather: float
    """What is not hidden of gradients, weights and tensor-parallel sums."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.all_to_all + self.reduce_gather + self.optimizer


def step_time(
    ds: DsConfig,
    states: StateBytes,
    layout: Layout,
    work: Work,
    device: Device,
    gpus_per_node: int,
    *,
    skew: float = 1.0,
    liger: bool = False,
    chunked: bool = True,
    one_pass_norm: bool = True,
) -> StepTime:
    """Seconds of one optimizer step of the slowest rank; ``skew`` as in ``memory.rank_load``, the rest as in
    ``predict``."""
    sizes, spread = states.sizes, states.spread
    load = rank_load(skew, sizes.num_experts, layout.ep_size) if spread else 1.0
    compute = work.accumulation * _compute(ds, sizes, layout, work, device, spread, load, liger, chunked)
    again = 4 / 3 if work.recompute else 1.0
    exchanged, hidden, exposed = 0.0, 0.0, 0.0
    for flow in traffic(ds, sizes, layout, work, gpus_per_node):
        seconds = _seconds(flow, ds, sizes, layout, work, device, gpus_per_node)
        if flow.collective == "all-to-all":
            exchanged += seconds * (load if flow.group == "EP" else 1.0)
        elif flow.group == "TP" or flow.what.startswith("updated weights"):
            exposed += seconds
        else:
            hidden += seconds
    if ds.zero_stage == 3:
        if "weights" in offloaded(ds):
            passes = (3 if work.recompute else 2) * work.accumulation
            hidden += passes * states.partition * BF16 / device.host_link_gb_per_s / 1e9
        sharded = states.share.dense + (states.share.expert if states.copies > 1 else 0)
        exposed += work.accumulation * sharded * SHARD_BYTES / (device.memory_gb_per_s * 1e9)
    exposed += max(STEAL * hidden, hidden - compute)
    if ds.zero_stage == 3:
        host = again * HOST_SECONDS["ZeRO-3"] * sizes.layers * work.accumulation
        exposed = max(exposed, host - compute - exchanged)
    elif spread:
        host = again * HOST_SECONDS["AutoEP, Liger" if liger else "AutoEP"] * sizes.layers * work.accumulation
        compute = max(compute, host - exchanged)
    return StepTime(
        compute=compute,
        all_to_all=exchanged,
        reduce_gather=exposed,
        optimizer=_optimizer(ds, states, device, work, one_pass_norm),
    )


def _compute(
    ds: DsConfig,
    sizes: ModelSizes,
    layout: Layout,
    work: Work,
    device: Device,
    spread: bool,
    load: float,
    liger: bool,
    chunked: bool,
) -> float:
    """Seconds of one micro-batch: matrix products, memory-bound kernels, and what the host needs."""
    tokens = work.micro_batch * work.length // layout.sp_size
    dense, experts = train_flops(sizes, work.length)
    again = 4 / 3 if work.recompute else 1.0
    inner = sizes.expert_size // 3 // sizes.hidden
    rows = tokens * sizes.top_k // layout.tp_size  # of this rank, evenly routed
    group = layout.ep_size if spread else 1
    each = rows * group / sizes.num_experts  # rows of one expert in one call
    rate = device.matmul_tflops * 1e12
    seconds: float = TIMER_SECONDS if ds.waits_for_timer else 0.0
    seconds += again * tokens * dense / layout.tp_size / (rate * MATMUL_SHARE)
    seconds += again * load * tokens * experts / layout.tp_size / (rate * grouped_share(device, each))
    moved: float = tokens * _normed(sizes) * NORM_BYTES[liger]
    fused = ds.expert_parallel is not None and ds.expert_parallel.combine_impl == "fused_weighted_sum"
    combine = "fused" if fused else "fp32" if spread or sizes.fp32_scores else "bf16"
    row = sizes.hidden * ROW_BYTES[combine] + load * inner * INNER_BYTES[spread]
    moved += rows * sizes.moe_layers * row
    vocabulary = dict(sizes.dense)["model.embed_tokens.weight"][0]
    logits = tokens * vocabulary * LOGIT_BYTES[chunked or liger]
    seconds += (again * moved + logits) / (device.memory_gb_per_s * 1e9)
    if chunked or liger:  # the backward pass computes the logits again
        seconds += 2 * tokens * vocabulary * sizes.hidden / (rate * MATMUL_SHARE)
    return seconds + again * LAYER_SECONDS[spread] * sizes.layers


def _normed(sizes: ModelSizes) -> int:
    """Elements of one token that pass an RMSNorm or RoPE, all layers together."""
    heads = {"q_norm": sizes.heads, "k_norm": sizes.kv_heads}
    width = sizes.layers * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    for name, shape in sizes.dense:
        if name.endswith("norm.weight"):
            each_head = shape[0] == sizes.head_dim  # one norm, used for every head
            width += shape[0] * (heads.get(name.split(".")[-2], 1) if each_head else 1)
    return width


def grouped_share(device: Device, rows: float) -> float:
    """Share of ``matmul_tflops`` that the grouped product reaches with ``rows`` for each expert."""
    if device.grouped_matmul_efficiency:
        return IN_STEP * interpolate(device.grouped_matmul_efficiency, rows)
    return IN_STEP * GROUPED_SHARE * rows / (rows + GROUPED_ROWS)


def _seconds(
    flow: Flow, ds: DsConfig, sizes: ModelSizes, layout: Layout, work: Work, device: Device, per_node: int
) -> float:
    kind = {"all-to-all": "all_to_all", "all-reduce": "all_reduce"}.get(flow.collective, "all_gather")
    calls = _calls(flow, ds, sizes, work)
    node, network = (links.get(kind, links["all_reduce"]) for links in (device.node, device.network))
    if not flow.across:
        return node.seconds(flow.sent, calls)
    neighbours = _in_one_node(flow, layout, per_node)
    if kind == "all_to_all":  # each GPU has a network link of its own; what stays in the node goes beside it
        leaving = flow.sent * (flow.size - neighbours) / max(1, flow.size - 1)
        return max(network.seconds(leaving, calls), node.seconds(flow.sent - leaving, calls))
    # A ring enters a node once: its GPUs share the load of their network links.
    return max(_wider(network, neighbours).seconds(flow.sent, calls), node.seconds(flow.sent, calls))


def _wider(link: Link, times: int) -> Link:
    pairs = tuple((size * times, speed * times) for size, speed in link.pairs)
    return Link(gb_per_s=link.gb_per_s * times, latency_us=link.latency_us, pairs=pairs)


def _in_one_node(flow: Flow, layout: Layout, per_node: int) -> int:
    """Ranks of one group that share a node."""
    if flow.group in ("EP", "TP", "SP"):  # neighbouring ranks
        return min(flow.size, per_node)
    step = layout.ep_size if flow.group == "EDP" else layout.tp_size
    return max(1, min(flow.size, per_node // step))


def _calls(flow: Flow, ds: DsConfig, sizes: ModelSizes, work: Work) -> int:
    """Calls that the flow's bytes are spread over in one step."""
    bucket = ds.raw.get("zero_optimization", {}).get("reduce_bucket_size", 5e8)
    bucket = sizes.hidden**2 if bucket == "auto" else bucket
    if flow.group == "EP":
        return 2 * sizes.moe_layers * work.accumulation
    if flow.group in ("TP", "SP"):
        return 2 * sizes.layers * work.accumulation
    if ds.zero_stage == 3 and flow.collective == "all-gather":
        return GATHER_CALLS * 2 * sizes.layers * work.accumulation
    return ceil(flow.payload / (bucket * work.element_bytes))


def _optimizer(ds: DsConfig, states: StateBytes, device: Device, work: Work, one_pass_norm: bool) -> float:
    if "optimizer" not in offloaded(ds):
        checked = ds.zero_stage < 3 and ds.raw.get("bf16", {}).get("check_grad_overflow", True)
        fp32_sums = ds.raw.get("data_types", {}).get("grad_accum_dtype") == "fp32"  # at ZeRO 1 another optimizer's
        taken = one_pass_norm and ds.tp_size == 1 and (ds.zero_stage == 2 or (ds.zero_stage == 1 and not fp32_sums))
        moved = states.partition * (ADAM_BYTES + (not taken) * OWN_NORM_BYTES + checked * CHECK_BYTES)
        return moved / (device.memory_gb_per_s * 1e9)
    backs = work.accumulation if states.stage > 1 else 1
    moved = states.partition * BF16 * (backs + (0 if "weights" in offloaded(ds) else 1))
    on_host = states.partition / (device.host_adam_gparams_per_s * 1e9)
    return on_host + moved / (device.host_link_gb_per_s * 1e9)
