"""Tensors of a live engine with pipeline stages, sent to rank 0 by the stage that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_models.checkpoint.from_engine import EngineSource
from moe_models.checkpoint.source import fingerprint, fingerprints, is_writer
from moe_models.engine.blocks import Block, parameter_names
from moe_models.families.table import EXPERT_PROJECTIONS, Family

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HeldBlock:
    """What rank 0 knows of an MoE block."""

    owners: tuple[int, ...]
    """The ranks that hold one copy of its experts together, in the order of experts."""
    shapes: dict[str, Shape]
    """Projection -> shape of one rank's experts, [E_local, F, D] or [E_local, D, F]."""
    names: dict[str, list[str]]
    """Projection -> names of the parameters that hold it."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the first rank of a stage tells the others of its stage."""

    rank: int
    tensors: dict[str, tuple[Shape, torch.dtype]]
    blocks: dict[str, HeldBlock]
    unasked: list[str]


class StagesSource(EngineSource):
    """Tensors of an engine whose layers are in stages; every rank must make the same calls in the same order.

    The first rank of each stage, and those that share its experts, send to rank 0, which writes alone. Fingerprints are
    taken where a tensor is held, before it travels, as in :class:`~moe_models.checkpoint.from_engine.EngineSource`.
    """

    def __init__(self, engine: Any, family: Family) -> None:
        super().__init__(engine, family)
        self._device = next(engine.module.parameters()).device
        # 1. The first rank of each stage says what its stage has.
        mine = None
        if engine.grid.get_data_parallel_rank() == 0:
            mine = self._describe()
        told: list[Held | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine)
        # 2. Who has what, by name. Buffers that every stage has are asked of the first.
        self._holders: dict[str, tuple[int, Shape, torch.dtype]] = {}
        self._all_blocks: dict[str, HeldBlock] = {}
        self._unasked = {}
        for held in told:
            if held is None:
                continue
            for name, (shape, dtype) in held.tensors.items():
                self._holders.setdefault(name, (held.rank, shape, dtype))
            self._all_blocks.update(held.blocks)
            self._unasked.update(dict.fromkeys(held.unasked))

    def _describe(self) -> Held:
        blocks = {path: self._describe_block(block) for path, block in self._blocks.items()}
        tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        return Held(rank=dist.get_rank(), tensors=tensors, blocks=blocks, unasked=list(self._unasked))

    @staticmethod
    def _describe_block(block: Block) -> HeldBlock:
        owners = [dist.get_rank()]
        if block.ep_group is not None:
            owners = dist.get_process_group_ranks(block.ep_group)
        return HeldBlock(
            owners=tuple(owners),
            shapes={projection: tuple(block.experts(projection).shape) for projection in EXPERT_PROJECTIONS},
            names={projection: parameter_names(block, projection) for projection in EXPERT_PROJECTIONS},
        )

    def writers(self) -> list[int]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`: rank 0, to which all stages send."""
        return [0]

    def dense(self, name: str) -> torch.Tensor | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError, on every rank, for an unknown
        name."""
        holder, shape, dtype = self._holders[name]
        self._unasked.pop(name, None)
        # 1. The holder takes the fingerprint, and sends both.
        if dist.get_rank() == holder:
            tensor = self._tensors[name].detach()
            whole = tensor.to("cpu", copy=True)
            value = fingerprint(whole)
            if not is_writer():
                dist.send(tensor.contiguous(), dst=0)
                dist.send(torch.tensor([value], device=self._device), dst=0)
        # 2. The writer keeps them.
        if not is_writer():
            return None
        if holder != 0:
            whole = self._received(shape, dtype, holder).cpu()
            value = int(self._received((1,), torch.int64, holder).item())
        self.fingerprints[name] = value
        return whole

    def experts(self, path: str, projection: str) -> tuple[torch.Tensor, range] | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError, on every rank, for a module that
        is no MoE block."""
        block = self._all_blocks[path]
        for name in block.names[projection]:
            self._unasked.pop(name, None)
        # 1. Each owner takes the fingerprints of its own experts, and sends both.
        if dist.get_rank() in block.owners:
            local = self._blocks[path].experts(projection).contiguous()
            held = local.to("cpu")
            prints = torch.tensor(fingerprints(held), device=self._device)
            if not is_writer():
                dist.send(local, dst=0)
                dist.send(prints, dst=0)
        if not is_writer():
            return None
        # 2. The writer puts them in the order of experts.
        E_local, *matrix = block.shapes[projection]
        count = E_local * len(block.owners)
        stacked = torch.empty((count, *matrix), dtype=self.dtype)
        all_prints = torch.empty(count, dtype=torch.int64)
        for place, owner in enumerate(block.owners):
            here = slice(place * E_local, (place + 1) * E_local)
            if owner == 0:
                stacked[here] = held
                all_prints[here] = prints.cpu()
            else:
                stacked[here] = self._received((E_local, *matrix), self.dtype, owner).cpu()
                all_prints[here] = self._received((E_local,), torch.int64, owner).cpu()
        for expert, value in enumerate(all_prints.tolist()):
            self.fingerprints[f"{path}.experts.{expert}.{projection}"] = value
        return stacked, range(count)

    def _received(self, shape: Shape, dtype: torch.dtype, source: int) -> torch.Tensor:
        received = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(received, src=source)
        return received
