"""The JSON files of ``ds_configs/`` as grids of ranks, so that the same routing can be laid over each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import Layout, size_problems
from moe_models.config.moe_section import Moe
from moe_models.errors import UserError
from moe_models.files import read_json

WORLD_SIZES = (1, 2, 4, 8, 16)
"""Numbers of GPUs that the page offers."""


def read_layouts(folder: Path, num_experts: int) -> list[dict[str, Any]]:
    """One entry for each JSON file of ``folder``; raises UserError if there is none, or for a section it cannot read.

    Only the keys that say where experts and tokens go are read here, without DeepSpeed; ``load_ds_config`` checks the
    rest when somebody trains with the file. ``problem`` says why a layout does not fit this model.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"--ds_configs {folder}: no JSON file in it; give a folder like ds_configs/")
    entries, problems = [], []
    for file in files:
        try:
            entries.append(_entry(file, num_experts))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return entries


def _entry(file: Path, num_experts: int) -> dict[str, Any]:
    raw = read_json(file)
    try:
        experts = ExpertParallel(**raw["expert_parallel"]) if "expert_parallel" in raw else None
        layer = Moe(**raw.get("moe", {})).layer
        tp = int(raw.get("tensor_parallel", {}).get("autotp_size", 1))
        sp = int(raw.get("sequence_parallel_size", 1))
        stage = int(raw.get("zero_optimization", {}).get("stage", 0))
        half = any(raw.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: its parallel sizes cannot be read ({reason}); mend it or move it away") from None
    if layer is not None:
        kind, ep = "native", layer.ep_size
    else:
        kind, ep = ("autoep", experts.autoep_size) if experts is not None and experts.enabled else ("plain", 1)
    worlds = {}
    if num_experts % ep == 0:
        for world_size in WORLD_SIZES:
            if not size_problems(world_size, ep, tp, sp):
                worlds[str(world_size)] = _grid(Layout(world_size, ep, tp, sp), num_experts, stage)
    problem = "" if worlds else f"needs {ep} x {tp * sp} ranks, more than the page draws"
    if num_experts % ep:
        problem = f"{num_experts} experts do not divide over {ep} GPUs"
    return {
        "file": file.name,
        "kind": kind,
        "zero": stage,
        "ep": ep,
        "tp": tp,
        "sp": sp,
        "bytes": 2 if half else 4,  # of one value that crosses the wire
        "drops": bool(layer is not None and layer.drop_tokens),
        "problem": problem,
        "worlds": worlds,
    }


def _grid(layout: Layout, num_experts: int, stage: int) -> dict[str, Any]:
    """For each rank [EP index, EP group, DP index, TP or SP index, first expert, number of experts]."""
    ranks = []
    for rank in range(layout.world_size):
        at, held = layout.coordinates(rank), layout.experts_of(rank, num_experts)
        ranks.append([at.ep, at.edp, at.dp, at.tp if layout.tp_size > 1 else at.sp, held.start, len(held)])
    return {"title": layout.describe(stage), "groups": layout.ep_groups(), "ranks": ranks}
