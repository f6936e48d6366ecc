"""Peak GPU memory of one rank, in bytes, by what holds it. Torch-free.

Read from deepspeed 0.19.8 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``module_inject/auto_ep_layer.py``,
``moe/ep_experts.py``, ``moe/utils.py``), transformers 5.20.2 (eager kernels, SDPA) and TRL 1.16.0 (chunked loss), bf16.

Three moments can be the fullest, and the split is that of the fullest one:

- *loss*: all layers' saved tensors, and the loss's logits;
- *backward*: the last MoE layer's gradients on top of (nearly) all saved tensors, the gradient partition allocated;
- *step*: no activations; fp32 gradients of one group, and fp64 copies for the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from moe_models.planner.case import Case
from moe_models.planner.devices import GIB
from moe_models.planner.zero_states import BF16, FP32

LOSS_TOKENS = 4096
LOSS_WORDS = 32768
"""Logits in one tile of TRL's loss: tokens x entries of the vocabulary (``trl/kernels/chunked_logprob.py``)."""
FRAGMENTS = {0: 0.03, 1: 0.03, 2: 0.03, 3: 0.06}
"""Share of the allocated memory that torch's allocator keeps and cannot use, by ZeRO stage. Assumed, not measured."""
ADAM = 3 * FP32
"""Bytes of the optimizer for each parameter: the fp32 weight and AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the fullest moment."""

    moment: Literal["loss", "backward", "step"]
    parameters: int
    """bf16 weights, and those that ZeRO-3 has gathered."""
    gradients: int
    optimizer: int
    """fp32 weights and AdamW's moments; at the step its temporary copies too."""
    activations: int
    """Saved for the backward pass, and its temporaries; logits."""
    dispatch: int
    """Routed rows on their way to experts and back: the part of the activations that expert parallelism adds."""
    buffers: int
    """ZeRO's reduce buckets."""
    skew: int
    """Room for a rank whose experts get more rows than the mean; not part of ``allocated``."""
    outside: int = 0
    """CUDA context, NCCL, fragments of the allocator; not part of ``allocated``."""

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` says of an evenly routed step."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.dispatch + self.buffers

    @property
    def needed(self) -> int:
        """What the GPU has to have."""
        return self.allocated + self.skew + self.outside


# --- one decoder layer


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of one decoder layer."""

    dense: int
    """Saved for the backward pass outside the experts."""
    dispatch: int
    """Saved rows: the experts' input and, for the weighted sum, their output."""
    experts: int
    """Saved inside the experts."""
    transient: int
    """More, at the worst moment of the layer's backward pass, weight gradients apart."""
    rows: int
    """The part of all these that grows with the rows this rank's experts get."""

    @property
    def kept(self) -> int:
        """All that is saved for the backward pass."""
        return self.dense + self.dispatch + self.experts


def saved_by_layer(case: Case) -> Saved:
    """What one decoder layer saves for its backward pass, averaged over layers with and without experts."""
    sizes = case.sizes
    with_experts = sizes.moe_layers / max(1, sizes.layers)  # share of the layers

    # 1. Outside the experts: bf16 elements of each token, and three fp32 numbers for each score of the router.
    router = 12 * case.tokens * sizes.num_experts
    dense = case.tokens * BF16 * _saved_width(case) + int(with_experts * router)

    # 2. Routed rows: `row` bytes for all rows of width D, `inner` bytes for all rows of width F. The input and the
    #    output of the experts are rows; inside are gate, up and their product. AutoEP's SwiGLU kernel does not keep
    #    silu(gate), transformers' does.
    row = case.rows * sizes.hidden * BF16
    inner = case.rows * sizes.expert_inner * BF16
    inside = 3 if case.spread else 4
    kept_rows = 2
    if case.adapter is not None and not case.adapter.gate_up:
        kept_rows = 1  # a frozen weight needs no input for its gradient
    dispatch = int(with_experts * kept_rows * row)
    experts = int(with_experts * inside * inner)

    # 3. The backward pass on top of that. Combine needs fp32 products of rows and scores, and their gradients. That of
    #    the layer before comes when this layer's saved tensors are gone, if they are not recomputed. The experts need
    #    the gradients of their input and of two inner matrices.
    combine = (5 if case.spread else 3) * row
    freed = dense + dispatch + experts
    if case.work.recompute:
        freed = 0
    inner_gradients = 2
    if case.adapter is not None and case.adapter.gate_up:
        inner_gradients = 4  # what the factors add to gate and up has gradients of its own
    transient = max(combine - freed, row + inner_gradients * inner)

    # 4. What a rank with fuller experts has more of.
    rows = 0
    if case.spread:
        rows = int(with_experts * (row + inside * inner))
    return Saved(dense=dense, dispatch=dispatch, experts=experts, transient=transient, rows=rows)


def _saved_width(case: Case) -> int:
    """bf16 elements that one layer saves of each token outside the experts, router apart."""
    sizes = case.sizes
    tp = case.layout.tp_size
    layers = max(1, sizes.layers)
    queries = sizes.heads * sizes.head_dim
    keys = sizes.kv_heads * sizes.head_dim
    values = sizes.kv_heads * sizes.value_dim
    outputs = sizes.heads * sizes.value_dim

    # 1. Two norms with what each hands on, and attention. Liger's norm keeps its bf16 input; the eager one keeps an
    #    fp32 copy of it (two bf16 elements) and the normalized bf16.
    norm = 1 if case.liger else 3
    width = 2 * (norm + 1) * sizes.hidden
    attends = sizes.attention_layers / layers  # share of the layers
    width += int(attends * (queries + keys + values + outputs)) // tp

    # 2. Norms of queries and keys, where the family has them, and the gate of the heads' output.
    if any(name.endswith(("q_norm.weight", "q_layernorm.weight")) for name, _ in sizes.dense):
        width += int(attends * norm * (queries + keys)) // tp
    gates = sum(shape[0] - queries for name, shape in sizes.dense if name.endswith("self_attn.q_proj.weight"))
    if not sizes.latent:
        width += 2 * gates // layers // tp

    # 3. The low ranks of latent attention and their norms.
    ranks = 0
    for name, shape in sizes.dense:
        if name.endswith(("q_a_layernorm.weight", "kv_a_layernorm.weight")):
            ranks += shape[0]
    width += (norm + 1) * ranks // layers

    # 4. Dense MLPs and shared experts: gate, silu(gate), up and the product.
    inner = sum(
        shape[0] for name, shape in sizes.dense if name.endswith(("gate_proj.weight", "feed_forward.w1.weight"))
    )
    width += 4 * inner // layers // tp

    # 5. What has no attention: its projections, before and after the convolution. An estimate: nobody measured it.
    projected = sum(shape[0] for name, shape in sizes.dense if ".linear_attn.in_proj" in name or ".conv.in_" in name)
    width += 2 * projected // layers // tp
    return width


# --- the whole model


class Gradients(NamedTuple):
    """Bytes of gradients at three times of the last micro-batch."""

    before: int
    """When its backward pass begins."""
    during: int
    """In the backward pass."""
    step: int
    """At the optimizer's step."""
    reduce: int = 0
    """Of a pipeline: when gradients are reduced, after all backward passes."""


class AtLoss(NamedTuple):
    """Bytes of logits and their gradients."""

    during: int
    """While the loss is taken."""
    after: int
    """What of it is still there in the backward pass of the layers."""


def memory_moments(case: Case, *, reserved_gib: float) -> list[Memory]:
    """The three moments of a training step on one rank, bf16 with AdamW (DeepSpeed's fused kernel).

    ``reserved_gib`` is what the device needs outside torch's allocator.
    """
    ds = case.ds
    sizes = case.sizes
    states = case.trained
    work = case.work
    stage = ds.zero_stage

    # 1. What is there all the time: weights, optimizer states, one or two reduce buckets.
    weights = _weights(case)
    optimizer = 0
    optimizer_at_step = 0
    if "optimizer" not in ds.offloaded:
        optimizer = states.partition * ADAM
        optimizer_at_step = optimizer + states.step_temporary_bytes
    bucket = case.zero_number("reduce_bucket_size", default=500_000_000, auto=sizes.hidden**2) * BF16
    buckets = bucket if stage > 0 else 0
    if ds.zero("overlap_comm", stage == 3):
        buckets *= 2
    bucket_at_rest = bucket if stage == 3 else 0  # ZeRO 1 and 2 free theirs after the backward pass

    # 2. Gradients. In the backward pass those of one MoE layer, which ZeRO 1 and 2 move to their place one by one and
    #    ZeRO-3 all together, come on top; at the loss those of the head.
    gradients = _gradients(case)
    if stage == 3:
        of_a_layer = sum(states.layer_expert_tensors) * BF16
    else:
        of_a_layer = max((*states.dense_tensors, *states.expert_tensors)) * BF16
    of_the_head = sizes.head_params * BF16 if case.adapter is None else 0

    # 3. Saved tensors. Checkpointing keeps the input of each layer, and all of the one layer that is recomputed.
    hidden_states = case.tokens * sizes.hidden * BF16
    saved = saved_by_layer(case)
    whole_layers = 1 if work.recompute else sizes.layers * case.in_flight
    dispatch = whole_layers * saved.dispatch
    activations = whole_layers * (saved.dense + saved.experts)
    dispatch_at_loss = dispatch
    activations_at_loss = activations
    if work.recompute:
        inputs = sizes.layers * hidden_states * case.in_flight
        activations += inputs
        activations_at_loss = inputs  # no layer is recomputed yet
        dispatch_at_loss = 0
    if case.stages > 1:  # what a stage got and what it sent, of each micro-batch in flight
        ends = 2 * case.in_flight * hidden_states
        activations += ends
        activations_at_loss += ends

    # 4. The final norm with its output, and the logits.
    norm = 1 if case.liger else 3
    final = norm * hidden_states + hidden_states
    logits = _logits(case, hidden_states)

    # 5. Room for uneven routing: the rows beyond the mean in all saved layers, and twice in the layer that is at work.
    excess = case.fullest_rank - 1
    uneven = int(excess * (whole_layers * saved.rows + 2 * (saved.rows + saved.transient)))

    # 6. The three moments.
    at_loss = Memory(
        moment="loss",
        parameters=weights,
        gradients=gradients.before + of_the_head,
        optimizer=optimizer,
        activations=activations_at_loss + final + logits.during,
        dispatch=dispatch_at_loss,
        buffers=bucket_at_rest,
        skew=uneven,
    )
    in_backward = Memory(
        moment="backward",
        parameters=weights,
        gradients=gradients.during + of_a_layer,
        optimizer=optimizer,
        activations=activations + logits.after,
        dispatch=dispatch + saved.transient,
        buffers=buckets,
        skew=uneven,
    )
    at_step = Memory(
        moment="step",
        parameters=weights,
        gradients=gradients.step,
        optimizer=optimizer_at_step,
        activations=0,
        dispatch=0,
        buffers=bucket_at_rest,
        skew=0,
    )

    # 7. A pipeline reduces its gradients when all micro-batches have passed, between the backward pass and the step.
    found = [at_loss, in_backward, at_step]
    if case.stages > 1:
        found.append(replace(at_step, gradients=gradients.reduce, optimizer=optimizer, buffers=buckets))

    # 8. What torch does not count as allocated.
    moments = []
    for memory in found:
        outside = int(reserved_gib * GIB + FRAGMENTS[stage] * memory.allocated)
        moments.append(replace(memory, outside=outside))
    return moments


def _weights(case: Case) -> int:
    """bf16 weights on the GPU: all of the rank's, or under ZeRO-3 its partition and what is gathered."""
    states = case.states
    factors = case.trained.elements if case.adapter is not None else 0
    if states.stage < 3:
        return (states.elements + factors) * BF16
    elements = _gathered(case) + factors
    if "weights" not in case.ds.offloaded:
        elements += states.partition
    return elements * BF16


def _gathered(case: Case) -> int:
    """Elements that ZeRO-3 holds whole where forward turns into backward (``partitioned_param_coordinator.py``)."""
    sizes = case.sizes
    states = case.states
    head = sizes.head_params

    # 1. What can be gathered at all, and the part of it in one layer. Experts that one rank holds alone are not.
    dense = sum(states.dense_tensors)
    experts = sum(states.expert_tensors)
    if states.spread and states.copies == 1:
        experts = 0
    layer = experts // max(1, sizes.moe_layers) + dense // max(1, sizes.layers)

    # 2. The layer at work, what is used again soon enough to stay (or the head), and what is fetched ahead.
    reused = case.zero_number("stage3_max_reuse_distance", default=10**9, auto=10**9) // 2
    ahead = case.zero_number("stage3_prefetch_bucket_size", default=50_000_000, auto=sizes.hidden**2)
    live = min(dense + experts, layer + max(head, reused) + ahead)
    if case.work.recompute:
        return live

    # 3. Without activation checkpointing the grouped product has saved its weights, so that all experts stay.
    return max(live, experts + head + layer)


def _gradients(case: Case) -> Gradients:
    """Bytes of the gradients that ZeRO keeps; those that the backward pass is making come on top."""
    states = case.trained
    offload = "optimizer" in case.ds.offloaded
    several = case.work.accumulation > 1

    # ZeRO-3: one partition, allocated for good.
    if states.stage == 3:
        if offload:
            return Gradients(0, 0, 0)
        held = states.partition * BF16
        return Gradients(held, held, held)

    # A pipeline adds whole gradients up until all micro-batches have passed, and then copies its partition out of them.
    if case.stages > 1:
        whole = states.elements * BF16
        partition = max((*states.dense_tensors, *states.expert_tensors)) * BF16
        if not offload:
            partition = states.whole_gradients * BF16
        return Gradients(whole, whole, partition, reduce=whole + partition)

    # ZeRO 0 and 1 add whole gradients up until the last micro-batch of a step.
    accumulated = 0
    if states.stage < 2 and several:
        accumulated = states.elements * BF16

    # Offloading moves each gradient to the host as soon as it is reduced, so that one is on its way.
    if offload:
        largest = max((*states.dense_tensors, *states.expert_tensors)) * BF16
        return Gradients(accumulated, accumulated + largest, largest)

    # ZeRO 1 and 2 then keep every gradient that reaches into the rank's partition; ZeRO-2 from the first micro-batch.
    elements = states.whole_gradients if states.stage > 0 else states.elements
    held = elements * BF16
    before = held if states.stage == 2 and several else accumulated
    return Gradients(before, before + held, held)


def _logits(case: Case, hidden_states: int) -> AtLoss:
    """Bytes of logits and of what the loss needs beside them."""
    sizes = case.sizes
    head = sizes.head_params
    if not sizes.has_head:
        return AtLoss(during=0, after=0)
    if not case.tiled_loss:  # three fp32 numbers for each logit; a bf16 one stays
        return AtLoss(
            during=12 * case.tokens * head // sizes.hidden,
            after=BF16 * case.tokens * head // sizes.hidden,
        )
    # Tile by tile, gradients summed in fp32: the hidden states' gradient in fp32 and bf16 with a copy of them, the
    # head's gradient in fp32 and bf16, two tiles.
    tile = min(case.tokens, LOSS_TOKENS) * LOSS_WORDS * FP32
    of_the_head = head * (FP32 + BF16) if case.adapter is None else 0
    return AtLoss(during=4 * hidden_states + of_the_head + 2 * tile, after=0)
