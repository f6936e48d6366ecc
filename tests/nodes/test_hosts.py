"""Two machines train what one trains, end when the other is gone, and go on together (support/hosts.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.hosts import Namespaces, ends, kill, start_on_both
from tests.support.recipe import ROOT, Ended, command, end_of, save_model, text_rows, train_in_cluster, write_jsonl

FLAGS = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "report_to": "none", "eval_on_start": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hosts")
    return save_model(folder / "tiny"), write_jsonl(folder / "train.jsonl", text_rows(64))


def curve_of(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> loss and gradient norm, from the last checkpoint."""
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(state.read_text())["log_history"]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in history if "loss" in row}


LAYOUTS = {
    "EP inside a host": ("zero1_ep2.json", 2),
    "EP across hosts": ("zero1_ep2.json", 1),
    "EP across hosts, two ranks on each": ("zero1_ep4.json", 2),
    "ZeRO-3, EP across hosts": ("zero3_ep2.json", 1),
}


@pytest.mark.netns
@pytest.mark.conformance
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hosts_train_as_one_and_resume(
    layout: str, inputs: tuple[Path, Path], tmp_path: Path, clusters: Callable[[int], Cluster]
) -> None:
    """Losses and gradient norms of both hosts equal those of one host bit by bit; so do those after a resume."""
    name, slots = LAYOUTS[layout]
    json_ = ROOT / "ds_configs" / name
    alone = clusters(2 * slots).run(train_in_cluster, command(*inputs, json_, tmp_path / "one", **FLAGS))[0]
    expected = {row["step"]: (row["loss"], row["grad_norm"]) for row in alone["history"] if "loss" in row}
    assert len(expected) == 6
    with Namespaces() as machines:
        two = tmp_path / "two"
        ended = ends(start_on_both(command(*inputs, json_, two, **FLAGS), tmp_path, slots, machines), tmp_path)
        assert [e.code for e in ended] == [0, 0], ended
        assert curve_of(two) == expected
        assert (two / "model" / "model.safetensors").read_bytes() == Path(
            alone["folder"], "model.safetensors"
        ).read_bytes()
        again = command(*inputs, json_, tmp_path / "again", **FLAGS, resume_from_checkpoint=two / "checkpoint-3")
        ended = ends(start_on_both(again, tmp_path, slots, machines), tmp_path)
        assert [e.code for e in ended] == [0, 0], ended
        assert curve_of(tmp_path / "again") == expected


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("second host killed", "loopback"),
        pytest.param("second host killed", "namespaces", marks=pytest.mark.netns),
        pytest.param("first host killed", "namespaces", marks=pytest.mark.netns),
        pytest.param("cable pulled", "namespaces", marks=pytest.mark.netns),
    ],
)
def test_one_host_gone_ends_the_other(what: str, where: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """With a line that names it, exit code 1, no hang; afterwards both go on from the last checkpoint."""
    out = tmp_path / "out"
    words = command(*inputs, ROOT / "ds_configs/zero1_ep2.json", out, **{**FLAGS, "save_steps": 20, "max_steps": 10**6})
    with ExitStack() as stack:
        machines = stack.enter_context(Namespaces()) if where == "namespaces" else None
        started = start_on_both(words, tmp_path, 1, machines)
        for process in started:
            stack.callback(kill, process)
        wait_for(out / "checkpoint-20")
        if what == "cable pulled":
            assert machines is not None
            machines.pull_the_cable()
            left, patience = [0, 1], 120.0
        else:
            gone = 0 if what.startswith("first") else 1
            kill(started[gone])
            left, patience = [1 - gone], 30.0
        for node in left:
            ended = end_of(started[node], tmp_path / f"node{node}.log", patience)
            assert ended.code == 1, ended
            other = f"node-{'ab'[1 - node]} (10.77.0.{2 - node}, rank {1 - node}): " if machines else ", rank 1): "
            said = [line for line in ended.errors if other in line]
            assert len(said) == 1, ended
            assert "its processes were killed, or the machine or the network failed" in said[0]
            assert "--resume_from_checkpoint true" in said[0]
    if what == "second host killed":
        last = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
        again = [*words, "--resume_from_checkpoint", "true", "--max_steps", str(last + 2)]
        with ExitStack() as stack:
            machines = stack.enter_context(Namespaces()) if where == "namespaces" else None
            ended_both: list[Ended] = ends(start_on_both(again, tmp_path, 1, machines), tmp_path)
        assert [e.code for e in ended_both] == [0, 0], ended_both
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        assert summary["steps"] == last + 2


@pytest.mark.netns
@pytest.mark.conformance
def test_the_node_with_another_json_is_named_by_its_address(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    given = json.loads((ROOT / "ds_configs/zero1_ep2.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**given, "gradient_clipping": 0.5}))
    words = command(*inputs, ROOT / "ds_configs/zero1_ep2.json", tmp_path / "out", **FLAGS)
    with Namespaces() as machines:
        # The second node sees its file where the first has another one: a mount of its own.
        machines.enter[1] += ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']
        machines.enter[1] += [str(tmp_path / "other.json"), words[5]]
        ended = ends(start_on_both(words, tmp_path, 1, machines), tmp_path)
    assert [e.code for e in ended] == [2, 2], ended
    a, b = "node-a (10.77.0.1, rank 0)", "node-b (10.77.0.2, rank 1)"
    line = f'{words[5]}: gradient_clipping: 0.5 on {b}; but "auto" on {a}; copy the same file to every node'
    for e in ended:
        (error,) = e.errors
        assert error.startswith(line), e
    assert not (tmp_path / "out").exists()
