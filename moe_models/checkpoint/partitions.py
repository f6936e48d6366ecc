"""Where ZeRO keeps each parameter in the optimizer files of a checkpoint; the only place that knows the arithmetic.

Every rank has one file, and in it flat fp32 tensors, one for each parameter group: the master weights and Adam's two
moments of the values that this rank owns.

ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole into one stretch for each rank. A cut may go
through a parameter. DeepSpeed writes down what each rank holds (``param_slice_mappings``). Two ranks, parameters a (5
values), b (4) and c (3)::

    rank 0: a0 a1 a2 a3 a4 b0      a: start 0, 5 values; b: start 5, 1 value
    rank 1: b1 b2 b3 c0 c1 c2      b: start 0, 3 values; c: start 3, 3 values

ZeRO-3 cuts every parameter by itself into equal shares and fills the last share up with zeros. A rank's flat tensor has
its shares end to end. DeepSpeed writes down the shapes only (``param_shapes``), so the places are counted::

    rank 0: a0 a1 a2 b0 b1 c0 c1   a: start 0, 3 values; b: start 3, 2 values; c: start 5, 2 values
    rank 1: a3 a4 0  b2 b3 c2 0    the same places

Either way the values of all ranks that share a parameter, in the order of ranks and without the zeros at the end, are
the parameter. :meth:`Partitions.join` puts them together, :meth:`Partitions.part` reads some of them, and
:func:`share_of` cuts a ZeRO-3 share out of a parameter.

The experts of AutoEP and native layers are shared only by the ranks that hold the same experts.
Source: deepspeed 0.19.8, ``runtime/zero/stage_1_and_2.py`` (``_create_param_mapping``) and ``runtime/zero/stage3.py``
(``_rigid_state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_models.errors import UserError

MASTER_WEIGHT = "fp32"
"""The key of the master weights; the other keys are those of the optimizer's own states, ``exp_avg`` for one."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """The values [start, start + numel) of the flat tensor of one group: what one rank holds of one parameter."""

    group: int
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What one rank's files hold of the parameters."""

    shapes: Mapping[str, Shape]
    """Parameter -> its shape on this rank before ZeRO cut it (for experts that are spread: those of this rank)."""
    pieces: Mapping[str, Piece]
    """Trained parameter -> its place; a parameter of which this rank holds nothing is not in here."""
    weights: Sequence[torch.Tensor]
    """The flat master weights of each group, [N]."""
    states: Mapping[int, Mapping[str, torch.Tensor]]
    """Group -> the optimizer's flat states by key, [N]."""
    sharers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter -> the ranks that share it, in order. ZeRO 1 and 2 do not say it, so it is empty there."""
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """ZeRO-3: parameter that is not trained -> this rank's share of it, [N], in the dtype of the model."""

    def holds(self, name: str) -> bool:
        """Whether this rank has values of parameter ``name``."""
        return name in self.pieces or name in self.frozen


class Partitions:
    """The partitions of all ranks of one checkpoint.

    Ranks are numbered as they were started. ``folder`` is the step folder, for messages.
    """

    def __init__(self, folder: Path, ranks: Sequence[Partition]) -> None:
        self.folder = folder
        self.ranks = ranks

    def values(self, rank: int, name: str, key: str = MASTER_WEIGHT) -> torch.Tensor:
        """The values of parameter ``name`` that ``rank`` holds, [numel], a view of its file.

        Raises KeyError if it holds none, and UserError if its flat tensor is too short for them.
        """
        partition = self.ranks[rank]
        if name in partition.frozen:
            return partition.frozen[name].flatten()
        piece = partition.pieces[name]
        if key == MASTER_WEIGHT:
            flat = partition.weights[piece.group]
        else:
            flat = partition.states[piece.group][key]
        end = piece.start + piece.numel
        if flat.numel() < end:
            raise UserError(
                f"{self.folder}: rank {rank} saved {flat.numel()} values where {name} needs {end}; weights offloaded "
                "to NVMe are not part of a checkpoint"
            )
        return flat.narrow(0, piece.start, piece.numel)

    def join(self, name: str, sharers: Sequence[int], key: str = MASTER_WEIGHT) -> torch.Tensor:
        """The whole parameter out of the values that ``sharers`` hold (for spread experts: those of one EP rank).

        Raises UserError if values are missing.
        """
        shape = torch.Size(self.ranks[sharers[0]].shapes[name])
        return self.part(name, sharers, range(shape.numel()), key).view(shape)

    def part(self, name: str, sharers: Sequence[int], places: range, key: str = MASTER_WEIGHT) -> torch.Tensor:
        """The values at ``places`` of the flattened parameter, [N]; nothing else is read.

        Raises UserError if any values of the parameter are missing.
        """
        # 1. The values of all ranks that have some, in the order of ranks. They are views: nothing is read yet.
        parts = [self.values(rank, name, key) for rank in sharers if self.ranks[rank].holds(name)]
        numel = torch.Size(self.ranks[sharers[0]].shapes[name]).numel()
        found = sum(part.numel() for part in parts)
        if not parts or found < numel:
            raise UserError(
                f"{self.folder}: {name} has {found} of {numel} values of {key}; the checkpoint is incomplete, "
                "or its optimizer states were offloaded to NVMe"
            )
        # 2. What of each part is asked for. The zeros that fill up the last share under ZeRO-3 never are.
        wanted = []
        first = 0
        for part in parts:
            start = max(places.start - first, 0)
            stop = min(places.stop - first, part.numel())
            if start < stop:
                wanted.append(part[start:stop])
            first += part.numel()
        if not wanted:
            return parts[0].new_empty(0)
        return torch.cat(wanted)


