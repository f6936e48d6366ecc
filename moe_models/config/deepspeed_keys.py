"""What a ds_config JSON may say: DeepSpeed's keys as data, and AutoEP's section as a type.

DeepSpeed reads its JSON with ``dict.get``: a misspelt key, or ``"auto"`` in a place that nobody fills, silently means
the default, and ``"expert_parallel": {"autoep_sizes": 8}`` trains without expert parallelism. The keys and types here
were read from deepspeed 0.19.8; ``tests/config/test_config.py`` compares them with the installed DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


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

AutoEPPreset = Literal["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"]
ExpertActivation = Literal["swiglu", "geglu_tanh", "swiglu_clamped", "swiglu_oai"]
_ATTRIBUTE = r"^[^.]+$"


class Section(BaseModel):
    """A section that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ExpertParallel(Section):
    """DeepSpeed's own ``"expert_parallel"`` section (AutoEP), key by key."""

    enabled: bool
    """Turn AutoEP on. Required here, because DeepSpeed ignores a section that does not say it."""
    autoep_size: int = Field(1, ge=1)
    """Ranks that share one copy of the experts; it must divide the experts and the world size."""
    expert_tensor_parallel_size: Literal[1] = 1
    """Tensor parallelism inside an expert; DeepSpeed reserves the key and accepts 1 only."""
    preset_model: AutoEPPreset | None = None
    """Names and routing of a known family; null takes it from the model's ``model_type``."""
    moe_layer_pattern: str | None = Field(None, min_length=1)
    """Regular expression of the module paths that are MoE blocks."""
    router_pattern: str | None = Field(None, pattern=_ATTRIBUTE)
    """Child of the block that is the router."""
    expert_pattern: str | None = Field(None, pattern=_ATTRIBUTE)
    """Child of the block that holds the experts."""
    expert_w1: str | None = Field(None, pattern=_ATTRIBUTE)
    """Expert gate (or fused gate and up) weight."""
    expert_w2: str | None = Field(None, pattern=_ATTRIBUTE)
    """Expert down weight."""
    expert_w3: str | None = Field(None, pattern=_ATTRIBUTE)
    """Expert up weight; null means fused into ``expert_w1``, absent means the preset's."""
    expert_activation: ExpertActivation | None = None
    """Activation of an expert; null takes the preset's."""
    num_experts_attr: str | None = Field(None, pattern=_ATTRIBUTE)
    """Attribute of the model config that counts the experts."""
    top_k_attr: str | None = Field(None, pattern=_ATTRIBUTE)
    """Attribute of the model config that holds top-k."""
    has_shared_experts: bool | None = None
    """Whether the block has shared experts."""
    shared_experts_pattern: str | None = Field(None, pattern=_ATTRIBUTE)
    """Child of the block that holds the shared experts."""
    shared_experts_gate_pattern: str | None = Field(None, pattern=_ATTRIBUTE)
    """Child of the block that gates the shared experts."""
    top_k: int | Literal["auto"] = "auto"
    """Experts per token; "auto" takes the model config's."""
    score_func: Literal["auto", "softmax", "sigmoid"] = "auto"
    """How router logits become scores."""
    score_apply: Literal["auto", "pre", "post"] = "auto"
    """Whether scores weigh the tokens before or after the experts."""
    route_norm: bool | None = None
    """Whether the top-k scores are normalized to sum 1; null takes the model's."""
    route_scale: float = 1.0
    """Factor on the scores."""
    routed_scaling_factor: float | Literal["auto"] = "auto"
    """DeepSeek's factor on the routed output; "auto" takes the model config's."""
    num_expert_groups: int | None = Field(None, ge=1)
    """Group-limited routing: groups of experts."""
    num_limited_groups: int | None = Field(None, ge=1)
    """Group-limited routing: groups that one token may reach."""
    load_balance_coeff: None = None
    """DeepSpeed 0.19.8 accepts null only."""
    use_grouped_mm: bool = True
    """One grouped GEMM over the local experts instead of a loop."""
    disable_triton_grouped_mm: bool = False
    """Prefer torch's grouped GEMM to the Triton kernel."""
    gate_up_impl: Literal["separate", "fused"] = "separate"
    """Gate and up projections as two GEMMs or one."""
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = "auto"
    """How the top-k outputs of a token are summed."""
    row_weighting_impl: Literal["auto", "eager", "fused"] = "auto"
    """How DeepEP weighs rows; "fused" needs ``comm_backend`` "deepep"."""
    comm_backend: Literal["comm", "deepep"] = "comm"
    """Transport of dispatch and combine: torch.distributed or DeepEP."""
    comm_num_sm: int = Field(12, ge=1)
    """Streaming multiprocessors that DeepEP may take."""
    comm_qp_margin: int = Field(4, ge=0)
    """Spare queue pairs of DeepEP."""
    comm_max_tokens_per_rank: int = Field(0, ge=0)
    """Tokens one rank can route at most; DeepEP needs it."""
    async_split_plan: bool = False
    """Exchange the split sizes asynchronously."""
    validate_folding_routing: bool = False
    """Check at every step that tensor-parallel peers route alike (debugging)."""

    @field_validator("moe_layer_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"a regular expression ({error})") from None
        return value

    def conflicts(self) -> list[str]:
        """One line for each pair of values that DeepSpeed refuses together."""
        problems = []
        if self.gate_up_impl == "fused" and not self.use_grouped_mm:
            problems.append('expert_parallel.gate_up_impl = "fused" needs use_grouped_mm true; change one of them')
        if self.row_weighting_impl == "fused" and (self.comm_backend != "deepep" or self.autoep_size == 1):
            problems.append(
                'expert_parallel.row_weighting_impl = "fused" needs comm_backend "deepep" and autoep_size above 1; '
                "remove the key"
            )
        if self.comm_backend == "deepep" and self.comm_max_tokens_per_rank == 0:
            problems.append(
                'expert_parallel.comm_backend = "deepep" needs comm_max_tokens_per_rank above 0: '
                "micro batch x longest padded sequence"
            )
        if self.combine_impl == "fused_weighted_sum" and self.comm_backend == "deepep" and self.autoep_size > 1:
            problems.append(
                'expert_parallel.combine_impl = "fused_weighted_sum" does nothing under comm_backend "deepep"; '
                "remove one of the two keys"
            )
        if self.combine_impl == "fused_weighted_sum" and self.score_apply == "pre":
            problems.append(
                'expert_parallel.combine_impl = "fused_weighted_sum" needs score_apply "post" or "auto"; '
                "change one of them"
            )
        groups, limited = self.num_expert_groups, self.num_limited_groups
        if groups is not None and limited is not None and limited > groups:
            problems.append(
                f"expert_parallel.num_limited_groups = {limited} is more than num_expert_groups = {groups}; lower it"
            )
        return problems


def show(value: object) -> str:
    """One short line of JSON for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(where: str, key: str, value: object, allowed: Iterable[str]) -> str:
    """One line for a key that nobody reads: its value, the nearest allowed key, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    mend = f'did you mean "{near[0]}"?' if near else f"remove it; allowed: {', '.join(names) or 'nothing yet'}"
    return f"{where}{key} = {show(value)}: unknown key; {mend}"


_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "float_type": "a number",
    "float_parsing": "a number",
    "none_required": "null",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "a string that is not empty",
    "string_pattern_mismatch": "one attribute name, without dots",
    "value_error": "{error}",
    "assertion_error": "{error}",
}
"""Pydantic's error types in words."""


