"""The layouts that recipes/plan.py compares, made from the presets in ds_configs/ and accepted by the preflight."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path
from typing import Any, Literal

from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import Layout, divisors
from moe_models.config.moe_section import Moe
from moe_models.config.work import Work
from moe_models.errors import UserError
from moe_models.families.sizes import ModelSizes, model_sizes
from moe_models.planner.devices import Device
from moe_models.planner.memory import memory_moments
from moe_models.planner.predict import GIB, Prediction, predict
from moe_models.planner.zero_states import StateBytes
from moe_models.preflight.flags import length_problems
from moe_models.preflight.run import check_run

Offload = Literal["", "optimizer", "optimizer and weights"]
PRESETS = Path(__file__).parents[2] / "ds_configs"
LARGEST_MICRO_BATCH = 64
SHORTEST = 256
"""Tokens below which a shorter sequence is not proposed."""
MOST_DOUBLINGS = 8
"""How often the number of GPUs is doubled in the search for one that fits."""
USUAL_NODE = 8
"""GPUs of a node, where a plan for less than a node looks for more GPUs."""
LARGEST_TP = 8
"""Tensor and sequence parallelism wait for each other in every layer: within a node of 8."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the plan is for."""

    config: Mapping[str, Any]
    gpus: int
    gpus_per_node: int
    device: Device
    length: int
    """Tokens of one sequence."""
    batch: int
    """Sequences of one optimizer step, all GPUs together."""
    skew: float
    liger: bool
    host_gib: float
    """Host memory of one node that offloading may take."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout with the batch that suits it best."""

    ds: DsConfig
    offload: Offload
    work: Work
    prediction: Prediction
    host_gib: float
    """What offloading takes in one node."""
    fits: bool

    @property
    def name(self) -> str:
        """The layout in few words."""
        parts = [f"ZeRO-{self.ds.zero_stage}"]
        parts += [
            f"{kind} {n}"
            for kind, n in (("EP", self.ds.ep_size), ("TP", self.ds.tp_size), ("SP", self.ds.sp_size))
            if n > 1
        ]
        parts += (
            [{"optimizer": "offload", "optimizer and weights": "offload all"}[self.offload]] if self.offload else []
        )
        return " ".join(parts)


