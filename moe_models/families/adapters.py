"""What an adapter (LoRA, arXiv 2106.09685) can be put on, by family and ``config.json``. Torch-free.

Names are those of PEFT's flags: a module is named by the end of its path (``q_proj``), experts by their fused tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
    """Module paths of all linear layers that may get an adapter: attention, dense MLPs, shared experts."""
    for layer in range(int(config["num_hidden_layers"])):
        path = f"model.layers.{layer}"
        for name in attention_targets(family, config):
            yield f"{path}.self_attn.{name}"
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
