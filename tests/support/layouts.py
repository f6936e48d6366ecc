"""Layouts for the planner's tests: the presets without DeepSpeed's parser, and the runs that it was compared with."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.moe_section import Moe
from moe_models.config.work import Work

ROOT = Path(__file__).parents[2]
if str(ROOT / "recipes") not in sys.path:  # as python does for a script
    sys.path.insert(0, str(ROOT / "recipes"))

plan = importlib.import_module("plan")
plan_search = importlib.import_module("moe_models.planner.search")

__all__ = [
    "BENCHED",
    "CALLS",
    "CUT",
    "FINE",
    "MEASURED",
    "MIXTRAL_8X7B",
    "ROOT",
    "as_before",
    "from_raw",
    "fused",
    "layout_of",
    "plan",
    "plan_search",
    "ran",
    "work",
]

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
"""128 experts, 8 for a token; heads and vocabulary, which were not noted, are taken to be Mixtral's."""

# model, ZeRO stage, EP, GPUs, sequences of 4096 in a micro-batch, accumulation, Liger, tokens/s/GPU. Real routing,
# clipping on, no activation checkpointing, the model's own loss; H200s of one node, torch 2.11. benchmarks/plan.md,
# "The earlier runs", says how far the planner is off; these rows are written down here only.
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

