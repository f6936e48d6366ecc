"""kill -9 at the worst moments, in real launcher runs: the run ends, nothing half is left, and it can be resumed.

One run is killed again and again, each time somewhere else, and resumed each time; what it exports in the end is, bit
for bit, what the run exports that nobody disturbed. The moments are found from outside, by what appears in the output
folder; both ranks are stopped there while the test looks around, so the moment is not missed.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.recipe import (
    ROOT,
    Ended,
    command,
    end_of,
    largest_difference,
    save_model,
    start_launcher,
    text_rows,
    train_in_cluster,
    write_jsonl,
)

SECONDS_TO_START = 200
SECONDS_TO_END = 90
"""After a kill. Alone on a machine it takes 2; what must not happen is waiting for a collective's timeout (minutes)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somewhat larger than the tiny ones, so that writing it takes long enough to be caught."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 8}
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1, **size)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(20))


def arguments(model: Path, data: Path, out: Path, **more: Any) -> list[str]:
    return command(
        model, data, ROOT / "ds_configs" / "zero1_ep2.json", out,
        **{
            "per_device_train_batch_size": 2, "max_steps": 12, "save_steps": 4, "logging_steps": 1,
            "learning_rate": 1e-3, "report_to": "none", **more,
        },
    )  # fmt: skip


def ranks_of(launcher: psutil.Popen | Any) -> dict[int, psutil.Process]:
    """rank -> its process, by the flag that the launcher gives it."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(word.endswith("finetune.py") for word in words):
            found |= {rank: process for rank in (0, 1) if f"--local_rank={rank}" in words}
    return found


def killed(words: list[str], log: Path, moment: Callable[[], bool], missed: Callable[[], bool], rank: int) -> Ended:
    """Start, kill ``rank`` when ``moment`` is true, and wait for the launcher; ``missed`` says the moment is over."""
    launcher = start_launcher(words, log)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not moment():
            assert launcher.poll() is None, f"ended before the moment: {end_of(launcher, log, 1)}"
            assert time.monotonic() < deadline, f"the moment never came: {log.read_text()[-3000:]}"
            time.sleep(0.001)
        processes = ranks_of(launcher)
        for process in processes.values():
            process.send_signal(signal.SIGSTOP)
        assert sorted(processes) == [0, 1], f"{processes}: {log.read_text()[-3000:]}"
        assert not missed(), "the moment was over before the ranks had been stopped"
        processes[rank].kill()
        processes[1 - rank].send_signal(signal.SIGCONT)
        ended = end_of(launcher, log, SECONDS_TO_END)
        _, alive = psutil.wait_procs(list(processes.values()), timeout=5)
        assert not alive, f"still running: {alive}"
        return ended
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def check_left_behind(out: Path, *expected: str, undisturbed: str) -> None:
    """Under final names there are exactly ``expected`` (``model`` may be), and each of them is whole."""
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert found - {"model", "summary.json", "expert_load.jsonl", "log.jsonl"} == set(expected)
    if "model" in found:
        assert largest_difference(out / "model", undisturbed) == 0.0
    export = runpy.run_path(str(ROOT / "recipes" / "export.py"))["export_checkpoint"]
    for name in expected:
        if name.startswith("checkpoint-"):
            offline = out.parent / f"offline-{name}"
            shutil.rmtree(offline, ignore_errors=True)
            export(out / name, offline, "5GB")  # refuses a checkpoint that lacks anything


@pytest.mark.timeout(1200)  # six launcher starts; two minutes alone on two cores
@pytest.mark.parametrize("order", [(1, 0, 0), pytest.param((0, 1, 1, 0), marks=pytest.mark.conformance)], ids=str)
def test_killed_again_and_again(
    order: tuple[int, ...], clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """Ranks ``order``: in training, while a checkpoint is written, in the export, and in one over an earlier one."""
    out = tmp_path / "out"
    step_12, staged_model = out / ".writing" / "checkpoint-12", out / ".model.writing"
    undisturbed = clusters(2).run(train_in_cluster, arguments(model, data, tmp_path / "undisturbed"))[0]["folder"]
    again = arguments(model, data, out, resume_from_checkpoint="true")
    all_three = ("checkpoint-4", "checkpoint-8", "checkpoint-12")

    ended = killed(
        arguments(model, data, out), tmp_path / "a.log",
        moment=(out / "checkpoint-4").exists, missed=(out / "checkpoint-8").exists, rank=order[0],
    )  # fmt: skip
    assert ended.code != 0, ended
    check_left_behind(out, "checkpoint-4", undisturbed=undisturbed)

    ended = killed(
        again, tmp_path / "b.log",
        moment=lambda: any(step_12.glob("global_step12/*")), missed=(out / "checkpoint-12").exists, rank=order[1],
    )  # fmt: skip
    assert ended.code != 0, ended
    check_left_behind(out, "checkpoint-4", "checkpoint-8", undisturbed=undisturbed)

    def killed_in_export(rank: int, log: Path) -> None:
        shutil.rmtree(staged_model, ignore_errors=True)
        ended = killed(
            again, log,
            moment=lambda: any(staged_model.glob("*.safetensors")), missed=lambda: not staged_model.exists(), rank=rank,
        )  # fmt: skip
        assert ended.code != 0, ended
        check_left_behind(out, *all_three, undisturbed=undisturbed)

    killed_in_export(order[2], tmp_path / "c.log")
    if order[2] == 0:  # without the writer there is none; without rank 1, rank 0 may just have had all it needed
        assert not (out / "model").exists()

    ended = end_of(start_launcher(again, tmp_path / "d.log"), tmp_path / "d.log", SECONDS_TO_START)
    assert ended.code == 0, ended
    assert "reloaded: no key missing" in ended.stdout, ended
    check_left_behind(out, *all_three, undisturbed=undisturbed)
    assert {"model", "summary.json"} <= {path.name for path in out.iterdir()}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    for rank in order[3:]:
        killed_in_export(rank, tmp_path / "e.log")
        assert not (out / "summary.json").exists() or rank == 1, "it would say that this run came to its end"
        assert (out / "model").exists(), "an export that is killed must leave the earlier one"


@pytest.mark.conformance
def test_kill_of_the_launcher_itself_is_not_success(model: Path, data: Path, tmp_path: Path) -> None:
    """deepspeed's runner answers 0 when its child `launch.py` was killed: summary.json is what tells success."""
    out, log = tmp_path / "out", tmp_path / "launcher.log"
    launcher = start_launcher(arguments(model, data, out, max_steps=400, save_steps=200), log)
    processes: dict[int, psutil.Process] = {}
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while "  loss " not in log.read_text():
            assert launcher.poll() is None, end_of(launcher, log, 1)
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        processes = ranks_of(launcher)
        (launch,) = psutil.Process(launcher.pid).children()
        launch.kill()
        ended = end_of(launcher, log, SECONDS_TO_END)
        assert ended.code == 0, "deepspeed reports it now: drop the sentence about it from the recipe's docstring"
        assert not (out / "summary.json").exists()
        assert not (out / "model").exists()
        _, alive = psutil.wait_procs(list(processes.values()), timeout=60)
        assert not alive, "the ranks must notice that their launcher is gone"
    finally:
        for process in processes.values():
            process.kill()
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
