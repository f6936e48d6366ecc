"""Tiny random models, one per family, small enough for a parity run in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Ten times the usual: with tiny weights every logit is about 0 and a wrong expert would go unnoticed.
    "initializer_range": 0.2,
}
_MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_SIGMOID = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    "qwen2_moe": {
        **_BASE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.02,
    },
    "qwen3_moe": {
        **_BASE,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.02,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "olmoe": {**_BASE, "num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    "deepseek_v2": {**_BASE, **_MLA, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    "deepseek_v3": {
        **_BASE,
        **_MLA,
        "q_lora_rank": 24,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        **_BASE,
        **_SIGMOID,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "glm4_moe_lite": {
        **_BASE,
        **_MLA,
        "q_lora_rank": 24,
        "mlp_layer_types": ["dense", "sparse"],
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
    },
    "dots1": {
        **_BASE,
        **_SIGMOID,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "layer_types": ["full_attention", "full_attention"],
    },
    "exaone_moe": {
        **_BASE,
        **_SIGMOID,
        "num_experts": 8,
        "num_shared_experts": 1,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
}


def make_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of the family, the same for the same seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**TINY[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zeros would hide a lost bias
            buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    return model


def save_tiny(folder: Path, model_type: str, seed: int = 0, *, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a random checkpoint in the hub layout, as ``save_pretrained`` does; returns the folder."""
    import torch

    make_model(model_type, seed, **overrides).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
