"""The speed of a run: what is steady, what is left out and what that took, with a clock that the test turns."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_models import meter
from moe_models.meter import KERNELS_LINE, Speed, Step, StepClock, speed_of
from tests.support.recipe import SCRIPT


def taken(*seconds: float, tokens: int = 1000) -> Speed:
    return speed_of([Step(each, tokens) for each in seconds])


def test_slow_first_steps_are_left_out_and_reported() -> None:
    """As on one H100 (16 steps): kernels are compiled in steps 1 to 7, and the old clock left out step 1 only."""
    speed = taken(82, 12, 9, 11, 8, 10, 9, *[2.0] * 9)
    assert speed.tokens_per_second == pytest.approx(500)
    assert (speed.steady, speed.steps, speed.steady_steps, speed.first_steps) == (True, 16, 9, 7)
    assert speed.first_steps_extra_seconds == pytest.approx(141 - 14)
    assert speed.describe() == "500 tokens/s (9 steady steps of 16)"
    assert speed.left_out() == "first 7 steps: 127 s more than steady ones (compiling)"


def test_first_steps_with_quick_ones_between() -> None:
    speed = taken(82, 2, 2, 40, 2, 2, 2, 30, *[2.0] * 12)
    assert (speed.first_steps, speed.later_slow_steps) == (8, 0)
    assert speed.tokens_per_second == pytest.approx(500)


def test_a_slow_middle_step_is_left_out_and_reported_apart() -> None:
    speed = taken(3, *[2.0] * 19, 60, *[2.0] * 19)
    assert (speed.first_steps, speed.later_slow_steps, speed.steady_steps) == (1, 1, 38)
    assert speed.tokens_per_second == pytest.approx(500)
    assert speed.later_slow_steps_extra_seconds == pytest.approx(58)
    assert speed.left_out() == "first step: 1 s more than steady ones (compiling); 1 slow step later: 58 s more"


def test_slow_steps_that_come_again_and_again_count() -> None:
    """Every third step waits for data: that is the pace of this run."""
    speed = taken(*[2.0] * 6, *[2.0, 2.0, 5.0] * 10)
    assert speed.later_slow_steps == 0
    assert speed.tokens_per_second == pytest.approx(35_000 / (5 * 2 + 10 * 9))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_short_runs_are_not_steady_yet(count: int) -> None:
    speed = taken(*[10.0, *[2.0] * 4][:count])
    assert not speed.steady
    assert speed.tokens_per_second == pytest.approx(100 if count == 1 else 500)
    assert speed.steady_steps == count - 1
    assert "not steady yet" in speed.describe()
    assert taken(10.0, *[2.0] * 5).steady


def test_compiling_until_the_end_is_not_steady_yet() -> None:
    speed = taken(82, 12, 9, 11, 8, 10, 9, 2)
    assert (speed.steady, speed.steady_steps, speed.tokens_per_second) == (False, 1, 500)


def test_no_step() -> None:
    assert speed_of([]).tokens_per_second == 0
    assert "(not steady yet: 0 steady steps of 0)" in speed_of([]).describe()
    assert speed_of([]).left_out() == ""


def test_steps_with_more_or_fewer_tokens_are_no_slow_steps() -> None:
    """Tokens and seconds are counted over the same steps: long rows, accumulation that ends early, half-empty rows."""
    in_proportion = [Step(tokens / 100, tokens) for tokens in (300, 100, 900, 200, 100, 800, 100, 100)]
    assert speed_of(in_proportion).steady_steps == 7
    assert speed_of(in_proportion).tokens_per_second == pytest.approx(100)
    equally_long = [Step(2.0, tokens) for tokens in (300, 100, 900, 200, 100, 800, 900, 900)]
    assert speed_of(equally_long).steady_steps == 7
    assert speed_of(equally_long).tokens_per_second == pytest.approx(3900 / 14)


def test_what_the_summary_holds() -> None:
    written = taken(82, *[2.0] * 9).as_json()
    assert "tokens over seconds of the steady steps" in written["taken"]
    assert written["text"] == "500 tokens/s (9 steady steps of 10)"
    assert written["left_out"] == "first step: 80 s more than steady ones (compiling)"
    assert (written["steady"], written["first_steps_extra_seconds"]) == (True, 80.0)


class Run:
    """A Trainer's calls, on a clock that stands still in between."""

    def __init__(self, device: str = "cpu") -> None:
        self.time = 100.0
        self.tokens = 7  # of an earlier train()
        self.clock = StepClock(lambda: self.tokens, lambda: self.time)
        self.args = SimpleNamespace(device=torch.device(device))

    def begin(self, first: bool = True) -> None:
        self.clock.on_train_begin(self.args, SimpleNamespace(is_world_process_zero=first), None)

    def step(self, seconds: float, tokens: int = 1000) -> None:
        self.time += seconds
        self.tokens += tokens
        self.clock.on_step_end(self.args, None, None)

    def pause(self, seconds: float, ended: str) -> None:
        self.time += seconds
        getattr(self.clock, ended)(self.args, None, None)


