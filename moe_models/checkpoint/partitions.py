"""Where ZeRO keeps each parameter in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Piece:
    """Where one rank keeps its partition of one ZeRO-3 parameter."""

    group: int
    start: int
    numel: int
    partition_ranks: tuple[int, ...]
    shape: tuple[int, ...]


def _index_pieces(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, _Piece]:
    """Where every parameter of one rank lies in its flat groups (ZeRO-3)."""
    world = tuple(range(int(model["dp_world_size"])))
    described = optimizer.get("ds_zero_partition_groups")
    pieces: dict[str, _Piece] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        ranks = tuple(described[group]["partition_ranks"]) if described else world
        start = 0
        for name, shape in shapes.items():
            numel = -(-torch.Size(shape).numel() // len(ranks))  # partitions are padded to equal length
            pieces[name] = _Piece(group, start, numel, ranks, tuple(shape))
            start += numel
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        pieces[name] = _Piece(-1, 0, 0, world, tuple(shape))
    return pieces
