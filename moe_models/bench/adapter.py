"""The adapter (LoRA) of a benchmark row: `+lora` on attention and both expert tensors, `+lora_attention` on attention.

A ``row`` is a job or what came of one: it says which of the two is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_models.families.adapters import EXPERT_TARGETS, AdapterSizes, adapter_sizes, attention_targets
from moe_models.families.sizes import model_sizes
from moe_models.families.table import FAMILIES

ADAPTERS = ("lora", "lora_attention")
"""Switches of a layout that train an adapter instead of all weights."""
RANK = 16
ALPHA = 32


def targets(row: Mapping[str, Any], model_config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Modules and expert tensors that get factors; None where the row trains all weights."""
    if not any(row.get(name) for name in ADAPTERS):
        return None
    attention = attention_targets(FAMILIES[model_config["model_type"]], model_config)
    if row.get("lora"):
        return attention, EXPERT_TARGETS
    return attention, ()


def sizes_of(row: Mapping[str, Any], model_config: Mapping[str, Any]) -> AdapterSizes | None:
    """Sizes of the row's adapter, as a plan takes them."""
    found = targets(row, model_config)
    if found is None:
        return None
    family = FAMILIES[model_config["model_type"]]
    return adapter_sizes(model_sizes(model_config), family, model_config, RANK, *found)


def peft_config(row: Mapping[str, Any], model_config: Mapping[str, Any]) -> Any:
    """PEFT's config of the row's adapter."""
    from peft import LoraConfig

    found = targets(row, model_config)
    if found is None:
        return None
    modules, parameters = found
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        task_type="CAUSAL_LM",
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
    )
