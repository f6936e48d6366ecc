"""The layouts that recipes/plan.py compares, made from the presets in ds_configs/ and accepted by the preflight."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_models.config.ds_config import DsConfig
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import divisors
from moe_models.config.moe_section import Moe
from moe_models.config.work import Work
from moe_models.errors import UserError
from moe_models.families.adapters import AdapterSizes
from moe_models.families.model import Model
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, Device
from moe_models.planner.pipeline import telling_stages
from moe_models.planner.predict import Prediction, Verdict, fullest_moment, predict
from moe_models.preflight.adapters import adapter_layout_problems
from moe_models.preflight.flags import length_problems
from moe_models.preflight.run import check_run

Offload = Literal["", "optimizer", "optimizer and weights"]
OFFLOAD_KEYS: dict[Offload, tuple[str, ...]] = {
    "": (),
    "optimizer": ("offload_optimizer",),
    "optimizer and weights": ("offload_optimizer", "offload_param"),
}
"""Sections of ``zero_optimization`` that move them to host memory."""
OFFLOAD_NAMES: dict[Offload, str] = {"optimizer": "offload", "optimizer and weights": "offload all"}
"""As the plan's tables call them."""
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
MOST_STAGES = 32
"""Stages of a pipeline; with more, a stage of today's models has less than two layers."""
ALIKE = 0.005
"""Layouts whose speeds differ by less are as fast as each other: the model is not better than that."""
WORTH = 1 + ALIKE
"""How much faster tensor or sequence parallelism has to be than the same layout without it, to be shown."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the plan is for."""

    model: Model
    gpus: int
    gpus_per_node: int
    device: Device
    length: int
    """Tokens of one sequence."""
    batch: int
    """Sequences of one optimizer step, all GPUs together."""
    skew: float
    """Rows of the fullest expert over the mean."""
    liger: bool
    """Whether the run uses Liger's kernels."""
    host_gib: float
    """Host memory of one node."""
    safetensors: bool = True
    """Whether the model's files are safetensors."""
    adapter: AdapterSizes | None = None
    """What is trained instead of all weights."""

    def refused(self, ds: DsConfig, *, recompute: bool) -> list[str]:
        """Why a layout cannot train this, by the preflight."""
        problems = check_run(ds, self.model.config, self.gpus)
        if self.adapter is not None:
            on_experts = bool(self.adapter.expert)
            problems += adapter_layout_problems(ds, on_experts=on_experts, recompute=recompute)
        return problems

    def case(self, ds: DsConfig, work: Work) -> Case:
        """One layout with one batch for this request."""
        return Case.of(
            ds,
            self.model,
            self.gpus,
            work,
            self.gpus_per_node,
            skew=self.skew,
            liger=self.liger,
            safetensors=self.safetensors,
            adapter=self.adapter,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout with the batch that suits it best."""

    prediction: Prediction
    offload: Offload
    host_gib: float
    """What one node needs at its peak."""
    verdict: Verdict
    """Whether it fits the GPUs and the host. Of the host's memory no error is known, so that it is in it or not."""

    @property
    def case(self) -> Case:
        """What is planned."""
        return self.prediction.case

    @property
    def fits(self) -> bool:
        """Whether it fits by the prediction, with or without room for its error."""
        return self.verdict != "no"

    @property
    def name(self) -> str:
        """The layout in few words, e.g. ``ZeRO-1 EP 8 offload``."""
        ds = self.case.ds
        parts = [f"ZeRO-{ds.zero_stage}"]
        kinds = (("PP", ds.pp_size), ("EP", ds.ep_size), ("TP", ds.tp_size), ("SP", ds.sp_size))
        for kind, size in kinds:
            if size > 1:
                parts.append(f"{kind} {size}")
        if self.offload:
            parts.append(OFFLOAD_NAMES[self.offload])
        return " ".join(parts)

    @property
    def splits_layers(self) -> bool:
        """Whether tensor or sequence parallelism is on, or pipeline stages are."""
        return self.case.ds.tp_size * self.case.ds.sp_size * self.case.ds.pp_size > 1


# --- the layouts


class Candidate(NamedTuple):
    """The numbers of one layout."""

    stage: int
    ep: int
    tp: int
    sp: int
    pp: int = 1


def layouts(request: Request) -> Iterator[Candidate]:
    """Every layout whose numbers divide; what else forbids one, the preflight knows."""
    in_a_node = [n for n in divisors(request.gpus_per_node) if n <= LARGEST_TP and request.gpus % n == 0]
    spread = [n for n in divisors(request.model.sizes.num_experts) if request.gpus % n == 0]
    splits = [(1, 1)]
    splits += [(n, 1) for n in in_a_node if n > 1]
    splits += [(1, n) for n in in_a_node if n > 1]
    for stage in (1, 2, 3):
        for ep in spread:
            for tp, sp in splits:
                if request.length % sp == 0:
                    yield Candidate(stage, ep, tp, sp)
    yield from _staged_layouts(request, spread)


def _staged_layouts(request: Request, spread: list[int]) -> Iterator[Candidate]:
    """Pipelines whose stages are whole nodes, with EP inside a node.

    Within a node stages save too little for what they wait. What EP across nodes costs, stages are there to save.
    """
    if request.adapter is not None or request.gpus % request.gpus_per_node:
        return
    nodes = request.gpus // request.gpus_per_node
    most = min(MOST_STAGES, request.model.sizes.moe_layers)
    for pp in divisors(nodes):
        if pp == 1 or pp > most:
            continue
        for ep in spread:
            if request.gpus_per_node % ep == 0:
                yield Candidate(1, ep, 1, 1, pp)


def offloads(stage: int) -> tuple[Offload, ...]:
    """What can be moved to the host: the weights under ZeRO-3 only."""
    return ("", "optimizer", "optimizer and weights") if stage == 3 else ("", "optimizer")


@cache
def _preset(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((PRESETS / name).read_text(encoding="utf-8"))
    return raw


def build(stage: int, ep: int, tp: int, sp: int, offload: Offload, pp: int = 1) -> DsConfig:
    """The ds_config of a layout, put together from presets; ``ep`` 1 is the plain model.

    It is not parsed by DeepSpeed's own models, whose import takes seconds: presets are known to pass.
    """
    # 1. The preset of the stage, with or without AutoEP.
    raw = copy.deepcopy(_preset(f"zero{stage}_ep2.json"))
    experts = raw.pop("expert_parallel")
    if ep > 1:
        raw = {"expert_parallel": {**experts, "autoep_size": ep}, **raw}

    # 2. What else is on, and the switches that then mean nothing.
    if tp > 1:
        tensor = copy.deepcopy(_preset("zero1_ep2_tp2.json")["tensor_parallel"])
        raw["tensor_parallel"] = {**tensor, "autotp_size": tp}
        raw.get("expert_parallel", {}).pop("combine_impl", None)  # AutoTP has no fused one
    if sp > 1:
        raw["sequence_parallel_size"] = sp
    if pp > 1:
        raw = {"pipeline": {"stages": pp}, **raw}
    if offload:
        raw["bf16"].pop("check_grad_overflow", None)  # is not read then
    for key in OFFLOAD_KEYS[offload]:
        raw["zero_optimization"][key] = copy.deepcopy(_preset("zero3_ep8_offload.json")["zero_optimization"][key])

    # 3. The sections as types.
    words = [f"zero{stage}", f"pp{pp}", f"ep{ep}", f"tp{tp}", f"sp{sp}", *offload.split()]
    return DsConfig(
        path=Path("_".join(words) + ".json"),
        raw=raw,
        deepspeed=raw,
        expert_parallel=ExpertParallel(**raw["expert_parallel"]) if ep > 1 else None,
        moe=Moe(),
        zero_stage=stage,
        tp_size=tp,
        sp_size=sp,
        pp_size=pp,
        precision="bf16",
    )


# --- the search


def search(request: Request) -> list[Plan]:
    """The best batch of every layout: those that fit, those that fit tightly, fastest first, and the others by memory.

    Offloading is tried where nothing of the layout surely fits without. Tensor and sequence parallelism and pipeline
    stages are left out where the same layout is as fast without them. Raises UserError if no layout can be made at all.
    """
    problems = length_problems(request.length, request.model.config)
    if problems:
        raise UserError(line.replace("--max_length", "--seq_length") for line in problems)

    # 1. The best batch of every layout that the preflight accepts.
    plans: list[Plan] = []
    refused: list[str] = []
    accepted = False
    for candidate in layouts(request):
        for offload in offloads(candidate.stage):
            ds = build(*candidate[:4], offload, candidate.pp)
            wrong = request.refused(ds, recompute=False)
            if wrong:
                refused += wrong
                continue
            accepted = True
            best = best_batches(request, ds, offload)
            plans += best
            if any(plan.verdict == "yes" for plan in best):
                break

    # 2. None at all: either the batch divides none of them, or the preflight says why.
    if not plans and accepted:
        raise UserError(
            f"--global_batch_size {request.batch}: no layout of {request.gpus} GPUs divides it; "
            f"use a multiple of {request.gpus}"
        )
    if not plans:
        raise UserError(dict.fromkeys(refused))

    # 3. Those that are worth a row.
    worth = _worth_showing(plans)
    return ranked(worth or plans)


def _worth_showing(plans: list[Plan]) -> list[Plan]:
    """The plans that split no layers, and those that it makes faster."""
    plain = [plan for plan in plans if plan.fits and not plan.splits_layers]
    worth = []
    for plan in plans:
        # Against those that fit as surely: a tight one is no reason to leave out one that fits.
        speed_without = 0.0
        for other in plain:
            if _stage_and_ep(other) == _stage_and_ep(plan) and ORDER[other.verdict] <= ORDER[plan.verdict]:
                speed_without = max(speed_without, other.prediction.tokens_per_s)
        faster = plan.prediction.tokens_per_s > WORTH * speed_without
        if not plan.splits_layers or (plan.fits and faster):
            worth.append(plan)
    return worth


def _stage_and_ep(plan: Plan) -> tuple[int, int]:
    return plan.case.ds.zero_stage, plan.case.ds.ep_size


ORDER: dict[Verdict, int] = {"yes": 0, "tight": 1, "no": 2}
"""Ranks of the verdicts."""


def ranked(plans: list[Plan]) -> list[Plan]:
    """Those that fit before the tight ones before those that do not.

    Faster first; those within :data:`ALIKE` of the fastest of them by memory, then in their order. What does not fit
    is ordered by memory alone.
    """
    # 1. By verdict, then by speed.
    by_speed = sorted(plans, key=lambda plan: (ORDER[plan.verdict], -plan.prediction.tokens_per_s))

    # 2. Runs of plans that are as fast as the first of the run.
    runs: list[list[Plan]] = []
    for plan in by_speed:
        first = runs[-1][0] if runs else plan
        alike = plan.prediction.tokens_per_s > (1 - ALIKE) * first.prediction.tokens_per_s
        if runs and plan.verdict == first.verdict and (alike or not plan.fits):
            runs[-1].append(plan)
        else:
            runs.append([plan])

    # 3. In each run the one with the least memory first.
    return [plan for run in runs for plan in sorted(run, key=lambda plan: plan.prediction.memory.needed)]


def best_batches(request: Request, ds: DsConfig, offload: Offload) -> list[Plan]:
    """The fastest micro-batch that fits, with or without activation checkpointing; if none does, the smallest.

    Then the fastest one that fits tightly, if it is faster. None at all if the batch cannot be divided among the ranks
    that read different data.
    """
    replicas = request.gpus // (ds.tp_size * ds.sp_size * ds.pp_size)
    if request.batch % replicas:
        return []
    sequences = request.batch // replicas  # of one replica in one optimizer step
    micro_batches = [n for n in divisors(sequences) if n <= LARGEST_MICRO_BATCH]
    first = request.case(ds, Work(micro_batch=1, length=request.length))
    plans: list[Plan] = []
    for recompute in (False, True):
        if recompute and request.adapter is not None and ds.zero_stage == 3:
            continue  # the preflight refuses it
        for micro_batch in micro_batches:
            work = Work(
                micro_batch=micro_batch,
                length=request.length,
                accumulation=sequences // micro_batch,
                recompute=recompute,
            )
            plan = evaluate(request, replace(first, work=work), offload)
            if not plan.fits and micro_batch > 1:
                break  # a larger micro-batch needs more
            plans.append(plan)
    in_order = ranked(plans)
    best = in_order[0]
    for plan in in_order:
        if plan.verdict == "tight":
            faster = plan.prediction.tokens_per_s > (1 + ALIKE) * best.prediction.tokens_per_s
            return [best, plan] if faster else [best]
    return [best]


def evaluate(request: Request, case: Case, offload: Offload) -> Plan:
    """One layout with one batch."""
    prediction = predict(case, request.device)
    host_gib = prediction.host.peak / GIB
    verdict = prediction.verdict if host_gib <= request.host_gib else "no"
    return Plan(prediction=prediction, offload=offload, host_gib=host_gib, verdict=verdict)


# --- where nothing fits


def nothing_fits(request: Request, plans: list[Plan]) -> list[str]:
    """Lines that say what is missing, and which other request would fit."""
    return [_what_is_missing(request, plans), _fewer_tokens(request), _more_gpus(request)]


def _what_is_missing(request: Request, plans: list[Plan]) -> str:
    device = request.device
    fit_the_gpu = [plan for plan in plans if plan.prediction.fits]
    if fit_the_gpu:
        cheapest = min(fit_the_gpu, key=lambda plan: plan.host_gib)
        if not cheapest.offload:
            return (
                f"nothing fits: {cheapest.name} fits the GPUs and needs {cheapest.host_gib:.0f} GiB of host memory in "
                f"each node (to {cheapest.prediction.host.fullest}), and --host_gib says {request.host_gib:.0f}"
            )
        return (
            f"nothing fits: without offloading, GPUs of {device.usable_gib:.0f} GiB are too small; {cheapest.name} "
            f"would do with {cheapest.host_gib:.0f} GiB of host memory in each node, and --host_gib says "
            f"{request.host_gib:.0f}"
        )
    least = min(plans, key=lambda plan: plan.prediction.memory.needed)
    memory = least.prediction.memory
    states = memory.parameters + memory.gradients + memory.optimizer
    return (
        f"nothing fits: the least that {request.gpus} GPUs need is {memory.needed / GIB:.0f} GiB each ({least.name}, "
        f"micro-batch {least.case.work.micro_batch} x {request.length}; weights, gradients and optimizer "
        f"{states / GIB:.0f}), and {device.name} has {device.usable_gib:.0f}"
    )


def _fewer_tokens(request: Request) -> str:
    """The longest sequence that fits, halving it."""
    length = request.length
    while length // 2 >= SHORTEST:
        length //= 2
        plan = frugal(replace(request, length=length))
        if plan is not None:
            return f"fewer tokens: --seq_length {length} fits ({plan.name}, {_gib(plan)})"
    return f"fewer tokens: not even --seq_length {length} fits"


def _more_gpus(request: Request) -> str:
    """The fewest GPUs that fit, doubling them."""
    gpus = request.gpus
    for _ in range(MOST_DOUBLINGS):
        gpus *= 2
        plan = frugal(replace(request, gpus=gpus, batch=gpus))
        if plan is not None:
            return f"more GPUs: --gpus {gpus} fits ({plan.name}, {_gib(plan)})"
    return f"more GPUs: not even --gpus {gpus} fits; take a device with more memory"


def _gib(plan: Plan) -> str:
    needed = f"{plan.prediction.memory.needed / GIB:.0f} GiB"
    return f"tight, {needed}" if plan.verdict == "tight" else needed


def frugal(request: Request) -> Plan | None:
    """A layout that fits with one sequence at a time and activation checkpointing; without offloading if possible."""
    request = replace(request, gpus_per_node=max(request.gpus_per_node, min(request.gpus, USUAL_NODE)))
    work = Work(micro_batch=1, length=request.length, accumulation=1, recompute=True)
    for offload in OFFLOAD_KEYS:
        for candidate in layouts(request):
            if offload not in offloads(candidate.stage):
                continue
            ds = build(*candidate[:4], offload, candidate.pp)
            case = request.case(ds, work)
            if (
                fullest_moment(telling_stages(case), request.device.reserved_gib).needed
                > request.device.usable_gib * GIB
            ):
                continue  # before the preflight, which takes longer
            if request.refused(ds, recompute=True):
                continue
            plan = evaluate(request, case, offload)
            if plan.fits:
                return plan
    return None
