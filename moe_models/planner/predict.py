"""Peak memory and step time of one case on one kind of GPU, before anything runs. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_models.errors import UserError
from moe_models.families.flops import train_flops
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, Device
from moe_models.planner.host import Host, host_needs
from moe_models.planner.memory import Memory, memory_moments
from moe_models.planner.pipeline import pipeline_time, telling_stages
from moe_models.planner.step_time import StepTime, step_time

MEMORY_ERROR = 0.09
"""Largest deviation of the predicted from the measured memory, over all measured runs (``benchmarks/plan.md``)."""
Verdict = Literal["yes", "tight", "no"]
"""Whether something fits: with room for :data:`MEMORY_ERROR`, only if the prediction is right, or not at all."""


def verdict_of(needed: int, usable: float) -> Verdict:
    """Whether a GPU that has ``usable`` bytes takes what is predicted to need ``needed``."""
    if needed > usable:
        return "no"
    if needed * (1 + MEMORY_ERROR) > usable:
        return "tight"
    return "yes"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one GPU is expected to do in one optimizer step."""

    case: Case
    device: Device
    memory: Memory
    """Of the fullest moment."""
    time: StepTime
    host: Host
    """What the host of one node needs."""

    @property
    def verdict(self) -> Verdict:
        """Whether the memory it needs is there."""
        return verdict_of(self.memory.needed, self.device.usable_gib * GIB)

    @property
    def fits(self) -> bool:
        """Whether it fits if the prediction is right."""
        return self.verdict != "no"

    @property
    def tokens(self) -> int:
        """Tokens of the step for each GPU (sequence and tensor-parallel peers share theirs, and so do stages)."""
        work = self.case.work
        layout = self.case.layout
        return work.micro_batch * work.length * work.accumulation // (layout.tp_size * layout.sp_size * layout.pp)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.time.total

    @property
    def flops(self) -> float:
        """FLOP that the mathematics of these tokens asks for."""
        for_a_token = sum(train_flops(self.case.sizes, self.case.work.length, self.case.adapter))
        return self.tokens * for_a_token

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation against the device's matmul rate (not against its data sheet)."""
        return self.flops / self.time.total / (self.device.matmul_tflops * 1e12)


def predict(case: Case, device: Device) -> Prediction:
    """Memory and time of a case.

    Raises UserError for what :func:`refuse_unpredicted` refuses.
    """
    refuse_unpredicted(case)
    stages = telling_stages(case)
    in_stages = case.layout.pp > 1
    return Prediction(
        case=case,
        device=device,
        memory=fullest_moment(stages, device.reserved_gib),
        time=pipeline_time(case, stages, device) if in_stages else step_time(case, device),
        host=host_needs(stages[0]),
    )


def fullest_moment(stages: list[Case], reserved_gib: float) -> Memory:
    """The memory of the fullest of these stages (one case, where there is no pipeline), at its fullest moment."""
    moments = []
    for stage in stages:
        moments += memory_moments(stage, reserved_gib=reserved_gib)
    return max(moments, key=lambda moment: moment.needed)


def refuse_unpredicted(case: Case) -> None:
    """Raises UserError for native layers, and for fp32 or fp16, of which the formulas know nothing."""
    if case.ds.moe.layer is not None:
        raise UserError("moe.layer: there is no prediction for native layers; use expert_parallel")
    if case.ds.precision not in ("bf16", "auto"):
        raise UserError(f"precision {case.ds.precision}: predictions are for bf16; set bf16.enabled to true")
