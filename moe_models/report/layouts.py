"""The JSON files of ``ds_configs/`` as grids of ranks, so that the same routing can be laid over each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import Layout, size_problems
from moe_models.config.moe_section import Moe
from moe_models.config.work import Work
from moe_models.errors import Problems, UserError, one_line
from moe_models.families.model import Model
from moe_models.files import read_json
from moe_models.planner.case import Case
from moe_models.planner.figures import sent_by_way
from moe_models.planner.traffic import traffic

WORLD_SIZES = (1, 2, 4, 8, 16)
"""Numbers of GPUs that the page offers."""


def read_layouts(folder: Path, num_experts: int, model: Model | None = None) -> list[dict[str, Any]]:
    """One entry for each JSON file of ``folder``; raises UserError if there is none, or for a section it cannot read.

    Only the keys that decide where experts and tokens go are read here, without DeepSpeed; ``load_ds_config`` checks
    the rest when the file is used for training. ``problem`` tells why a layout does not fit this model. With ``model``
    each number of GPUs also has what one of them gathers and reduces in a step of one micro-batch.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"--ds_configs {folder}: no JSON file in it; give a folder like ds_configs/")
    entries = []
    problems = Problems()
    for file in files:
        with problems.note():
            entries.append(_entry(file, num_experts, model))
    problems.refuse()
    return entries


def _entry(file: Path, num_experts: int, model: Model | None) -> dict[str, Any]:
    """One layout as the page knows it."""
    # 1. The parallel sizes, the ZeRO stage and the precision.
    raw = read_json(file)
    try:
        experts = ExpertParallel(**raw.get("expert_parallel", {"enabled": False}))
        moe = Moe(**raw.get("moe", {}))
        native = moe.layer
        tp = int(raw.get("tensor_parallel", {}).get("autotp_size", 1))
        sp = int(raw.get("sequence_parallel_size", 1))
        stage = int(raw.get("zero_optimization", {}).get("stage", 0))
        half = any(raw.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{file}: its parallel sizes cannot be read ({reason}); mend it or move it away") from None
    # 2. Which experts there are, and over how many ranks they are spread.
    kind = "plain"
    ep = 1
    if native is not None:
        kind = "native"
        ep = native.ep_size
    elif experts.enabled:
        kind = "autoep"
        ep = experts.autoep_size
    # 3. The grid of ranks, for every number of GPUs that the layout can have.
    worlds = {}
    problem = ""
    if num_experts % ep:
        problem = f"{num_experts} experts do not divide over {ep} GPUs"
    else:
        for world_size in WORLD_SIZES:
            if not size_problems(world_size, ep, tp, sp):
                world = _grid(Layout(world_size, ep, tp, sp), num_experts, stage)
                if model is not None:
                    ds = DsConfig(
                        path=file,
                        raw=raw,
                        deepspeed=raw,
                        expert_parallel=experts if experts.enabled else None,
                        moe=moe,
                        zero_stage=stage,
                        tp_size=tp,
                        sp_size=sp,
                        precision="bf16" if half else "fp32",
                    )
                    world["moved"] = _moved(ds, model, world_size)
                worlds[str(world_size)] = world
        if not worlds:
            problem = f"needs {ep} x {tp * sp} ranks, more than the page draws"
    return {
        "file": file.name,
        "kind": kind,
        "zero": stage,
        "ep": ep,
        "tp": tp,
        "sp": sp,
        "bytes": 2 if half else 4,  # of one value that crosses the wire
        "drops": bool(native is not None and native.drop_tokens),
        "problem": problem,
        "worlds": worlds,
    }


def _moved(ds: DsConfig, model: Model, world_size: int) -> list[int]:
    """[gathered, reduced] bytes that one GPU sends in a step of one micro-batch, whatever its tokens are.

    What tensor-parallel peers sum up grows with the tokens, and is left out.
    """
    work = Work(micro_batch=1, length=1, recompute=False, element_bytes=2 if ds.precision == "bf16" else 4)
    flows = [flow for flow in traffic(Case.of(ds, model, world_size, work, world_size)) if flow.group != "TP"]
    sent = sent_by_way(flows)
    return [sent["gathered"], sent["reduced"]]


def _grid(layout: Layout, num_experts: int, stage: int) -> dict[str, Any]:
    """For each rank [EP index, EP group, DP index, TP or SP index, first expert, number of experts]."""
    ranks = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        held = layout.experts_of(rank, num_experts)
        part = at.tp if layout.tp_size > 1 else at.sp
        ranks.append([at.ep, at.edp, at.dp, part, held.start, len(held)])
    return {"title": layout.describe(stage), "groups": layout.ep_groups(), "ranks": ranks}
