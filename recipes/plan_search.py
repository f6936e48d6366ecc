"""The layouts that recipes/plan.py compares, made from the presets in ds_configs/ and accepted by the preflight."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from moe_models.config import DsConfig
from moe_models.devices import Device
from moe_models.ds_schema import ExpertParallel
from moe_models.errors import UserError
from moe_models.layout import divisors
from moe_models.moe_schema import Moe
from moe_models.predict import GIB, Prediction, predict
from moe_models.preflight import check_run, length_problems
from moe_models.sizes import ModelSizes, model_sizes
from moe_models.traffic import Work

Offload = Literal["", "optimizer", "optimizer and weights"]
PRESETS = Path(__file__).parents[1] / "ds_configs"
LARGEST_MICRO_BATCH = 64
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
        parts += [f"{kind} {n}" for kind, n in (("EP", self.ds.ep_size), ("TP", self.ds.tp_size), ("SP", self.ds.sp_size)) if n > 1]
        parts += [{"optimizer": "offload", "optimizer and weights": "offload all"}[self.offload]] if self.offload else []
        return " ".join(parts)


@lru_cache(maxsize=None)
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
    if sp > 1:
        raw["sequence_parallel_size"] = sp
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

    Offloading is tried where nothing of the layout fits without. Raises UserError if no layout can be made at all.
    """
    sizes = model_sizes(request.config)
    problems = [line.replace("--max_length", "--seq_length") for line in length_problems(request.length, request.config)]
    refused: list[str] = []
    plans: list[Plan] = []
    for stage, ep, tp, sp in () if problems else layouts(request, sizes):
        choices: tuple[Offload, ...] = ("", "optimizer") if stage < 3 else ("", "optimizer", "optimizer and weights")
        best: Plan | None = None
        for offload in choices:
            ds = build(stage, ep, tp, sp, offload)
            wrong = check_run(ds, request.config, request.gpus)
            refused += wrong
            if not wrong:
                best = _best_batch(request, sizes, ds, offload)
                plans += [best] if best else []
            if best and best.fits:
                break
    if not plans:
        replicas = f"--global_batch_size {request.batch}: does not divide among {request.gpus} GPUs in any layout; use a "
        raise UserError(problems or [f"{replicas}multiple of {request.gpus}", *dict.fromkeys(refused)][: 1 + bool(refused)])
    order = sorted(plans, key=lambda plan: (not plan.fits, *_rank(plan)))
    return order


def _rank(plan: Plan) -> tuple[float, float]:
    """Faster first; alike within half a percent, by memory."""
    from math import log

    if not plan.fits:
        return plan.prediction.memory.needed, 0.0
    return -round(log(plan.prediction.tokens_per_s) * 200), plan.prediction.memory.needed


def _best_batch(request: Request, sizes: ModelSizes, ds: DsConfig, offload: Offload) -> Plan | None:
    """The fastest micro-batch that fits, with or without activation checkpointing; if none does, the smallest."""
    replicas = request.gpus // (ds.tp_size * ds.sp_size)
    if request.batch % replicas:
        return None
    each = request.batch // replicas
    plans = []
    for recompute in (False, True):
        for micro in (n for n in divisors(each) if n <= LARGEST_MICRO_BATCH):
            work = Work(micro_batch=micro, length=request.length, accumulation=each // micro, recompute=recompute)
            plan = evaluate(request, sizes, ds, offload, work)
            if not plan.fits and plans and any(p.work.recompute == recompute for p in plans):
                break  # a larger micro-batch needs more
            plans.append(plan)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=_rank)
    return min(plans, key=lambda plan: plan.prediction.memory.needed)


def evaluate(request: Request, sizes: ModelSizes, ds: DsConfig, offload: Offload, work: Work) -> Plan:
    """One layout with one batch."""
    prediction = predict(
        request.config, ds, request.gpus, request.gpus_per_node, work, request.device,
        skew=request.skew, liger=request.liger, sizes=sizes,
    )  # fmt: skip
    host = prediction.host * min(request.gpus, request.gpus_per_node) / GIB
    fits = prediction.fits and host <= request.host_gib
    return Plan(ds=ds, offload=offload, work=work, prediction=prediction, host_gib=host, fits=fits)


def nothing_fits(request: Request, plans: list[Plan]) -> list[str]:
    """Lines that say what is missing, and which other request would fit."""
    least = plans[0]
    memory, device = least.prediction.memory, request.device
    states = memory.parameters + memory.gradients + memory.optimizer
    lines = [
        f"nothing fits: the least that {request.gpus} GPUs need is {memory.needed / GIB:.0f} GiB each "
        f"({least.name}, micro-batch {least.work.micro_batch} x {request.length}), and {device.name} has "
        f"{device.usable_gib:.0f}; weights, gradients and optimizer take {states / GIB:.0f} of it"
    ]
    unlimited = [plan for plan in search(replace(request, host_gib=1e9)) if plan.fits]
    if unlimited:
        cheapest = min(unlimited, key=lambda plan: plan.host_gib)
        lines.append(
            f"offload: {cheapest.name} fits with {cheapest.host_gib:.0f} GiB of host memory in each node; "
            f"--host_gib says {request.host_gib:.0f}"
        )
    shorter = request.length // 2
    while shorter >= 256 and not (found := _fitting(replace(request, length=shorter))):
        shorter //= 2
    lines.append(
        f"fewer tokens: --seq_length {shorter} fits ({found.name})"
        if shorter >= 256 and found
        else "fewer tokens: not even --seq_length 256 fits"
    )
    more = request.gpus * 2
    while more <= 1024 * request.gpus:
        batch = max(request.batch, more) + (-max(request.batch, more)) % more
        if found := _fitting(replace(request, gpus=more, batch=batch)):
            lines.append(f"more GPUs: --gpus {more} fits ({found.name}, {found.prediction.memory.needed / GIB:.0f} GiB)")
            return lines
        more *= 2
    lines.append(f"more GPUs: not even {more // 2} of them; another device has more memory")
    return lines


def _fitting(request: Request) -> Plan | None:
    try:
        plans = search(request)
    except UserError:
        return None
    return plans[0] if plans[0].fits else None
