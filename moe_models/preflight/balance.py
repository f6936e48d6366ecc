"""``"moe": {"balance": ...}``: balancing that would do nothing, or that the model's router has no hook for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.errors import show
from moe_models.families.table import family_of


def balance_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """One line for each key of the section that cannot act."""
    balance = ds.moe.balance
    if balance is None:
        return
    family = family_of(model_config)

    # 1. Keys that shape the auxiliary loss, where there is none. None: the class has a coefficient of its own.
    coefficient = balance.aux_loss_coef
    if coefficient is None:
        coefficient = model_config.get("router_aux_loss_coef")
    if coefficient is None and family is not None and not family.returns_aux_loss:
        coefficient = 0.0
    for key, value, default in (("scope", balance.scope, "micro_batch"), ("per_layer", balance.per_layer, False)):
        if value != default and coefficient == 0:
            yield (
                f"moe.balance.{key} = {show(value)}: does nothing, because there is no auxiliary loss; set "
                "moe.balance.aux_loss_coef above 0, or remove the key"
            )

    # 2. A pyramid of experts, whose layers cannot be pooled.
    if coefficient != 0 and not balance.per_layer and isinstance(model_config.get("num_local_experts"), list):
        yield (
            "moe.balance.per_layer = false: the layers of this model have different numbers of experts and cannot be "
            "pooled; set it to true"
        )

    # 3. The selection bias, which AutoEP's router has and few others.
    if not balance.bias_update_rate:
        return
    key = f"moe.balance.bias_update_rate = {balance.bias_update_rate}"
    if ds.moe.layer is not None:
        yield (
            f"{key}: the gate of native layers chooses by its scores alone and has no place for a bias; use "
            "expert_parallel instead of moe.layer, or remove the key"
        )
    elif ds.expert_parallel is None and (family is None or not family.selection_bias):
        yield (
            f"{key}: the router of {show(model_config.get('model_type'))} has no selection bias without "
            "expert_parallel; add that section (autoep_size 1 will do), or remove the key"
        )
