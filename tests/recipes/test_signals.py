"""SIGTERM, SIGUSR1 and the end of the launcher, in real launcher runs: what is saved, how it ends, and that all ends.

The undisturbed run and the resumed ones share the clusters; only what is disturbed is started by a launcher. Here the
launchers differ, and the moments are found from outside, as a user's signal finds them. Every point of a run is in
``test_storms.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.recipe import (
    ROOT,
    Ended,
    command,
    largest_difference,
    save_model,
    start_launcher,
    text_rows,
    train_in_cluster,
    write_jsonl,
)

SECONDS_TO_START = 240
SECONDS_TO_END = 60
MARK = "MOE_RECIPES_TEST_RUN"
STEPS = 12
Act = Callable[[psutil.Process, dict[int, psutil.Process]], None]
"""What is done to (launcher, ranks)."""


@dataclass(frozen=True)
class Run:
    """What every run of this file reads."""

    model: Path
    data: Path

    def words(self, out: Path, **more: Any) -> list[str]:
        flags = {
            "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 5, "logging_steps": 1,
            "learning_rate": 1e-3, "report_to": "none", **more,
        }  # fmt: skip
        return command(self.model, self.data, ROOT / "ds_configs" / "zero1_ep2.json", out, **flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Somewhat larger than the tiny ones, so that saving and exporting take long enough to be met."""
    folder = tmp_path_factory.mktemp("signals")
    size = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 8}
    model = save_model(folder / "model", attention_dropout=0.1, **size)
    return Run(model, write_jsonl(folder / "train.jsonl", text_rows(20)))


