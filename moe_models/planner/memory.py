"""Peak GPU memory of one rank, in bytes, by what it holds. Torch-free.

Read from deepspeed 0.19.8 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``module_inject/auto_ep_layer.py``,
``moe/ep_experts.py``, ``moe/utils.py``), transformers 5.20.2 (eager kernels, SDPA) and TRL 1.16.0 (chunked loss), bf16.

Three moments can be the fullest, and the split is that of the fullest one:

- *loss*: all layers' saved tensors, and the loss's logits;
- *backward*: the last MoE layer's gradients on top of (nearly) all saved tensors, the gradient partition allocated;
- *step*: no activations; fp32 gradients of one group, and fp64 copies for the norm.

Units, as in the code: U = tokens x D x 2 bytes, R = routed rows x D x 2 bytes, G = routed rows x F x 2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, prod, sqrt
from typing import Any, Literal

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.families.sizes import ModelSizes
from moe_models.planner.shares import offloaded
from moe_models.planner.zero_states import BF16, FP32, StateBytes

Loss = Literal["chunked", "full"]
"""How the loss is taken: TRL's fused head, or all logits at once as the model's own ``loss``."""

LOSS_TOKENS, LOSS_WORDS = 4096, 32768
"""One tile of TRL's loss (``trl/kernels/chunked_logprob.py``)."""
FRAGMENTS = {0: 0.03, 1: 0.03, 2: 0.03, 3: 0.06}
"""Share of the allocated memory that torch's allocator keeps and cannot use, by ZeRO stage. Assumed, not measured."""


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
    outside: int
    """CUDA context, NCCL, fragments of the allocator; not part of ``allocated``."""

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` says of an evenly routed step."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.dispatch + self.buffers

    @property
    def needed(self) -> int:
        """What the GPU has to have."""
        return self.allocated + self.skew + self.outside


def rank_load(skew: float, num_experts: int, ep_size: int) -> float:
    """Rows of the fullest EP rank over the mean, where the fullest of all experts has ``skew`` times the mean.

    Experts vary independently, so that a rank's E/EP experts vary 1/sqrt(E/EP) as much, and the largest of n deviates
    by sqrt(2 ln n). EP = 1: even; EP = E: ``skew``.
    """
    if ep_size == 1 or num_experts == 1:
        return 1.0
    share = sqrt(log(ep_size) / log(num_experts)) / sqrt(num_experts / ep_size)
    return 1 + (skew - 1) * share


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


def saved_by_layer(sizes: ModelSizes, layout: Layout, work: Work, *, spread: bool, liger: bool) -> Saved:
    """What one MoE layer saves for its backward pass; U, R, G as in the module docstring."""
    tokens = work.micro_batch * work.length // layout.sp_size
    tp, names = layout.tp_size, dict(sizes.dense)
    d2 = tokens * BF16
    norm = 1 if liger else 3  # Liger keeps bf16 x; the eager norm an fp32 copy and the normalized bf16
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    values, outputs = sizes.kv_heads * sizes.value_dim, sizes.heads * sizes.value_dim
    width = 2 * (norm + 1) * sizes.hidden + (queries + keys + values + outputs) // tp
    if any(name.endswith("q_norm.weight") for name in names):
        width += norm * (queries + keys) // tp
    ranks_of = [
        shape[0] for name, shape in sizes.dense if name.endswith(("q_a_layernorm.weight", "kv_a_layernorm.weight"))
    ]
    width += (norm + 1) * sum(ranks_of) // max(1, sizes.layers)
    inner = sum(shape[0] for name, shape in sizes.dense if name.endswith("gate_proj.weight"))
    width += 4 * inner // max(1, sizes.layers) // tp  # dense MLPs and shared experts: gate, silu(gate), up, product
    router = 12 * tokens * sizes.num_experts
    rows = tokens * sizes.top_k // tp
    moe = sizes.moe_layers / max(1, sizes.layers)  # share of layers that have experts
    r = rows * sizes.hidden * BF16
    g = rows * (sizes.expert_size // 3 // sizes.hidden) * BF16
    inside = 3 if spread else 4  # AutoEP's SwiGLU kernel does not keep silu(gate)
    combine = 5 * r if spread else 3 * r  # fp32 products of rows and scores, and their gradients
    dense, dispatch, experts = d2 * width + int(moe * router), int(moe * 2 * r), int(moe * inside * g)
    # The combine of the layer before comes when this layer's saved tensors are gone, if they are not recomputed.
    room = 0 if work.recompute else dense + dispatch + experts
    return Saved(
        dense=dense,
        dispatch=dispatch,
        experts=experts,
        transient=max(combine - room, r + 2 * g),
        rows=int(moe * (r + inside * g)) if spread else 0,
    )


def memory_moments(
    ds: DsConfig,
    states: StateBytes,
    layout: Layout,
    work: Work,
    *,
    reserved_gib: float,
    loss: Loss = "chunked",
    skew: float = 1.0,
    liger: bool = False,
) -> list[Memory]:
    """The three moments of a training step on one rank, bf16 with AdamW (DeepSpeed's fused kernel)."""
    sizes, zero = states.sizes, ds.raw.get("zero_optimization", {})
    elsewhere = offloaded(ds)
    saved = saved_by_layer(sizes, layout, work, spread=states.spread, liger=liger)
    stage, elements = ds.zero_stage, states.elements
    largest_tensor = max((*states.dense_tensors, *states.expert_tensors))
    head = prod(dict(sizes.dense).get("lm_head.weight", dict(sizes.dense)["model.embed_tokens.weight"]))
    tokens = work.micro_batch * work.length // layout.sp_size

    weights = elements * BF16 if stage < 3 else (0 if "weights" in elsewhere else states.partition * BF16)
    if stage == 3:
        weights += _gathered(states, sizes, zero, head, kept=not work.recompute) * BF16
    optimizer = 0 if "optimizer" in elsewhere else states.partition * 3 * FP32
    bucket = _number(zero, "reduce_bucket_size", 500_000_000, sizes.hidden**2) * BF16
    buckets = bucket * (2 if zero.get("overlap_comm", stage == 3) else 1) if stage else 0

    early, late, full = _gradients(states, work, largest_tensor, offload="optimizer" in elsewhere)
    u = tokens * sizes.hidden * BF16
    layers = sizes.layers if not work.recompute else 1
    kept = u * sizes.layers if work.recompute else 0  # the inputs of the layers
    final = (1 if liger else 3) * u + u
    if loss == "full" and not liger:  # Liger fuses the head into the loss, tile by tile
        at_loss, after = 12 * tokens * head // sizes.hidden, BF16 * tokens * head // sizes.hidden
    else:
        at_loss = 4 * u + head * (FP32 + BF16) + 2 * min(tokens, LOSS_TOKENS) * LOSS_WORDS * FP32
        after = 0
    dense, rows = layers * saved.dense + kept, layers * saved.dispatch
    experts = layers * saved.experts
    layer_gradients = (
        sum(states.expert_tensors[: 3 if states.spread else 2]) * BF16 if stage == 3 else largest_tensor * BF16
    )

    common = {"parameters": weights, "optimizer": optimizer}
    saved_at_loss = (u * sizes.layers, 0, 0) if work.recompute else (dense, rows, experts)
    moments: list[dict[str, Any]] = [
        {
            "moment": "loss", **common, "gradients": early + head * BF16,
            "activations": saved_at_loss[0] + saved_at_loss[2] + final + at_loss, "dispatch": saved_at_loss[1],
            "buffers": bucket if stage == 3 else 0,
        },
        {
            "moment": "backward", **common, "gradients": late + layer_gradients,
            "activations": dense + experts + after, "dispatch": rows + saved.transient, "buffers": buckets,
        },
        {
            "moment": "step", **common, "gradients": full,
            "optimizer": optimizer + (0 if "optimizer" in elsewhere else states.step_temporaries),
            "activations": 0, "dispatch": 0, "buffers": bucket if stage == 3 else 0,
        },
    ]  # fmt: skip
    excess = rank_load(skew, sizes.num_experts, layout.ep_size) - 1 if states.spread else 0.0
    uneven = int(excess * (layers * saved.rows + 2 * (saved.rows + saved.transient)))
    memories = []
    for moment in moments:
        here = Memory(**moment, skew=0 if moment["moment"] == "step" else uneven, outside=0)
        outside = int(reserved_gib * 2**30 + FRAGMENTS[stage] * here.allocated)
        memories.append(Memory(**{**vars(here), "outside": outside}))
    return memories


def host_bytes(ds: DsConfig, states: StateBytes) -> int:
    """Pinned host memory of one rank: what ZeRO-Offload moved there, with fp32 gradients and a bf16 staging copy."""
    elsewhere = offloaded(ds)
    each = (3 * FP32 + FP32 + BF16 if "optimizer" in elsewhere else 0) + (BF16 if "weights" in elsewhere else 0)
    return states.partition * each


def _gradients(states: StateBytes, work: Work, largest: int, *, offload: bool) -> tuple[int, int, int]:
    """Bytes of gradients when the backward pass begins, in it, and at the step."""
    if states.stage == 3:
        held = 0 if offload else states.partition * BF16
        return held, held, held
    accumulated = states.elements * BF16 if states.stage < 2 and work.accumulation > 1 else 0
    if offload:
        return accumulated, accumulated + largest * BF16, largest * BF16
    held = states.whole_gradients * BF16 if states.stage else states.elements * BF16
    before = held if states.stage == 2 and work.accumulation > 1 else accumulated
    return before, before + held, held


def _gathered(states: StateBytes, sizes: ModelSizes, zero: Mapping[str, Any], head: int, *, kept: bool) -> int:
    """Elements that ZeRO-3 holds whole where forward turns into backward (``partitioned_param_coordinator.py``).

    Experts that one rank holds alone are not gathered. Without activation checkpointing the grouped product has saved
    its weights, so that all gathered experts stay.
    """
    per_layer = sum(states.expert_tensors) // max(1, sizes.moe_layers)
    alone = states.spread and states.copies == 1
    gathered_experts = 0 if alone else sum(states.expert_tensors)
    dense = sum(states.dense_tensors)
    layer = (0 if alone else per_layer) + dense // max(1, sizes.layers)
    window = _number(zero, "stage3_max_reuse_distance", 10**9, 10**9) // 2
    prefetch = _number(zero, "stage3_prefetch_bucket_size", 50_000_000, sizes.hidden**2)
    live = min(dense + gathered_experts, layer + max(head, window) + prefetch)
    return max(live, gathered_experts + head + layer) if kept else live


def _number(zero: Mapping[str, Any], key: str, default: int, auto: int) -> int:
    value = zero.get(key, default)
    return auto if value == "auto" else int(value)
