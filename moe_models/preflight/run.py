"""Everything that can be known to be wrong before a weight is read: from the JSON, config.json and the world size.

DeepSpeed makes most of these checks too, but inside ``deepspeed.initialize``: on every rank, with a traceback, one at a
time, after the model was loaded. Each line here names the key, its value, what is allowed and the mend. Source:
deepspeed 0.19.8, ``module_inject/auto_ep_config.py`` (``validate_autoep_config``, ``validate_autoep_post_detection``);
``moe_models/preflight/combinations.py`` has what does not depend on the model, ``moe_models/preflight/advice.py`` what
is only unwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_models import versions
from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import divisors, size_problems
from moe_models.errors import show
from moe_models.families.config_json import read_model_config
from moe_models.families.table import FAMILIES, Family, family_of, moe_blocks
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.combinations import autoep_combination_problems, autoep_zero_problems, zero_problems
from moe_models.preflight.native import check_native
from moe_models.preflight.paths import check_dataset_path, check_output_dir
from moe_models.preflight.sequence_parallel import sequence_parallel_problems
from moe_models.preflight.tensor_parallel import tensor_parallel_problems

__all__ = [
    "check_dataset_path",
    "check_output_dir",
    "check_run",
    "length_problems",
    "read_model_config",
    "reentrant_problems",
    "warnings_for_run",
]

_EXPERT_COUNT_KEYS = {family.num_experts_key for family in FAMILIES.values()} | {"moe_num_experts", "num_moe_experts"}
_SIZE_NAMES = {
    "ep_size": "expert_parallel.autoep_size",
    "tp_size": "tensor_parallel.autotp_size",
    "sp_size": "sequence_parallel_size",
}


def check_run(ds: DsConfig, model_config: Mapping[str, Any], world_size: int) -> list[str]:
    """All known reasons why this ds_config, this model and this number of ranks cannot train together.

    ``model_config`` is the model's ``config.json``. Neither weights nor torch are needed.
    """
    names = _SIZE_NAMES if ds.moe.layer is None else {**_SIZE_NAMES, "ep_size": "moe.layer.ep_size"}
    problems = size_problems(world_size, ds.ep_size, ds.tp_size, ds.sp_size, names=names)
    problems += _batch_problems(ds, world_size)
    problems += zero_problems(ds)
    problems += _balance_problems(ds, model_config)
    problems += tensor_parallel_problems(ds, model_config)
    problems += sequence_parallel_problems(ds, model_config)
    if ds.expert_parallel is None and ds.moe.layer is None and family_of(model_config) is None:
        problems.append(
            f"model_type = {show(model_config.get('model_type'))}: known are {', '.join(sorted(FAMILIES))}; turn a "
            "dense model into one of them with recipes/upcycle.py"
        )
    if ds.expert_parallel is not None:
        problems += _model_problems(ds.expert_parallel, model_config, world_size)
        problems += autoep_zero_problems(ds)
        problems += autoep_combination_problems(ds, ds.expert_parallel)
        problems += versions.version_problems()
    if ds.moe.layer is not None:
        problems += check_native(ds, ds.moe.layer, model_config, world_size)
    return problems


def length_problems(max_length: int | None, model_config: Mapping[str, Any]) -> list[str]:
    """A line if ``--max_length`` is longer than the model's context."""
    context = model_config.get("max_position_embeddings")
    if max_length and context and max_length > context:
        return [f"--max_length {max_length}: longer than the model's context; use at most {context}"]
    return []


def reentrant_problems(args: Any, aux_loss: bool) -> list[str]:
    """A line if activation checkpointing would take the auxiliary loss its gradient, and nobody would notice.

    Reentrant checkpointing runs the layers without gradients first, and that is when transformers 5.20.2 takes the
    router's logits for the loss. ``args`` are TrainingArguments, or the flags they are made of; ``aux_loss`` says
    whether there is such a loss.
    """
    options = args.gradient_checkpointing_kwargs or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:  # TrainingArguments will say it
            return []
    if aux_loss and args.gradient_checkpointing and options.get("use_reentrant"):
        return [
            '--gradient_checkpointing_kwargs {"use_reentrant": true}: the auxiliary loss would have no gradient; set '
            "it to false, which is the default, or --router_aux_loss_coef 0"
        ]
    return []


