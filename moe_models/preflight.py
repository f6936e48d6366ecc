"""Everything that can be known to be wrong before a weight is read: from the JSON, config.json and the world size.

DeepSpeed makes most of these checks too, but inside ``deepspeed.initialize``: on every rank, with a traceback, one at a
time, after the model was loaded. Each line here names the key, its value, what is allowed and the mend. Sources, all of
deepspeed 0.19.8: ``module_inject/auto_ep_config.py`` (``validate_autoep_config``, ``validate_autoep_post_detection``),
``module_inject/auto_ep_folding.py`` (``validate_folding_global``), ``runtime/engine.py``
(``_validate_zero3_moe_compatibility``), ``runtime/zero/stage_1_and_2.py`` (``_configure_moe_settings``).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config import DsConfig
from moe_models.ds_schema import ExpertParallel, show
from moe_models.families import FAMILIES, HAS_SELECTION_BIAS, Family, moe_blocks
from moe_models.inputs import check_dataset_path, check_output_dir, read_model_config
from moe_models.layout import divisors, size_problems
from moe_models.native_checks import check_native

__all__ = ["check_dataset_path", "check_output_dir", "check_run", "read_model_config", "warnings_for_run"]

TESTED_DEEPSPEED = ("0.19.8",)
"""DeepSpeed versions the tests ran with."""
TESTED_TRANSFORMERS = ("5.17.0", "5.20.2")
"""transformers versions AutoEP was run with."""
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
    problems += _zero_problems(ds)
    problems += _balance_problems(ds, model_config)
    if ds.expert_parallel is not None:
        problems += _model_problems(ds.expert_parallel, model_config, world_size)
        problems += _autoep_zero_problems(ds)
        problems += _autoep_combination_problems(ds, ds.expert_parallel)
        problems += _version_problems()
    if ds.moe.layer is not None:
        problems += check_native(ds, ds.moe.layer, model_config, world_size)
    return problems


def warnings_for_run(
    ds: DsConfig,
    model_config: Mapping[str, Any],
    world_size: int,
    gpus_per_node: int | None = None,
    *,
    on_gpu: bool = False,
) -> list[str]:
    """One line for each thing that works but is probably not meant, that nobody has tested, or that fails on some GPUs.

    ``gpus_per_node`` None leaves out what depends on it; ``on_gpu`` False leaves out what only GPU processes need.
    """
    lines: list[str] = []
    params = ds.raw.get("optimizer", {}).get("params", {})
    kind = str(ds.raw.get("optimizer", {}).get("type", "")).lower()
    compiler = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if on_gpu and kind in ("adam", "adamw") and not params.get("torch_adam") and compiler is None:
        lines.append(
            f"optimizer.type = {show(ds.raw['optimizer']['type'])}: DeepSpeed compiles its fused kernel at the first "
            'start, and there is no nvcc; install the CUDA toolkit, or set "torch_adam": true, "fused": true in '
            "optimizer.params"
        )
    balance, model_type = ds.moe.balance, model_config.get("model_type")
    if balance and balance.bias_update_rate and model_type not in HAS_SELECTION_BIAS:
        lines.append(
            f"moe.balance.bias_update_rate = {balance.bias_update_rate}: {model_type} has no place for the bias, so "
            "the exported model routes without it and may lose quality; the losses stay with the model, or train "
            "deepseek_v3"
        )
    if ds.expert_parallel is None:
        return lines
    ep = ds.ep_size
    if ep == 1:
        lines.append(
            "expert_parallel.autoep_size = 1: every rank holds all experts and no token is exchanged; raise it, or "
            "remove expert_parallel"
        )
    if gpus_per_node and world_size > gpus_per_node and gpus_per_node % ep:
        inside = [size for size in divisors(gpus_per_node) if size <= ep]
        lines.append(
            f"expert_parallel.autoep_size = {ep}: EP groups cross nodes of {gpus_per_node} GPUs, so every MoE layer's "
            f"dispatch and combine go over the network; inside a node: {inside}"
        )
    top_k, own = ds.expert_parallel.top_k, model_config.get("num_experts_per_tok")
    if top_k != "auto" and own is not None and top_k != own:
        lines.append(
            f"expert_parallel.top_k = {top_k} replaces the model's num_experts_per_tok = {own}, also in evaluation; "
            "the exported config.json keeps its own"
        )
    for package, tested in (("deepspeed", TESTED_DEEPSPEED), ("transformers", TESTED_TRANSFORMERS)):
        version = installed_version(package)
        if version is not None and version not in tested:
            lines.append(f"{package} {version} is untested with expert_parallel; tested: {', '.join(tested)}")
    return lines


def installed_version(package: str) -> str | None:
    """Version of an installed package, from its metadata (nothing is imported), or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def _zero_problems(ds: DsConfig) -> Iterator[str]:
    """What DeepSpeed refuses under ZeRO with or without experts."""
    zero = ds.raw.get("zero_optimization", {})
    if zero.get("legacy_stage1"):
        yield "zero_optimization.legacy_stage1 = true: DeepSpeed no longer has it; remove the key"
    if ds.zero_stage == 3 and zero.get("elastic_checkpoint"):
        yield "zero_optimization.elastic_checkpoint = true: not supported with stage 3; remove the key"
    if ds.zero_stage == 3 and zero.get("reduce_scatter", True):
        for key, needed in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if ds.raw.get(key, needed) != needed:
                yield f"{key} = {show(ds.raw[key])}: must be {show(needed)} with ZeRO stage 3; remove the key"
    if ds.zero_stage == 3 and ds.raw.get("gradient_allreduce_op") == "sum":
        yield 'gradient_allreduce_op = "sum": not supported with ZeRO stage 3; remove the key'