def translate(error: ValidationError, section: str, values: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Pydantic's errors as one line for each key; the branches of a union become one line."""
    lines: list[str] = []
    wrong: dict[str, tuple[object, list[str], str]] = {}
    for problem in error.errors():
        where, inside = section, model
        value: Any = values
        parent, field = model, None
        for part in problem["loc"]:  # a union adds the branch's name to the location: stop where the JSON does
            if not isinstance(value, dict) or part not in value:
                break
            parent, field = inside, _fields(inside).get(str(part))
            inside = next((m for m in get_args(field.annotation) if _is_model(m)), BaseModel) if field else BaseModel
            where, value = f"{where}.{part}", value[part]
        if problem["type"] == "extra_forbidden":
            prefix, _, key = where.rpartition(".")
            lines.append(unknown_key(f"{prefix}.", key, value, _fields(parent)))
        elif problem["type"] == "missing":
            lines.append(f'{where}.{problem["loc"][-1]}: missing; DeepSpeed takes it as false; write "enabled": true')
        else:
            text = _MUST_BE.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
            text = text.replace(", 3 or 3", " or 3")  # ZeroStageEnum has two names for 3
            default = (
                f"; remove the key for the default {show(field.get_default(call_default_factory=True))}"
                if field
                else ""
            )
            wrong.setdefault(where, (value, [], default))[1].append(text)
    for where, (value, texts, mend) in wrong.items():
        shown = f"{where} = {show(value)}: must be" if where != section else f"{where}:"
        lines.append(f"{shown} {' or '.join(dict.fromkeys(texts))}{mend}")
    return lines


def _is_model(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}
