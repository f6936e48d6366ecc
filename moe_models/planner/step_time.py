"""Seconds of one optimizer step on one rank: compute, all-to-all, reduce and gather, optimizer. Torch-free.

A model, not a measurement. Bytes on the wire are those of ``traffic.py``, which its test compares with live runs. Rates
are the device's (``devices.json`` or a calibration). What no rate says is a constant here. The constants were fitted
together to runs on 2 and 4 H200s, bf16, and rounded; those of ``recipes/bench.py`` counted more. All runs are in
``tests/support/layouts.py``, ``tests/planner/test_step_time.py`` holds the fit, ``benchmarks/plan.md`` says how good it
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moe_models.families.flops import train_flops
from moe_models.families.sizes import ModelSizes
from moe_models.planner.case import Case
from moe_models.planner.devices import Device, Link, interpolate
from moe_models.planner.traffic import Flow, traffic
from moe_models.planner.zero_states import BF16

MATMUL_SHARE = 0.74
"""Of ``matmul_tflops``, in the dense matrices of a model (attention included)."""
GROUPED_SHARE = 0.95
"""The experts' grouped product alone: share of ``matmul_tflops`` at many rows of one expert."""
GROUPED_ROWS = 170
"""Rows of one expert at which half of that is reached (``benchmarks/alltoall.md``); a calibration replaces both."""
IN_STEP = 0.86
"""Of that share, inside of a training step."""
NORM_BYTES = {False: 165, True: 24}
"""For each element that passes an RMSNorm (with the residual sum beside it) or RoPE, forward and backward; eager
(False) and Liger's kernels (True)."""
ROW_BYTES = {"bf16": 80, "fp32": 150, "fused": 68}
"""For each element of a routed row [D]: gather, permute, un-permute, weigh and sum, forward and backward. Plain blocks
weigh in the dtype of the router's scores (``Family.fp32_scores``). AutoEP weighs an fp32 copy, unless ``combine_impl``
is ``fused_weighted_sum``: one kernel without copies."""
INNER_BYTES = {False: 54, True: 26}
"""For each element of an expert's inner activation [F], forward and backward: transformers' SwiGLU out of several
kernels that read strided halves of one tensor (False), AutoEP's single kernel (True)."""
LOGIT_BYTES = {False: 60, True: 14}
"""For each logit; with all logits at once (False) and tile by tile (True)."""
ADAM_BYTES = 72
"""For each parameter a rank updates: the norm in one pass, flat copies, fp32 gradient, AdamW's reads and writes."""
OWN_NORM_BYTES = 38
"""What DeepSpeed's own norm takes beside that, with its fp64 copies and its waits (``engine/grad_norm.py``)."""
CHECK_BYTES = 14
"""What ``bf16.check_grad_overflow`` reads before them."""
LAYER_SECONDS = {False: 1.5e-3, True: 1.85e-3}
"""One decoder layer, forward and backward, in which the GPU has nothing to do: plain, and with AutoEP (True), whose
layers read split sizes back to the host before they go on."""
TIMER_SECONDS = 1.4e-3
"""In each forward and backward pass: DeepSpeed's throughput timer waits for the GPU before and after."""
HOST_SECONDS = {"AutoEP": 12.5e-3, "AutoEP, Liger": 11e-3, "ZeRO-3": 20e-3}
"""What Python needs for one layer, forward and backward, with AutoEP (Liger's kernels are fewer) and under ZeRO-3,
whose hooks fetch and release each module. A step takes no less, whatever the GPU does meanwhile. Hosts differ by a
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
    stages: float = 0.0
    """What a pipeline's stage waits for the others, and sends to them."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.all_to_all + self.reduce_gather + self.optimizer + self.stages


def step_time(case: Case, device: Device) -> StepTime:
    """Seconds of one optimizer step of the slowest rank."""
    ds = case.ds
    states = case.states
    work = case.work

    # 1. Compute, if the host keeps up.
    compute = work.accumulation * _compute(case, device)

    # 2. Communication by what becomes of it. All-to-alls are waited for, on the rank with the fullest experts. Other
    #    flows either travel beside the compute, or nothing is computed meanwhile.
    exchanged = 0.0
    beside = 0.0
    exposed = 0.0
    for flow in traffic(case):
        seconds = _seconds(flow, case, device)
        if flow.group == "EP":
            exchanged += seconds * case.fullest_rank
        elif flow.collective == "all-to-all":
            exchanged += seconds
        elif flow.overlaps:
            beside += seconds
        else:
            exposed += seconds

    # 3. ZeRO-3 also fetches offloaded weights for each pass, beside the compute, and copies in the GPU's memory.
    if ds.zero_stage == 3:
        if "weights" in ds.offloaded:
            passes = work.forwards + work.accumulation
            beside += passes * states.partition * BF16 / device.host_link_gb_per_s / 1e9
        sharded = states.share.dense
        if states.copies > 1:
            sharded += states.share.expert
        exposed += work.accumulation * sharded * SHARD_BYTES / (device.memory_gb_per_s * 1e9)

    # 4. What travels beside the compute slows it down, and shows where it takes longer than the compute.
    exposed += max(STEAL * beside, beside - compute)

    # 5. A step takes no less than the host's Python needs for its layers. What is missing goes to the part that waits
    #    for it: gathers under ZeRO-3, compute with AutoEP.
    if ds.zero_stage == 3:
        host = _host_seconds(case, "ZeRO-3")
        exposed = max(exposed, host - compute - exchanged)
    elif case.spread:
        host = _host_seconds(case, "AutoEP, Liger" if case.liger else "AutoEP")
        compute = max(compute, host - exchanged)

    return StepTime(
        compute=compute,
        all_to_all=exchanged,
        reduce_gather=exposed,
        optimizer=_optimizer(case, device),
    )