@pytest.fixture(scope="module")
def undisturbed(run: Run, clusters: Callable[[int], Cluster], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run exports that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return Path(clusters(2).run(train_in_cluster, run.words(out))[0]["folder"])


# ------------------------------------------------------------------------------------------------- moments and actions

MOMENTS: dict[str, Callable[[Path, str, str], bool]] = {
    "reading": lambda out, said, bar: "layout:" in said,
    "first step": lambda out, said, bar: f"step 0/{STEPS}" in said,
    "mid-step": lambda out, said, bar: said.count("  loss ") >= 2,
    "saving": lambda out, said, bar: any((out / ".writing").glob("checkpoint-5/global_step5/*")),
}
"""Whether it has come, by the output folder, stdout and stderr."""


def send(number: int, to: str) -> Act:
    """The signal ``number`` to the launcher, to its child ``launch.py``, or to a rank."""

    def act(launcher: psutil.Process, ranks: dict[int, psutil.Process]) -> None:
        if to == "launcher":
            launcher.send_signal(number)
        elif to == "launch.py":
            launcher.children()[0].send_signal(number)
        else:
            ranks[int(to.removeprefix("rank "))].send_signal(number)

    return act


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


def ranks_among(processes: list[psutil.Process]) -> dict[int, psutil.Process]:
    """rank -> its process. A loader's worker has its parent's environment, and no launcher as its parent."""
    pids = {process.pid: process for process in processes if "finetune.py" in " ".join(process.cmdline()[:3])}
    return {int(process.environ()["RANK"]): process for process in pids.values() if process.ppid() not in pids}


def disturbed(
    words: list[str], out: Path, log: Path, moment: str, act: Act, monkeypatch: pytest.MonkeyPatch, name: str = "run.sh"
) -> Ended:
    """Start, act at the moment, and see that nothing is left of it after a minute."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    launcher = start_launcher(words, log, name=name)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        come = MOMENTS[moment]
        while not come(out, log.read_text(), log.with_suffix(".err").read_text()):
            assert launcher.poll() is None, f"ended before the moment: {_ended(launcher, log)}"
            assert time.monotonic() < deadline, f"the moment never came: {_ended(launcher, log)}"
            time.sleep(0.005)
        act(psutil.Process(launcher.pid), ranks_among(marked(mark)))
        deadline = time.monotonic() + SECONDS_TO_END
        while left := marked(mark):
            assert time.monotonic() < deadline, f"left behind: {[p.cmdline() for p in left]}: {_ended(launcher, log)}"
            launcher.poll()
            time.sleep(0.1)
        launcher.wait(5)
        return _ended(launcher, log)
    finally:
        for process in marked(mark):
            process.kill()
        launcher.wait(10)


def _ended(launcher: subprocess.Popen[str], log: Path) -> Ended:
    code = launcher.returncode if launcher.returncode is not None else -1
    return Ended(code, log.read_text(), log.with_suffix(".err").read_text())


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))


def check_resumes(run: Run, out: Path, undisturbed: Path, clusters: Callable[[int], Cluster]) -> None:
    """The next start goes on from what is there, and exports bit by bit what the undisturbed run exports."""
    more = {"resume_from_checkpoint": "true"} if steps_saved(out) else {}
    result = clusters(2).run(train_in_cluster, run.words(out, **more))[0]
    assert result["steps"] == STEPS
    assert largest_difference(out / "model", undisturbed) == 0.0


# ---------------------------------------------------------------------------------------------------------------- tests

EVERY_DAY = [
    ("deepspeed", "mid-step", signal.SIGTERM, "rank 1", 143),
    ("deepspeed", "mid-step", signal.SIGKILL, "launcher", -9),
]
CONFORMANCE = [
    ("run.sh", "saving", signal.SIGTERM, "launcher", 143),
    ("deepspeed", "mid-step", signal.SIGKILL, "launch.py", 0),
    ("deepspeed", "mid-step", signal.SIGTERM, "launcher", -15),
    ("deepspeed", "reading", signal.SIGTERM, "rank 0", 143),
    ("deepspeed", "first step", signal.SIGUSR1, "rank 1", 143),
    ("deepspeed", "mid-step", signal.SIGTERM, "launch.py", 1),
    ("run.sh", "mid-step", signal.SIGUSR1, "launcher", 143),
    ("torchrun", "mid-step", signal.SIGUSR1, "rank 0", 1),
    ("torchrun", "mid-step", signal.SIGTERM, "launcher", 1),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "moment", "number", "to", "code"),
    [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.conformance) for case in CONFORMANCE)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_told_to_stop(
    name: str,
    moment: str,
    number: signal.Signals,
    to: str,
    code: int,
    run: Run,
    undisturbed: Path,
    clusters: Callable[[int], Cluster],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything ends within a minute; the step is saved where there is one; the resumed run is the undisturbed one.

    ``code``: the plain launchers answer in their own way. deepspeed's dies of a signal, and says 0 when launch.py died;
    torchrun says 1 for every rank that did not end with 0.
    """
    out = tmp_path / "out"
    ended = disturbed(run.words(out), out, tmp_path / "run.log", moment, send(number, to), monkeypatch, name)
    assert ended.code == code, ended
    assert "Traceback" not in ended.stderr or name == "torchrun", ended
    assert ended.stderr.count("stopped: ") == 1, ended
    saved = steps_saved(out)
    if moment in ("first step", "mid-step", "saving"):
        assert saved, ended
        assert saved[-1] < STEPS, "it trained on"
        assert f"step {saved[-1]} is saved in {out}/checkpoint-{saved[-1]}; go on with" in ended.stderr, ended
    assert not (out / "summary.json").exists()
    check_resumes(run, out, undisturbed, clusters)


@pytest.mark.conformance
@pytest.mark.parametrize("to", ["rank 0", "launcher"])
def test_without_checkpoints_it_just_ends(run: Run, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = run.words(out, save_strategy="no", max_steps=4000)
    monkeypatch.setitem(MOMENTS, "training", lambda out, said, bar: "  loss " in said)
    ended = disturbed(words, out, tmp_path / "run.log", "training", send(signal.SIGTERM, to), monkeypatch)
    assert ended.code == 143, ended
    assert "stopped: SIG" in ended.stderr, ended
    assert steps_saved(out) == []


@pytest.mark.conformance
def test_a_killed_rank_does_not_keep_the_others(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank and the launcher die together: the other rank cannot vote, and must not wait in a collective for ever."""

    def act(launcher: psutil.Process, ranks: dict[int, psutil.Process]) -> None:
        for process in (launcher, *launcher.children(), ranks[1]):
            process.kill()

    out = tmp_path / "out"
    ended = disturbed(run.words(out), out, tmp_path / "run.log", "mid-step", act, monkeypatch)
    assert ended.code == -9, ended
    assert not (out / "summary.json").exists()


CHILD = """
import os, signal, sys, time
from moe_models.engine import signals
signals.listen()
read, write = os.pipe()
child = os.fork()
if child == 0:
    if {worker}:
        import torch.utils.data._utils.worker as worker
        worker._worker_info = object()
    os.write(write, b"!")
    time.sleep(2)
    os._exit(7)
os.read(read, 1)
os.kill(child, signal.SIGTERM)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
time.sleep(1.5)
print("the parent lives, child", code)
"""


@pytest.mark.parametrize(("worker", "code"), [(False, -15), (True, 7)])
def test_signals_of_children_are_their_own(worker: bool, code: int) -> None:
    """A forked child that is told to stop does; a loader's worker stays as long as its rank; the rank hears nothing."""
    script = "import torch.utils.data\n" + CHILD.format(worker=worker)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"the parent lives, child {code}\n"), done.stderr


def test_a_signal_reaches_a_main_thread_that_does_not_return() -> None:
    """The interpreter does not run a handler while the main thread is in C, such as in a collective."""
    script = """
import ctypes
from moe_models.engine import signals
signals.listen()
print("ready", flush=True)
libc = ctypes.CDLL(None)
while True:
    libc.pthread_cond_wait(ctypes.create_string_buffer(64), ctypes.create_string_buffer(64))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.strip() == "stopped: SIGTERM: nothing that is complete was lost"


@pytest.mark.parametrize("variable", ["CROSS_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_that_ended_before_its_rank_could_look_for_it(variable: str) -> None:
    """The rank was taken over by init, and has the variables of a launcher: it ends, and does not train on."""
    rank = "from moe_models.engine import signals; import time; signals.listen(); time.sleep(30); print('trained on')"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}])"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    with_variable = {**environment, variable: "0"}
    for given, told in ((with_variable, True), (environment, False)):
        process = subprocess.Popen(
            [sys.executable, "-c", launcher if told else launcher.replace("sleep(30)", "sleep(2)")], cwd=ROOT,
            env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        out, err = process.communicate(timeout=60)  # until the rank, too, has closed them
        assert ("stopped: the launcher is gone: nothing that is complete was lost" in err) is told, err
        assert ("trained on" in out) is not told


def test_run_sh_tells_that_its_child_was_killed() -> None:
    """DeepSpeed's runner would end with 0."""
    from moe_models.nodes.launcher import _Remembering

    started = _Remembering()
    assert started.code() == 0
    for script, code in (("import os; os.kill(os.getpid(), 9)", 137), ("raise SystemExit(3)", 3), ("", 0)):
        started.Popen([sys.executable, "-c", script]).wait()
        assert started.code() == code
    assert started.PIPE is subprocess.PIPE
