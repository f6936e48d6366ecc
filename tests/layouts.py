"""Layouts for the planner's tests: the presets without DeepSpeed's parser, and the runs in the design notes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from moe_models.config import DsConfig
from moe_models.ds_schema import ExpertParallel
from moe_models.moe_schema import Moe
from moe_models.traffic import Work

ROOT = Path(__file__).parents[1]
if str(ROOT / "recipes") not in sys.path:  # as python does for a script
    sys.path.insert(0, str(ROOT / "recipes"))

plan, plan_search = importlib.import_module("plan"), importlib.import_module("plan_search")

__all__ = ["CUT", "FINE", "MEASURED", "MIXTRAL_8X7B", "ROOT", "from_raw", "layout_of", "plan", "plan_search", "work"]

MIXTRAL_8X7B: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip
CUT = {**MIXTRAL_8X7B, "num_hidden_layers": 4}
"""Mixtral's shape cut to 4 layers."""
FINE = {
    **CUT, "hidden_size": 2048, "intermediate_size": 768, "num_local_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 8,
}  # fmt: skip
"""128 experts, 8 for a token; heads and vocabulary, which the notes leave out, are taken to be Mixtral's."""

# model, ZeRO stage, EP, GPUs, sequences of 4096 in a micro-batch, accumulation, Liger, tokens/s/GPU. Real routing,
# clipping on, no activation checkpointing, the model's own loss; H200s of one node, torch 2.11.
MEASURED = {
    "cut ZeRO-3, 2 GPUs, 1": (CUT, 3, 1, 2, 1, 1, False, 17340),
    "cut EP 2, 2 GPUs, 1": (CUT, 1, 2, 2, 1, 1, False, 21857),
    "cut EP 2, 2 GPUs, 1, again": (CUT, 1, 2, 2, 1, 1, False, 21498),
    "cut ZeRO-3, 2 GPUs, 4": (CUT, 3, 1, 2, 4, 1, False, 35828),
    "cut EP 2, 2 GPUs, 4": (CUT, 1, 2, 2, 4, 1, False, 35709),
    "cut EP 2, 2 GPUs, 4, again": (CUT, 1, 2, 2, 4, 1, False, 35249),
    "cut EP 2, 2 GPUs, 4, Liger": (CUT, 1, 2, 2, 4, 1, True, 38778),
    "cut EP 2, 2 GPUs, 4 x 4, Liger": (CUT, 1, 2, 2, 4, 4, True, 44800),
    "cut ZeRO-3, 4 GPUs, 2": (CUT, 3, 1, 4, 2, 1, False, 29022),
    "cut EP 4, 4 GPUs, 2": (CUT, 1, 4, 4, 2, 1, False, 33838),
    "cut ZeRO-3, 4 GPUs, 4": (CUT, 3, 1, 4, 4, 1, False, 37761),
    "cut EP 4, 4 GPUs, 4": (CUT, 1, 4, 4, 4, 1, False, 37330),
    "fine EP 2, 2 GPUs, 4": (FINE, 1, 2, 2, 4, 1, False, 48923),
    "fine ZeRO-3, 4 GPUs, 4": (FINE, 3, 1, 4, 4, 1, False, 49128),
    "fine EP 4, 4 GPUs, 4": (FINE, 1, 4, 4, 4, 1, False, 51921),
}


def layout_of(stage: int, ep: int) -> DsConfig:
    """The preset's layout."""
    return plan_search.build(stage, ep, 1, 1, "")


def from_raw(raw: dict[str, Any]) -> DsConfig:
    """A DsConfig that DeepSpeed's parser has not seen."""
    experts = raw.get("expert_parallel")
    return DsConfig(
        path=Path("test.json"), raw=raw, deepspeed=raw, moe=Moe(), zero_stage=raw["zero_optimization"]["stage"],
        expert_parallel=ExpertParallel(**experts) if experts else None, tp_size=1, sp_size=1, precision="bf16",
    )  # fmt: skip


def work(micro_batch: int, length: int = 4096, accumulation: int = 1, recompute: bool = False) -> Work:
    """One rank's work."""
    return Work(micro_batch=micro_batch, length=length, accumulation=accumulation, recompute=recompute)
