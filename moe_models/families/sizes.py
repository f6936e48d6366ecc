"""Shapes of a model's tensors from its ``config.json``: how much of it is dense, how much is in experts. Torch-free.

Written down from the modelling code of transformers 5.20.2; ``tests/families/test_sizes.py`` compares every name and
shape with the real model classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from moe_models.errors import UserError
from moe_models.families.table import FAMILIES, Family, is_moe_layer

Shape = tuple[int, ...]
_FALLBACKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "num_key_value_heads": lambda config: config["num_attention_heads"],
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
    "num_experts_per_tok": lambda config: None,
}
"""What transformers computes for keys that a config.json may leave out or set to null."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a layout needs to know of a model. Sizes count parameters (numbers, not bytes)."""

    hidden: int
    """Width D of the residual stream."""
    heads: int
    """Attention heads."""
    kv_heads: int
    """Key and value heads; with latent attention (DeepSeek) as many as heads."""
    head_dim: int
    """Width of one head as attention sees it (DeepSeek: of queries and keys)."""
    value_dim: int
    """Width of one head's values."""
    layers: int
    """Decoder layers."""
    moe_layers: int
    """Decoder layers with experts."""
    num_experts: int
    """Routed experts E of one MoE layer."""
    top_k: int
    """Experts per token."""
    expert_size: int
    """Parameters of one expert."""
    dense: tuple[tuple[str, Shape], ...]
    """Module name and shape of every parameter that is not in a routed expert."""
    fp32_scores: bool
    """As in :class:`~moe_models.families.table.Family`."""

    @cached_property
    def dense_params(self) -> int:
        """Parameters outside the routed experts: attention, norms, routers, shared experts, embeddings."""
        return sum(prod(shape) for _, shape in self.dense)

    @property
    def expert_params(self) -> int:
        """Parameters in routed experts, all layers together."""
        return self.moe_layers * self.num_experts * self.expert_size

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through."""
        return self.dense_params + self.moe_layers * self.top_k * self.expert_size


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """Sizes of the model with this ``config.json``. Raises UserError for a family it does not know or a missing key."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"config.json: model_type = {config.get('model_type')!r}: sizes are known for {', '.join(sorted(FAMILIES))}"
        )
    if family.model_type == "prmoe":
        raise UserError("config.json: model_type = 'prmoe': sizes are known for models whose MoE layers are all alike")
    try:
        layers = int(_get(config, "num_hidden_layers"))
        hidden, heads = int(_get(config, "hidden_size")), int(_get(config, "num_attention_heads"))
        latent = config.get("kv_lora_rank") is not None
        head_dim = (
            int(_get(config, "qk_nope_head_dim")) + int(_get(config, "qk_rope_head_dim"))
            if latent
            else int(_get(config, "head_dim"))
        )
        return ModelSizes(
            hidden=hidden,
            heads=heads,
            kv_heads=heads if latent else int(_get(config, "num_key_value_heads")),
            head_dim=head_dim,
            value_dim=int(_get(config, "v_head_dim")) if latent else head_dim,
            layers=layers,
            moe_layers=sum(is_moe_layer(family, config, layer) for layer in range(layers)),
            num_experts=family.num_experts(config),
            top_k=int(_get(config, "num_experts_per_tok") or 1),
            expert_size=3 * hidden * int(_get(config, family.expert_size_key)),
            dense=tuple(_dense(family, config)),
            fp32_scores=family.fp32_scores,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json: sizes cannot be read from it ({type(error).__name__}: {error})") from error


def _get(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None and key in _FALLBACKS:
        return _FALLBACKS[key](config)
    return config[key]


def _dense(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every parameter outside the routed experts, in the model's order."""
    hidden, vocab = int(_get(config, "hidden_size")), int(_get(config, "vocab_size"))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(int(_get(config, "num_hidden_layers"))):
        prefix = f"model.layers.{layer}."
        attention = _latent_attention if config.get("kv_lora_rank") is not None else _attention
        for name, shape in attention(family.model_type, config):
            yield f"{prefix}self_attn.{name}", shape
        if is_moe_layer(family, config, layer):
            yield f"{prefix}mlp.gate.weight", (family.num_experts(config), hidden)
            yield from _shared_experts(f"{prefix}mlp.", family.model_type, config)
        else:
            yield from _mlp(f"{prefix}mlp.", hidden, int(_get(config, "intermediate_size")))
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, hidden)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (inner, hidden)
    yield f"{prefix}up_proj.weight", (inner, hidden)
    yield f"{prefix}down_proj.weight", (hidden, inner)


def _shared_experts(prefix: str, model_type: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Experts that every token passes through: part of the dense model as far as the layout goes."""
    hidden = int(config["hidden_size"])
    if model_type == "qwen2_moe":
        yield from _mlp(f"{prefix}shared_expert.", hidden, int(_get(config, "shared_expert_intermediate_size")))
        yield f"{prefix}shared_expert_gate.weight", (1, hidden)
    elif config.get("n_shared_experts"):
        inner = int(config["n_shared_experts"]) * int(_get(config, "moe_intermediate_size"))
        yield from _mlp(f"{prefix}shared_experts.", hidden, inner)


def _attention(model_type: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Grouped-query attention."""
    hidden, dim = int(config["hidden_size"]), int(_get(config, "head_dim"))
    queries, keys = dim * int(config["num_attention_heads"]), dim * int(_get(config, "num_key_value_heads"))
    bias = config.get("qkv_bias", True) if model_type == "qwen2_moe" else config.get("attention_bias", False)
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{name}_proj.weight", (rows, hidden)
        if bias and model_type != "mixtral":
            yield f"{name}_proj.bias", (rows,)
    yield "o_proj.weight", (hidden, queries)
    if bias and model_type in ("qwen3_moe", "olmoe"):
        yield "o_proj.bias", (hidden,)
    if model_type == "qwen3_moe":  # one norm for all heads
        yield "q_norm.weight", (dim,)
        yield "k_norm.weight", (dim,)
    if model_type == "olmoe":  # over all heads together
        yield "q_norm.weight", (queries,)
        yield "k_norm.weight", (keys,)


def _latent_attention(model_type: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Multi-head latent attention (DeepSeek): queries, keys and values come out of low-rank projections."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    nope, rope = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    value, rank = int(_get(config, "v_head_dim")), int(config["kv_lora_rank"])
    q_rank, bias = config.get("q_lora_rank"), bool(config.get("attention_bias", False))
    if q_rank is None:
        yield "q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield "q_a_proj.weight", (int(q_rank), hidden)
        if bias:
            yield "q_a_proj.bias", (int(q_rank),)
        yield "q_a_layernorm.weight", (int(q_rank),)
        yield "q_b_proj.weight", (heads * (nope + rope), int(q_rank))
    yield "kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    if bias:
        yield "kv_a_proj_with_mqa.bias", (rank + rope,)
    yield "kv_a_layernorm.weight", (rank,)
    yield "kv_b_proj.weight", (heads * (nope + value), rank)
    yield "o_proj.weight", (hidden, heads * value)
    if bias:
        yield "o_proj.bias", (hidden,)
