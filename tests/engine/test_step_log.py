"""One line a step: what is in it, what goes to log.jsonl, and what a run prints without and with --log_full."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_models.engine.step_log import LOG_FILE, StepLog, duration, step_line
from moe_models.meter import Step
from tests.support.recipe import command, launch, save_model, text_rows, write_jsonl

FIGURES = {
    "loss": 2.92314, "grad_norm": 1.2345, "learning_rate": 1e-4, "expert_load_max": 1.314, "tokens_per_second": 24999.4,
    "memory_gib": 8.71, "seconds_left": 3723.2,
}  # fmt: skip


class Clock:
    """Steps whose times are known."""

    def __init__(self) -> None:
        self.steps: list[Step] = []


def state(step: int, steps: int = 10) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)


def test_a_line_has_what_tells_whether_a_run_goes_well() -> None:
    assert step_line(FIGURES, 12, 60) == (
        "step 12/60  loss 2.9231  grad norm 1.23  fullest expert 1.31x  24,999 tokens/s  8.7 GiB  1:02:03 left"
    )
    assert step_line({"eval_loss": 2.5, "eval_aux_loss": 1.0}, 12, 60) == "step 12/60  held-out loss 2.5000"
    assert step_line({"train_loss": 2.5, "train_runtime": 3.0}, 60, 60) is None
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3600)] == ["00:00", "01:00", "59:59", "1:00:00"]


def test_speed_is_since_the_last_line_and_the_first_step_foretells_nothing() -> None:
    clock: Any = Clock()
    log = StepLog(clock)
    clock.steps.append(Step(100.0, 50))
    first = log.figures({"loss": 1.0}, state(1))
    assert (first["tokens_per_second"], first["seconds_left"]) == (0.5, 900.0)  # nothing better is known
    clock.steps += [Step(1.0, 50), Step(3.0, 50)]
    second = log.figures({"loss": 1.0}, state(3))
    assert (second["tokens_per_second"], second["seconds_left"]) == (25.0, 14.0)
    assert log.figures({"eval_loss": 1.0}, state(3)) == {}
    assert first["memory_gib"] > 0


def test_all_figures_go_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock: Any = Clock()
    log = StepLog(clock)
    args = SimpleNamespace(output_dir=str(tmp_path))
    log.on_log(args, state(1), None, logs=FIGURES)
    log.on_log(args, state(10), None, logs={"train_runtime": 3.0})
    other = SimpleNamespace(global_step=1, max_steps=10, is_world_process_zero=False)
    log.on_log(args, other, None, logs=FIGURES)
    rows = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [1, 10]
    assert all(row.pop("seconds") >= 0 for row in rows)
    assert rows == [FIGURES, {"train_runtime": 3.0}]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_jsonl(folder / "data.jsonl", text_rows(16))


@pytest.mark.conformance
@pytest.mark.parametrize("full", [False, True])
def test_a_run_prints_a_line_a_step(full: bool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """And TensorBoard has every figure of log.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, data = inputs
    flags = {"max_steps": 3, "save_strategy": "no", "log_full": full, "logging_dir": None, "report_to": "tensorboard"}
    ended = launch(command(model, data, Path("ds_configs/zero1_ep2.json"), tmp_path / "out", **flags), tmp_path)
    assert ended.code == 0, ended
    lines = [line for line in ended.stdout.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 0/3", "step 1/3", "step 2/3", "step 3/3"]
    for line in lines[1:]:
        for word in ("  loss ", "  grad norm ", "  fullest expert ", " tokens/s", " GiB", " left"):
            assert word in line
    assert ("'mean_token_accuracy'" in ended.stdout) is full, ended
    assert ("0/3 [" in ended.stderr) is full, ended

    rows = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    (events,) = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    board = EventAccumulator(str(events))
    board.Reload()
    tags = {tag.removeprefix("train/") for tag in board.Tags()["scalars"]}
    figures = {name for row in rows if "loss" in row for name in row} - {"step", "seconds"}
    assert {"tokens_per_second", "memory_gib", "seconds_left", "expert_load_max", "loss"} <= figures
    assert figures <= tags
