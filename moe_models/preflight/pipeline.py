"""What cannot be trained with ``"pipeline"``: stages of layers on DeepSpeed's pipeline engine. Torch-free.

Sources: deepspeed 0.19.8, ``runtime/pipe/engine.py`` and ``module_inject/auto_ep_folding.py``;
``moe_models/engine/pipeline/`` is the run time. Some of what is refused here DeepSpeed would ignore without a word:
sequence parallelism; and with ZeRO-0 it clips by a wrong norm (weights were 4e-4 off after five steps).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.errors import UserError
from moe_models.families.sizes import sizes_of
from moe_models.families.stages import stage_bounds
from moe_models.families.table import family_of, moe_blocks

MICRO_BATCHES_PER_STAGE = 4
"""From here on the bubble costs less than a fifth of a step: (S - 1) of M + S - 1 turns."""


def pipeline_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """One line for each section and each trait of the model that does not go with stages."""
    if ds.pp_size == 1:
        return
    key = f"pipeline.stages = {ds.pp_size}"
    yield from _section_problems(ds, key)
    yield from _expert_problems(ds, key)
    yield from _model_problems(ds, model_config, key)


def _section_problems(ds: DsConfig, key: str) -> Iterator[str]:
    """Sections of the JSON that have nothing to do with experts."""
    if ds.zero_stage != 1:
        yield (
            f"{key} with zero_optimization.stage = {ds.zero_stage}: DeepSpeed's pipeline shards optimizer states only; "
            "set stage to 1"
        )
    if ds.tp_size > 1:
        yield (
            f"{key} with tensor_parallel.autotp_size = {ds.tp_size}: DeepSpeed splits no matrices inside a stage; "
            "remove one of the two sections"
        )
    if ds.sp_size > 1:
        yield (
            f"{key} with sequence_parallel_size = {ds.sp_size}: DeepSpeed's pipeline ignores it and trains on whole "
            "sequences; remove one of the two"
        )
    if ds.precision == "fp16":
        yield f"{key} with fp16: the loss scale is not shared between stages here; use bf16"
    if ds.value("data_types", "grad_accum_dtype", None) not in (None, "bf16", "auto") and ds.precision != "fp32":
        yield (
            f'{key} with data_types.grad_accum_dtype = "{ds.value("data_types", "grad_accum_dtype")}": not tested '
            "together, DeepSpeed takes another optimizer then; remove the key"
        )
    if ds.value("compile", "deepcompile") or ds.compiles_around_experts:
        yield f"{key} with compile: DeepSpeed compiles no stages; remove the section"
    device = (ds.zero("offload_optimizer") or {}).get("device", "none")
    if device == "nvme":
        yield f'{key} with zero_optimization.offload_optimizer.device = "nvme": not tested together; set it to "cpu"'
    if ds.raw.get("train_batch_size", "auto") != "auto":
        yield (
            f"train_batch_size = {ds.raw['train_batch_size']} with {key}: transformers compares it with a number that "
            'counts the stages as if they read other rows; write "auto"'
        )
    if not ds.has_optimizer:
        yield (
            f"{key} without an optimizer section: stages are trained with DeepSpeed's own; copy the optimizer section "
            "of ds_configs/zero1_ep2.json"
        )


def _expert_problems(ds: DsConfig, key: str) -> Iterator[str]:
    """How experts are spread, computed and kept even."""
    if ds.expert_parallel is not None and ds.expert_parallel.comm_backend == "deepep":
        yield f'{key} with expert_parallel.comm_backend = "deepep": not tested together; remove comm_backend'
    if ds.moe.kernels == "fused":
        yield f'{key} with moe.kernels = "fused": not tested together; remove moe.kernels'
    if ds.moe.balance is not None and ds.moe.balance.bias_update_rate:
        yield (
            f"{key} with moe.balance.bias_update_rate = {ds.moe.balance.bias_update_rate}: each stage would have to "
            "save the bias of its own layers, which is not done here; remove the key"
        )
    layer = ds.moe.layer
    if layer is None:
        return
    if layer.aux_loss == "layer":
        yield (
            f'{key} with moe.layer.aux_loss = "layer": only the model\'s loss travels between stages; remove the key'
        )
    if layer.drop_tokens:
        yield (
            f"{key} with moe.layer.drop_tokens = true: how many tokens a stage drops is not counted here; remove the "
            "key"
        )


def _model_problems(ds: DsConfig, model_config: Mapping[str, Any], key: str) -> Iterator[str]:
    """What the model says against it."""
    family = family_of(model_config)
    if family is None:
        return
    if family.no_pipeline is not None:
        yield f"{key} with model_type = {family.model_type}: {family.no_pipeline}; remove pipeline"
        return
    try:
        sizes_of(family, model_config)
    except UserError:  # a config.json that is broken beyond this
        return
    try:
        stage_bounds(model_config, ds.pp_size)
    except ValueError:
        count = len(list(moe_blocks(family, model_config)))
        yield f"{key}: each stage needs an MoE layer, and the model has {count}; use at most {count}"


def pipeline_flags(given: Any, ds: DsConfig) -> Iterator[str]:
    """Flags that cannot be honoured beside it."""
    if ds.pp_size == 1:
        return
    key = f"pipeline.stages = {ds.pp_size}"
    if given.use_peft:
        yield f"--use_peft with {key}: adapters are not cut into stages here; drop one of them"
    if given.use_liger_kernel:
        yield f"--use_liger_kernel with {key}: not tested together; drop the flag"
    if given.torch_compile or given.torch_compile_backend or given.torch_compile_mode:
        yield f"--torch_compile with {key}: DeepSpeed compiles no stages; drop the flag"
    if given.dataset_streaming:
        yield f"--dataset_streaming with {key}: accelerate would give the stages of a lane different rows; drop it"
    if given.neftune_noise_alpha:
        yield f"--neftune_noise_alpha with {key}: only the first stage has the embedding; drop the flag"
    if given.activation_offloading:
        yield f"--activation_offloading with {key}: not tested together; drop the flag"
    if given.chat_template_path and not str(given.chat_template_path).endswith(".jinja"):
        yield (
            f"--chat_template_path {given.chat_template_path} with {key}: new tokens would change the embedding, which "
            "the first stage has, and the head, which the last one has; give the template alone (.jinja)"
        )
    if given.include_num_input_tokens_seen not in ("no", False, None):
        yield f"--include_num_input_tokens_seen with {key}: every stage would count the same tokens; drop the flag"
    options = given.gradient_checkpointing_kwargs or {}
    if given.gradient_checkpointing and "use_reentrant" in str(options) and "true" in str(options).lower():
        yield (
            f'--gradient_checkpointing_kwargs {{"use_reentrant": true}} with {key}: not tested together; set it to '
            "false, which is the default"
        )


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage waits for the others: (S - 1) / (M + S - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def bubble_advice(ds: DsConfig, accumulation: int) -> Iterator[str]:
    """A line if the pipeline is empty for long."""
    if ds.pp_size > 1 and accumulation < MICRO_BATCHES_PER_STAGE * ds.pp_size:
        idle = bubble(ds.pp_size, accumulation)
        yield (
            f"pipeline.stages = {ds.pp_size} with {accumulation} accumulation steps: each stage waits {idle:.0%} of a "
            f"step; with {MICRO_BATCHES_PER_STAGE * ds.pp_size} it waits "
            f"{bubble(ds.pp_size, MICRO_BATCHES_PER_STAGE * ds.pp_size):.0%}: raise --gradient_accumulation_steps"
        )