MIXTRAL, FINEGRAINED = (
    json.loads((ROOT / "model_configs" / f"bench-{shape}.json").read_text()) for shape in ("mixtral", "finegrained")
)
# model, how it ran, sequences of 4096 in a micro-batch, load of the fullest expert over the mean, tokens/s/GPU, GiB
# allocated. recipes/bench.py on 2 H200s of one node, the pinned versions, accumulation 4: benchmarks/speed.md, the
# first call, with the presets as they were; one with those of today; and the last, with the norm in one pass.
Row = tuple[dict[str, Any], str, int, float, float, float]
FIRST_CALL: dict[str, Row] = {
    "mixtral trainer, 1": (MIXTRAL, "trainer", 1, 1.07, 32984, 57.1),
    "mixtral trainer, 4": (MIXTRAL, "trainer", 4, 1.05, 40420, 72.0),
    "mixtral bare, 1": (MIXTRAL, "bare", 1, 1.07, 34031, 57.4),
    "mixtral bare, 4": (MIXTRAL, "bare", 4, 1.05, 41382, 72.9),
    "mixtral ZeRO-3, 1": (MIXTRAL, "ZeRO-3", 1, 1.07, 25593, 67.1),
    "mixtral ZeRO-3, 4": (MIXTRAL, "ZeRO-3", 4, 1.05, 37749, 88.2),
    "mixtral stock, 1": (MIXTRAL, "stock", 1, 1.07, 33692, 53.4),
    "mixtral stock, 4": (MIXTRAL, "stock", 4, 1.05, 41354, 72.4),
    "mixtral Liger, 1": (MIXTRAL, "Liger", 1, 1.07, 35079, 56.6),
    "mixtral Liger, 4": (MIXTRAL, "Liger", 4, 1.05, 43427, 70.0),
    "fine trainer, 1": (FINEGRAINED, "trainer", 1, 5.18, 33881, 49.7),
    "fine trainer, 4": (FINEGRAINED, "trainer", 4, 3.13, 48459, 67.1),
    "fine ZeRO-3, 1": (FINEGRAINED, "ZeRO-3", 1, 5.19, 23014, 56.6),
    "fine ZeRO-3, 4": (FINEGRAINED, "ZeRO-3", 4, 3.13, 54270, 79.7),
    "fine stock, 1": (FINEGRAINED, "stock", 1, 5.17, 33634, 47.3),
    "fine stock, 4": (FINEGRAINED, "stock", 4, 3.13, 49878, 69.7),
    "fine Liger, 1": (FINEGRAINED, "Liger", 1, 5.18, 38366, 48.7),
    "fine Liger, 4": (FINEGRAINED, "Liger", 4, 3.13, 59970, 62.8),
    "fine fused combine, 4": (FINEGRAINED, "fused combine", 4, 3.13, 55286, 67.1),
}
THIRD_CALL: dict[str, Row] = {
    "mixtral trainer, 1": (MIXTRAL, "trainer", 1, 1.07, 33432, 57.1),
    "mixtral trainer, 4": (MIXTRAL, "trainer", 4, 1.05, 41952, 72.0),
    "mixtral bare, 1": (MIXTRAL, "bare", 1, 1.07, 34886, 57.4),
    "mixtral bare, 4": (MIXTRAL, "bare", 4, 1.05, 42596, 72.9),
    "mixtral stock, 1": (MIXTRAL, "stock", 1, 1.07, 33017, 53.4),
    "mixtral stock, 4": (MIXTRAL, "stock", 4, 1.05, 40985, 72.4),
    "mixtral Liger, 1": (MIXTRAL, "Liger", 1, 1.07, 34697, 56.6),
    "mixtral Liger, 4": (MIXTRAL, "Liger", 4, 1.05, 45231, 70.0),
    "fine trainer, 1": (FINEGRAINED, "trainer", 1, 5.18, 33882, 49.7),
    "fine trainer, 4": (FINEGRAINED, "trainer", 4, 3.13, 56322, 67.1),
    "fine bare, 1": (FINEGRAINED, "bare", 1, 5.19, 36190, 50.0),
    "fine bare, 4": (FINEGRAINED, "bare", 4, 3.13, 57343, 69.5),
    "fine ZeRO-3, 1": (FINEGRAINED, "ZeRO-3", 1, 5.19, 15709, 56.6),
    "fine ZeRO-3, 4": (FINEGRAINED, "ZeRO-3", 4, 3.13, 53521, 79.7),
    "fine stock, 1": (FINEGRAINED, "stock", 1, 5.18, 33153, 47.3),
    "fine stock, 4": (FINEGRAINED, "stock", 4, 3.13, 48996, 69.7),
    "fine Liger, 1": (FINEGRAINED, "Liger", 1, 5.18, 37600, 48.7),
    "fine Liger, 4": (FINEGRAINED, "Liger", 4, 3.13, 71935, 62.8),
}
LAST_CALL: dict[str, Row] = {
    "mixtral trainer, 1": (MIXTRAL, "trainer", 1, 1.08, 34809, 57.1),
    "mixtral trainer, 4": (MIXTRAL, "trainer", 4, 1.07, 42495, 72.0),
    "mixtral bare, 1": (MIXTRAL, "bare", 1, 1.08, 35301, 57.4),
    "mixtral bare, 4": (MIXTRAL, "bare", 4, 1.07, 42707, 72.9),
    "mixtral stock, 1": (MIXTRAL, "stock", 1, 1.08, 33472, 53.4),
    "mixtral stock, 4": (MIXTRAL, "stock", 4, 1.07, 41288, 72.4),
    "mixtral Liger, 1": (MIXTRAL, "Liger", 1, 1.09, 37900, 56.6),
    "mixtral Liger, 4": (MIXTRAL, "Liger", 4, 1.07, 46332, 70.0),
    "fine trainer, 1": (FINEGRAINED, "trainer", 1, 5.00, 33158, 49.8),
    "fine trainer, 4": (FINEGRAINED, "trainer", 4, 3.07, 57689, 67.4),
    "fine bare, 1": (FINEGRAINED, "bare", 1, 4.99, 36489, 50.0),
    "fine bare, 4": (FINEGRAINED, "bare", 4, 3.07, 56803, 69.8),
    "fine ZeRO-3, 1": (FINEGRAINED, "ZeRO-3", 1, 5.00, 21203, 56.6),
    "fine ZeRO-3, 4": (FINEGRAINED, "ZeRO-3", 4, 3.07, 52972, 79.7),
    "fine stock, 1": (FINEGRAINED, "stock", 1, 5.00, 32640, 47.4),
    "fine stock, 4": (FINEGRAINED, "stock", 4, 3.07, 49437, 70.0),
    "fine Liger, 1": (FINEGRAINED, "Liger", 1, 4.99, 38774, 48.7),
    "fine Liger, 4": (FINEGRAINED, "Liger", 4, 3.07, 73973, 63.2),
}
CALLS = {"first call": FIRST_CALL, "third call": THIRD_CALL, "last call": LAST_CALL}
BENCHED = {f"{call}, {name}": row for call, rows in CALLS.items() for name, row in rows.items()}


def ran(name: str) -> DsConfig:
    """The layout of a row of :data:`BENCHED`, with the switches that it had."""
    how = BENCHED[name][1]
    ds = layout_of(3, 1) if how == "ZeRO-3" else layout_of(1, 2)
    if how not in ("ZeRO-3", "stock") and not name.startswith("first call"):
        return ds
    return fused(as_before(ds)) if how == "fused combine" else as_before(ds)


def as_before(ds: DsConfig) -> DsConfig:
    """DeepSpeed's defaults for what the presets switch since the first call."""
    raw = copy.deepcopy(ds.raw)
    raw.pop("timers")
    raw["bf16"].pop("check_grad_overflow", None)
    raw.get("expert_parallel", {}).pop("combine_impl", None)
    return from_raw(raw)


def fused(ds: DsConfig) -> DsConfig:
    """The layout with AutoEP's fused combine."""
    assert ds.expert_parallel is not None
    return replace(ds, expert_parallel=ds.expert_parallel.model_copy(update={"combine_impl": "fused_weighted_sum"}))


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
