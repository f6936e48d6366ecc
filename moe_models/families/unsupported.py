"""MoE families of transformers that this package cannot train, with the reason: refused before weights are read.

Each was looked at in transformers 5.20.2 with AutoEP of deepspeed 0.19.8. Some of them initialise, step and compute
another function there, without a word. What a row of the table needs is in ``docs/adding-a-family.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNSUPPORTED: dict[str, str] = {
    "afmoe": "AutoEP would lose its selection bias (expert_bias), and its router's weight is a module deeper",
    "ernie4_5_moe": "its selection bias is a module of its own (moe_statics), which AutoEP cannot take over",
    "gemma4": "it has no MoE block: router and experts are in the decoder layer, beside a dense MLP",
    "gemma4_text": "it has no MoE block: router and experts are in the decoder layer, beside a dense MLP",
    "gpt_oss": "AutoEP would lose the biases of its experts, whose gate and up are interleaved",
    "hunyuan_v1_moe": "its router's weight is a module deeper (gate.wg), where AutoEP does not find it",
    "lfm2_moe": "AutoEP would lose its selection bias (expert_bias)",
    "llama4": "its router's scores weigh the input of the experts, and its block returns them beside its output",
    "llama4_text": "its router's scores weigh the input of the experts, and its block returns them beside its output",
    "nemotron_h": "its experts have no gate (squared ReLU), and its layers are no attention-and-MLP pairs",
    "phimoe": "its router is SparseMixer, which AutoEP would replace by a softmax",
}
"""``model_type`` of config.json -> why not."""


def why_unsupported(config: Mapping[str, Any]) -> str | None:
    """Why a model with this ``config.json`` cannot be trained, if its family is one of :data:`UNSUPPORTED`."""
    return UNSUPPORTED.get(str(config.get("model_type")))