def _model_problems(experts: ExpertParallel, config: Mapping[str, Any], world_size: int) -> Iterator[str]:
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.autoep_preset))
    if family is not None and family.autoep_preset is None:
        yield (
            f"model_type = {show(model_type)}: AutoEP would leave out its residual MLP; use moe.layer instead "
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
                "moe_models/families.py, or remove expert_parallel (ds_configs/zero3.json)"
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


def _autoep_zero_problems(ds: DsConfig) -> list[str]:
    """AutoEP with each ZeRO stage, and with the optimizer."""
    zero = ds.raw.get("zero_optimization", {})
    stage, key = ds.zero_stage, "zero_optimization."
    hpz = zero.get("zero_hpz_partition_size", 1)
    rules = (
        (
            stage == 0,
            "expert_parallel with zero_optimization.stage = 0: DeepSpeed 0.19.8 then clips with a wrong gradient norm "
            "(3.8% too low in fp32, without the experts in bf16); set stage to 1, 2 or 3",
        ),
        (
            stage in (1, 2) and not isinstance(ds.raw.get("optimizer"), dict),
            "expert_parallel without an optimizer section: at ZeRO stage 1 and 2 DeepSpeed refuses an optimizer "
            "that it did not build itself; copy the optimizer section of ds_configs/zero1_ep2.json",
        ),
        (
            stage in (1, 2) and not zero.get("reduce_scatter", True),
            f"{key}reduce_scatter = false: must be true with expert_parallel at stage 1 or 2; remove the key",
        ),
        (
            stage == 2 and not zero.get("contiguous_gradients", True),
            f"{key}contiguous_gradients = false: must be true with expert_parallel at stage 2; remove the key",
        ),
        (
            stage == 3 and ds.sp_size > 1,
            f"sequence_parallel_size = {ds.sp_size}: not supported with expert_parallel at ZeRO stage 3; use stage "
            "1 or 2, or set it to 1",
        ),
        (
            stage == 3 and bool(zero.get("zero_quantized_gradients")),
            f"{key}zero_quantized_gradients = true: not supported with expert_parallel at stage 3; remove the key",
        ),
        (
            stage == 3 and hpz > 1,
            f"{key}zero_hpz_partition_size = {hpz}: hpZeRO is not supported with expert_parallel; remove the key",
        ),
    )
    return [line for wrong, line in rules if wrong]


def _balance_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """Balancing that would do nothing, or that the model's router has no hook for."""
    balance = ds.moe.balance
    if balance is None:
        return
    model_type = model_config.get("model_type")
    coefficient = model_config.get("router_aux_loss_coef") if balance.aux_loss_coef is None else balance.aux_loss_coef
    family = FAMILIES.get(str(model_type))
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
    elif balance.bias_update_rate and ds.expert_parallel is None and model_type not in HAS_SELECTION_BIAS:
        yield (
            f"moe.balance.bias_update_rate = {balance.bias_update_rate}: the router of {show(model_type)} has no "
            "selection bias without expert_parallel; add that section (autoep_size 1 will do), or remove the key"
        )


def _autoep_combination_problems(ds: DsConfig, experts: ExpertParallel) -> list[str]:
    """AutoEP with other sections of the JSON, tensor parallelism above all."""
    tensor, zero = ds.raw.get("tensor_parallel", {}), ds.raw.get("zero_optimization", {})
    presets = [tensor.get("preset_model"), experts.preset_model]
    offload = [
        key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    tp = ds.tp_size > 1
    both = f"tensor_parallel.autotp_size = {ds.tp_size} and expert_parallel"
    no = "not supported together;"
    rules = (
        (
            bool(ds.raw.get("use_data_before_expert_parallelism")),
            "use_data_before_expert_parallelism = true: spreads each EP group over the whole machine instead of "
            "neighbouring ranks, which nothing in this package expects; remove the key",
        ),
        (
            None not in presets and presets[0] != presets[1],
            f"tensor_parallel.preset_model = {show(presets[0])} and expert_parallel.preset_model = {show(presets[1])} "
            "must be the same; remove one of them",
        ),
        (
            tp and experts.autoep_size == 1,
            f"{both}.autoep_size = 1: DeepSpeed would count token gradients twice; raise autoep_size or set TP to 1",
        ),
        (tp and experts.async_split_plan, f"{both}.async_split_plan = true: {no} remove async_split_plan"),
        (
            tp and experts.combine_impl == "fused_weighted_sum",
            f'{both}.combine_impl = "fused_weighted_sum": {no} remove combine_impl',
        ),
        (tp and experts.comm_backend == "deepep", f'{both}.comm_backend = "deepep": {no} remove comm_backend'),
        (
            tp and bool(ds.raw.get("compile", {}).get("deepcompile")),
            f"{both} with compile.deepcompile = true: {no} set deepcompile to false",
        ),
        (tp and bool(offload), f"{both} with zero_optimization.{' and '.join(offload)}: {no} remove the offload"),
    )
    return [line for wrong, line in rules if wrong]


def _version_problems() -> Iterator[str]:
    version = installed_version("transformers")
    found = re.match(r"(\d+)\.(\d+)", version or "")
    tested = " or ".join(TESTED_TRANSFORMERS)
    if found is None:
        yield f"transformers {version or 'is not installed'}: expert_parallel needs it; install {tested}"
    elif tuple(map(int, found.groups())) < (5, 0):
        yield f"transformers {version}: expert_parallel needs the fused experts of 5.0 and later; install {tested}"
    elif tuple(map(int, found.groups())) >= (5, 23):
        yield (
            f"transformers {version}: AutoEP of deepspeed 0.19.8 fails there (_CanRecordRegistry.get() takes 2 "
            f"positional arguments but 3 were given); install {tested}"
        )