# --- compute


def _compute(case: Case, device: Device) -> float:
    """Seconds of one micro-batch: matrix products, memory-bound kernels, and what the host needs."""
    sizes = case.sizes
    tokens = case.tokens
    tp = case.layout.tp_size
    again = case.work.compute_factor
    load = case.fullest_rank
    rate = device.matmul_tflops * 1e12
    dense_flops, expert_flops = train_flops(sizes, case.work.length, case.adapter)
    logits = tokens * sizes.vocabulary

    # 1. DeepSpeed's timer.
    seconds = TIMER_SECONDS if case.ds.waits_for_timer else 0.0

    # 2. Matrix products outside the experts, attention included.
    seconds += again * tokens * dense_flops / tp / (rate * MATMUL_SHARE)

    # 3. The experts' grouped products, of the fullest rank. More rows of one expert in a call make them faster.
    sources = case.layout.ep_size if case.spread else 1  # ranks whose rows meet in one call
    rows_of_an_expert = case.rows * sources / sizes.num_experts
    seconds += again * load * tokens * expert_flops / tp / (rate * grouped_share(device, rows_of_an_expert))

    # 4. Memory-bound kernels, in bytes: norms and RoPE, the experts' rows and activations, logits.
    moved: float = tokens * _normed_elements(sizes) * NORM_BYTES[case.liger]
    row_bytes = sizes.hidden * ROW_BYTES[_combine_kind(case)] + load * sizes.expert_inner * INNER_BYTES[case.spread]
    moved += case.rows * sizes.moe_layers * (row_bytes + load * _factor_bytes(case))
    logit_bytes = logits * LOGIT_BYTES[case.tiled_loss]
    seconds += (again * moved + logit_bytes) / (device.memory_gb_per_s * 1e9)

    # 5. A loss that is taken tile by tile computes the logits again in the backward pass.
    if case.tiled_loss:
        seconds += 2 * logits * sizes.hidden / (rate * MATMUL_SHARE)

    # 6. Time in which the GPU has nothing to do.
    return seconds + again * LAYER_SECONDS[case.spread] * sizes.layers


def _factor_bytes(case: Case) -> int:
    """Bytes for each row of an adapted expert: what its factors read and write beside the frozen products.

    They are too thin for the matrix units, so that the memory limits them: the input is read, the addend written, then
    read and added, forward and (with two gradients) backward.
    """
    adapter = case.adapter
    if adapter is None:
        return 0
    hidden = case.sizes.hidden
    inner = case.sizes.expert_inner
    elements = 0
    if adapter.gate_up:
        elements += 3 * hidden + 3 * 4 * 2 * inner
    if adapter.down:
        elements += 3 * inner + 3 * 4 * hidden
    return BF16 * elements


def _combine_kind(case: Case) -> str:
    """How the outputs of a token's experts are weighed and summed: a key of :data:`ROW_BYTES`."""
    autoep = case.ds.expert_parallel
    if autoep is not None and autoep.combine_impl == "fused_weighted_sum":
        return "fused"
    if case.spread or case.sizes.fp32_scores:
        return "fp32"
    return "bf16"


def _normed_elements(sizes: ModelSizes) -> int:
    """Elements of one token that pass an RMSNorm or RoPE, all layers together."""
    # 1. RoPE turns queries and keys.
    elements = sizes.attention_layers * (sizes.heads + sizes.kv_heads) * sizes.head_dim

    # 2. Norms. A norm of queries or keys that is as wide as one head is used for every head.
    heads = {"q_norm": sizes.heads, "k_norm": sizes.kv_heads}
    for name, shape in sizes.dense:
        if not name.endswith("norm.weight"):
            continue
        times = 1
        if shape[0] == sizes.head_dim:
            times = heads.get(name.split(".")[-2], 1)
        elements += shape[0] * times
    return elements


