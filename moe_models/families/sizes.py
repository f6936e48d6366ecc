"""Shapes of a model's tensors from its ``config.json``: how much of it is dense, how much is in experts. Torch-free.

Written from the modelling code of transformers 5.20.2. ``tests/families/test_sizes.py`` compares every name and shape
with the real model classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from moe_models.errors import UserError
from moe_models.families.table import FAMILIES, Family, family_of
from moe_models.families.unsupported import why_unsupported

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
    """Key and value heads. With latent attention (DeepSeek) there are as many as heads."""
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
    """Experts per token K."""
    expert_size: int
    """Parameters of one expert: three matrices of D x F."""
    dense: tuple[tuple[str, Shape], ...]
    """Module name and shape of every parameter that is not in a routed expert, in the model's order."""
    fp32_scores: bool
    """As in :class:`~moe_models.families.table.Family`."""

    @property
    def expert_inner(self) -> int:
        """Width F inside one expert."""
        return self.expert_size // 3 // self.hidden

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

    @cached_property
    def vocabulary(self) -> int:
        """Rows V of the embedding."""
        return dict(self.dense)["model.embed_tokens.weight"][0]

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding is the head too."""
        return "lm_head.weight" not in dict(self.dense)

    @cached_property
    def head_params(self) -> int:
        """Parameters of the head, which turns hidden states into logits: V x D."""
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        return prod(dict(self.dense)[name])


def known_family(config: Mapping[str, Any]) -> Family:
    """The row of a model with this ``config.json``. Raises UserError for a model that is not in the table."""
    family = family_of(config)
    why = why_unsupported(config)
    if why is not None:
        raise UserError(f"config.json: model_type = {config['model_type']!r}: cannot be trained here: {why}")
    if family is None:
        raise UserError(
            f"config.json: model_type = {config.get('model_type')!r}: sizes are known for {', '.join(sorted(FAMILIES))}"
        )
    return family


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """Sizes of the model with this ``config.json``. Raises UserError for a family it does not know or a missing key."""
    return sizes_of(known_family(config), config)


def sizes_of(family: Family, config: Mapping[str, Any]) -> ModelSizes:
    """:func:`model_sizes` for a row that the caller has. Raises UserError where sizes cannot be read."""
    if not family.counts_flops:
        known = "sizes are known for models whose MoE layers are all alike"
        raise UserError(f"config.json: model_type = {family.model_type!r}: {known}")
    try:
        return _read_sizes(family, config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json: sizes cannot be read from it ({type(error).__name__}: {error})") from error


def _read_sizes(family: Family, config: Mapping[str, Any]) -> ModelSizes:
    layers = _number(config, "num_hidden_layers")
    hidden = _number(config, "hidden_size")
    heads = _number(config, "num_attention_heads")
    if family.attention.latent:
        kv_heads = heads
        head_dim = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
        value_dim = _number(config, "v_head_dim")
    else:
        kv_heads = _number(config, "num_key_value_heads")
        head_dim = _number(config, "head_dim")
        value_dim = head_dim
    return ModelSizes(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        layers=layers,
        moe_layers=sum(family.moe_layers(config, layer) for layer in range(layers)),
        num_experts=family.num_experts(config),
        top_k=int(_get(config, "num_experts_per_tok") or 1),
        expert_size=3 * hidden * _number(config, family.expert_size_key),
        dense=tuple(_dense(family, config)),
        fp32_scores=family.fp32_scores,
    )


def _get(config: Mapping[str, Any], key: str) -> Any:
    """The value of ``key`` as transformers reads it. Raises KeyError for a key that has to be there."""
    value = config.get(key)
    if value is None and key in _FALLBACKS:
        return _FALLBACKS[key](config)
    return config[key]


def _number(config: Mapping[str, Any], key: str) -> int:
    return int(_get(config, key))


def _dense(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every parameter outside the routed experts, in the model's order."""
    hidden = _number(config, "hidden_size")
    vocabulary = _number(config, "vocab_size")
    attention = _latent_attention if family.attention.latent else _attention
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(_number(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        for name, shape in attention(family, config):
            yield f"{prefix}self_attn.{name}", shape
        if family.moe_layers(config, layer):
            yield f"{prefix}mlp.gate.weight", (family.num_experts(config), hidden)
            yield from _shared_expert(f"{prefix}mlp.", family, config)
        else:
            yield from _mlp(f"{prefix}mlp.", hidden, _number(config, "intermediate_size"))
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (inner, hidden)
    yield f"{prefix}up_proj.weight", (inner, hidden)
    yield f"{prefix}down_proj.weight", (hidden, inner)


def _shared_expert(prefix: str, family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """The expert that every token passes through: part of the dense model as far as the layout goes."""
    shared = family.shared
    if shared is None:
        return
    inner = shared.size(config)
    if inner == 0 and shared.count_key is not None:  # config.json asks for none
        return
    hidden = _number(config, "hidden_size")
    yield from _mlp(f"{prefix}{shared.name}.", hidden, inner)
    if shared.gate is not None:
        yield f"{prefix}{shared.gate}.weight", (1, hidden)


def _attention(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Grouped-query attention."""
    hidden = _number(config, "hidden_size")
    head_dim = _number(config, "head_dim")
    queries = head_dim * _number(config, "num_attention_heads")
    keys = head_dim * _number(config, "num_key_value_heads")
    bias = _has_bias(family, config)
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{name}_proj.weight", (rows, hidden)
        if bias:
            yield f"{name}_proj.bias", (rows,)
    yield "o_proj.weight", (hidden, queries)
    if bias and family.attention.output_bias:
        yield "o_proj.bias", (hidden,)
    key = family.attention.norms_key
    if key is not None and not config.get(key, False):
        return
    if family.attention.norms == "each head":
        yield "q_norm.weight", (head_dim,)
        yield "k_norm.weight", (head_dim,)
    if family.attention.norms == "all heads":
        yield "q_norm.weight", (queries,)
        yield "k_norm.weight", (keys,)


def _latent_attention(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Multi-head latent attention (DeepSeek, arXiv 2405.04434): queries, keys and values come from low ranks."""
    hidden = _number(config, "hidden_size")
    heads = _number(config, "num_attention_heads")
    without_position = _number(config, "qk_nope_head_dim")
    rotary = _number(config, "qk_rope_head_dim")
    value_dim = _number(config, "v_head_dim")
    kv_rank = _number(config, "kv_lora_rank")
    queries = heads * (without_position + rotary)
    bias = _has_bias(family, config)
    if config.get("q_lora_rank") is None:
        yield "q_proj.weight", (queries, hidden)
    else:
        q_rank = _number(config, "q_lora_rank")
        yield "q_a_proj.weight", (q_rank, hidden)
        if bias:
            yield "q_a_proj.bias", (q_rank,)
        yield "q_a_layernorm.weight", (q_rank,)
        yield "q_b_proj.weight", (queries, q_rank)
    # All heads share one rotary key, which comes out of the projection beside the low-rank keys and values.
    yield "kv_a_proj_with_mqa.weight", (kv_rank + rotary, hidden)
    if bias:
        yield "kv_a_proj_with_mqa.bias", (kv_rank + rotary,)
    yield "kv_a_layernorm.weight", (kv_rank,)
    yield "kv_b_proj.weight", (heads * (without_position + value_dim), kv_rank)
    yield "o_proj.weight", (hidden, heads * value_dim)
    if bias:
        yield "o_proj.bias", (hidden,)


def _has_bias(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the projections of attention have biases; ``output_bias`` decides about the last one."""
    attention = family.attention
    if attention.bias_key is None:
        return False
    return bool(config.get(attention.bias_key, attention.bias_default))
