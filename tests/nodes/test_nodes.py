"""What must be equal on every node is compared before weights are read, and the node that differs is named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_models.nodes.facts import Report, data_facts, differences, flag_facts, json_facts, version_facts
from tests.support.cluster import free_port
from tests.support.recipe import ROOT, Ended, ForkedRecipe, command, save_model, text_rows, write_jsonl

NAMES = [f"node-{name} (10.0.0.{i + 1}, rank {8 * i})" for i, name in enumerate("abcd")]


def reports(*facts: dict[str, dict[str, str]], problems: dict[int, tuple[str, ...]] | None = None) -> list[Report]:
    return [
        Report(i, NAMES[i], f"10.0.0.{i + 1}", of_node, (problems or {}).get(i, ())) for i, of_node in enumerate(facts)
    ]


def test_one_line_for_each_difference_with_the_node_that_differs() -> None:
    usual = {"version": {"torch": "2.13.0"}, "flag": {"--learning_rate": "1e-4"}}
    assert differences(reports(usual, usual, usual)) == []
    other = {"version": {"torch": "2.12.0"}, "flag": {"--learning_rate": "1e-4", "--packing": "given"}}
    the_others = f"{NAMES[0]}, {NAMES[1]}, {NAMES[3]}"
    assert differences(reports(usual, usual, other, usual)) == [
        f"torch: 2.12.0 on {NAMES[2]}; but 2.13.0 on {the_others}; install the same on every node",
        f"--packing: given on {NAMES[2]}; but absent on {the_others}; give every node the same command line",
    ]
    # The many are right, even against the first; with two, the first is.
    assert differences(reports(other, usual, usual))[0].startswith(f"torch: 2.12.0 on {NAMES[0]}; but")
    assert differences(reports(usual, other))[0].startswith(f"torch: 2.12.0 on {NAMES[1]}; but 2.13.0 on {NAMES[0]}")


def test_a_problem_of_one_node_is_said_with_its_name_and_one_of_all_nodes_without() -> None:
    read, unread = {"file": {"x.json: a": "1"}}, {"file": {}}
    found = differences(reports(read, unread, problems={0: ("wrong",), 1: ("wrong", "x.json: no such file")}))
    assert found == ["wrong", f"{NAMES[1]}: x.json: no such file"]


def test_facts(tmp_path: Path) -> None:
    assert flag_facts(["--a", "1", "2", "--b=x", "--c"]) == {"--a": "1 2", "--b": "x", "--c": "given"}
    assert json_facts("f.json", {"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {
        "f.json: a.b": "1",
        "f.json: a.c.d": "[2]",
        "f.json: e": "{}",
    }
    assert {"python", "torch", "deepspeed", "transformers", "trl", "accelerate", "moe-recipes"} <= set(version_facts())
    assert data_facts("owner/name") == {}
    big = tmp_path / "big.txt"
    seen = set()
    for first, last in (("a", "a"), ("b", "a"), ("a", "b")):
        big.write_text(first + "x" * 300_000 + last)
        seen |= {*data_facts(str(big)).values(), *data_facts(str(tmp_path)).values()}
    assert len(seen) == 4  # three files of one size, and the folder, of which names and sizes are looked at


def test_a_change_in_any_package_is_another_source(tmp_path: Path) -> None:
    """Planted in a copy: the hash is of all rooms, not of the one that computes it, and such nodes do not start."""
    package = tmp_path / "moe_models"
    shutil.copytree(ROOT / "moe_models", package, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from moe_models.nodes.facts import version_facts; print(version_facts()['moe-recipes'])"

    def told_by_the_copy() -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    own = version_facts()["moe-recipes"]
    assert told_by_the_copy() == own
    for file in ("engine/cpu.py", "trainer.py", "nodes/watch.py"):
        content = (package / file).read_text()
        (package / file).write_text(content + "# another line\n")
        other = told_by_the_copy()
        (package / file).write_text(content)
        (line,) = differences(reports({"version": {"moe-recipes": own}}, {"version": {"moe-recipes": other}}))
        assert line == f"moe-recipes: {other} on {NAMES[1]}; but {own} on {NAMES[0]}; install the same on every node"
    assert told_by_the_copy() == own


class Node:
    """A folder that one node sees under the same names as the other: model, data and JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_model(folder / "tiny")
        write_jsonl(folder / "train.jsonl", text_rows(32))
        shutil.copy(ROOT / "ds_configs/zero1_ep2.json", folder / "ds.json")

    def edit(self, name: str, **values: Any) -> None:
        path = self.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Node, Node]:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return Node(tmp_path / "a"), Node(tmp_path / "b")


WORDS = command(Path("tiny"), Path("train.jsonl"), Path("ds.json"), Path("out"))
HOST = socket.gethostname()
A, B = f"{HOST} (127.0.0.1, rank 0)", f"{HOST} (127.0.0.1, rank 1)"


