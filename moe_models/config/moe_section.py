"""What our one extra section of a ds_config may say: ``"moe"``, read and removed before DeepSpeed sees the config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_models.config.section import Section
from moe_models.errors import show

_ARCHITECTURE = (
    "is part of the architecture, and the exported config.json has to say it; write {} into the config.json of a model "
    "of type prmoe (model_configs/prmoe-tiny.json), train that with recipes/pretrain.py, and remove the key here"
)
ELSEWHERE = {
    "use_residual": _ARCHITECTURE.format('"use_residual"'),
    "num_experts": _ARCHITECTURE.format('"num_local_experts" (a list is a pyramid)'),
    "enable_expert_tensor_parallelism": (
        "DeepSpeed reads it where an mpu splits the dense layers over ranks, to group those ranks, and splits no "
        "expert itself; native layers run without tensor parallelism here, so that it does nothing; remove the key"
    ),
}
"""Arguments of ``deepspeed.moe.layer.MoE`` that ``"moe": {"layer": ...}`` does not take: where they belong, or why."""


class MoeLayer(Section):
    """``"moe": {"layer": {...}}``: replace the HF MoE blocks by ``deepspeed.moe.layer.MoE`` ("native" layers).

    The defaults compute what the HF model computes. Each key but ``ep_size`` departs from it and is printed at start.
    """

    ep_size: int = Field(1, ge=1)
    """Ranks that share one copy of the experts; it must divide the experts and the world size."""
    k: int | None = Field(None, ge=1)
    """Experts per token; null takes the model's. Another value is written into the exported config.json."""
    drop_tokens: bool = False
    """Give each expert a fixed number of places, and drop the routes that find none."""
    capacity_factor: float = Field(1.0, gt=0)
    """Places of an expert in training: tokens of the rank x k / experts x this, rounded up."""
    eval_capacity_factor: float = Field(1.0, gt=0)
    """The same in evaluation."""
    min_capacity: int = Field(0, ge=0)
    """Places that an expert has at least."""
    use_rts: bool = False
    """Top-1 only: drop routes at random instead of the last ones of the batch (random token selection)."""
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = None
    """Noise in training: on the router's input (Jitter), or on the logits of the choice (RSample, top-1 only)."""
    top2_2nd_expert_sampling: bool = False
    """Top-2 only: draw the second expert at random, by its score; also in evaluation."""
    aux_loss: Literal["model", "layer"] = "model"
    """Whose load-balancing loss: the HF model's, or the mean over the layers of DeepSpeed's own ``l_aux``."""
    use_residual: bool | None = None
    """Refused: part of the architecture, see :data:`ELSEWHERE`."""
    num_experts: int | list[int] | None = None
    """Refused likewise."""
    enable_expert_tensor_parallelism: bool | None = None
    """Refused: see :data:`ELSEWHERE`."""

    def conflicts(self) -> list[str]:
        """One line for each value that would do nothing, or does not belong here."""
        problems = []
        for key, why in ELSEWHERE.items():
            if key in self.model_fields_set:
                problems.append(f"moe.layer.{key} = {show(getattr(self, key))}: {why}")
        for key in ("capacity_factor", "eval_capacity_factor", "min_capacity", "use_rts"):
            value = getattr(self, key)
            written = key in self.model_fields_set and value is not False
            if written and not self.drop_tokens:
                problems.append(
                    f'moe.layer.{key} = {show(value)} does nothing without "drop_tokens": true; add that, or remove '
                    "the key"
                )
        return problems

    def departures(self) -> list[str]:
        """One line for each value with which the layer no longer computes what the HF model computes."""
        lines = []
        if self.k is not None:
            lines.append(f"k = {self.k}: experts per token, whatever the model's config.json says")
        if self.drop_tokens:
            how = "at random" if self.use_rts else "those with the smallest scores or at the end of the batch"
            lines.append(
                f"drop_tokens = true: an expert takes {self.capacity_factor:g} times its even share "
                f"({self.eval_capacity_factor:g} in evaluation, at least {self.min_capacity}); routes beyond are "
                f"dropped, {how}"
            )
        if self.noisy_gate_policy is not None:
            lines.append(f"noisy_gate_policy = {show(self.noisy_gate_policy)}: the router chooses with noise")
        if self.top2_2nd_expert_sampling:
            lines.append("top2_2nd_expert_sampling = true: the second expert is drawn at random, also in evaluation")
        if self.aux_loss == "layer":
            lines.append("aux_loss = \"layer\": DeepSpeed's l_aux, mean over the layers, instead of the model's own")
        return lines


class Balance(Section):
    """``"moe": {"balance": {...}}``: how the load of the experts is kept even (``moe_models.routing.losses``)."""

    aux_loss_coef: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Weight of the auxiliary loss; null takes --router_aux_loss_coef or else the model's router_aux_loss_coef."""
    scope: Literal["micro_batch", "global_batch", "sequence"] = "micro_batch"
    """Tokens that the auxiliary loss balances: one rank's micro-batch, all ranks', or each sequence alone."""
    per_layer: bool = False
    """Balance each layer by itself; false pools the layers, as Hugging Face does."""
    z_loss_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the router z-loss; 0 is off."""
    bias_update_rate: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Step of the selection bias after each optimizer step; 0 is off, DeepSeek-V3 took 0.001."""


Kernels = Literal["deepspeed", "fused"]
"""Whose forward pass AutoEP's layers take."""

Dispatch = Literal["auto", "all_to_all", "all_gather"]
"""How tokens get to their experts' ranks and back."""


def rows_sent(dispatch: Dispatch, ep_size: int, top_k: int) -> float:
    """Rows [D] that a rank sends for each of its tokens on the way to the experts, and gets back, evenly routed.

    All-gather: the token to each other rank. All-to-all: a row for each choice, of which 1 / EP stay.
    """
    if resolve_dispatch(dispatch, ep_size, top_k) == "all_gather":
        return ep_size - 1
    return top_k * (ep_size - 1) / ep_size


def resolve_dispatch(dispatch: Dispatch, ep_size: int, top_k: int) -> Dispatch:
    """What "auto" means: the all-gather where it sends fewer rows, which is where EP is below top-k."""
    if dispatch != "auto":
        return dispatch
    if 1 < ep_size < top_k:
        return "all_gather"
    return "all_to_all"


class Moe(Section):
    """``"moe"``."""

    layer: MoeLayer | None = None
    """Native layers; absent means the model's own blocks, or AutoEP's."""
    balance: Balance | None = None
    """Load balancing; absent leaves it to the model's own auxiliary loss."""
    kernels: Kernels = "deepspeed"
    """AutoEP's layers as DeepSpeed computes them, or the same function in fewer kernels (``engine/fused``)."""
    dispatch: Dispatch = "auto"
    """With fused kernels: all-to-all, or all-gather and reduce-scatter; "auto" takes what sends fewer rows."""
