"""Weights and optimizer states of a DeepSpeed checkpoint as whole tensors, whatever layout wrote it.

A checkpoint keeps three fp32 numbers for each weight: the master weight and Adam's two moments, cut into partitions
(:mod:`moe_models.checkpoint.partitions`). :class:`SavedStates` puts the partitions of one parameter together when asked
for it, or reads a part of it out of the partitions that hold it. Nothing is converted or written; files are
memory-mapped and read as plain tensors (:func:`moe_models.checkpoint.from_folder.load_states`).

Ranks are numbered as they were started: rank r is tensor-parallel peer ``r % tp_size`` of data-parallel rank
``r // tp_size``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.from_folder import FolderSource, expert_places, find_step_folder, load_states, stages_in
from moe_models.checkpoint.partitions import (
    MASTER_WEIGHT,
    Partition,
    Partitions,
    zero3_partition,
    zero12_partition,
)
from moe_models.checkpoint.tp_shards import join_saved
from moe_models.config.layout import Layout
from moe_models.engine.blocks import plain_parameter
from moe_models.errors import UserError
from moe_models.families.table import Family

KEYS = (MASTER_WEIGHT, "exp_avg", "exp_avg_sq")
"""Master weight, first and second moment."""

WEIGHT = "weight"
"""The key of the weight that the model computes with, which frozen parameters and buffers have, too."""


class TrainedStates:
    """What the ranks of a checkpoint trained: partitions, and which ranks share one.

    :attr:`counters` are the engine's: ``global_steps``, ``lr_scheduler`` and the like. :attr:`loss_scaler` is
    DeepSpeed's; it matters for fp16 only. Of a pipeline it has one ``stage``, whose ranks count from 0.

    Raises:
        UserError: from ``__init__``, if files are missing or cannot be read as plain tensors.
    """

    def __init__(self, checkpoint: Path, family: Family, stage: int = 0) -> None:
        # 1. The engine's counters, and how many ranks there were.
        self._step = find_step_folder(checkpoint)
        only: int | None = None
        if stages_in(self._step) > 1:
            only = stage
        self._models = _load_models(self._step, only)
        self.counters = {key: value for key, value in self._models[0].items() if key != "module"}
        self.tp_size = 1
        if only is None:
            self.tp_size = int(self.counters.get("mp_world_size") or 1)
        self.world_size = int(self.counters["dp_world_size"]) * self.tp_size
        # 2. The optimizer states of every rank, and where each parameter is in them.
        optimizers = _load_optimizers(self._step, self.world_size, only)
        self.loss_scaler = optimizers[0].get("loss_scaler")
        self._partitions = Partitions(self._step, _partitions_of(self._models, optimizers))
        # 3. Module name -> stored name of every trained tensor.
        first = self._partitions.ranks[0]
        trained = [name for name in first.shapes if name not in first.frozen]
        self._names = {family.autoep_to_module(name): name for name in trained}

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has counted."""
        return int(self._partitions.ranks[0].states[0].get("step", self.counters["global_steps"]))

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise UserError(
                f"{self._step}: holds no optimizer state of {name}; it was frozen, or belongs to another model"
            )
        return self._names[name]

    def _replicas_of(self, stored: str, peer: int) -> Sequence[int]:
        """The ranks that share a dense parameter with tensor-parallel peer ``peer``."""
        known = self._partitions.ranks[peer].sharers
        return known.get(stored, range(peer, self.world_size, self.tp_size))

    def _holders_of(self, stored: str, ep_rank: int, ep_size: int) -> Sequence[int]:
        """The ranks that hold the same experts as rank ``ep_rank``: its group of expert data parallelism."""
        known = self._partitions.ranks[ep_rank].sharers
        if stored in known:
            return known[stored]
        groups = Layout(self.world_size, ep_size).edp_groups()
        return next(group for group in groups if ep_rank in group)


