"""What the plan's page shows: the layouts of a plan, predicted for other numbers of GPUs, lengths, batches and loads.

The page computes nothing that the planner knows: each place of its sliders was predicted here. Memory is in MiB, time
in tenths of a millisecond, what travels in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB
from moe_models.planner.figures import PARTS, times_of
from moe_models.planner.pipeline import pipeline_traffic
from moe_models.planner.predict import MEMORY_ERROR
from moe_models.planner.search import ALIKE, ORDER, SHORTEST, Plan, Request, best_batches, evaluate
from moe_models.report.text import visible

FEWEST_GPUS = 8
MOST_GPUS = 1024
"""The ends of the chart, unless the plan is for fewer or more."""
MOST_TIMES = 4
"""Sequences for each of the most GPUs, beyond which the one batch leaves out a number of GPUs."""
MOST_LAYOUTS = 10
MICRO_BATCHES = (1, 2, 4, 8)
SKEWS = (1.0, 1.3, 2.0, 4.0)
"""Rows of the fullest expert over the mean."""
NODES_SHOWN = 3
"""First nodes in the grid; the last one is shown too."""
MIB = 2**20
DIMENSIONS = {
    "dp": ("DP", "reads data of its own; ranks with one number here share it"),
    "ep": ("EP", "holds a part of the experts; a group exchanges tokens"),
    "edp": ("EDP", "one whole set of experts; the sets average their gradients"),
    "tp": ("TP", "holds a part of each dense matrix"),
    "sp": ("SP", "has a part of each sequence"),
    "pp": ("PP", "has a part of the layers"),
}
"""Fields of :class:`~moe_models.config.layout.Coordinates`, and what they say of a rank. A layout has those that
split."""


def plan_data(
    request: Request,
    plans: list[Plan],
    per_node: int,
    name: str,
    tokens: float | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """Everything that the page shows.

    ``plans`` are those of ``search``, ``per_node`` the GPUs of a full node, ``tokens`` those of the whole run and
    ``price`` that of a GPU hour, where they are given.
    """
    chosen = layouts_of(plans)
    axes: dict[str, list[Any]] = {
        "gpus": gpus_axis(request.gpus, per_node),
        "lengths": lengths_axis(request),
        "micro": sorted({*MICRO_BATCHES, *(plan.case.work.micro_batch for plan in chosen)}),
        "skews": sorted({*SKEWS, request.skew}),
    }
    kinds: dict[tuple[str, str, str], int] = {}
    times = times_of(plan.case for plan in chosen)
    layouts = []
    for plan in chosen:
        worlds = [_world(request, plan, gpus, per_node, axes, kinds, times) for gpus in axes["gpus"]]
        best = _one_batch(request, plan, per_node, axes, times)
        layouts.append({"name": plan.name, "worlds": worlds, "one_batch": best})
    sizes = request.model.sizes
    return {
        "model": name,
        "model_type": request.model.config["model_type"],
        "billions": (sizes.dense_params + sizes.expert_params) / 1e9,
        "experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "adapter": request.adapter.r if request.adapter is not None else 0,
        "device": request.device.name,
        "measured": [visible(line) for line in request.device.measured],
        "host": request.host_gib,
        "run": {"tokens": tokens, "price": price},
        "usable": request.device.usable_gib * GIB / MIB,
        "error": MEMORY_ERROR,
        "alike": ALIKE,
        "verdicts": list(ORDER),
        "parts": list(PARTS.values()),
        "times": list(times.values()),
        "dimensions": DIMENSIONS,
        "per_node": per_node,
        "sequences": request.batch / request.gpus,
        "one_batch": one_batch(request, axes["gpus"]),
        "axes": axes,
        "start": {"gpus": request.gpus, "lengths": request.length, "skews": request.skew},
        "kinds": list(kinds),
        "layouts": layouts,
    }


def layouts_of(plans: list[Plan]) -> list[Plan]:
    """One plan of each layout, those that fit first, at most :data:`MOST_LAYOUTS`."""
    by_name: dict[str, Plan] = {}
    for plan in plans:
        by_name.setdefault(plan.name, plan)
    return list(by_name.values())[:MOST_LAYOUTS]


def gpus_axis(gpus: int, per_node: int) -> list[int]:
    """Powers of two from :data:`FEWEST_GPUS` to :data:`MOST_GPUS` that are whole nodes, and ``gpus``."""
    axis = {gpus}
    count = FEWEST_GPUS
    while count <= MOST_GPUS:
        if count <= per_node or count % per_node == 0:
            axis.add(count)
        count *= 2
    return sorted(axis)


def lengths_axis(request: Request) -> list[int]:
    """Half, once and twice the length, as far as the model's context goes."""
    context = request.model.config.get("max_position_embeddings") or request.length
    wanted = (request.length // 2, request.length, 2 * request.length)
    return [length for length in wanted if length == request.length or SHORTEST <= length <= context]


# --- one layout on so many GPUs


def _world(
    request: Request,
    plan: Plan,
    gpus: int,
    per_node: int,
    axes: dict[str, list[Any]],
    kinds: dict[tuple[str, str, str], int],
    times: Iterable[str],
) -> dict[str, Any] | None:
    """A layout on so many GPUs; None where it cannot be. Kinds of flows that are new get a number in ``kinds``."""
    ds = plan.case.ds
    if gpus % (ds.ep_size * ds.pp_size) or gpus % sharing(ds):
        return None
    there = replace(request, gpus=gpus, gpus_per_node=min(per_node, gpus))
    if there.refused(ds, recompute=False):
        return None
    first = there.case(ds, Work(micro_batch=1, length=request.length))
    recomputes = (False,) if there.refused(ds, recompute=True) else (False, True)
    cells: list[Any] = []
    for length in axes["lengths"]:
        for micro_batch in axes["micro"]:
            for recompute in (False, True):
                work = _work(request, first.layout, length, micro_batch, recompute)
                if work is None or recompute not in recomputes:
                    cells.append(None)
                else:
                    cells.append(_cell(there, plan, replace(first, work=work), axes["skews"], kinds, times))
    return {"grid": grid(first), "split": sharing(ds), "cells": cells}


def sharing(ds: DsConfig) -> int:
    """Ranks that work on the same rows: peers of tensor and sequence parallelism, and the stages of a pipeline."""
    return ds.tp_size * ds.sp_size * ds.pp_size


def one_batch(request: Request, gpus: list[int]) -> int:
    """Sequences of a step for all numbers of GPUs: the request's, or the next that give one to each of most GPUs.

    A number of GPUs that is no power of two divides them only if that does not make them many more.
    """
    whole = math.lcm(*gpus)
    if whole > MOST_TIMES * gpus[-1]:
        whole = gpus[-1]
    return whole * math.ceil(request.batch / whole)


def _one_batch(
    request: Request, plan: Plan, per_node: int, axes: dict[str, list[Any]], times: Iterable[str]
) -> list[Any]:
    """The layout's best batch on each number of GPUs, all with :func:`one_batch`; None where it cannot be."""
    rows: list[Any] = []
    for gpus in axes["gpus"]:
        there = replace(request, gpus=gpus, gpus_per_node=min(per_node, gpus), batch=one_batch(request, axes["gpus"]))
        ds = plan.case.ds
        if gpus % (ds.ep_size * ds.pp_size) or gpus % sharing(ds) or there.refused(ds, recompute=False):
            rows.append(None)
            continue
        best = best_batches(there, ds, plan.offload)
        if not best:  # the batch cannot be divided
            rows.append(None)
            continue
        work = best[0].case.work
        rows.append([work.micro_batch, work.accumulation, int(work.recompute), *_figures(best[0], times)])
    return rows


def _figures(plan: Plan, times: Iterable[str]) -> list[int]:
    """Verdict, MiB by what holds them, tenths of a millisecond by what they are spent on, GiB of a node's host.

    ``times`` are fields of :class:`~moe_models.planner.step_time.StepTime`.
    """
    memory = plan.prediction.memory
    time = plan.prediction.time
    return [
        ORDER[plan.verdict],
        *(round(getattr(memory, part) / MIB) for part in PARTS),
        *(round(1e4 * getattr(time, part)) for part in times),
        math.ceil(plan.host_gib),
    ]


def _work(request: Request, layout: Layout, length: int, micro_batch: int, recompute: bool) -> Work | None:
    """The work of a step with as many sequences for each GPU as the request has; None where it does not divide.

    A micro-batch that is larger than that makes the step larger; the page takes it only if the reader chooses it.
    """
    if length % layout.sp_size:
        return None
    sequences = request.batch * layout.tp_size * layout.sp_size * layout.pp // request.gpus
    if sequences % micro_batch and micro_batch < sequences:
        return None
    accumulation = max(1, sequences // micro_batch)
    return Work(micro_batch=micro_batch, length=length, accumulation=accumulation, recompute=recompute)


def _cell(
    request: Request,
    plan: Plan,
    case: Case,
    skews: list[float],
    kinds: dict[tuple[str, str, str], int],
    times: Iterable[str],
) -> dict[str, Any]:
    """Predictions of one batch at each load of the fullest expert, and what travels."""
    predictions = [_figures(evaluate(request, replace(case, skew=skew), plan.offload), times) for skew in skews]
    flows = []
    for flow in pipeline_traffic(case):
        kind = kinds.setdefault((flow.what, flow.collective, flow.group), len(kinds))
        flows.append([kind, flow.size, flow.sent, int(flow.across)])
    return {"acc": case.work.accumulation, "flows": flows, "at": predictions}


def grid(case: Case) -> dict[str, Any]:
    """The ranks of the first nodes and the last one: for each its place in every dimension that splits, its experts."""
    layout = case.layout
    nodes = math.ceil(layout.world_size / case.gpus_per_node)
    shown = sorted({*range(min(nodes, NODES_SHOWN)), nodes - 1})
    ranks = []
    dimensions = list(_dimensions(case))
    for node in shown:
        for rank in range(node * case.gpus_per_node, min(layout.world_size, (node + 1) * case.gpus_per_node)):
            at = layout.coordinates(rank)
            held = layout.experts_of(rank, case.sizes.num_experts) if case.spread else range(case.sizes.num_experts)
            ranks.append([rank, node, held.start, len(held), [getattr(at, name) for name in dimensions]])
    return {"title": layout.describe(case.ds.zero_stage), "nodes": nodes, "dimensions": dimensions, "ranks": ranks}


def _dimensions(case: Case) -> Iterator[str]:
    """Names of the dimensions that a layout has: data parallelism, and those with more than one rank."""
    layout = case.layout
    sizes = {"ep": layout.ep_size, "tp": layout.tp_size, "sp": layout.sp_size, "pp": layout.pp}
    for name in DIMENSIONS:
        if name == "dp" or sizes.get(name, 0) > 1 or (name == "edp" and case.spread):
            yield name
