"""A DeepSpeed checkpoint of a pipeline: one ordinary checkpoint for each stage, in one folder.

DeepSpeed numbers stages as it numbers tensor-parallel peers. Stage s has ``mp_rank_<s>_model_states.pt``, the optimizer
states ``zero_pp_rank_<r>_mp_rank_<s>``, and its MoE layers count from 0. ``checkpoint_parallel_dimensions`` in each
file says which of the two they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.from_folder import FolderSource, find_step_folder, stages_in
from moe_models.checkpoint.saved_states import SavedStates
from moe_models.errors import UserError
from moe_models.families.table import Family


def open_folder(checkpoint: Path, family: Family) -> FolderSource | StagesFolder:
    """The tensors of a checkpoint, of one stage or several. Raises UserError as FolderSource does."""
    count = _stages(checkpoint)
    if count == 1:
        return FolderSource(checkpoint, family)
    return StagesFolder(checkpoint, family, count)


def open_states(checkpoint: Path, family: Family) -> SavedStates | StagesStates:
    """Weights and optimizer states of a checkpoint, of one stage or several. Raises UserError as SavedStates does."""
    count = _stages(checkpoint)
    if count == 1:
        return SavedStates(checkpoint, family)
    return StagesStates(checkpoint, family, count)


def _stages(checkpoint: Path) -> int:
    """How many stages wrote it; 1 where the file that says it is not there, for what is missing is told by others."""
    return stages_in(find_step_folder(checkpoint))


class StagesFolder:
    """Tensors of a checkpoint of several stages; see :class:`~moe_models.checkpoint.source.TensorSource`.

    Raises:
        UserError: from ``__init__``, as :class:`~moe_models.checkpoint.from_folder.FolderSource`.
    """

    def __init__(self, checkpoint: Path, family: Family, stages: int) -> None:
        self._parts = [FolderSource(checkpoint, family, stage) for stage in range(stages)]
        self.dtype: torch.dtype = self._parts[0].dtype
        self.spread = False

    def writers(self) -> list[int]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`: one process reads and writes all."""
        return [0]

    def dense(self, name: str) -> torch.Tensor:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError if no stage has the tensor."""
        return _holder(self._parts, name).dense(name)

    def experts(self, path: str, projection: str) -> tuple[torch.Tensor, range]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError if no stage has the block."""
        for part in self._parts:
            if part.holds_block(path):
                return part.experts(path, projection)
        raise KeyError(path)

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        return [name for part in self._parts for name in part.unasked()]


class StagesStates:
    """Weights and optimizer states of a checkpoint of several stages; see
    :class:`~moe_models.checkpoint.saved_states.SavedStates`."""

    tp_size = 1

    def __init__(self, checkpoint: Path, family: Family, stages: int) -> None:
        self._checkpoint = checkpoint
        self._parts = [SavedStates(checkpoint, family, stage) for stage in range(stages)]
        self.counters: dict[str, Any] = self._parts[0].counters
        self.loss_scaler = self._parts[0].loss_scaler

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has counted, on every stage alike."""
        return self._parts[0].optimizer_step

    def dense(self, name: str, key: str) -> torch.Tensor:
        """As of one stage."""
        return self._of(name).dense(name, key)

    def part(self, name: str, key: str, places: range) -> torch.Tensor:
        """As of one stage."""
        return self._of(name).part(name, key, places)

    def shape(self, name: str, key: str) -> torch.Size:
        """As of one stage."""
        return self._of(name).shape(name, key)

    def expert(self, block: str, projection: str, expert: int, key: str) -> torch.Tensor:
        """As of one stage."""
        for part in self._parts:
            if part.weights.holds_block(block):
                return part.expert(block, projection, expert, key)
        raise UserError(f"{self._checkpoint}: no stage holds {block}; it belongs to another model")

    def _of(self, name: str) -> SavedStates:
        """The part that holds a dense tensor."""
        for part in self._parts:
            if part.weights.holds(name):
                return part
        raise UserError(f"{self._checkpoint}: no stage holds {name}; it belongs to another model")


def _holder(parts: list[FolderSource], name: str) -> FolderSource:
    for part in parts:
        if part.holds(name):
            return part
    raise KeyError(name)