def grouped_share(device: Device, rows: float) -> float:
    """Share of ``matmul_tflops`` that the grouped product reaches with ``rows`` for each expert."""
    if device.grouped_matmul_efficiency:
        return IN_STEP * interpolate(device.grouped_matmul_efficiency, rows)
    return IN_STEP * GROUPED_SHARE * rows / (rows + GROUPED_ROWS)


def _host_seconds(case: Case, kind: str) -> float:
    """What Python needs for all layers of one step; ``kind`` is a key of :data:`HOST_SECONDS`."""
    return case.work.compute_factor * HOST_SECONDS[kind] * case.sizes.layers * case.work.accumulation


# --- communication

_MEASURED_AS = {"all-to-all": "all_to_all", "all-reduce": "all_reduce"}
"""Figures of a device by collective; those of ``all_gather`` hold for reduce-scatter too."""


def _seconds(flow: Flow, case: Case, device: Device) -> float:
    """Seconds of a flow, if nothing else is on its way."""
    kind = _MEASURED_AS.get(flow.collective, "all_gather")
    node = device.node.get(kind, device.node["all_reduce"])
    network = device.network.get(kind, device.network["all_reduce"])
    calls = _calls(flow, case)
    if not flow.across:
        return node.seconds(flow.sent, calls)

    neighbours = _ranks_in_one_node(flow, case)
    if flow.collective == "all-to-all":
        # Each GPU has a network link of its own. What stays in the node goes beside it.
        leaving = flow.sent * (flow.size - neighbours) / max(1, flow.size - 1)
        staying = flow.sent - leaving
        return max(network.seconds(leaving, calls), node.seconds(staying, calls))
    # A ring enters a node once: its GPUs share the load of their network links.
    return max(_together(network, neighbours).seconds(flow.sent, calls), node.seconds(flow.sent, calls))


def _together(link: Link, links: int) -> Link:
    """So many equal links that share the load."""
    pairs = tuple((size * links, speed * links) for size, speed in link.pairs)
    return Link(gb_per_s=link.gb_per_s * links, latency_us=link.latency_us, pairs=pairs)


def _ranks_in_one_node(flow: Flow, case: Case) -> int:
    """Ranks of one group that share a node."""
    per_node = case.gpus_per_node
    if flow.group in ("EP", "TP", "SP"):  # neighbouring ranks
        return min(flow.size, per_node)
    step = case.layout.ep_size if flow.group == "EDP" else case.layout.tp_size
    return max(1, min(flow.size, per_node // step))


def _calls(flow: Flow, case: Case) -> int:
    """Calls that the flow's bytes are spread over in one step."""
    sizes = case.sizes
    work = case.work
    if flow.group == "EP":
        return 2 * sizes.moe_layers * work.accumulation
    if flow.group in ("TP", "SP"):
        return 2 * sizes.layers * work.accumulation
    if case.ds.zero_stage == 3 and flow.collective == "all-gather":
        return GATHER_CALLS * 2 * sizes.layers * work.accumulation
    bucket = case.zero_number("reduce_bucket_size", default=500_000_000, auto=sizes.hidden**2)
    return ceil(flow.payload / (bucket * work.element_bytes))


# --- optimizer


def _optimizer(case: Case, device: Device) -> float:
    """Seconds of the optimizer's step: limited by the GPU's memory, or by the host and the link to it."""
    if "optimizer" in case.ds.offloaded:
        return _optimizer_on_host(case, device)
    for_each = ADAM_BYTES
    if not _norm_in_one_pass(case):
        for_each += OWN_NORM_BYTES
    if case.ds.zero_stage < 3 and case.ds.value("bf16", "check_grad_overflow", True):
        for_each += CHECK_BYTES
    return case.trained.partition * for_each / (device.memory_gb_per_s * 1e9)


def _norm_in_one_pass(case: Case) -> bool:
    """Whether the gradient norm is MoETrainer's, as ``engine/grad_norm.py`` decides."""
    if not case.one_pass_norm or case.ds.tp_size > 1:
        return False
    if case.ds.zero_stage == 1:  # with fp32 sums DeepSpeed takes another optimizer, which has a norm of its own
        return bool(case.ds.value("data_types", "grad_accum_dtype") != "fp32")
    return case.ds.zero_stage == 2


def _optimizer_on_host(case: Case, device: Device) -> float:
    """Gradients to the host, AdamW there, updated weights back; nothing of it runs beside the compute."""
    partition = case.trained.partition
    to_host = case.work.accumulation if case.states.stage > 1 else 1  # ZeRO 2 and 3 move them after each pass
    to_gpu = 0 if "weights" in case.ds.offloaded else 1  # offloaded weights are fetched as they are needed
    moved = partition * BF16 * (to_host + to_gpu)
    on_host = partition / (device.host_adam_gparams_per_s * 1e9)
    return on_host + moved / (device.host_link_gb_per_s * 1e9)
