"""Shapes of published models, as their ``config.json`` on the hub says: what the lessons compute with. No weights.

Keys that no figure depends on are left out. ``tests/docs/test_concepts.py`` compares the shapes with the defaults of
transformers' own config classes, which are those of these models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_models.families.model import Model

ROOT = Path(__file__).parents[2]


def _all_layers_of(bench: str, layers: int, **changes: Any) -> dict[str, Any]:
    """A model of which ``recipes/bench.py`` takes the first layers."""
    config = json.loads((ROOT / "model_configs" / bench).read_text())
    return {**config, "num_hidden_layers": layers, **changes}


HUB: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": _all_layers_of("bench-mixtral.json", 32),
    "Qwen/Qwen3-30B-A3B": _all_layers_of("bench-finegrained.json", 48, vocab_size=151936),
    "zai-org/GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Hub id -> config.json."""


def model(hub_id: str) -> Model:
    """One of :data:`HUB`, as the planner takes it."""
    return Model.of(HUB[hub_id])


def short(hub_id: str) -> str:
    """Its name without the owner and the version."""
    return hub_id.rpartition("/")[2].removesuffix("-v0.1")