@cache
def _preset(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((PRESETS / name).read_text(encoding="utf-8"))
    return raw


def build(stage: int, ep: int, tp: int, sp: int, offload: Offload) -> DsConfig:
    """The ds_config of a layout, put together from presets; ``ep`` 1 is the plain model.

    It is not parsed by DeepSpeed's own models, whose import takes seconds: presets are known to pass.
    """
    raw = copy.deepcopy(_preset(f"zero{stage}_ep2.json"))
    experts = raw.pop("expert_parallel")
    if ep > 1:
        raw = {"expert_parallel": {**experts, "autoep_size": ep}, **raw}
    if tp > 1:
        tensor = copy.deepcopy(_preset("zero1_ep2_tp2.json")["tensor_parallel"])
        raw["tensor_parallel"] = {**tensor, "autotp_size": tp}
        raw.get("expert_parallel", {}).pop("combine_impl", None)  # AutoTP has no fused one
    if sp > 1:
        raw["sequence_parallel_size"] = sp
    if offload:
        raw["bf16"].pop("check_grad_overflow", None)  # is not read then
    for key in {"": (), "optimizer": ("offload_optimizer",)}.get(offload, ("offload_optimizer", "offload_param")):
        raw["zero_optimization"][key] = copy.deepcopy(_preset("zero3_ep8_offload.json")["zero_optimization"][key])
    return DsConfig(
        path=Path(f"zero{stage}_ep{ep}_tp{tp}_sp{sp}{'_' if offload else ''}{offload.replace(' ', '_')}.json"),
        raw=raw,
        deepspeed=raw,
        expert_parallel=ExpertParallel(**raw["expert_parallel"]) if ep > 1 else None,
        moe=Moe(),
        zero_stage=stage,
        tp_size=tp,
        sp_size=sp,
        precision="bf16",
    )


def layouts(request: Request, sizes: ModelSizes) -> Iterator[tuple[int, int, int, int]]:
    """(stage, EP, TP, SP) of every layout whose numbers divide; what else forbids one, the preflight knows."""
    inside = [n for n in divisors(request.gpus_per_node) if n <= LARGEST_TP and request.gpus % n == 0]
    for stage in (1, 2, 3):
        for ep in (n for n in divisors(sizes.num_experts) if request.gpus % n == 0):
            for tp, sp in ((1, 1), *((n, 1) for n in inside if n > 1), *((1, n) for n in inside if n > 1)):
                if request.length % sp == 0:
                    yield stage, ep, tp, sp


def search(request: Request) -> list[Plan]:
    """The best batch of every layout: those that fit, fastest first, then those that do not, by memory.

    Offloading is tried where nothing of the layout fits without; tensor and sequence parallelism are left out where the
    same layout is as fast without them. Raises UserError if no layout can be made at all.
    """
    problems = length_problems(request.length, request.config)
    if problems:
        raise UserError(line.replace("--max_length", "--seq_length") for line in problems)
    sizes, refused, plans, accepted = model_sizes(request.config), list[str](), list[Plan](), False
    for stage, ep, tp, sp in layouts(request, sizes):
        choices: tuple[Offload, ...] = ("", "optimizer") if stage < 3 else ("", "optimizer", "optimizer and weights")
        for offload in choices:
            ds = build(stage, ep, tp, sp, offload)
            wrong = check_run(ds, request.config, request.gpus)
            best = None if wrong else _best_batch(request, sizes, ds, offload)
            refused += wrong
            accepted = accepted or not wrong
            plans += [best] if best else []
            if best and best.fits:
                break
    if not plans:
        batch = f"--global_batch_size {request.batch}: no layout of {request.gpus} GPUs divides it; use a multiple of "
        raise UserError([f"{batch}{request.gpus}"] if accepted else dict.fromkeys(refused))
    speeds = {
        _key(plan): plan.prediction.tokens_per_s
        for plan in plans
        if plan.ds.tp_size * plan.ds.sp_size == 1 and plan.fits
    }
    worth = [
        plan
        for plan in plans
        if plan.ds.tp_size * plan.ds.sp_size == 1
        or (plan.fits and plan.prediction.tokens_per_s > 1.005 * speeds.get(_key(plan), 0.0))
    ]
    return sorted(worth or plans, key=lambda plan: (not plan.fits, *_rank(plan)))


def _key(plan: Plan) -> tuple[int, int]:
    return plan.ds.zero_stage, plan.ds.ep_size


def _rank(plan: Plan) -> tuple[float, float]:
    """Faster first; alike within half a percent, by memory."""
    if not plan.fits:
        return plan.prediction.memory.needed, 0.0
    return -round(log(plan.prediction.tokens_per_s) * 200), plan.prediction.memory.needed


def _best_batch(request: Request, sizes: ModelSizes, ds: DsConfig, offload: Offload) -> Plan | None:
    """The fastest micro-batch that fits, with or without activation checkpointing; if none does, the smallest."""
    replicas = request.gpus // (ds.tp_size * ds.sp_size)
    if request.batch % replicas:
        return None
    each = request.batch // replicas
    states = StateBytes(ds, sizes, Layout(request.gpus, ds.ep_size, ds.tp_size, ds.sp_size))
    plans: list[Plan] = []
    for recompute in (False, True):
        for micro in (n for n in divisors(each) if n <= LARGEST_MICRO_BATCH):
            work = Work(micro_batch=micro, length=request.length, accumulation=each // micro, recompute=recompute)
            plan = evaluate(request, states, ds, offload, work)
            if not plan.fits and plans and any(p.work.recompute == recompute for p in plans):
                break  # a larger micro-batch needs more
            plans.append(plan)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=_rank)
    return min(plans, key=lambda plan: plan.prediction.memory.needed)


def evaluate(request: Request, states: StateBytes, ds: DsConfig, offload: Offload, work: Work) -> Plan:
    """One layout with one batch."""
    prediction = predict(
        request.config, ds, request.gpus, request.gpus_per_node, work, request.device,
        skew=request.skew, liger=request.liger, states=states,
    )  # fmt: skip
    host = prediction.host * min(request.gpus, request.gpus_per_node) / GIB
    fits = prediction.fits and host <= request.host_gib
    return Plan(ds=ds, offload=offload, work=work, prediction=prediction, host_gib=host, fits=fits)


def nothing_fits(request: Request, plans: list[Plan]) -> list[str]:
    """Lines that say what is missing, and which other request would fit."""
    device, on_gpu = request.device, [plan for plan in plans if plan.prediction.fits]
    least = min(plans, key=lambda plan: plan.prediction.memory.needed)
    memory = least.prediction.memory
    states = memory.parameters + memory.gradients + memory.optimizer
    lines = [
        f"nothing fits: the least that {request.gpus} GPUs need is {memory.needed / GIB:.0f} GiB each ({least.name}, "
        f"micro-batch {least.work.micro_batch} x {request.length}; weights, gradients and optimizer "
        f"{states / GIB:.0f}), and {device.name} has {device.usable_gib:.0f}"
    ]
    if on_gpu:
        cheapest = min(on_gpu, key=lambda plan: plan.host_gib)
        lines = [
            f"nothing fits: without offloading, GPUs of {device.usable_gib:.0f} GiB are too small; {cheapest.name} "
            f"would do with {cheapest.host_gib:.0f} GiB of host memory in each node, and --host_gib says "
            f"{request.host_gib:.0f}"
        ]
    lengths = [request.length // 2**n for n in range(1, 16) if request.length // 2**n >= SHORTEST]
    shorter = next(((length, plan) for length in lengths if (plan := frugal(replace(request, length=length)))), None)
    lines.append(
        f"fewer tokens: --seq_length {shorter[0]} fits ({shorter[1].name}, {_gib(shorter[1])} GiB)"
        if shorter
        else f"fewer tokens: not even --seq_length {min([request.length, *lengths])} fits"
    )
    counts = [request.gpus * 2**n for n in range(1, MOST_DOUBLINGS + 1)]
    more = next(((gpus, plan) for gpus in counts if (plan := frugal(replace(request, gpus=gpus, batch=gpus)))), None)
    lines.append(
        f"more GPUs: --gpus {more[0]} fits ({more[1].name}, {_gib(more[1])} GiB)"
        if more
        else f"more GPUs: not even --gpus {counts[-1]} fits; take a device with more memory"
    )
    return lines


def _gib(plan: Plan) -> str:
    return f"{plan.prediction.memory.needed / GIB:.0f}"


def frugal(request: Request) -> Plan | None:
    """A layout that fits with one sequence at a time and activation checkpointing; without offloading if possible."""
    sizes = model_sizes(request.config)
    request = replace(request, gpus_per_node=max(request.gpus_per_node, min(request.gpus, USUAL_NODE)))
    work = Work(micro_batch=1, length=request.length, accumulation=1, recompute=True)
    choices: tuple[Offload, ...] = ("", "optimizer", "optimizer and weights")
    for offload in choices:
        for stage, ep, tp, sp in layouts(request, sizes):
            if offload == choices[-1] and stage < 3:
                continue
            ds, layout = build(stage, ep, tp, sp, offload), Layout(request.gpus, ep, tp, sp)
            states = StateBytes(ds, sizes, layout)
            moments = memory_moments(
                ds,
                states,
                layout,
                work,
                reserved_gib=request.device.reserved_gib,
                skew=request.skew,
                liger=request.liger,
            )
            if max(moment.needed for moment in moments) > request.device.usable_gib * GIB:
                continue  # before the preflight, which takes longer
            if not check_run(ds, request.config, request.gpus):
                plan = evaluate(request, states, ds, offload, work)
                if plan.fits:
                    return plan
    return None