class SavedStates(TrainedStates):
    """See the module. ``dense`` and ``expert`` raise UserError for what the checkpoint does not hold."""

    def __init__(self, checkpoint: Path, family: Family, stage: int = 0) -> None:
        # The weights that the model computes with, and which experts each rank held.
        self.weights = FolderSource(checkpoint, family, stage)
        self._blocks = self.weights.blocks
        super().__init__(checkpoint, family, stage)

    def dense(self, name: str, key: str) -> torch.Tensor:
        """The tensor with this module-layout name, whole; fp32 but for the weight."""
        if key == WEIGHT:
            return self.weights.dense(name)
        stored = self._stored(name)
        shards = []
        for peer in range(self.tp_size):
            shards.append(self._partitions.join(stored, self._replicas_of(stored, peer), key))
        return join_saved(stored, shards, self._models[0])

    def expert(self, block: str, projection: str, expert: int, key: str) -> torch.Tensor:
        """One expert's [F, D] (gate, up) or [D, F] (down); fp32 but for the weight.

        ``block`` is the module path; ``expert`` counts from 0 to E - 1.
        """
        if key == WEIGHT:
            return self.weights.expert(block, projection, expert)
        saved = self._blocks.get(block)
        if saved is None:  # Hugging Face's own: all experts in one tensor
            name = plain_parameter(block, projection)
            places, shape = expert_places(self.shape(name, key), expert, projection)
            return self.part(name, key, places).view(shape)
        # Experts are dealt in equal runs to neighbouring ranks, so the EP rank is the rank in the first EP group.
        ep_rank, local = divmod(expert, saved.E_local)
        stored = self._stored(saved.parameter(projection, local))
        holders = self._holders_of(stored, ep_rank, saved.ep_size)
        shape = torch.Size(self._partitions.ranks[ep_rank].shapes[stored])
        if saved.kind == "native":  # a tensor for each expert
            return self._partitions.join(stored, holders, key)
        matrix = shape[1:]
        places = range(local * matrix.numel(), (local + 1) * matrix.numel())
        return self._partitions.part(stored, holders, places, key).view(matrix)

    def part(self, name: str, key: str, places: range) -> torch.Tensor:
        """The values at ``places`` of a flattened dense tensor, [N]. Not of a checkpoint with tensor parallelism."""
        if key == WEIGHT:
            return self.weights.part(name, places)
        stored = self._stored(name)
        return self._partitions.part(stored, self._replicas_of(stored, 0), places, key)

    def shape(self, name: str, key: str) -> torch.Size:
        """The shape of a dense tensor. Not of a checkpoint with tensor parallelism."""
        if key == WEIGHT:
            return self.weights.shape(name)
        return torch.Size(self._partitions.ranks[0].shapes[self._stored(name)])


def _load_models(step: Path, stage: int | None) -> list[dict[str, Any]]:
    """The model states: of each tensor-parallel peer, of each rank under ZeRO-3, or of one ``stage`` of a pipeline."""
    files = [path for path in step.glob("*model_states.pt") if "_expert_" not in path.name]
    return [load_states(path) for path in sorted(_of_stage(files, stage), key=_numbers_in)]


def _load_optimizers(step: Path, world_size: int, stage: int | None) -> list[dict[str, Any]]:
    """The optimizer states of each rank, or of each rank of one ``stage`` of a pipeline."""
    files = sorted(_of_stage(step.glob("*zero_pp_rank_*_optim_states.pt"), stage), key=_numbers_in)
    if len(files) != world_size:
        raise UserError(
            f"{step}: {len(files)} of {world_size} optimizer files are there; the checkpoint is incomplete, use an "
            "earlier one"
        )
    return [load_states(path)["optimizer_state_dict"] for path in files]


def _partitions_of(models: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]) -> list[Partition]:
    """The partition of each rank."""
    if int(optimizers[0]["zero_stage"]) == 3:
        return [zero3_partition(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    # One file of model states speaks for all ranks of a tensor-parallel peer.
    partitions = []
    for rank, optimizer in enumerate(optimizers):
        partitions.append(zero12_partition(models[rank % len(models)], optimizer))
    return partitions


def _of_stage(files: Iterable[Path], stage: int | None) -> list[Path]:
    """Those of one stage of a pipeline, which DeepSpeed numbers like tensor-parallel peers; None: all."""
    return [path for path in files if stage is None or _number_after("mp_rank_", path.name) == stage]


def _numbers_in(path: Path) -> tuple[int, int]:
    """Data-parallel rank (0 where one file speaks for all) and number of the tensor-parallel peer."""
    return _number_after("zero_pp_rank_", path.name), _number_after("mp_rank_", path.name)


def _number_after(word: str, name: str) -> int:
    match = re.search(rf"{word}(\d+)_", name)
    if match is None:
        return 0
    return int(match[1])
