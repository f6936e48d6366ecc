"""step_time.py against the runs of benchmarks/plan.md and benchmarks/speed.md, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_models.families.flops import train_flops
from moe_models.families.model import Model
from moe_models.families.sizes import model_sizes
from moe_models.planner.case import Case, Loss
from moe_models.planner.devices import GIB, Device, read_device
from moe_models.planner.predict import Prediction, predict
from tests.support.layouts import (
    BENCHED,
    CALLS,
    CUT,
    MEASURED,
    MIXTRAL_8X7B,
    ROOT,
    as_before,
    from_raw,
    layout_of,
    plan_search,
    ran,
    work,
)  # fmt: skip

H200 = read_device("h200")
SLOW_HOST = "third call, fine ZeRO-3, 1"
"""The host's Python is the limit of this row, and hosts differ: 0.71 s a step in the first call, 1.04 s here. The model
has the first; the order of the layouts is asked of both."""

HOST_BOUND = {f"last call, fine {how}, 1" for how in ("trainer", "Liger", "stock", "ZeRO-3")}
"""In these too, and that host was not steady: minutes later it took 401 to 431 ms for the step of "fine trainer, 1"
(494 here)."""


def earlier(name: str) -> tuple[float, float]:
    """(predicted, measured) tokens a second and GPU of one of the earlier runs (benchmarks/plan.md)."""
    model, stage, ep, gpus, micro, accumulation, liger, speed = MEASURED[name]
    batch = work(micro, accumulation=accumulation)
    ds = as_before(layout_of(stage, ep))
    case = Case.of(ds, Model.of(model), gpus, batch, 8, skew=1.1, liger=liger, loss="full", one_pass_norm=False)
    return predict(case, H200).tokens_per_s, speed


def benched(name: str, device: Device = H200) -> tuple[Prediction, float, float]:
    """(prediction, measured tokens a second and GPU, measured GiB) of a row of recipes/bench.py."""
    _, _, _, skew, speed, gib = BENCHED[name]
    return predict(benched_case(name, skew), device), speed, gib


def benched_case(name: str, skew: float) -> Case:
    """What a row of recipes/bench.py ran, at another load of the fullest expert."""
    model, how, micro, *_ = BENCHED[name]
    loss: Loss = "full" if how in ("bare", "stock", "ZeRO-3") else "chunked"
    batch = work(micro, accumulation=4)
    return Case.of(
        ran(name), Model.of(model), 2, batch, 8,
        skew=skew, liger=how == "Liger", loss=loss, one_pass_norm=norm_of(name),
    )  # fmt: skip


def norm_of(name: str) -> bool:
    """Whether a row took the norm in one pass: MoETrainer's of the last call."""
    return name.startswith("last call") and BENCHED[name][1] in ("trainer", "Liger")


@pytest.mark.parametrize("name", BENCHED)
def test_benched(name: str) -> None:
    """The constants of the time were fitted to these runs, so this holds the fit; none was fitted to memory."""
    said, speed, gib = benched(name)
    assert said.memory.allocated / GIB == pytest.approx(gib, rel=0.10)
    if name != SLOW_HOST:
        assert said.tokens_per_s == pytest.approx(speed, rel=0.12 if name in HOST_BOUND else 0.05)


@pytest.mark.parametrize("name", [name for name in BENCHED if name.startswith("first call")])
def test_benched_with_the_calibrations_of_these_machines(name: str) -> None:
    shape = "mixtral" if "mixtral" in name else "finegrained"
    device = read_device("h200", [ROOT / "benchmarks" / f"calibration-h200-{shape}.json"])
    said, speed, _ = benched(name, device)
    assert said.tokens_per_s == pytest.approx(speed, rel=0.06)


@pytest.mark.parametrize("name", MEASURED)
def test_earlier_runs(name: str) -> None:
    """Other versions of transformers and DeepSpeed, and a fine-grained shape of which a part was not noted."""
    said, seen = earlier(name)
    assert said == pytest.approx(seen, rel=0.12)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("shape", ["mixtral", "fine"])
@pytest.mark.parametrize("call", CALLS)
def test_order_of_layouts_measured_side_by_side(call: str, shape: str, micro: int) -> None:
    """Which is ahead by more than 5% of the time; at the load that was seen, and at the planner's own guess of it."""
    names = [name for name in BENCHED if name.startswith(f"{call}, {shape}") and name.endswith(f", {micro}")]
    names = [name for name in names if "bare" not in name]  # another loop around the same layout
    assert len(names) > 2
    for skew in (None, 1.3):
        said = {}
        for name in names:
            seen = BENCHED[name][3]
            said[name] = predict(benched_case(name, skew or seen), H200).tokens_per_s
        for one in names:
            for other in names:
                if BENCHED[one][4] > 1.05 * BENCHED[other][4]:
                    assert said[one] > said[other], (one, other)


@pytest.mark.parametrize(
    ("stage", "tp", "sums", "one_pass"),
    [(1, 1, None, True), (2, 1, None, True), (2, 1, "fp32", True), (1, 1, "bf16", True), (1, 1, "fp32", False),
     (1, 2, None, False), (3, 1, None, False)],
)  # fmt: skip
def test_where_the_norm_is_taken_in_one_pass(stage: int, tp: int, sums: str | None, one_pass: bool) -> None:
    """As ``grad_norm.norm_in_one_pass`` decides; elsewhere it is DeepSpeed's own, with or without MoETrainer."""
    layout = plan_search.build(stage, 2, tp, 1, "")
    if sums:
        layout = from_raw({**layout.raw, "data_types": {"grad_accum_dtype": sums}})
    layout = replace(layout, tp_size=tp)
    case = Case.of(layout, Model.of(CUT), 4, work(1), 8)
    ours, theirs = (predict(replace(case, one_pass_norm=norm), H200).time.optimizer for norm in (True, False))
    assert ours == pytest.approx(theirs * (72 / 110 if one_pass else 1), rel=1e-9)


def test_flops_of_the_measured_run() -> None:
    """44,800 tokens a second (of :data:`MEASURED`: EP 2, 4 x 4 sequences, Liger) were noted as 477 TFLOP/s."""
    assert 44_800 * sum(train_flops(model_sizes(CUT), 4096)) / 1e12 == pytest.approx(477, rel=0.005)


def test_what_costs_what() -> None:
    def time(stage: int, ep: int, gpus: int = 16, per_node: int = 8, skew: float = 1.0, recompute: bool = False):
        batch = work(1, recompute=recompute)
        case = Case.of(layout_of(stage, ep), Model.of(MIXTRAL_8X7B), gpus, batch, per_node, skew=skew)
        return predict(case, H200).time

    inside, across = time(1, 8), time(1, 8, per_node=4)
    assert across.all_to_all > 3 * inside.all_to_all
    assert time(1, 1).all_to_all == 0.0
    assert time(3, 1).reduce_gather > 2 * time(1, 8).reduce_gather
    assert time(1, 8, skew=2.0).compute > inside.compute
    assert time(1, 8, recompute=True).compute == pytest.approx(4 / 3 * inside.compute, rel=0.01)
    assert time(1, 8, gpus=64).optimizer < inside.optimizer / 3
