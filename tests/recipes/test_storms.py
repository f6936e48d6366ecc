"""SIGTERM, SIGUSR1 and kill -9 at named points of real launcher runs: all ends, nothing complete is lost, it goes on.

A process of the run is held where it is about to call a named function (``tests/support/stops``), and signalled there.
Then: no process of the run is left after a minute; what has a final name is whole; and the next start gives the losses
and the exported bytes of the run that nobody disturbed. The table of what was seen: ``benchmarks/faults.md``.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import stops
from tests.support.cluster import Cluster, free_port
from tests.support.recipe import (
    ROOT,
    Ended,
    command,
    curve,
    end_of,
    save_model,
    start_launcher,
    text_rows,
    train_in_cluster,
    write_jsonl,
)
from tests.support.stops import Point

SECONDS_TO_START = 300
SECONDS_TO_END = 60
MARK = "MOE_RECIPES_TEST_RUN"
STEPS = 8
ALL = [3, 6, 8]
"""Steps whose checkpoints a run has that nobody disturbed. It evaluates at 4, at 8, and after training."""
TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL


@dataclass(frozen=True)
class Storm:
    """One run, and what is done to it."""

    name: str
    point: Point
    number: signal.Signals
    to: str
    """The processes that are signalled: names as in ``Point.who``, joined by +."""
    saved: list[int]
    """Steps whose checkpoints are there afterwards."""
    launcher: str = "run.sh"
    has_model: bool = False
    has_summary: bool = False
    told: bool = True
    """Whether the ranks say that they were told to stop; a rank that was killed says nothing."""
    goes_on: bool = False
    """Whether the held process goes on after the signal, which it does not hear."""
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> int | None:
        """The exit code; None where the launcher says which of its children failed first."""
        if self.number in (TERM, USR1):
            return 143
        if self.to == "launch.py":  # deepspeed's command does not know of it
            return 137 if self.launcher == "run.sh" else 0
        return -9 if "launcher" in self.to.split("+") else None

    def __str__(self) -> str:
        return f"{self.name}: {self.number.name} to {self.to}".replace(" ", "_")


def engine(name: str) -> str:
    return f"deepspeed.runtime.engine:DeepSpeedEngine.{name}"


def trainer(name: str) -> str:
    return f"moe_models.trainer:ExpertParallelTraining.{name}"


def half_of(text: str, who: str) -> Point:
    """A file that torch.save writes, without its end."""
    return Point("torch.serialization:_open_zipfile_writer_file.__exit__", who, text=text)


ONE_RANK = Point("subprocess:Popen.__init__", "launch.py", text="--local_rank=1")
UNHEARD = Point("moe_models.engine.signals:listen", "rank 0")
FIRST = trainer("training_step")
EVALUATION = "transformers.trainer:Trainer.evaluation_loop"
OPTIMIZER = half_of("global_step6/.*optim_states", "rank 0")
WEIGHT = "moe_models.checkpoint.hf_folder:TensorWriter.add"
PROOF = Point("moe_models.checkpoint.proof:prove_folder", "rank 0")
LEAVING = Point("moe_models.nodes.watch:leave", "rank 0")

STORMS = [
    # starting
    Storm("nothing is started", Point("deepspeed.launcher.runner:main", "launcher"), TERM, "launcher", [], told=False),
    Storm("one rank is started", ONE_RANK, TERM, "launcher", [], told=False, goes_on=True),
    Storm("one rank is started", ONE_RANK, KILL, "launcher", [], goes_on=True),
    Storm("a rank imports", UNHEARD, KILL, "launch.py", [], "deepspeed", goes_on=True),
    Storm("a rank imports", UNHEARD, KILL, "launcher+launch.py", [], "deepspeed", goes_on=True),
    # reading
    Storm("data", Point("moe_models.data:load_rows", "rank 0"), TERM, "launcher", []),
    Storm("reading", Point("moe_models.checkpoint.reading:read_dense", "rank 0"), TERM, "rank 0", [], "deepspeed"),
    Storm("reading", Point("moe_models.checkpoint.reading:read_dense", "rank 1"), KILL, "rank 1", [], told=False),
    Storm("building the engine", Point("deepspeed:initialize", "rank 1"), KILL, "launch.py", []),
    # training
    Storm("before the first step", Point(FIRST, "rank 0"), TERM, "launcher", [1]),
    Storm("before the first step", Point(FIRST, "rank 1"), KILL, "launcher", [1]),
    Storm("forward pass", Point(trainer("compute_loss"), "rank 1", 2), USR1, "rank 1", [2], "deepspeed"),
    Storm("backward pass", Point(engine("backward"), "rank 0", 5), KILL, "rank 0", [3], told=False),
    Storm("optimizer", Point(engine("step"), "rank 0", 4), TERM, "launcher", [3, 4]),
    Storm(
        "between two steps", Point("transformers.trainer_callback:CallbackHandler.on_step_end", "rank 0", 5),
        TERM, "rank 0", [3, 6], "deepspeed",
    ),
    # evaluating
    Storm("evaluation", Point(EVALUATION, "rank 0"), TERM, "launcher", [3, 4]),
    Storm("evaluation", Point(EVALUATION, "rank 1"), KILL, "launcher", [3, 4], "deepspeed"),
    Storm("evaluation", Point(EVALUATION, "rank 1"), KILL, "rank 1", [3], told=False),
    Storm("last evaluation", Point(EVALUATION, "rank 0", 3), TERM, "launcher", ALL),
    # saving
    Storm("saving: no file yet", Point(engine("save_checkpoint"), "rank 0", 2), TERM, "launcher", [3, 6]),
    Storm(
        "saving: half of an expert", half_of("global_step6/layer_1_expert_", "rank 1"), KILL, "rank 1", [3], told=False
    ),
    Storm("saving: half of the optimizer", OPTIMIZER, KILL, "launcher", [3, 6], "deepspeed"),
    Storm("saving: half of the optimizer", OPTIMIZER, KILL, "launcher+launch.py+rank 0+rank 1", [3], told=False),
    Storm("saving: random state", half_of("checkpoint-6/rng_state", "rank 1"), TERM, "rank 1", [3, 6], "deepspeed"),
    Storm(
        "saving: layout.json", Point("moe_models.checkpoint.whole_checkpoints:describe_engine", "rank 0", 2),
        KILL, "rank 0", [3], told=False,
    ),
    Storm("saving: no name yet", Point("os:replace", text="checkpoint-6"), KILL, "rank 0", [3], told=False),
    Storm("saving: named", Point("shutil:rmtree", call=3, text=".writing"), KILL, "rank 0", [3, 6], told=False),
    Storm(
        "saving: an old one half removed", Point("os:rmdir", text="global_step3"), KILL, "rank 0", [6], told=False,
        flags={"save_total_limit": 1},
    ),
    # exporting
    Storm("export: weights", Point(WEIGHT, "rank 1", 10), TERM, "launcher", ALL),
    Storm("export: weights", Point(WEIGHT, "rank 0", 10), KILL, "rank 0", ALL, told=False),
    Storm(
        "export: config", Point("moe_models.checkpoint.hf_folder:save_companions", "rank 0", 4), KILL, "launcher", ALL,
        "deepspeed",
    ),
    Storm("proof", PROOF, TERM, "launcher", ALL),
    Storm("proof", PROOF, KILL, "rank 1", ALL, told=False),
    Storm("export: no name yet", Point("moe_models.files:replace_folder"), KILL, "launch.py", ALL),
    # the end
    Storm("summary", Point("moe_models.files:write"), TERM, "launcher", ALL, has_model=True),
    Storm("leaving", LEAVING, TERM, "launcher", ALL, has_model=True, has_summary=True),
    Storm("leaving", LEAVING, KILL, "rank 0", ALL, has_model=True, has_summary=True, told=False),
]  # fmt: skip
DAILY = ("saving:_no_file_yet:_SIGTERM_to_launcher",)
"""More of every day are in test_signals.py and test_faults.py."""


@dataclass(frozen=True)
class Run:
    """What every run of this file reads."""

    model: Path
    data: Path

    def words(self, out: Path, **more: Any) -> list[str]:
        flags = {
            "eval_dataset": self.data, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": "false",
            "max_steps": STEPS, "save_steps": 3,
            "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", **more,
        }  # fmt: skip
        return command(self.model, self.data, ROOT / "ds_configs" / "zero1_ep2.json", out, **flags)


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody disturbs."""

    result: dict[str, Any]
    sums: dict[str, str]
    """``model``, and ``checkpoint-N`` exported by recipes/export.py -> sha256 of its weights."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("storms")
    return Run(save_model(folder / "model", attention_dropout=0.1), write_jsonl(folder / "t.jsonl", text_rows(20)))


@pytest.fixture(scope="module")
def undisturbed(run: Run, clusters: Callable[[int], Cluster], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = clusters(2).run(train_in_cluster, run.words(folder / "out"))[0]
    sums = {f"checkpoint-{step}": exported_sum(folder / "out" / f"checkpoint-{step}", folder) for step in ALL}
    return Undisturbed(result, {"model": weights_sum(folder / "out" / "model"), **sums})


def weights_sum(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def exported_sum(checkpoint: Path, folder: Path) -> str:
    """sha256 of what recipes/export.py makes of it; it refuses a checkpoint that lacks anything."""
    target = folder / f"exported-{checkpoint.name}"
    runpy.run_path(str(ROOT / "recipes" / "export.py"))["export_checkpoint"](checkpoint, target, "5GB")
    return weights_sum(target)


# ------------------------------------------------------------------------------------------------------- one storm


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of the run: its launchers, ranks, and all that these started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def by_name(processes: list[psutil.Process]) -> dict[str, psutil.Process]:
    """``launcher``, ``launch.py``, ``rank 0``, ``rank 1`` -> its process. A loader's worker is a rank's child."""
    found = {}
    pids = {process.pid for process in processes if "finetune.py" in " ".join(process.cmdline()[:3])}
    for process in processes:
        words = process.cmdline()[:4]
        if "deepspeed.launcher.launch" in words:
            found["launch.py"] = process
        elif "moe_models.nodes.launcher" in words or "deepspeed.launcher.runner" in words:
            found["launcher"] = process
        elif process.pid in pids and process.ppid() not in pids:
            found[f"rank {process.environ()['RANK']}"] = process
    return found


def disturbed(storm: Storm, words: list[str], folder: Path, port: int) -> tuple[Ended, float]:
    """(how the run ended, seconds from the signal until none of its processes was left)."""
    mark = uuid.uuid4().hex
    log = folder / "run.log"
    until = "go" if storm.goes_on else "told"
    environment = {MARK: mark, **stops.environment(storm.point, folder / "stop", until)}
    launcher = start_launcher(words, log, name=storm.launcher, port=port, **environment)
    try:
        # 1. Wait until it is held.
        stops.wait_until_held(folder / "stop", SECONDS_TO_START, lambda: launcher.poll() is not None and said(log))
        # 2. Signal.
        processes = by_name(marked(mark))
        begin = time.monotonic()
        for name in storm.to.split("+"):
            processes[name].send_signal(storm.number)
        if storm.goes_on:
            stops.let_go(folder / "stop")
        # 3. All of it ends.
        while left := marked(mark):
            assert time.monotonic() < begin + SECONDS_TO_END, f"left: {[p.cmdline()[:6] for p in left]}: {said(log)}"
            launcher.poll()
            time.sleep(0.1)
        seconds = time.monotonic() - begin
        return Ended(launcher.wait(5), log.read_text(), log.with_suffix(".err").read_text()), seconds
    finally:
        for process in marked(mark):
            process.kill()
        launcher.wait(10)


def said(log: Path) -> str:
    return str(Ended(-1, log.read_text(), log.with_suffix(".err").read_text()))


def check_whole(out: Path, storm: Storm, undisturbed: Undisturbed, folder: Path) -> None:
    """What has its final name is what it should be, and nothing else has one."""
    named = {path.name for path in out.glob("*") if not path.name.startswith(".")} - {"expert_load.jsonl", "log.jsonl"}
    expected = {f"checkpoint-{step}" for step in storm.saved}
    expected |= {"model"} if storm.has_model else set()
    expected |= {"summary.json"} if storm.has_summary else set()
    assert named == expected
    for step in storm.saved:
        sum_ = exported_sum(out / f"checkpoint-{step}", folder)
        assert sum_ == undisturbed.sums.get(f"checkpoint-{step}", sum_), step
    if storm.has_model:
        assert weights_sum(out / "model") == undisturbed.sums["model"]
    if storm.has_summary:
        assert json.loads((out / "summary.json").read_text())["steps"] == STEPS


def check_goes_on(result: dict[str, Any], undisturbed: Undisturbed, out: Path) -> None:
    """Its losses and its model are those of the undisturbed run."""
    assert result["steps"] == STEPS
    keys = ("loss", "grad_norm")
    assert curve(result, *keys) == curve(undisturbed.result, *keys)
    # An evaluation that was due when the run was told to stop is left out.
    evaluations = {entry["step"]: entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry}
    reference = {entry["step"]: entry["eval_loss"] for entry in undisturbed.result["history"] if "eval_loss" in entry}
    assert evaluations.items() <= reference.items()
    assert STEPS in evaluations
    assert weights_sum(out / "model") == undisturbed.sums["model"]


def cases() -> list[Any]:
    return [storm if str(storm) in DAILY else pytest.param(storm, marks=pytest.mark.conformance) for storm in STORMS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("storm", cases(), ids=str)
def test_storm(
    storm: Storm,
    run: Run,
    undisturbed: Undisturbed,
    clusters: Callable[[int], Cluster],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    out = tmp_path / "out"
    port = free_port()
    ended, seconds = disturbed(storm, run.words(out, **storm.flags), tmp_path, port)
    record_property("seconds", round(seconds, 1))
    record_property("code", ended.code)
    assert ended.code == storm.code or storm.code is None, ended
    assert ended.stderr.count("stopped: ") == storm.told or not storm.told, ended
    if not any(name in storm.to for name in ("rank 0", "rank 1")) or storm.number is not KILL:
        assert "Traceback" not in ended.stderr, ended
    check_whole(out, storm, undisturbed, tmp_path)

    more = {"resume_from_checkpoint": "true", **storm.flags} if storm.saved else storm.flags
    result = clusters(2).run(train_in_cluster, run.words(out, **more))[0]
    check_goes_on(result, undisturbed, out)


@pytest.mark.conformance
@pytest.mark.timeout(900)
def test_the_next_launcher_finds_nothing_in_its_way(run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """All processes killed at once while a checkpoint is written; the same command on the same port goes on."""
    out = tmp_path / "out"
    port = free_port()
    storm = next(storm for storm in STORMS if storm.to.count("+") == 3)
    disturbed(storm, run.words(out), tmp_path, port)
    assert list(out.glob(".writing/checkpoint-6/*/*")), "the half checkpoint is there"
    log = tmp_path / "resumed.log"
    words = run.words(out, resume_from_checkpoint="true")
    ended = end_of(start_launcher(words, log, name="run.sh", port=port), log, 240)
    assert ended.code == 0, ended
    assert weights_sum(out / "model") == undisturbed.sums["model"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "nothing hidden is left"
