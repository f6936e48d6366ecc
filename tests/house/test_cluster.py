"""How a cluster tells what became of its ranks; here they are processes without torch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import ChildError, Cluster, serve


class Light(Cluster):
    """Ranks that only serve."""

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=be_rank, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def be_rank(rank: int, pipe: Any) -> None:
    os.environ["RANK"] = str(rank)
    serve(pipe)


def act(what: str, rank: int) -> str:
    """Do ``what`` on ``rank`` only."""
    if os.environ["RANK"] != str(rank):
        return "well"
    if what == "raises":
        raise ValueError("planted")
    if what == "dies":
        os._exit(7)
    if what == "dies and leaves a child":
        if os.fork() == 0:
            time.sleep(20)  # it has the pipe open
        os._exit(7)
    if what == "hangs":
        time.sleep(100)
    return "slow" if time.sleep(0.3) is None else ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Light]:
    cluster = Light(2)
    yield cluster
    cluster.stop()


def test_answers_are_in_the_order_of_the_ranks(cluster: Light) -> None:
    for rank, answers in ((0, ["slow", "well"]), (1, ["well", "slow"])):
        assert cluster.run(act, "works", rank) == answers


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("raises", "ValueError: planted"),
        ("dies", "process died with exit code 7"),
        ("dies and leaves a child", "process died with exit code 7"),
        ("hangs", "no answer within "),
    ],
)
def test_a_rank_that_does_not_answer_ends_the_cluster(what: str, told: str, cluster: Light) -> None:
    cluster.run(act, "works", 0)  # so that it is running
    before = time.monotonic()
    with pytest.raises(ChildError) as caught:
        cluster.run(act, what, 1, timeout=1 if what == "hangs" else 15)
    assert time.monotonic() - before < 15
    assert str(caught.value).startswith("--- rank 1 of 2:\n")
    assert told in str(caught.value)
    assert cluster.run(act, "works", 1) == ["well", "slow"], "a fresh one"
