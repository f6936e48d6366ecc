"""What AutoEP (``"expert_parallel"``) cannot do with a model, known from JSON, config.json and world size. Torch-free.

Source: deepspeed 0.19.8, ``module_inject/auto_ep_config.py`` (``validate_autoep_config``,
``validate_autoep_post_detection``). ``combinations.py`` has what does not depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import divisors
from moe_models.errors import show
from moe_models.families.table import FAMILIES, family_of, moe_blocks
from moe_models.families.unsupported import why_unsupported

_EXPERT_COUNT_KEYS = {family.num_experts_key for family in FAMILIES.values()} | {"moe_num_experts", "num_moe_experts"}
"""Keys by which a config.json of an unknown family says that it has experts."""

_PART_OF_THE_MODEL = (
    "score_func",
    "score_apply",
    "route_norm",
    "route_scale",
    "routed_scaling_factor",
    "expert_activation",
)
"""Keys that change what the block computes; a Hugging Face config.json has no place for them."""


def autoep_model_problems(experts: ExpertParallel, config: Mapping[str, Any], world_size: int) -> Iterator[str]:
    """One line for each reason why AutoEP cannot spread this model's experts as the section says."""
    model_type = config.get("model_type")
    family = family_of(config)
    if family is None:
        if why_unsupported(config) is None:  # those have their line
            yield _unknown_family(config)
        return
    if family.no_autoep is not None:
        yield (
            f"model_type = {show(model_type)}: {family.no_autoep}; use moe.layer instead "
            "(ds_configs/zero1_ep2_native.json and its siblings), or remove expert_parallel"
        )
        return
    try:
        count = family.num_experts(config)
    except (KeyError, TypeError, ValueError):
        count = 0
    if count < 1:
        value = config.get(family.num_experts_key)
        yield f"config.json: {family.num_experts_key} = {show(value)}: must be the number of experts, at least 1"
        return
    if not list(moe_blocks(family, config)):
        yield f"config.json: model_type = {show(model_type)}, but no layer is an MoE layer; remove expert_parallel"
    if count % experts.autoep_size:
        both = [size for size in divisors(count) if world_size % size == 0]
        yield (
            f"expert_parallel.autoep_size = {experts.autoep_size} does not divide the model's {count} experts; with "
            f"{world_size} ranks use one of {both}"
        )
    yield from _routing_problems(experts, config, count)
    if experts.preset_model is not None and experts.preset_model != family.autoep_preset:
        yield (
            f"expert_parallel.preset_model = {show(experts.preset_model)}: model_type {show(family.model_type)} "
            f"takes {show(family.autoep_preset)}; remove the key, it is found from the model"
        )


def _unknown_family(config: Mapping[str, Any]) -> str:
    """A dense model, or an MoE family that is not in the table."""
    model_type = show(config.get("model_type"))
    if not _EXPERT_COUNT_KEYS & set(config):
        return (
            f"expert_parallel with a dense model (model_type = {model_type}): there are no experts to "
            "spread; make a MoE of it first (recipes/upcycle.py), or remove expert_parallel (ds_configs/zero3.json)"
        )
    known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.autoep_preset))
    return (
        f"model_type = {model_type}: expert_parallel knows {known}; for another MoE family add a row to "
        "moe_models/families/table.py, or remove expert_parallel (ds_configs/zero3.json)"
    )


def _routing_problems(experts: ExpertParallel, config: Mapping[str, Any], count: int) -> Iterator[str]:
    """Routing that cannot be, or that the exported model would not do, because its class reads its config.json."""
    # 1. Numbers that do not fit each other. Where there are any, what the exported model would do is no question yet.
    impossible = list(_impossible_routing(experts, config, count))
    if impossible:
        yield from impossible
        return

    # 2. Numbers that config.json has a key for, and says otherwise.
    for key, own, default in (
        ("top_k", "num_experts_per_tok", "auto"),
        ("num_expert_groups", "n_group", None),
        ("num_limited_groups", "topk_group", None),
    ):
        value = getattr(experts, key)
        if value in (default, config.get(own)):
            continue
        if own in config:
            where = f"{own} = {show(config[own])}"
            fix = "change it there before training, or remove the key"
        else:
            where = f"no {own}"
            fix = "remove the key"
        yield f"expert_parallel.{key} = {value}: config.json has {where}, and the exported model routes by that; {fix}"

    # 3. What config.json has no key for.
    for key in _PART_OF_THE_MODEL:
        value = getattr(experts, key)
        if value != type(experts).model_fields[key].default:
            yield (
                f"expert_parallel.{key} = {show(value)}: the exported model would not know of it and compute another "
                "function; remove the key, the model's own is found from its config.json"
            )


def _impossible_routing(experts: ExpertParallel, config: Mapping[str, Any], count: int) -> Iterator[str]:
    """More experts for a token than there are, and groups that do not divide them."""
    if experts.top_k != "auto" and not 1 <= experts.top_k <= count:
        yield f'expert_parallel.top_k = {experts.top_k}: must be 1 to {count} (the experts), or "auto" for the model\'s'
    groups = experts.num_expert_groups or config.get("n_group")
    limited = experts.num_limited_groups or config.get("topk_group")
    if groups is not None and limited is None:
        yield "expert_parallel.num_expert_groups needs num_limited_groups beside it; set both or none"
    elif groups is None and limited is not None:
        yield "expert_parallel.num_limited_groups needs num_expert_groups beside it; set both or none"
    elif groups is not None and limited is not None:
        if count % groups:
            yield (
                f"expert_parallel.num_expert_groups = {groups} does not divide the model's {count} experts; use one of "
                f"{divisors(count)}"
            )
        if limited > groups:
            yield f"expert_parallel.num_limited_groups = {limited}: must be 1 to {groups} (num_expert_groups)"
