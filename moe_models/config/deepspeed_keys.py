"""What a ds_config JSON may say: DeepSpeed's keys as data, and AutoEP's section as a type.

DeepSpeed reads its JSON with ``dict.get``: a misspelt key, or ``"auto"`` in a place that nothing fills, silently means
the default, and ``"expert_parallel": {"autoep_sizes": 8}`` trains without expert parallelism. The keys and types here
were read from deepspeed 0.19.8; ``tests/config/test_config.py`` compares them with the installed DeepSpeed.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL_KEYS: frozenset[str] = _words(
    """activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"""
)
"""Top-level keys that DeepSpeed 0.19.8 reads (``bfloat16``, an old name of ``bf16``, is left out: HF ignores it)."""

REMOVED_KEYS: frozenset[str] = _words(
    """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients"""
)
"""Top-level keys that DeepSpeed once read and 0.19.8 refuses."""

REMOVED_ZERO_KEYS: frozenset[str] = frozenset(
    {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
)
"""The same for ``zero_optimization``."""

DEEPSPEED_MODELS: dict[str, tuple[str, str]] = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "tensor_parallel": ("deepspeed.runtime.tensor_parallel.config", "TPTrainingConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
}
"""Sections checked by constructing DeepSpeed's own pydantic model (imported only when the section is there)."""

SECTION_KEYS: dict[str, tuple[str, ...]] = {
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "timers": ("throughput",),
}
"""Keys of sections that DeepSpeed reads with ``dict.get``, ignoring misspelt ones."""

AUTO_FILLED: tuple[str, ...] = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
"""Where HF's ``HfTrainerDeepSpeedConfig`` replaces "auto" by a training argument (transformers 5.20.2)."""

AUTO_OWN: tuple[str, ...] = (
    "data_types.keep_in_fp32_modules",
    "pipeline.stages",
    "zero_optimization.zenflow.select_strategy",
    "zero_optimization.zenflow.select_interval",
    "zero_optimization.zenflow.update_interval",
)
"""Where "auto" is DeepSpeed's own value, outside ``expert_parallel`` (whose fields say it themselves)."""
