"""One line a step, and everything else in ``log.jsonl``: instead of transformers' progress bar and its dict of strings.

A line has what tells whether a run goes well: step, loss, gradient norm, fullest expert, speed, memory, time left. All
figures of a step go to ``log.jsonl`` and to what ``--report_to`` names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from moe_models.files import RunLog
from moe_models.meter import StepClock, peak_memory_of_this_process

LOG_FILE = "log.jsonl"
"""In the output folder: one line for each logged step or evaluation, with all its figures."""

RECENT = 20
"""The time left is foretold from the mean of so many last steps."""


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Prints a line for each logged step, and keeps all figures.

    Args:
        clock: takes the times; its callback must be called before this one.
    """

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._shown_steps = 0
        self._file = RunLog("the figures of the steps are not logged")
        self._begun = time.monotonic()

    def figures(self, logs: Mapping[str, Any], state: Any) -> dict[str, float]:
        """What this adds to the ``logs`` of a training step: speed since the last line, memory, time left."""
        if "loss" not in logs:
            return {}
        found = {"memory_gib": round(peak_memory_of_this_process(), 2)}

        # 1. The speed of the steps since the last line.
        steps = self._clock.steps
        new = steps[self._shown_steps :]
        self._shown_steps = len(steps)
        seconds = sum(step.seconds for step in new)
        if seconds > 0:
            found["tokens_per_second"] = round(sum(step.tokens for step in new) / seconds, 1)

        # 2. The time left. The first step compiles kernels.
        recent = steps[1:][-RECENT:] or steps
        if recent:
            mean = sum(step.seconds for step in recent) / len(recent)
            found["seconds_left"] = round(mean * (state.max_steps - state.global_step), 1)
        return found

    def on_train_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        """Say how many steps there will be."""
        if state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}  begins", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the line and append the figures; rank 0 alone."""
        if not state.is_world_process_zero or logs is None:
            return
        line = step_line(logs, state.global_step, state.max_steps)
        if line is not None:
            print(line, flush=True)
        seconds = round(time.monotonic() - self._begun, 3)
        row = {"step": state.global_step, "seconds": seconds, **logs}
        self._file.add(Path(args.output_dir) / LOG_FILE, json.dumps(row, default=str) + "\n")


def step_line(logs: Mapping[str, Any], step: int, steps: int) -> str | None:
    """The line for a training step or an evaluation; None for other logs (the totals at the end)."""
    parts = [f"step {step}/{steps}"]
    if "loss" in logs:
        parts.append(f"loss {float(logs['loss']):.4f}")
        if logs.get("grad_norm") is not None:
            parts.append(f"grad norm {float(logs['grad_norm']):.3g}")
        if "expert_load_max" in logs:
            parts.append(f"fullest expert {logs['expert_load_max']:.2f}x")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "memory_gib" in logs:
            parts.append(f"{logs['memory_gib']:.1f} GiB")
        if "seconds_left" in logs:
            parts.append(f"{duration(logs['seconds_left'])} left")
        return "  ".join(parts)
    held_out = [f"held-out {name.removeprefix('eval_')} {logs[name]:.4f}" for name in logs if name.endswith("_loss")]
    held_out = [part for part in held_out if "aux" not in part and "train" not in part]
    if not held_out:
        return None
    return "  ".join([*parts, *held_out])


def duration(seconds: float) -> str:
    """``1:02:03``, or ``02:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def log_in_lines(trainer: Any, clock: StepClock, *, full: bool) -> StepLog:
    """Give ``trainer`` a :class:`StepLog` instead of transformers' bar and dict; ``full`` keeps those, too."""
    log = StepLog(clock)
    trainer.add_callback(log)
    if not full:
        for kind in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(kind)
    return log
