"""``checkpoint/partitions.py``: the tiny examples of its docstring, and faults of one place that are seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_models.checkpoint import partitions
from moe_models.checkpoint.partitions import (
    Partitions,
    Piece,
    counted_pieces,
    share_of,
    share_size,
    zero3_partition,
    zero12_partition,
)
from moe_models.errors import UserError

STEP = Path("global_step1")
# Three parameters: a has 5 values, b is 2 x 2, c has 3.
A = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
B = torch.tensor([[11.0, 12.0], [13.0, 14.0]])
C = torch.tensor([21.0, 22.0, 23.0])
WHOLE = {"a": A, "b": B, "c": C}
SHAPES = {"a": (5,), "b": (2, 2), "c": (3,)}


def at(start: int, numel: int) -> SimpleNamespace:
    """What DeepSpeed calls a fragment_address."""
    return SimpleNamespace(start=start, numel=numel)


def flat(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def two_ranks_of_zero_1() -> Partitions:
    """a, b and c end to end, cut in the middle of b; the moment is the weight plus 100."""
    weights = (flat(1, 2, 3, 4, 5, 11), flat(12, 13, 14, 21, 22, 23))
    places: list[list[dict[str, Any]]] = [
        [{"a": at(0, 5), "b": at(5, 1)}],
        [{"b": at(0, 3), "c": at(3, 3)}],
    ]
    model = {"param_shapes": [SHAPES]}
    ranks = []
    for weight, mappings in zip(weights, places, strict=True):
        optimizer = {
            "param_slice_mappings": mappings,
            "single_partition_of_fp32_groups": [weight],
            "base_optimizer_state": {"state": {0: {"exp_avg": weight + 100}}},
        }
        ranks.append(zero12_partition(model, optimizer))
    return Partitions(STEP, ranks)


def two_ranks_of_zero_3(**changes: Any) -> Partitions:
    """Each of a, b and c cut in half, the last share filled up; d was frozen, in bf16, and has 3 values."""
    weights = (
        flat(1, 2, 3, 11, 12, 21, 22),
        flat(4, 5, 0, 13, 14, 23, 0),
    )
    frozen = (
        torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
        torch.tensor([2.5, 0.0], dtype=torch.bfloat16),
    )
    ranks = []
    for weight, share in zip(weights, frozen, strict=True):
        model = {
            "dp_world_size": 2,
            "param_shapes": [SHAPES],
            "frozen_param_shapes": {"d": (3,)},
            "frozen_param_fragments": {"d": share},
            **changes,
        }
        optimizer = {
            "fp32_flat_groups": [weight],
            "optimizer_state_dict": {"state": {0: {"exp_avg": weight + 100}}},
        }
        ranks.append(zero3_partition(model, optimizer))
    return Partitions(STEP, ranks)


@pytest.mark.parametrize("stage", [two_ranks_of_zero_1, two_ranks_of_zero_3])
@pytest.mark.parametrize("name", SHAPES)
def test_whole_again(stage: Any, name: str) -> None:
    both = stage()
    assert torch.equal(both.join(name, (0, 1)), WHOLE[name])
    assert torch.equal(both.join(name, (0, 1), "exp_avg"), WHOLE[name] + 100)


@pytest.mark.parametrize("stage", [two_ranks_of_zero_1, two_ranks_of_zero_3])
@pytest.mark.parametrize("name", SHAPES)
def test_any_part(stage: Any, name: str) -> None:
    """Every range of a parameter, the empty ones too, within a rank's share and across them."""
    both = stage()
    flat_whole = WHOLE[name].flatten()
    for start in range(len(flat_whole) + 1):
        for stop in range(start, len(flat_whole) + 1):
            assert both.part(name, (0, 1), range(start, stop)).tolist() == flat_whole[start:stop].tolist()


def test_places_of_zero_3() -> None:
    assert counted_pieces([SHAPES], [2]) == {"a": Piece(0, 0, 3), "b": Piece(0, 3, 2), "c": Piece(0, 5, 2)}
    # Each group starts at 0, and may be shared by another number of ranks: two experts' groups of one rank each.
    groups = [{"dense": (5,)}, {"w1": (2, 3), "w2": (1,)}]
    assert counted_pieces(groups, [2, 1]) == {"dense": Piece(0, 0, 3), "w1": Piece(1, 0, 6), "w2": Piece(1, 6, 1)}


def test_only_some_ranks_share_the_experts() -> None:
    """Four ranks, EP 2: ranks 0 and 2 hold the same experts, 1 and 3 the others. One group, w of 3 values."""
    shares = (flat(1, 2), flat(11, 12), flat(3, 0), flat(13, 0))
    ranks = []
    for rank, share in enumerate(shares):
        members = [rank % 2, rank % 2 + 2]
        model = {"dp_world_size": 4, "param_shapes": [{"w": (3,)}]}
        optimizer = {"fp32_flat_groups": [share], "ds_zero_partition_groups": [{"partition_ranks": members}]}
        ranks.append(zero3_partition(model, optimizer))
    four = Partitions(STEP, ranks)
    assert [partition.sharers["w"] for partition in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert four.join("w", ranks[0].sharers["w"]).tolist() == [1, 2, 3]
    assert four.join("w", ranks[1].sharers["w"]).tolist() == [11, 12, 13]


def test_a_frozen_parameter_keeps_its_dtype() -> None:
    both = two_ranks_of_zero_3()
    assert both.ranks[0].sharers["d"] == (0, 1)
    joined = both.join("d", (0, 1))
    assert joined.dtype == torch.bfloat16
    assert joined.tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("numel", range(1, 12))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_cut_and_joined(numel: int, ranks: int) -> None:
    """:func:`share_of` is the inverse of joining, also where the last ranks get nothing but zeros."""
    whole = torch.arange(1.0, numel + 1)
    size = share_size(numel, ranks)
    shares = [share_of(whole, rank, size) for rank in range(ranks)]
    assert {len(share) for share in shares} == {size}
    assert torch.cat(shares)[:numel].tolist() == whole.tolist()
    assert torch.cat(shares)[numel:].abs().sum() == 0


# ------------------------------------------------------------------------------------------------------ planted faults


def test_shares_rounded_down_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "share_size", lambda numel, ranks: numel // ranks)
    with pytest.raises(UserError, match=r"global_step1: a has 4 of 5 values of fp32; the checkpoint is incomplete"):
        two_ranks_of_zero_3().join("a", (0, 1))


def test_shares_one_too_long_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is one value longer than it should be (b: 3 for 2) moves everything after it."""
    monkeypatch.setattr(partitions, "share_size", lambda numel, ranks: numel // ranks + 1)
    both = two_ranks_of_zero_3()
    assert torch.equal(both.join("a", (0, 1)), A), "a is odd, and first"
    assert not torch.equal(both.join("b", (0, 1)), B)
    with pytest.raises(UserError, match="rank 0 saved 7 values where c needs 8; weights offloaded to NVMe"):
        both.join("c", (0, 1))


def test_ranks_in_another_order_are_seen() -> None:
    assert not torch.equal(two_ranks_of_zero_1().join("b", (1, 0)), B)
    assert not torch.equal(two_ranks_of_zero_3().join("b", (1, 0)), B)


def test_a_rank_that_is_missing_is_seen() -> None:
    with pytest.raises(UserError, match="b has 1 of 4 values of fp32; the checkpoint is incomplete"):
        two_ranks_of_zero_1().join("b", (0,))
    with pytest.raises(UserError, match="c has 2 of 3 values of exp_avg"):
        two_ranks_of_zero_3().join("c", (0,), "exp_avg")