def _batch_problems(ds: DsConfig, world_size: int) -> Iterator[str]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, steps = (ds.raw.get(key) for key in keys)
    if isinstance(train, int) and isinstance(micro, int) and isinstance(steps, int):
        replicas = max(1, world_size // (ds.tp_size * ds.sp_size))
        if train != micro * steps * replicas:
            yield (
                f"train_batch_size = {train}: must be micro batch {micro} x accumulation {steps} x {replicas} "
                f'data-parallel ranks = {micro * steps * replicas}; write "auto" to have it computed'
            )


def _model_problems(experts: ExpertParallel, config: Mapping[str, Any], world_size: int) -> Iterator[str]:
    model_type = config.get("model_type")
    family = family_of(config)
    known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.autoep_preset))
    if family is not None and family.no_autoep is not None:
        yield (
            f"model_type = {show(model_type)}: {family.no_autoep}; use moe.layer instead "
            "(ds_configs/zero1_ep2_native.json and its siblings), or remove expert_parallel"
        )
        return
    if family is None:
        if not _EXPERT_COUNT_KEYS & set(config):
            yield (
                f"expert_parallel with a dense model (model_type = {show(model_type)}): there are no experts to "
                "spread; make a MoE of it first (recipes/upcycle.py), or remove expert_parallel (ds_configs/zero3.json)"
            )
        else:
            yield (
                f"model_type = {show(model_type)}: expert_parallel knows {known}; for another MoE family add a row to "
                "moe_models/families/table.py, or remove expert_parallel (ds_configs/zero3.json)"
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
    yield from _preset_problems(experts, family)


def _routing_problems(experts: ExpertParallel, config: Mapping[str, Any], count: int) -> Iterator[str]:
    """Routing that cannot be, or that the exported model would not do, because its class reads its config.json."""
    impossible = list(_impossible_routing(experts, config, count))
    if impossible:
        yield from impossible
        return
    for key, own, default in (
        ("top_k", "num_experts_per_tok", "auto"),
        ("num_expert_groups", "n_group", None),
        ("num_limited_groups", "topk_group", None),
    ):
        value = getattr(experts, key)
        if value not in (default, config.get(own)):
            where = f"{own} = {show(config[own])}" if own in config else f"no {own}"
            yield (
                f"expert_parallel.{key} = {value}: config.json has {where}, and the exported model routes by that; "
                f"{'change it there before training, or ' if own in config else ''}remove the key"
            )
    fields = type(experts).model_fields
    for key in ("score_func", "score_apply", "route_norm", "route_scale", "routed_scaling_factor", "expert_activation"):
        value, default = getattr(experts, key), fields[key].default
        if value != default:
            yield (
                f"expert_parallel.{key} = {show(value)}: the exported model would not know of it and compute another "
                "function; remove the key, the model's own is found from its config.json"
            )


def _impossible_routing(experts: ExpertParallel, config: Mapping[str, Any], count: int) -> Iterator[str]:
    if experts.top_k != "auto" and not 1 <= experts.top_k <= count:
        yield f'expert_parallel.top_k = {experts.top_k}: must be 1 to {count} (the experts), or "auto" for the model\'s'
    groups = experts.num_expert_groups or config.get("n_group")
    limited = experts.num_limited_groups or config.get("topk_group")
    if (groups is None) != (limited is None):
        there, missing = ("num_expert_groups", "num_limited_groups")[:: 1 if limited is None else -1]
        yield f"expert_parallel.{there} needs {missing} beside it; set both or none"
    elif groups is not None and limited is not None:
        if count % groups:
            yield (
                f"expert_parallel.num_expert_groups = {groups} does not divide the model's {count} experts; use one of "
                f"{divisors(count)}"
            )
        if limited > groups:
            yield f"expert_parallel.num_limited_groups = {limited}: must be 1 to {groups} (num_expert_groups)"


def _preset_problems(experts: ExpertParallel, family: Family) -> Iterator[str]:
    if experts.preset_model is not None and experts.preset_model != family.autoep_preset:
        yield (
            f"expert_parallel.preset_model = {show(experts.preset_model)}: model_type {show(family.model_type)} "
            f"takes {show(family.autoep_preset)}; remove the key, it is found from the model"
        )


def _balance_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """Balancing that would do nothing, or that the model's router has no hook for."""
    balance = ds.moe.balance
    if balance is None:
        return
    model_type = model_config.get("model_type")
    coefficient = model_config.get("router_aux_loss_coef") if balance.aux_loss_coef is None else balance.aux_loss_coef
    family = family_of(model_config)
    if coefficient is None and family is not None and not family.returns_aux_loss:
        coefficient = 0.0
    for key, value, default in (("scope", balance.scope, "micro_batch"), ("per_layer", balance.per_layer, False)):
        if value != default and coefficient == 0:
            yield (
                f"moe.balance.{key} = {show(value)}: does nothing, because there is no auxiliary loss; set "
                "moe.balance.aux_loss_coef above 0, or remove the key"
            )
    if coefficient != 0 and not balance.per_layer and isinstance(model_config.get("num_local_experts"), list):
        yield (
            "moe.balance.per_layer = false: the layers of this model have different numbers of experts and cannot be "
            "pooled; set it to true"
        )
    if balance.bias_update_rate and ds.moe.layer is not None:
        yield (
            f"moe.balance.bias_update_rate = {balance.bias_update_rate}: the gate of native layers chooses by its "
            "scores alone and has no place for a bias; use expert_parallel instead of moe.layer, or remove the key"
        )
    elif balance.bias_update_rate and ds.expert_parallel is None and (family is None or not family.selection_bias):
        yield (
            f"moe.balance.bias_update_rate = {balance.bias_update_rate}: the router of {show(model_type)} has no "
            "selection bias without expert_parallel; add that section (autoep_size 1 will do), or remove the key"
        )