def test_checkpoints_and_evaluations_are_in_no_step() -> None:
    run = Run()
    run.begin()
    run.pause(50, "on_evaluate")  # --eval_on_start
    run.step(6)
    for _ in range(10):
        run.step(2)
        run.pause(30, "on_evaluate")
        run.pause(70, "on_save")
    speed = run.clock.speed
    assert speed.tokens_per_second == pytest.approx(500)
    assert (speed.steady_steps, speed.later_slow_steps) == (10, 0)
    assert speed.first_steps_extra_seconds == pytest.approx(4)
    assert run.clock.speed == speed, "asking twice changes nothing"


def test_the_wait_for_data_is_in_the_step() -> None:
    run = Run()
    run.begin()
    for _ in range(8):
        run.time += 3  # on_step_begin comes after this
        run.step(2)
    assert run.clock.speed.tokens_per_second == pytest.approx(200)


def test_kernels_are_announced_on_gpus_only(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    Run().begin()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(meter.StepClock, "_mark", lambda self: 0.0)
    Run("cuda").begin(first=False)
    assert capsys.readouterr().out == ""
    Run("cuda").begin()
    assert capsys.readouterr().out.splitlines() == [KERNELS_LINE]


@pytest.mark.gpu(1)
def test_on_a_gpu_each_step_has_its_own_work() -> None:
    """The host queues ten steps at once; the clock sees how long the GPU takes for each, and waits for none."""
    run = Run("cuda")
    run.begin()
    for cycles in [10**9] + [10**8] * 9:
        torch.cuda._sleep(cycles)
        run.step(0)
    speed = run.clock.speed
    assert (speed.first_steps, speed.steady_steps) == (1, 9)
    assert 0.02 < 1000 / speed.tokens_per_second < 0.2
    assert speed.first_steps_extra_seconds > 5 * 1000 / speed.tokens_per_second


@pytest.mark.parametrize("slow", [True, False])
def test_the_closing_lines_of_a_run(slow: bool, capsys: pytest.CaptureFixture[str]) -> None:
    speed = taken(82.0 if slow else 2.0, *[2.0] * 9)
    proof = {"max_logit_difference": 0.0, "same_top1": 1.0}
    summary = {
        "layout": "2 ranks", "tokens_per_second": speed.tokens_per_second, "speed": speed.as_json(),
        "peak_memory_gib": 1.5, "eval_loss_before": None, "eval_loss_after": None, "checkpoint": "out/model",
        "verified": proof, "left_out": None,
    }  # fmt: skip
    runpy.run_path(str(SCRIPT), run_name="recipe")["print_summary"](summary)
    lines = capsys.readouterr().out.splitlines()
    assert "speed         500 tokens/s (9 steady steps of 10), peak 1.5 GiB per process" in lines
    said = "slow steps    first step: 80 s more than steady ones (compiling)" in lines
    assert said == slow
    assert [line.split()[0] for line in lines] == ["layout", "speed", *(["slow"] if slow else []), "model"]