def zero12_partition(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Partition:
    """One rank of ZeRO 1 or 2, from its model and optimizer states."""
    return Partition(
        shapes=_merged(model["param_shapes"]),
        pieces=sliced_pieces(optimizer["param_slice_mappings"]),
        weights=optimizer["single_partition_of_fp32_groups"],
        states=optimizer["base_optimizer_state"]["state"],
    )


def zero3_partition(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Partition:
    """One rank of ZeRO-3, from its model and optimizer states."""
    world = tuple(range(int(model["dp_world_size"])))
    groups: list[Mapping[str, Shape]] = model["param_shapes"]
    # 1. The ranks that share each group. DeepSpeed names them only where AutoEP's experts are shared by fewer than all.
    described = optimizer.get("ds_zero_partition_groups")
    if described:
        ranks = [tuple(group["partition_ranks"]) for group in described]
    else:
        ranks = [world] * len(groups)
    sharers = {name: ranks[group] for group, shapes in enumerate(groups) for name in shapes}
    # 2. Parameters that are not trained have no optimizer states; their shares are in the model states.
    frozen_shapes: Mapping[str, Shape] = model.get("frozen_param_shapes") or {}
    sharers.update(dict.fromkeys(frozen_shapes, world))
    return Partition(
        shapes=_merged([*groups, frozen_shapes]),
        pieces=counted_pieces(groups, [len(members) for members in ranks]),
        weights=optimizer["fp32_flat_groups"],
        states=optimizer.get("optimizer_state_dict", {}).get("state", {}),
        sharers=sharers,
        frozen=model.get("frozen_param_fragments") or {},
    )


def sliced_pieces(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Piece]:
    """The places that DeepSpeed wrote down for one rank of ZeRO 1 or 2, one mapping for each group."""
    pieces = {}
    for group, mapping in enumerate(mappings):
        for name, address in mapping.items():
            pieces[name] = Piece(group, address.start, address.numel)
    return pieces


def counted_pieces(groups: Sequence[Mapping[str, Shape]], sharers: Sequence[int]) -> dict[str, Piece]:
    """The places of ZeRO-3, the same on every rank.

    Args:
        groups: the shapes of each group's parameters, in the order of its flat tensor.
        sharers: how many ranks share each group.
    """
    pieces = {}
    for group, (shapes, ranks) in enumerate(zip(groups, sharers, strict=True)):
        start = 0
        for name, shape in shapes.items():
            numel = share_size(torch.Size(shape).numel(), ranks)
            pieces[name] = Piece(group, start, numel)
            start += numel
    return pieces


def share_size(numel: int, ranks: int) -> int:
    """Values in each rank's share of a parameter under ZeRO-3: equal on all ranks, so rounded up."""
    return -(-numel // ranks)


def share_of(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The share of the ``rank``-th of the sharing ranks under ZeRO-3: [size] values, filled up with zeros."""
    mine = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def _merged(groups: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    return {name: tuple(shape) for group in groups for name, shape in group.items()}
