"""Weights and optimizer states of a DeepSpeed checkpoint as whole tensors, whatever layout wrote it.

A checkpoint keeps three fp32 numbers per weight: the master weight and Adam's two moments, in flat partitions of
parameter groups (ZeRO 1 and 2: any fragment of a parameter may lie on any rank; ZeRO-3: an equal share on each).
:class:`SavedStates` puts the partitions of one parameter together when asked for it. Nothing is converted or written;
files are memory-mapped and read as plain tensors (:func:`moe_models.checkpoint.from_folder.load_states`).

Ranks are numbered as they were started: rank r is peer ``r % tp_size`` of data-parallel rank ``r // tp_size``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.from_folder import FolderSource, find_step_folder, load_states
from moe_models.checkpoint.tp_shards import join_saved
from moe_models.config.layout import Layout
from moe_models.errors import UserError
from moe_models.families.table import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, Family

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
"""Master weight, first and second moment."""

WEIGHT = "weight"
"""The key of the weight that the model computes with, which frozen parameters and buffers have, too."""


class SavedStates:
    """See the module. ``dense`` and ``expert`` raise UserError for what the checkpoint does not hold.

    :attr:`counters` are the engine's: ``global_steps``, ``lr_scheduler`` and the like.

    Raises:
        UserError: from ``__init__``, if files are missing or cannot be read as plain tensors.
    """

    def __init__(self, checkpoint: Path, family: Family) -> None:
        self._weights = FolderSource(checkpoint, family)
        self._step = find_step_folder(checkpoint)
        models = sorted(
            (path for path in self._step.glob("*model_states.pt") if "_expert_" not in path.name), key=_numbers_in
        )
        self._models = [load_states(path) for path in models]
        self.counters = {key: value for key, value in self._models[0].items() if key != "module"}
        self.tp_size = int(self.counters.get("mp_world_size") or 1)
        self.world_size = int(self.counters["dp_world_size"]) * self.tp_size
        files = sorted(self._step.glob("*zero_pp_rank_*_optim_states.pt"), key=_numbers_in)
        if len(files) != self.world_size:
            raise UserError(
                f"{self._step}: {len(files)} of {self.world_size} optimizer files are there; the checkpoint is "
                "incomplete, use an earlier one"
            )
        self._optimizers = [load_states(path)["optimizer_state_dict"] for path in files]
        self.zero_stage = int(self._optimizers[0]["zero_stage"])
        # Under ZeRO-3 every rank has model states of its own; before, the file of a TP peer speaks for all its ranks.
        self._shapes = [_shapes(states) for states in self._models] * (self.world_size // len(models))
        self._names = {family.autoep_to_module(name): name for name in self._shapes[0]}
        self._layers = {entry["module_path"]: entry for entry in self.counters.get("ds_autoep_layers") or []}
        self._native = _native_sizes(self._shapes[0])
        self._fragments = [self._fragments_of(rank) for rank in range(self.world_size)]
        self._last: tuple[tuple[str, int, str], torch.Tensor] | None = None

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has counted."""
        return int(self._base(0)["state"][0].get("step", self.counters["global_steps"]))

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's; it matters for fp16 only."""
        return self._optimizers[0].get("loss_scaler")

    def dense(self, name: str, key: str) -> torch.Tensor:
        """The tensor with this module-layout name, whole; fp32 but for the weight."""
        if key == WEIGHT:
            return self._weights.dense(name)
        stored = self._stored(name)
        shards = [self._join(stored, peer, key) for peer in range(self.tp_size)]
        return join_saved(stored, shards, self._models[0])

    def expert(self, block: str, projection: str, expert: int, key: str) -> torch.Tensor:
        """One expert's [F, D] (gate, up) or [D, F] (down); fp32 but for the weight."""
        if key == WEIGHT:
            return self._weights.experts(block, projection)[expert]
        if block in self._layers:
            local = int(self._layers[block]["num_local_experts"])
            stacked = self._cached(f"{block}.experts.{AUTOEP_EXPERT_NAMES[projection]}", expert // local, key)
            return stacked[expert % local]
        if block in self._native:
            local = self._native[block]
            name = f"{block}.{NATIVE_EXPERTS}.{expert % local}.{projection}_proj.weight"
            return self._join(name, expert // local, key)
        if projection == "down":
            return self._cached(self._stored(f"{block}.experts.down_proj"), 0, key)[expert]
        gate_up_2FD = self._cached(self._stored(f"{block}.experts.gate_up_proj"), 0, key)[expert]
        return gate_up_2FD.chunk(2)[0 if projection == "gate" else 1]

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise UserError(
                f"{self._step}: holds no optimizer state of {name}; it was frozen, or belongs to another model"
            )
        return self._names[name]

    def _cached(self, stored: str, ep_rank: int, key: str) -> torch.Tensor:
        """:meth:`_join`, kept until another tensor is asked for: experts are asked for one after the other."""
        what = (stored, ep_rank, key)
        if self._last is None or self._last[0] != what:
            self._last = None  # before the next one is read
            self._last = (what, self._join(stored, ep_rank, key))
        return self._last[1]

    def _join(self, stored: str, rank: int, key: str) -> torch.Tensor:
        """The fragments of all ranks that share this tensor with ``rank``, in the order of ranks."""
        shape = torch.Size(self._shapes[rank][stored])
        parts = []
        for member in self._sharers(stored, rank):
            if stored in self._fragments[member]:
                group, start, numel = self._fragments[member][stored]
                parts.append(self._flat(member, group, key).narrow(0, start, numel))
        flat = torch.cat(parts) if parts else torch.empty(0)
        if flat.numel() < shape.numel():
            raise UserError(
                f"{self._step}: {stored} has {flat.numel()} of {shape.numel()} values of {key}; the checkpoint is "
                "incomplete, or its optimizer states were offloaded to NVMe"
            )
        return flat[: shape.numel()].view(shape)  # ZeRO-3 pads to equal shares

    def _sharers(self, stored: str, rank: int) -> tuple[int, ...]:
        groups = self._optimizers[rank].get("ds_zero_partition_groups")
        if groups:
            return tuple(groups[self._fragments[rank][stored][0]]["partition_ranks"])
        block = re.sub(r"\.(experts\.w[123]|moe\.deepspeed_moe\.experts\..*)$", "", stored)
        ep_size = int(self._layers[block]["ep_size"]) if block in self._layers else 1
        if block in self._native:
            ep_size = self._weights.num_experts(block) // self._native[block]
        if block == stored:
            return tuple(range(rank % self.tp_size, self.world_size, self.tp_size))
        return next(group for group in Layout(self.world_size, ep_size).edp_groups() if rank in group)

    def _base(self, rank: int) -> Mapping[str, Any]:
        name = "optimizer_state_dict" if self.zero_stage == 3 else "base_optimizer_state"
        base: Mapping[str, Any] = self._optimizers[rank][name]
        return base

    def _flat(self, rank: int, group: int, key: str) -> torch.Tensor:
        if key != "fp32":
            moments: torch.Tensor = self._base(rank)["state"][group][key]
            return moments
        name = "fp32_flat_groups" if self.zero_stage == 3 else "single_partition_of_fp32_groups"
        weights: torch.Tensor = self._optimizers[rank][name][group]
        return weights

    def _fragments_of(self, rank: int) -> dict[str, tuple[int, int, int]]:
        """Parameter -> (group, start, number of values) of what ``rank`` keeps of it."""
        optimizer = self._optimizers[rank]
        if self.zero_stage < 3:
            return {
                name: (group, address.start, address.numel)
                for group, mapping in enumerate(optimizer["param_slice_mappings"])
                for name, address in mapping.items()
            }
        found: dict[str, tuple[int, int, int]] = {}
        groups = optimizer.get("ds_zero_partition_groups")
        for group, shapes in enumerate(self._group_shapes(rank)):
            count = len(groups[group]["partition_ranks"]) if groups else self.world_size
            start = 0
            for name, shape in shapes.items():
                numel = -(-torch.Size(shape).numel() // count)
                found[name] = (group, start, numel)
                start += numel
        return found

    def _group_shapes(self, rank: int) -> list[dict[str, tuple[int, ...]]]:
        path = self._step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        shapes: list[dict[str, tuple[int, ...]]] = load_states(path)["param_shapes"]
        return shapes


def _shapes(model_states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for group in model_states["param_shapes"] for name, shape in group.items()}


def _native_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Native block -> experts that each rank holds."""
    sizes: dict[str, int] = {}
    for name in shapes:
        if match := re.fullmatch(rf"(.*)\.{re.escape(NATIVE_EXPERTS)}\.(\d+)\.gate_proj\.weight", name):
            sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1)
    return sizes


def _numbers_in(path: Path) -> tuple[int, int]:
    """Data-parallel rank (0 where one file speaks for all) and number of the tensor-parallel peer."""
    rank, peer = re.search(r"zero_pp_rank_(\d+)_", path.name), re.search(r"mp_rank_(\d+)_", path.name)
    return int(rank[1]) if rank else 0, int(peer[1]) if peer else 0
