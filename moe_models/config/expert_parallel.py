"""DeepSpeed's ``"expert_parallel"`` section (AutoEP) as a type."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from moe_models.config.section import Section

AutoEPPreset = Literal["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"]
"""The presets of deepspeed 0.19.8."""

ExpertActivation = Literal["swiglu", "geglu_tanh", "swiglu_clamped", "swiglu_oai"]
"""The activations of its experts."""

_ATTRIBUTE = r"^[^.]+$"
"""The name of one attribute: no path."""


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
        groups = self.num_expert_groups
        limited = self.num_limited_groups
        if groups is not None and limited is not None and limited > groups:
            problems.append(
                f"expert_parallel.num_limited_groups = {limited} is more than num_expert_groups = {groups}; lower it"
            )
        return problems
