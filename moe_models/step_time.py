"""Seconds of one optimizer step on one rank: compute, all-to-all, reduce and gather, optimizer. Torch-free.

A model, not a measurement. Bytes on the wire are those of ``traffic.py``, which its test compares with live runs; rates
are the device's (``devices.json`` or a calibration). What no rate says stands here as a constant, each with what it was
fitted to: 15 runs on 2 and 4 H200s, bf16, mostly eager kernels (``tests/layouts.py`` has them, ``test_step_time.py``
holds the fit).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from moe_models.config import DsConfig
from moe_models.devices import Device, Link, interpolate
from moe_models.layout import Layout
from moe_models.memory import rank_load
from moe_models.shares import offloaded
from moe_models.sizes import ModelSizes
from moe_models.states import BF16, StateBytes
from moe_models.traffic import Flow, Work, traffic

MATMUL_SHARE = 0.85
"""Of ``matmul_tflops``, in the dense matrices of a model (attention included)."""
GROUPED_SHARE, GROUPED_ROWS, GROUPED_WIDTH = 0.82, 192, 390
"""The experts' grouped product: share at many rows and wide experts, and where half of it is reached."""
NORM_BYTES = {False: 150, True: 30}
"""Read and written for each element of the residual stream by one RMSNorm and what surrounds it, forward and backward;
eager (False) and Liger's kernel (True)."""
ROW_BYTES = 156
"""For each element of a routed row [D]: gather, permute, un-permute, weigh and sum, forward and backward."""
INNER_BYTES = 22
"""For each element of an expert's inner activation [F], forward and backward."""
LOGIT_BYTES = {False: 60, True: 12}
"""For each logit; with all logits at once (False) and tile by tile (True)."""
ADAM_BYTES = 115
"""For each parameter a rank updates: norm in fp64, flat copies, fp32 gradient, AdamW's reads and writes."""
LAYER_SECONDS = 1.55e-3
"""One decoder layer, forward and backward, whatever the tokens: launches, and split sizes read back by the host."""
HOOK_SECONDS = 4.3e-3
"""More of it under ZeRO-3, whose hooks fetch and release each module."""
OVERLAP = 0.2
"""Share of the compute time behind which reductions and gathers hide (``overlap_comm``)."""
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


@lru_cache(maxsize=64)
def train_flops(sizes: ModelSizes, length: int) -> tuple[float, float]:
    """Floating point operations of forward and backward for one token: outside the experts, and in them.

    6 for each parameter of a matrix that the token passes (the embedding is a lookup), and causal attention, which sees
    half of the sequence on average. Recomputation is not counted, as in MFU (arXiv 2204.02311, appendix B).
    """
    matrices = sum(prod(shape) for name, shape in sizes.dense if len(shape) == 2 and "embed_tokens" not in name)
    if not any(name == "lm_head.weight" for name, _ in sizes.dense):  # tied
        matrices += prod(dict(sizes.dense)["model.embed_tokens.weight"])
    attention = sizes.layers * sizes.heads * (sizes.head_dim + sizes.value_dim) * length / 2
    return 6.0 * (matrices + attention), 6.0 * sizes.moe_layers * sizes.top_k * sizes.expert_size


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
) -> StepTime:
    """Seconds of one optimizer step of the slowest rank; ``skew`` as in ``memory.rank_load``."""
    sizes, spread = states.sizes, states.spread
    load = rank_load(skew, sizes.num_experts, layout.ep_size) if spread else 1.0
    compute = work.accumulation * _compute(ds, sizes, layout, work, device, spread, load, liger, chunked)
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
        exposed += HOOK_SECONDS * sizes.layers * work.accumulation
        if "weights" in offloaded(ds):
            passes = (3 if work.recompute else 2) * work.accumulation
            hidden += passes * states.partition * BF16 / device.host_link_gb_per_s / 1e9
    exposed += max(0.0, hidden - OVERLAP * compute)
    return StepTime(
        compute=compute,
        all_to_all=exchanged,
        reduce_gather=exposed,
        optimizer=_optimizer(ds, states, device, work),
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
    seconds: float = again * tokens * dense / layout.tp_size / (rate * MATMUL_SHARE)
    seconds += again * load * tokens * experts / layout.tp_size / (rate * grouped_share(device, each, inner))
    norms = sum(name.endswith("norm.weight") for name, _ in sizes.dense)
    moved: float = tokens * sizes.hidden * norms * NORM_BYTES[liger]
    moved += rows * sizes.moe_layers * (sizes.hidden * ROW_BYTES + load * inner * INNER_BYTES)
    vocabulary = dict(sizes.dense)["model.embed_tokens.weight"][0]
    logits = tokens * vocabulary * LOGIT_BYTES[chunked or liger]
    seconds += (again * moved + logits) / (device.memory_gb_per_s * 1e9)
    return seconds + again * LAYER_SECONDS * sizes.layers


def grouped_share(device: Device, rows: float, inner: int) -> float:
    """Share of ``matmul_tflops`` that the grouped product reaches with ``rows`` for each expert of width ``inner``."""
    if device.grouped_matmul_efficiency:
        return interpolate(device.grouped_matmul_efficiency, rows)
    return GROUPED_SHARE * rows / (rows + GROUPED_ROWS) * inner / (inner + GROUPED_WIDTH)


def _seconds(
    flow: Flow, ds: DsConfig, sizes: ModelSizes, layout: Layout, work: Work, device: Device, per_node: int
) -> float:
    kind = "all_to_all" if flow.collective == "all-to-all" else "all_reduce"
    calls = _calls(flow, ds, sizes, work)
    node, network = device.node[kind], device.network[kind]
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


def _optimizer(ds: DsConfig, states: StateBytes, device: Device, work: Work) -> float:
    if "optimizer" not in offloaded(ds):
        return states.partition * ADAM_BYTES / (device.memory_gb_per_s * 1e9)
    backs = work.accumulation if states.stage > 1 else 1
    moved = states.partition * BF16 * (backs + (0 if "weights" in offloaded(ds) else 1))
    on_host = states.partition / (device.host_adam_gparams_per_s * 1e9)
    return on_host + moved / (device.host_link_gb_per_s * 1e9)
