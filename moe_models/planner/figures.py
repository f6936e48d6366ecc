"""How predicted figures are told: by plan, by check and on the plan's page, the same everywhere. Torch-free.

Memory of a GPU and of a host is in GiB (2^30 bytes). What travels and what is on disk is in GB (10^9 bytes).
"""

from __future__ import annotations

from collections.abc import Iterable

from moe_models.planner.case import Case
from moe_models.planner.devices import GIB
from moe_models.planner.memory import Memory
from moe_models.planner.traffic import Collective, Flow

PARTS = {
    "parameters": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "dispatch": "dispatch",
    "buffers": "buckets",
    "skew": "skew",
    "outside": "other",
}
"""Fields of :class:`~moe_models.planner.memory.Memory`, and what they are called."""
TIMES = {"compute": "compute", "all_to_all": "all-to-all", "reduce_gather": "reduce, gather", "optimizer": "optimizer"}
"""Fields of :class:`~moe_models.planner.step_time.StepTime`, and what they are called."""
STAGES = {"stages": "stages"}
"""The one of a pipeline beside them: turns in which a stage waits, and what travels between stages."""
WAYS: dict[Collective, str] = {
    "all-to-all": "exchanged",
    "all-reduce": "reduced",
    "reduce-scatter": "reduced",
    "all-gather": "gathered",
    "send": "passed on",
}
"""What a collective does with its bytes."""


def gib(count: float) -> str:
    """Bytes as GiB, without the unit."""
    return f"{count / GIB:.1f}"


def memory_cells(memory: Memory) -> list[str]:
    """GiB by what holds them, in the order of :data:`PARTS`."""
    return [gib(getattr(memory, part)) for part in PARTS]


def times_of(cases: Iterable[Case]) -> dict[str, str]:
    """:data:`TIMES`, and :data:`STAGES` only where one of the cases has some."""
    return TIMES | STAGES if any(case.layout.pp > 1 for case in cases) else TIMES


def ways_of(cases: Iterable[Case]) -> list[str]:
    """What is told of bytes on the wire: without "passed on" where none of the cases has pipeline stages."""
    staged = any(case.layout.pp > 1 for case in cases)
    return [way for way in dict.fromkeys(WAYS.values()) if staged or way != WAYS["send"]]


def sent_by_way(flows: Iterable[Flow]) -> dict[str, int]:
    """Bytes that a rank sends in a step, for each way of :data:`WAYS`; each is there, if only as 0."""
    sent = dict.fromkeys(WAYS.values(), 0)
    for flow in flows:
        sent[WAYS[flow.collective]] += flow.sent
    return sent


def sent_across(flows: Iterable[Flow]) -> int:
    """Bytes that a rank sends in a step in groups that span nodes."""
    return sum(flow.sent for flow in flows if flow.across)
