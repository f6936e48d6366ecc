"""Sections of a ds_config that exclude each other, whatever the model: ZeRO, AutoEP, tensor parallelism, offload.

Sources, all of deepspeed 0.19.8: ``module_inject/auto_ep_folding.py`` (``validate_folding_global``),
``runtime/engine.py`` (``_validate_zero3_moe_compatibility``), ``runtime/zero/stage_1_and_2.py``
(``_configure_moe_settings``).
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_models.config.ds_config import OFFLOAD_KEYS, DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.errors import show


def zero_problems(ds: DsConfig) -> Iterator[str]:
    """What DeepSpeed refuses under ZeRO with or without experts."""
    if ds.zero("legacy_stage1"):
        yield "zero_optimization.legacy_stage1 = true: DeepSpeed no longer has it; remove the key"
    if ds.zero_stage < 3:
        return
    if ds.zero("elastic_checkpoint"):
        yield "zero_optimization.elastic_checkpoint = true: not supported with stage 3; remove the key"
    if ds.zero("reduce_scatter", True):
        for key, needed in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if ds.raw.get(key, needed) != needed:
                yield f"{key} = {show(ds.raw[key])}: must be {show(needed)} with ZeRO stage 3; remove the key"
    if ds.raw.get("gradient_allreduce_op") == "sum":
        yield 'gradient_allreduce_op = "sum": not supported with ZeRO stage 3; remove the key'


def optimizer_problems(ds: DsConfig) -> Iterator[str]:
    """Optimizers that DeepSpeed runs as something else in this layout, or cannot run."""
    section = ds.raw.get("optimizer")
    name = section.get("type") if isinstance(section, dict) else None
    if not isinstance(name, str):
        return
    key = f"optimizer.type = {show(name)}"
    if name.lower() in _NEED_BASE_SHAPES:
        yield f"{key}: needs the base shapes of the package mup, which nothing here sets; use AdamW"
    if name.lower() != "muon":
        return
    clip = ds.raw.get("gradient_clipping", DEEPSPEED_CLIPS_AT)
    if ds.zero_stage > 0 and clip not in (0, "auto"):
        yield muon_clips(f"gradient_clipping = {show(clip)}", "write gradient_clipping 0")
    if ds.zero_stage == 3 and ds.zero("reduce_scatter", True):
        yield (
            f"{key} with zero_optimization.stage = 3: DeepSpeed needs zero_optimization.reduce_scatter = false there; "
            "set it, or set stage to 1 or 2"
        )
    if ds.tp_size > 1:
        yield (
            f"{key} with tensor_parallel.autotp_size = {ds.tp_size}: each peer would orthogonalise its shard of a "
            "matrix instead of the matrix; use AdamW, or set autotp_size to 1"
        )


def muon_clips(setting: str, fix: str) -> str:
    """The line for Muon with clipping, which the JSON or a flag may ask for.

    deepspeed 0.19.8 at ZeRO 1, 2 and 3: the clipped "gradients" are Muon's orthogonal updates, whose norm grows with
    the number and the rank of the matrices. ``tests/training/test_muon.py`` shows it.
    """
    return (
        f'optimizer.type = "Muon" with {setting}: at ZeRO stage 1 to 3 DeepSpeed clips the updates instead of the '
        f"gradients, which divides the learning rate by their norm; {fix}, or use AdamW"
    )


DEEPSPEED_CLIPS_AT = 1.0
"""What DeepSpeed does without ``gradient_clipping``."""

_NEED_BASE_SHAPES = ("muadam", "muadamw", "musgd")


def autoep_zero_problems(ds: DsConfig) -> Iterator[str]:
    """AutoEP with each ZeRO stage, and with the optimizer."""
    stage = ds.zero_stage
    key = "zero_optimization."
    if stage == 0:
        yield (
            "expert_parallel with zero_optimization.stage = 0: DeepSpeed 0.19.8 then clips with a wrong gradient norm "
            "(3.8% too low in fp32, without the experts in bf16); set stage to 1, 2 or 3"
        )
    if stage in (1, 2) and not ds.has_optimizer:
        yield (
            "expert_parallel without an optimizer section: at ZeRO stage 1 and 2 DeepSpeed refuses an optimizer "
            "that it did not build itself; copy the optimizer section of ds_configs/zero1_ep2.json"
        )
    if stage in (1, 2) and not ds.zero("reduce_scatter", True):
        yield f"{key}reduce_scatter = false: must be true with expert_parallel at stage 1 or 2; remove the key"
    if stage == 2 and not ds.zero("contiguous_gradients", True):
        yield f"{key}contiguous_gradients = false: must be true with expert_parallel at stage 2; remove the key"
    if stage == 3 and ds.sp_size > 1:
        yield (
            f"sequence_parallel_size = {ds.sp_size}: not supported with expert_parallel at ZeRO stage 3; use stage "
            "1 or 2, or set it to 1"
        )
    if stage == 3 and ds.zero("zero_quantized_gradients"):
        yield f"{key}zero_quantized_gradients = true: not supported with expert_parallel at stage 3; remove the key"
    hpz = ds.zero("zero_hpz_partition_size", 1)
    if stage == 3 and hpz > 1:
        yield f"{key}zero_hpz_partition_size = {hpz}: hpZeRO is not supported with expert_parallel; remove the key"


def autoep_combination_problems(ds: DsConfig, experts: ExpertParallel) -> Iterator[str]:
    """AutoEP with other sections of the JSON, tensor parallelism above all."""
    # 1. Where the ranks and the names of the layers come from.
    if ds.raw.get("use_data_before_expert_parallelism"):
        yield data_before_experts()
    tensor_preset = ds.value("tensor_parallel", "preset_model")
    if None not in (tensor_preset, experts.preset_model) and tensor_preset != experts.preset_model:
        yield (
            f"tensor_parallel.preset_model = {show(tensor_preset)} and expert_parallel.preset_model = "
            f"{show(experts.preset_model)} must be the same; remove one of them"
        )

    # 2. Tensor parallelism, which AutoEP folds into its own groups.
    both = f"tensor_parallel.autotp_size = {ds.tp_size} and expert_parallel"
    no = "not supported together;"
    if ds.tp_size > 1:
        if experts.autoep_size == 1:
            yield (
                f"{both}.autoep_size = 1: DeepSpeed would count token gradients twice; raise autoep_size or set TP to 1"
            )
        if experts.async_split_plan:
            yield f"{both}.async_split_plan = true: {no} remove async_split_plan"
        if experts.combine_impl == "fused_weighted_sum":
            yield f'{both}.combine_impl = "fused_weighted_sum": {no} remove combine_impl'
        if experts.comm_backend == "deepep":
            yield f'{both}.comm_backend = "deepep": {no} remove comm_backend'
        if ds.deepcompile:
            yield f"{both} with compile.deepcompile = true: {no} set deepcompile to false"

    # 3. The compiler around the AutoEP layers, which DeepSpeed allows in the plainest layouts only.
    in_its_way = {
        "tensor parallelism": ds.tp_size > 1,
        "sequence parallelism": ds.sp_size > 1,
        "ZeRO stage 3": ds.zero_stage == 3,
        "offload": bool(ds.offloaded),
        'comm_backend "deepep"': experts.comm_backend == "deepep",
        "compile.deepcompile": ds.deepcompile,
    }
    if ds.compiles_around_experts and any(in_its_way.values()):
        yield (
            f"compile.autoep_non_moe = true with {', '.join(name for name, there in in_its_way.items() if there)}: "
            "refused by DeepSpeed; remove compile.autoep_non_moe"
        )

    # 4. Tensor parallelism again: offload comes last in the order of the lines.
    if ds.tp_size > 1 and ds.offloaded:
        keys = [key for what, key in OFFLOAD_KEYS.items() if what in ds.offloaded]
        yield f"{both} with zero_optimization.{' and '.join(keys)}: {no} remove the offload"


def data_before_experts() -> str:
    """The line for ``use_data_before_expert_parallelism``, which AutoEP and native layers share."""
    return (
        "use_data_before_expert_parallelism = true: spreads each EP group over the whole machine instead of "
        "neighbouring ranks, which nothing in this package expects; remove the key"
    )