def start(nodes: tuple[Node, Node], words: list[str], words_b: list[str] | None = None, **others: str) -> list[Ended]:
    """The recipe as rank 0 on node 0 and rank 1 on node 1, in the environment that the deepspeed launcher makes.

    ``others`` is what is different in that of node 1.
    """
    common = {"WORLD_SIZE": "2", "CROSS_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    recipe = ForkedRecipe()

    def run(i: int) -> Ended:
        given = words_b if i and words_b is not None else words
        its = {**common, "RANK": str(i), "CROSS_RANK": str(i), **(others if i else {})}
        return recipe(given, start_in=nodes[i].folder, timeout=60, **its)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


def test_every_difference_at_once_on_every_node(nodes: tuple[Node, Node]) -> None:
    _, b = nodes
    b.edit("ds.json", zero_allow_untested_optimizer=True)
    b.edit("tiny/config.json", rms_norm_eps=1e-3)
    write_jsonl(b.folder / "train.jsonl", text_rows(32, seed=1))
    ended = start(nodes, [*WORDS, "--learning_rate", "1e-4"], [*WORDS, "--learning_rate", "2e-4"])
    assert [e.code for e in ended] == [2, 2], ended
    assert ended[0].errors == ended[1].errors
    copy = "copy the same file to every node, or read it from a folder that all of them share"
    rows = [next(iter(data_facts(str(node.folder / "train.jsonl")).values())) for node in nodes]
    assert ended[0].errors == [
        f"--learning_rate: 2e-4 on {B}; but 1e-4 on {A}; give every node the same command line",
        f"tiny: rms_norm_eps: 0.001 on {B}; but 1e-05 on {A}; {copy}",
        f"train.jsonl: {rows[1]} on {B}; but {rows[0]} on {A}; {copy}",
        f"ds.json: zero_allow_untested_optimizer: true on {B}; but absent on {A}; {copy}",
    ]
    assert not (nodes[0].folder / "out").exists()
    assert "Traceback" not in ended[0].stderr + ended[1].stderr


def test_what_one_node_lacks_is_said_on_all(nodes: tuple[Node, Node]) -> None:
    (nodes[1].folder / "train.jsonl").unlink()
    ended = start(nodes, WORDS)
    assert [e.code for e in ended] == [2, 2], ended
    (error,) = ended[0].errors
    assert error.startswith(f"{B}: data set train.jsonl: no such file or folder; ")
    assert ended[1].errors == [error]


def test_an_output_folder_of_its_own_is_refused(nodes: tuple[Node, Node]) -> None:
    """Each node starts in its own folder here, so that ``--output_dir out`` is two folders."""
    before = sorted(nodes[0].folder.rglob("*"))
    ended = start(nodes, WORDS)
    assert [e.code for e in ended] == [2, 2], ended
    assert sorted(nodes[0].folder.rglob("*")) == before
    (error,) = ended[0].errors
    assert error.startswith(f"--output_dir out: {B} does not see what {A} writes there, and every rank ")
    assert ended[1].errors == [error]


def test_without_checkpoints_nobody_needs_to_share(nodes: tuple[Node, Node]) -> None:
    """The same two folders: training, and the whole model in that of the first node."""
    ended = start(nodes, [*WORDS, "--save_strategy", "no", "--max_steps", "2", "--report_to", "none"])
    assert [e.code for e in ended] == [0, 0], ended
    assert (nodes[0].folder / "out/model/model.safetensors").exists()
    assert json.loads((nodes[0].folder / "out/summary.json").read_text())["world_size"] == 2
    assert not (nodes[1].folder / "out/model").exists()


def test_what_stops_one_node_later_stops_the_other_with_its_words(nodes: tuple[Node, Node]) -> None:
    """A row that is no text, in the middle of the second node's copy, which the comparison of both ends cannot see."""
    rows = [{"text": "w5 w6 " * 200} for _ in range(200)]
    for node, text in zip(nodes, ("w7 " * 400, None), strict=True):
        middle = [{"text": text if text is not None else None, "pad": "" if text else "x" * 1198}]
        write_jsonl(node.folder / "train.jsonl", [*rows[:100], *middle, *rows[100:]])
    sizes = [(node.folder / "train.jsonl").stat().st_size for node in nodes]
    assert sizes[0] == sizes[1], sizes
    ended = start(nodes, [*WORDS, "--save_strategy", "no", "--max_steps", "2", "--report_to", "none"])
    assert [e.code for e in ended] == [2, 2], ended
    (said,) = ended[1].errors
    assert said.startswith("data set train.jsonl, split 'train': text is null in 1 of 201 rows")
    assert ended[0].errors == [f"{B}: {said}"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"CROSS_RANK": "0"}, f"node rank 0: {A} and {B} both have it; "),
        ({"CROSS_SIZE": "3", "WORLD_SIZE": "4"}, f"WORLD_SIZE: 4 on {B}; but 2 on {A}; "),
    ],
)
def test_launchers_that_were_told_different_things(nodes: tuple[Node, Node], others: Any, said: str) -> None:
    ended = start(nodes, WORDS, **others)
    assert [e.code for e in ended] == [2, 2], ended
    assert ended[0].errors[0].startswith(said), ended[0]
