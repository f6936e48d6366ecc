"""Sections of a ds_config that cannot stand together, whatever the model: ZeRO, AutoEP, tensor parallelism, offload.

Sources, all of deepspeed 0.19.8: ``module_inject/auto_ep_folding.py`` (``validate_folding_global``),
``runtime/engine.py`` (``_validate_zero3_moe_compatibility``), ``runtime/zero/stage_1_and_2.py``
(``_configure_moe_settings``).
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.errors import show


def zero_problems(ds: DsConfig) -> Iterator[str]:
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


def autoep_zero_problems(ds: DsConfig) -> list[str]:
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


def autoep_combination_problems(ds: DsConfig, experts: ExpertParallel) -> list[str]:
    """AutoEP with other sections of the JSON, tensor parallelism above all."""
    tensor, zero = ds.raw.get("tensor_parallel", {}), ds.raw.get("zero_optimization", {})
    presets = [tensor.get("preset_model"), experts.preset_model]
    offload = [
        key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    tp = ds.tp_size > 1
    eager = {
        "tensor parallelism": tp,
        "sequence parallelism": ds.sp_size > 1,
        "ZeRO stage 3": ds.zero_stage == 3,
        "offload": bool(offload),
        'comm_backend "deepep"': experts.comm_backend == "deepep",
        "compile.deepcompile": bool(ds.raw.get("compile", {}).get("deepcompile")),
    }
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
        (
            bool(ds.raw.get("compile", {}).get("autoep_non_moe")) and any(eager.values()),
            f"compile.autoep_non_moe = true with {', '.join(name for name, there in eager.items() if there)}: refused "
            "by DeepSpeed; remove compile.autoep_non_moe",
        ),
        (tp and bool(offload), f"{both} with zero_optimization.{' and '.join(offload)}: {no} remove the offload"),
    )
    return [line for wrong, line in rules if wrong]
