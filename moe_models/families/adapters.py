"""What an adapter (LoRA, arXiv 2106.09685) can be put on, by family and ``config.json``. Torch-free.

Names are those of PEFT's flags: a module is named by the end of its path (``q_proj``), experts by their fused tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_models.families.sizes import ModelSizes
from moe_models.families.table import Family

EXPERT_TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""What PEFT calls the experts' two fused tensors, in ``target_parameters``."""

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def attention_targets(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the linear layers of a decoder layer's attention."""
    if not family.attention.latent:
        return ("q_proj", "k_proj", "v_proj", "o_proj")
    queries: tuple[str, ...] = ("q_a_proj", "q_b_proj")
    if config.get("q_lora_rank") is None:
        queries = ("q_proj",)
    return (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def adaptable_modules(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Module paths of all linear layers that may get an adapter: attention; by family dense MLPs and shared experts."""
    for layer in range(int(config["num_hidden_layers"])):
        path = f"model.layers.{layer}"
        for name in attention_targets(family, config):
            yield f"{path}.self_attn.{name}"
        if not family.mlp_adapters:
            continue
        mlp: str | None = f"{path}.mlp"
        if family.moe_layers(config, layer):
            mlp = None
            if family.shared is not None and family.shared.size(config):
                mlp = f"{path}.mlp.{family.shared.name}"
        if mlp is not None:
            for name in MLP_TARGETS:
                yield f"{mlp}.{name}"


def matches(target: str, path: str) -> bool:
    """Whether PEFT would put an adapter for ``target`` on the module or parameter at ``path``."""
    return path == target or path.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class AdapterSizes:
    """Numbers in an adapter. Sizes count parameters."""

    r: int
    dense: tuple[int, ...]
    """Of each factor outside the experts, in the model's order."""
    expert: tuple[int, ...]
    """Of each factor of one expert: A and B of gate and up (one pair), A and B of down."""
    gate_up: bool
    """Whether the experts' gate and up have an adapter."""
    down: bool
    """Whether their down has one."""


def adapter_sizes(
    sizes: ModelSizes,
    family: Family,
    config: Mapping[str, Any],
    r: int,
    modules: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> AdapterSizes:
    """Sizes of an adapter of rank ``r``; on attention and both expert tensors where no targets are given."""
    if not modules and not parameters:
        modules = attention_targets(family, config)
        parameters = EXPERT_TARGETS
    # 1. Linear layers [out, in].
    shapes = dict(sizes.dense)
    dense: list[int] = []
    for path in adaptable_modules(family, config):
        if any(matches(target, path) for target in modules or ()):
            out_features, in_features = shapes[f"{path}.weight"]
            dense += [r * in_features, out_features * r]
    # 2. One expert.
    D = sizes.hidden
    F = sizes.expert_inner
    gate_up = EXPERT_TARGETS[0] in (parameters or ())
    down = EXPERT_TARGETS[1] in (parameters or ())
    expert: list[int] = []
    if gate_up:
        expert += [r * D, 2 * F * r]
    if down:
        expert += [r * F, D * r]
    return AdapterSizes(r=r, dense=tuple(dense), expert=tuple(expert), gate_up=gate_up, down=down)
