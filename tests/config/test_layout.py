"""layout.py against DeepSpeed's own tables, and its arithmetic by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest

from moe_models.config.layout import Coordinates, Degrees, Layout, divisors, size_problems
from moe_models.errors import UserError

SHAPES = [
    (world, ep, tp, pp)
    for world in (1, 2, 4, 6, 8, 16, 64)
    for pp in (1, 2)
    for tp in (1, 2, 4)
    for ep in (1, 2, 3, 4, 8)
    if world % pp == 0 and (world // pp) % tp == 0 and (world // pp) % ep == 0
]


def test_groups_are_deepspeeds() -> None:
    folding = pytest.importorskip("deepspeed.module_inject.auto_ep_folding")
    assert len(SHAPES) > 40
    for world, ep, tp, pp in SHAPES:
        layout = Layout(world, ep, tp, pp=pp)
        spec = folding.build_folding_spec(world_size=world, pp_size=pp, tp_size=tp, ep_size=ep)
        tables = folding.expected_folding_group_tables(spec)
        assert layout.tp_groups() == tables.tp_groups
        assert layout.dp_groups() == tables.dense_dp_groups
        assert layout.ep_groups() == tables.ep_groups
        assert layout.edp_groups() == tables.edp_groups
        assert (layout.dp_size, layout.edp_size) == (spec.dp_size, spec.edp_size)
        for rank in range(world):
            at = layout.coordinates(rank)
            local = folding.local_folding_ranks(rank, spec)
            assert local["ep"][at.ep] == local["edp"][at.edp] == local["tp"][at.tp] == local["dense_dp"][at.dp] == rank


def test_groups_that_deepspeed_creates_without_tp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without tensor parallelism does not use the folding tables; record the groups it asks for."""
    groups = pytest.importorskip("deepspeed.utils.groups")
    for world, ep, mp, pp in ((8, 2, 1, 1), (8, 4, 1, 2), (8, 4, 2, 1), (6, 3, 1, 1)):
        asked: list[tuple[int, ...]] = []
        monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(groups.dist, "get_world_size", lambda world=world: world)
        monkeypatch.setattr(groups.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(groups.dist, "new_group", lambda ranks, asked=asked: asked.append(tuple(ranks)))
        monkeypatch.setattr(groups, "log_dist", lambda *_, **__: None)
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            monkeypatch.setattr(groups, name, {})
            monkeypatch.setattr(groups, f"{name}_RANKS", {})
        groups._create_expert_and_data_parallel(ep, mp_size=mp, pp_size=pp, mp_mode="sp")
        layout = Layout(world, ep, sp_size=mp, pp=pp)
        assert sorted(asked) == sorted(layout.ep_groups() + layout.edp_groups())


def test_four_ranks_two_dimensions() -> None:
    layout = Layout(4, 2)
    assert layout.ep_groups() == ((0, 1), (2, 3))
    assert layout.edp_groups() == ((0, 2), (1, 3))
    assert layout.dp_groups() == ((0, 1, 2, 3),)
    assert list(layout.experts_of(3, 64)) == list(range(32, 64))
    assert layout.ep_rank_of(31, 64) == 0
    assert layout.ep_rank_of(32, 64) == 1
    assert layout.coordinates(3) == Coordinates(rank=3, pp=0, dp=3, tp=0, sp=0, edp=1, ep=1)


def test_a_thousand_ranks() -> None:
    layout = Layout(1024, 64, tp_size=8)
    assert (layout.dp_size, layout.zero_size, layout.edp_size) == (128, 128, 16)
    owners = [rank for rank in range(1024) if 255 in layout.experts_of(rank, 256)]
    assert owners == list(layout.edp_groups()[63])
    for groups in (layout.tp_groups(), layout.dp_groups(), layout.ep_groups(), layout.edp_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(1024))


def test_sequence_parallel_peers_share_weights() -> None:
    layout = Layout(8, 4, sp_size=2)
    assert (layout.dp_size, layout.zero_size) == (4, 8)
    assert layout.sp_groups()[0] == (0, 1)
    assert layout.dp_groups() == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (layout.coordinates(5).sp, layout.coordinates(5).dp) == (1, 2)


@pytest.mark.parametrize(
    ("per_node", "top_k", "groups", "limited", "expected"),
    [
        (8, 8, 8, 4, (4, 8)),  # DeepSeek-V3 as it was trained: a group of experts is what a node holds
        (8, 8, 1, 1, (8, 8)),  # no limit
        (8, 2, 8, 4, (2, 8)),  # fewer experts than groups
        (16, 8, 8, 4, (4, 4)),  # a node holds two groups: four groups can be on all four nodes
        (4, 8, 8, 2, (4, 16)),  # a group lies on two nodes
        (64, 8, 8, 4, (1, 1)),
    ],
)
def test_nodes_that_a_token_reaches(
    per_node: int, top_k: int, groups: int, limited: int, expected: tuple[int, int]
) -> None:
    """256 experts on 64 ranks; then by trying every choice of groups."""
    layout = Layout(128, 64)
    assert layout.nodes_of_a_token(per_node, 256, top_k, groups, limited) == expected
    held = [{rank // per_node for rank in range(64) if e in layout.experts_of(rank, 256)} for e in range(256)]
    size = 256 // groups
    spread = [set().union(*held[start : start + size]) for start in range(0, 256, size)]
    most = max(len(set().union(*chosen)) for chosen in itertools.combinations(spread, limited))
    assert min(top_k, most) == expected[0]


@pytest.mark.parametrize(
    ("layout", "zero", "line"),
    [
        (Layout(2, 2), 1, "2 ranks: EP 2 x EDP 1, ZeRO-1"),
        (Layout(1, 1), 0, "1 rank: EP 1 x EDP 1, ZeRO-0"),
        (Layout(8, 4, tp_size=2), 2, "8 ranks: EP 4 x EDP 2, TP 2 x DP 4, ZeRO-2"),
        (Layout(16, 8, sp_size=4), 2, "16 ranks: EP 8 x EDP 2, SP 4 x DP 4, ZeRO-2"),
        (Layout(16, 4, pp=2), 1, "16 ranks: EP 4 x EDP 2, PP 2, ZeRO-1"),
    ],
)
def test_describe(layout: Layout, zero: int, line: str) -> None:
    assert layout.describe(zero) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"world_size": 6, "ep_size": 4},
            "ep_size = 4 does not divide the world size 6; use one of [1, 2, 3, 6], or start a ",
        ),
        (
            {"world_size": 8, "ep_size": 2, "tp_size": 3},
            "tp_size = 3 does not divide the world size 8; use one of [1, 2, 4, 8]",
        ),
        ({"world_size": 8, "ep_size": 2, "sp_size": 5}, "sp_size = 5 does not divide the world size 8"),
        ({"world_size": 8, "ep_size": 2, "pp": 3}, "pp = 3 does not divide the world size 8; use [1, 2, 4, 8]"),
        ({"world_size": 8, "ep_size": 8, "pp": 2}, "ep_size = 8 does not divide the 4 ranks of a pipeline stage"),
        ({"world_size": 0, "ep_size": 1}, "world_size = 0: must be at least 1"),
        (
            {"world_size": 8, "ep_size": 2, "tp_size": 2, "sp_size": 2},
            "tp_size = 2 and sp_size = 2: DeepSpeed takes tensor",
        ),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Layout(**arguments)
    assert caught.value.problems[0].startswith(line)


def test_every_size_problem_at_once_in_the_callers_words() -> None:
    problems = size_problems(8, 3, 5, names={"ep_size": "expert_parallel.autoep_size"})
    assert len(problems) == 2
    assert problems[1].startswith("expert_parallel.autoep_size = 3 does not divide the world size 8")


def test_out_of_range() -> None:
    layout = Layout(4, 4)
    for call, line in (
        (lambda: layout.coordinates(4), "rank = 4: must be 0 to 3"),
        (lambda: layout.ep_rank_of(8, 8), "expert = 8: must be 0 to 7"),
        (lambda: layout.experts_of(0, 6), "ep_size = 4 does not divide 6 experts; use one of [1, 2, 3, 6]"),
    ):
        with pytest.raises(UserError, match=line.replace("[", r"\[")):
            call()
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_torch_free() -> None:
    code = "import sys; import moe_models.config.layout; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("raw", "sizes"),
    [
        ({}, (1, 1, 1)),
        ({"expert_parallel": {"enabled": True, "autoep_size": 4}}, (4, 1, 1)),
        ({"expert_parallel": {"enabled": True}}, (1, 1, 1)),
        ({"expert_parallel": {"enabled": False, "autoep_size": 4}}, (1, 1, 1)),
        ({"moe": {"layer": {"ep_size": 2}}}, (2, 1, 1)),
        ({"moe": {"layer": {}}}, (1, 1, 1)),
        ({"moe": {"layer": None, "balance": {}}, "tensor_parallel": {"autotp_size": 0}}, (1, 1, 1)),
        ({"tensor_parallel": {"autotp_size": 8}, "sequence_parallel_size": 2}, (1, 8, 2)),
    ],
)
def test_sizes_in_the_json(raw: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    degrees = Degrees.from_json(raw)
    assert (degrees.ep, degrees.tp, degrees.sp) == sizes
