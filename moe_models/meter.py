"""What a run measured about itself: speed and memory, over all ranks.

Speed. ``tokens_per_second`` is that of the *steady* steps: their tokens over their seconds (:func:`speed_of`).

- A step lasts from the end of the one before to its own end: the wait for its batch counts. Where the Trainer saved or
  evaluated between two steps, the later one begins after that. So no checkpoint and no evaluation is in a step. On a
  GPU the ends are events in its stream: a step ends when its work is done, and nothing waits for that.
- A step is *slow* where its seconds, and its seconds for each token too, are more than twice those of the last quarter
  of the run (medians). Both, because neither alone knows a slow step from one with more or fewer tokens.
- The *first steps* end where as many steps in a row as there were before, and at least :data:`ENOUGH`, are not slow.
  There is always one. A first run on a machine compiles its kernels there (Triton, Liger).
- Steady are all later steps. Slow ones among them are left out while they are rare (at most one in :data:`RARE`). If
  they are more, they belong to the pace of the run, and count.
- What the first steps and the slow ones that were left out took beyond steady ones is reported apart.
- With fewer than :data:`ENOUGH` steady steps the speed is *not steady yet*, and the summary says so.

No warm-up pass compiles the kernels before the first step. It would have to run forward and backward through the
engine, which counts micro-batches, records the order of ZeRO-3's gathers, draws dropout's random numbers and adds to
the routers' load. None of these can be put back exactly by DeepSpeed's public interface.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SLOW = 2
"""A step that takes more than so many times the typical one is slow: it did something that others do not."""
ENOUGH = 5
"""Steady steps from which on a speed is steady, and the first steps are over."""
RARE = 5
"""Of so many later steps one may be slow and is left out."""
KERNELS_LINE = (
    "The first run on a machine compiles kernels during its first steps, which can take a minute or more. "
    "summary.json says what they took; tokens_per_second leaves them out."
)
"""Said on a GPU before the first step."""
HOW_IT_IS_TAKEN = "tokens over seconds of the steady steps, without the first and slow ones, checkpoints, evaluations"
"""In summary.json."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    seconds: float
    """Since the step before, without checkpoints and evaluations."""
    tokens: int
    """Tokens of all ranks."""

    @property
    def pace(self) -> float:
        """Seconds for each token."""
        return self.seconds / max(1, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run was, what is left out of that, and what that took."""

    tokens_per_second: float
    """Of the steady steps, over all ranks; 0.0 without a step."""
    steady: bool
    """Whether there were enough of them."""
    steps: int
    """Steps of the run."""
    steady_steps: int
    first_steps: int
    first_steps_extra_seconds: float
    """What they took beyond steady steps with as many tokens."""
    later_slow_steps: int
    """Slow steps after the first ones that are left out."""
    later_slow_steps_extra_seconds: float

    def as_json(self) -> dict[str, Any]:
        """What summary.json holds beside ``tokens_per_second``; figures with one decimal."""
        figures = asdict(self)
        del figures["tokens_per_second"]
        for name, figure in figures.items():
            if isinstance(figure, float):
                figures[name] = round(figure, 1)
        return {"taken": HOW_IT_IS_TAKEN, "text": self.describe(), "left_out": self.left_out(), **figures}

    def describe(self) -> str:
        """``35,600 tokens/s (9 steady steps of 16)``; with "not steady yet" where that is so."""
        taken = f"{self.steady_steps} steady steps of {self.steps}"
        if not self.steady:
            taken = f"not steady yet: {self.steady_steps} steady steps of {self.steps}"
        return f"{self.tokens_per_second:,.0f} tokens/s ({taken})"

    def left_out(self) -> str:
        """``first 7 steps: 82 s more than steady ones (compiling)``; empty where that is less than a second."""
        texts = []
        if self.first_steps_extra_seconds >= 1:
            first = "first step" if self.first_steps == 1 else f"first {self.first_steps} steps"
            texts.append(f"{first}: {self.first_steps_extra_seconds:,.0f} s more than steady ones (compiling)")
        if self.later_slow_steps_extra_seconds >= 1:
            slow = "1 slow step" if self.later_slow_steps == 1 else f"{self.later_slow_steps} slow steps"
            texts.append(f"{slow} later: {self.later_slow_steps_extra_seconds:,.0f} s more")
        return "; ".join(texts)


def speed_of(steps: Sequence[Step]) -> Speed:
    """The speed of a run with these steps; the module's docstring says how it is taken."""
    if not steps:
        return Speed(
            tokens_per_second=0.0,
            steady=False,
            steps=0,
            steady_steps=0,
            first_steps=0,
            first_steps_extra_seconds=0.0,
            later_slow_steps=0,
            later_slow_steps_extra_seconds=0.0,
        )

    # 1. The typical step, out of the last quarter: it is far from the first steps. The lower median is one of the
    #    steps, so that of two steps a slow one is not half of it.
    last_quarter = steps[-max(1, -(-len(steps) // 4)) :]
    typical_seconds = median_low(step.seconds for step in last_quarter)
    typical_pace = median_low(step.pace for step in last_quarter)
    slow = [step.seconds > SLOW * typical_seconds and step.pace > SLOW * typical_pace for step in steps]

    # 2. The first steps, those after them, and the slow ones of these, if they are rare.
    number_of_first = _number_of_first(slow)
    first_steps = steps[:number_of_first]
    steady = list(steps[number_of_first:])
    slow_later = slow[number_of_first:]
    left_out = []
    if sum(slow_later) * RARE <= len(slow_later):
        left_out = [step for step, is_slow in zip(steady, slow_later, strict=True) if is_slow]
        steady = [step for step, is_slow in zip(steady, slow_later, strict=True) if not is_slow]

    # 3. The rate. A run of one step has no other than that of its first.
    counted = steady or first_steps
    seconds = sum(step.seconds for step in counted)
    rate = sum(step.tokens for step in counted) / seconds if seconds > 0 else 0.0
    return Speed(
        tokens_per_second=rate,
        steady=len(steady) >= ENOUGH,
        steps=len(steps),
        steady_steps=len(steady),
        first_steps=len(first_steps),
        first_steps_extra_seconds=_extra_seconds(first_steps, rate),
        later_slow_steps=len(left_out),
        later_slow_steps_extra_seconds=_extra_seconds(left_out, rate),
    )


def _number_of_first(slow: Sequence[bool]) -> int:
    """How many steps are first steps; ``slow`` says of each whether it is slow."""
    number = 1
    while True:
        watched = slow[number : number + max(number, ENOUGH)]
        if True not in watched:
            return number
        last_slow = len(watched) - watched[::-1].index(True)
        number += last_slow


def _extra_seconds(steps: Sequence[Step], rate: float) -> float:
    """What the steps took beyond their tokens at this rate."""
    if rate == 0:
        return 0.0
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    return max(0.0, seconds - tokens / rate)


Mark = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event in a GPU's stream."""


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Takes the time and the tokens of each optimizer step.

    Args:
        tokens: says how many tokens of all ranks were trained on so far.
        now: the host's clock; where the run is on a GPU, events in its stream are used instead.
    """

    def __init__(self, tokens: Callable[[], int], now: Callable[[], float] = time.perf_counter) -> None:
        self._tokens = tokens
        self._now = now
        self._on_gpu = False
        self._tokens_before = 0
        self._begun: Mark | None = None
        self._steps: list[Step] = []
        # The step that the GPU may still be at work on: when it began, when it ends, its tokens.
        self._last: tuple[Mark, Mark, int] | None = None

    def on_train_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        """Start the clock. On a GPU, say that the first steps may be slow."""
        self._on_gpu = args.device.type == "cuda"
        self._tokens_before = self._tokens()
        self._begun = self._mark()
        if self._on_gpu and state.is_world_process_zero:
            print(KERNELS_LINE, flush=True)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is over, and the next one begins."""
        assert self._begun is not None
        end = self._mark()
        self._settle()  # the step before: the GPU is hardly ever more than one step behind
        tokens = self._tokens()
        self._last = (self._begun, end, tokens - self._tokens_before)
        self._begun = end
        self._tokens_before = tokens

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """The next step begins after the checkpoint."""
        self._begun = self._mark()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The next step begins after the evaluation."""
        self._begun = self._mark()

    @property
    def steps(self) -> list[Step]:
        """All steps so far."""
        self._settle()
        return self._steps

    @property
    def speed(self) -> Speed:
        """Of all steps so far."""
        self._settle()
        return speed_of(self._steps)

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _settle(self) -> None:
        """Note the last step, once the GPU has done it."""
        if self._last is None:
            return
        begun, end, tokens = self._last
        self._last = None
        self._steps.append(Step(_seconds_between(begun, end), tokens))


def _seconds_between(begun: Mark, end: Mark) -> float:
    if isinstance(begun, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return float(begun.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begun


def peak_memory_of_this_process() -> float:
    """Its largest memory so far in GiB: allocated on the GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    return kib / 2**20


def peak_memory_gib() -> float:
    """:func:`peak_memory_of_this_process`, the largest of all ranks. Collective."""
    peak = torch.tensor(peak_memory_of_this_process())
    if torch.cuda.is_available():
        peak = peak.to("cuda")
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)
