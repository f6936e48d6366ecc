"""sizes.py against the real model classes: every name and shape, at toy size and at the size of released models."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from typing import Any

import pytest

from moe_models.errors import UserError
from moe_models.families.sizes import model_sizes
from tests.support.tiny import TINY

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, TINY[model_type]) for model_type in sorted(TINY)),
    # The class's own defaults: the size of a released model. dots1's has no number of experts.
    *((model_type, {}) for model_type in sorted(set(TINY) - {"dots1"})),
    ("glm4_moe", {**TINY["glm4_moe"], "use_qk_norm": False, "attention_bias": False}),
    ("dots1", {**TINY["dots1"], "attention_bias": True}),
    ("exaone_moe", {**TINY["exaone_moe"], "mlp_layer_types": None, "first_k_dense_replace": 0}),
    ("mixtral", {**TINY["mixtral"], "head_dim": 6, "tie_word_embeddings": True}),
    ("qwen2_moe", {**TINY["qwen2_moe"], "qkv_bias": False, "decoder_sparse_step": 2}),
    ("qwen3_moe", {**TINY["qwen3_moe"], "attention_bias": True}),
    ("olmoe", {**TINY["olmoe"], "attention_bias": True, "num_key_value_heads": None}),
    ("deepseek_v2", {**TINY["deepseek_v2"], "q_lora_rank": 12, "attention_bias": True, "n_shared_experts": 3}),
    ("deepseek_v3", {**TINY["deepseek_v3"], "q_lora_rank": None, "n_shared_experts": 2}),
]


def meta_parameters(model_type: str, overrides: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **overrides)
    if getattr(config, "num_experts_per_tok", 0) is None:
        config.num_experts_per_tok = 6
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, config.to_dict()


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_every_parameter_has_its_name_and_shape(model_type: str, overrides: dict[str, Any]) -> None:
    real, config = meta_parameters(model_type, overrides)
    experts = {name: shape for name, shape in real.items() if ".mlp.experts." in name}
    sizes = model_sizes(config)
    assert dict(sizes.dense) == {name: shape for name, shape in real.items() if name not in experts}
    assert len(dict(sizes.dense)) == len(sizes.dense)
    assert sizes.expert_params == sum(map(prod, experts.values())) > 0
    assert sizes.dense_params + sizes.expert_params == sum(map(prod, real.values()))
    assert sizes.moe_layers == len(experts) // 2
    assert sizes.top_k == config["num_experts_per_tok"]


def test_mixtral_8x7b() -> None:
    """The figures of its model card: 46.7 billion parameters, 12.9 billion for one token."""
    _, config = meta_parameters("mixtral", {"num_hidden_layers": 1})
    sizes = model_sizes({**config, "num_hidden_layers": 32})
    assert round((sizes.dense_params + sizes.expert_params) / 1e9, 1) == 46.7
    assert round(sizes.active_params / 1e9, 1) == 12.9


_GLM: dict[str, Any] = {
    "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
    "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128,
    "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("billions", "config"),
    [
        (106, _GLM),  # GLM-4.5-Air
        (
            355,  # GLM-4.5
            {
                **_GLM, "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92, "use_qk_norm": True,
                "moe_intermediate_size": 1536, "n_routed_experts": 160, "first_k_dense_replace": 3,
            },
        ),
        (
            30,  # GLM-4.7-Flash
            {
                **_GLM, "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048,
                "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_hidden_layers": 47,
                "num_attention_heads": 20, "n_routed_experts": 64, "num_experts_per_tok": 4, "kv_lora_rank": 512,
                "q_lora_rank": 768, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256,
                "attention_bias": False,
            },
        ),
        (
            142,  # dots.llm1
            {
                **_GLM, "model_type": "dots1", "vocab_size": 152064, "num_hidden_layers": 62, "attention_bias": False,
                "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": 2, "num_experts_per_tok": 6,
            },
        ),
        (
            236,  # K-EXAONE
            {
                **_GLM, "model_type": "exaone_moe", "vocab_size": 153600, "hidden_size": 6144,
                "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 48,
                "num_attention_heads": 64, "num_shared_experts": 1, "num_experts": 128,
            },
        ),
    ],
)  # fmt: skip
def test_released_models_have_their_published_size(billions: int, config: dict[str, Any]) -> None:
    sizes = model_sizes(config)
    assert (sizes.dense_params + sizes.expert_params) / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_cannot_be_read() -> None:
    with pytest.raises(UserError, match=r"model_type = 'llama': sizes are known for deepseek_v2, "):
        model_sizes({"model_type": "llama"})
    with pytest.raises(UserError, match=r"sizes cannot be read from it \(KeyError: 'hidden_size'\)"):
        model_sizes({"model_type": "mixtral", "num_hidden_layers": 2})


def test_torch_free() -> None:
    code = "import sys, moe_models.planner.traffic; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
