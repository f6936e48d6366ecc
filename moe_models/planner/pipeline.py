"""A pipeline in the planner: each stage is a case of its own, and the stages wait for each other. Torch-free.

A stage is planned as a smaller model on fewer ranks: its own layers, the groups inside it. Two things make a pipeline
of them:

- Memory: DeepSpeed's schedule (1F1B) has min(M, S - s) of M micro-batches in flight on stage s of S, whose saved
  activations are there together. The first stage has most.
- Time: with t the time of the slowest stage for one micro-batch, a step takes (M + S - 1) t. In S - 1 of these turns a
  stage waits (the bubble). Between stages hidden states go forth and their gradients back; DeepSpeed's sends are not
  beside the compute.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from moe_models.config.layout import Layout
from moe_models.families.sizes import ModelSizes
from moe_models.families.stages import Stage, stage_bounds, stage_sizes
from moe_models.families.table import is_moe_layer
from moe_models.planner.case import Case
from moe_models.planner.devices import Device
from moe_models.planner.step_time import StepTime, step_time
from moe_models.planner.traffic import Flow, traffic
from moe_models.planner.zero_states import FP32, ZeroStates


def stage_cases(case: Case) -> list[Case]:
    """One case for each stage of a pipeline, in order; the case itself where there is none."""
    stages = case.layout.pp
    if stages == 1:
        return [case]
    return [_stage_case(case, index) for index in range(stages)]


def telling_stages(case: Case) -> list[Case]:
    """The stages that can be the fullest or the slowest: the first, the last, and one between them.

    The first has most micro-batches in flight, the last the head. Those between are cut to cost the same. Without a
    pipeline it is the case itself.
    """
    stages = case.layout.pp
    if stages == 1:
        return [case]
    return [_stage_case(case, index) for index in sorted({0, stages // 2, stages - 1})]


def _stage_case(case: Case, index: int) -> Case:
    whole = case.layout
    part = _parts(case)[index]
    layout = Layout(whole.stage_size, whole.ep_size, whole.tp_size, whole.sp_size)
    return replace(
        case,
        layout=layout,
        part=part,
        states=_states(case.states, part, layout),
        stages=whole.pp,
        in_flight=min(case.work.accumulation, whole.pp - index),
    )


def _parts(case: Case) -> tuple[ModelSizes, ...]:
    """The sizes of each stage."""
    bounds = stage_bounds(case.model.config, case.layout.pp)
    layers = range(case.model.sizes.layers)
    moe = tuple(is_moe_layer(case.model.family, case.model.config, layer) for layer in layers)
    return _cut(case.model.sizes, moe, bounds)


@lru_cache(maxsize=64)
def _cut(sizes: ModelSizes, moe: tuple[bool, ...], bounds: tuple[int, ...]) -> tuple[ModelSizes, ...]:
    """The planner asks for the same stages with every batch."""
    return tuple(stage_sizes(sizes, moe, Stage(index=index, bounds=bounds)) for index in range(len(bounds) - 1))


@lru_cache(maxsize=64)
def _states(whole: ZeroStates, part: ModelSizes, layout: Layout) -> ZeroStates:
    """What ZeRO keeps of a stage: the same with every batch, as ``whole`` is."""
    return ZeroStates(ds=whole.ds, sizes=part, layout=layout)


def pipeline_traffic(case: Case) -> list[Flow]:
    """Every flow of one optimizer step of the costliest stage, and what a stage in the middle sends to its neighbours.

    Without stages it is :func:`~moe_models.planner.traffic.traffic`.
    """
    if case.layout.pp == 1:
        return traffic(case)
    slowest = max(telling_stages(case), key=lambda stage: stage.sizes.active_params)
    return [*traffic(slowest), *between_stages(case)]


def between_stages(case: Case) -> list[Flow]:
    """What a stage sends in one optimizer step: hidden states to the next one, their gradients to the one before.

    Router statistics go along (fp32, choices and probabilities of each expert of each MoE layer); masks and positions
    do not, for every stage reads the same rows.
    """
    sizes = case.model.sizes
    hidden = case.tokens * sizes.hidden * case.work.element_bytes
    statistics = sizes.moe_layers * (2 * sizes.num_experts + 1) * FP32
    payload = (hidden + statistics) * case.work.accumulation
    across = case.layout.world_size > case.gpus_per_node
    flows = []
    for what in ("hidden states to the next stage", "gradients to the stage before"):
        flows.append(
            Flow(
                what=what, collective="send", group="PP", size=case.layout.pp, payload=payload, across=across,
                overlaps=False,
            )
        )  # fmt: skip
    return flows


def pipeline_time(case: Case, telling: list[Case], device: Device) -> StepTime:
    """Seconds of one optimizer step of a pipeline; ``telling`` are its :func:`telling_stages`."""
    stages = case.layout.pp
    micro_batches = case.work.accumulation

    # 1. Each stage by itself; the slowest one sets the pace.
    times = [step_time(stage, device) for stage in telling]
    slowest = max(times, key=lambda time: time.compute + time.all_to_all)
    turn = (slowest.compute + slowest.all_to_all) / micro_batches

    # 2. What travels between stages: both ways in each turn.
    link = device.network if case.layout.world_size > case.gpus_per_node else device.node
    speed = link.get("all_gather", link["all_reduce"])
    sent = sum(flow.sent for flow in between_stages(case))
    travelling = speed.seconds(sent, 2 * micro_batches)

    # 3. Turns in which a stage waits for the others.
    waiting = (stages - 1) * (turn + travelling / micro_batches)
    return StepTime(
        compute=slowest.compute,
        all_to_all=slowest.all_to_all,
        reduce_gather=max(time.reduce_gather for time in times),
        optimizer=max(time.optimizer for time in times),
        stages=waiting + travelling,
    )
