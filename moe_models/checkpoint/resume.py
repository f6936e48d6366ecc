"""Going on from a checkpoint of another layout: ranks, ZeRO stage, EP or TP size, AutoEP, native or plain blocks.

DeepSpeed's way is a conversion of the checkpoint (``ds_to_universal``) that its ZeRO-3 loader then cannot read when
ZeRO 1 or 2 wrote it. Here nothing is converted and nothing written: every rank reads the tensors it needs whole, one
after the other (:mod:`moe_models.checkpoint.saved_states`), and keeps the share that the new layout gives it. Master
weights and Adam's moments arrive bit by bit; learning-rate schedule and counters go on. Random numbers are per rank:
ranks that the old run did not have start theirs anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from moe_models.checkpoint.saved_states import KEYS, WEIGHT, SavedStates
from moe_models.checkpoint.tp_shards import own_shard
from moe_models.engine.autoep import autoep_layers
from moe_models.engine.native import native_blocks
from moe_models.errors import UserError
from moe_models.families.table import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, Family
from moe_models.files import read_json

logger = logging.getLogger(__name__)

_PROJECTIONS = {weight: projection for projection, weight in AUTOEP_EXPERT_NAMES.items()}
_NATIVE_EXPERT = re.compile(rf"(.*)\.{re.escape(NATIVE_EXPERTS)}\.(\d+)\.(gate|up|down)_proj\.weight")


def describe_engine(engine: Any) -> dict[str, Any]:
    """What a checkpoint's files depend on; two engines that agree here read each other's."""
    blocks = native_blocks(engine.module)
    autoep = autoep_layers(engine.module)
    ep_sizes = {layer.ep_size for layer in autoep.values()} | {block.moe.ep_size for block in blocks.values()}
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "zero_stage": int(engine.zero_optimization_stage()),
        "experts": "native" if blocks else "autoep" if autoep else "plain",
        "ep_size": max(ep_sizes, default=1),
        "tp_size": max(1, engine.autotp_size()),
        "precision": str(next(p.dtype for p in engine.module.parameters())).removeprefix("torch."),
    }


@contextmanager
def any_layout(family: Family) -> Iterator[None]:
    """In here, HF's Trainer resumes from a checkpoint of any layout; DeepSpeed reads those of its own."""
    from transformers import trainer

    load_own = trainer.deepspeed_load_checkpoint

    def load(engine: Any, checkpoint: str, **options: Any) -> None:
        saved, here = saved_layout(Path(checkpoint)), describe_engine(engine)
        if saved is None or saved == here:
            load_own(engine, checkpoint, **options)
            return
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning("resume: %s was written by another layout (%s); it is read into this one", checkpoint, saved)
        load_other_layout(engine, Path(checkpoint), family)

    trainer.deepspeed_load_checkpoint = load
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = load_own


@torch.no_grad()
def load_other_layout(engine: Any, checkpoint: Path, family: Family) -> None:
    """Load ``checkpoint`` (a ``checkpoint-N`` folder) into an engine of another layout; every rank calls it.

    Raises:
        UserError: the files are damaged or incomplete, a trained parameter has no state in them, or the engine's
            optimizer is none of DeepSpeed's ZeRO 1, 2, 3 over Adam or AdamW in memory.
    """
    states = SavedStates(checkpoint, family)
    shares = _shares_of(engine)
    reader = _Reader(engine.module, family, states)
    for name, parameter in engine.module.named_parameters():
        for key in KEYS if parameter.requires_grad else (WEIGHT,):
            value = own_shard(reader.whole(name, parameter, key), parameter)
            if value.shape != _shape(parameter):
                raise UserError(f"{checkpoint}: {name} has shape {list(value.shape)}, here {list(_shape(parameter))}")
            if key in ("fp32", WEIGHT):
                shares.set_weight(parameter, value)
            if key != WEIGHT:
                shares.set_state(parameter, key, value)
    _set_buffers(engine.module, family, states)
    _set_step(engine.optimizer.optimizer, states.optimizer_step)
    scaler = states.loss_scaler
    if getattr(engine.optimizer, "dynamic_loss_scale", False) and type(scaler) is type(engine.optimizer.loss_scaler):
        engine.optimizer.loss_scaler = scaler
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, states.counters[counter])
    _resume_schedule(engine.lr_scheduler, states.counters.get("lr_scheduler"))


class _Reader:
    """What this rank's parameters are made of: a block's experts may be spread, stacked or fused, here and there."""

    def __init__(self, module: torch.nn.Module, family: Family, states: SavedStates) -> None:
        self._autoep, self._native = autoep_layers(module), native_blocks(module)
        self._family, self._states = family, states

    def whole(self, name: str, parameter: Any, key: str) -> torch.Tensor:
        """What ``name`` stands for on this rank, all of it: with experts that are spread, those of this rank."""
        block, _, rest = name.partition(".experts.")
        if block in self._autoep and rest in _PROJECTIONS:
            E_local = _shape(parameter)[0]
            first = E_local * _ep_rank(self._autoep[block].ep_size, self._autoep[block].ep_group)
            return self._stack(block, _PROJECTIONS[rest], range(first, first + E_local), key)
        if match := _NATIVE_EXPERT.fullmatch(name):
            moe = self._native[match[1]].moe
            expert = int(match[2]) + moe.num_local_experts * _ep_rank(moe.ep_size, moe.deepspeed_moe.ep_group)
            return self._states.expert(match[1], match[3], expert, key)
        if rest == "down_proj":
            return self._stack(block, "down", range(_shape(parameter)[0]), key)
        if rest == "gate_up_proj":
            both = [self._stack(block, projection, range(_shape(parameter)[0]), key) for projection in ("gate", "up")]
            return torch.cat(both, dim=1)
        return self._states.dense(self._family.autoep_to_module(name), key)

    def _stack(self, block: str, projection: str, experts: range, key: str) -> torch.Tensor:
        return torch.stack([self._states.expert(block, projection, expert, key) for expert in experts])


def _set_buffers(module: torch.nn.Module, family: Family, states: SavedStates) -> None:
    kept = module.state_dict()
    for name, buffer in module.named_buffers():
        if name in kept:  # others are computed, not saved
            buffer.copy_(states.dense(family.autoep_to_module(name), WEIGHT))


def _resume_schedule(scheduler: Any, saved: Any) -> None:
    """Go on at the saved step, with the rates of this run's flags."""
    if scheduler is None or saved is None:
        return
    if not isinstance(scheduler, LambdaLR):  # every schedule of HF is one, but reduce_lr_on_plateau
        scheduler.load_state_dict(saved)
        return
    # Its lists have an entry for each parameter group, and layouts differ in their groups.
    scheduler.load_state_dict({k: v for k, v in saved.items() if not isinstance(v, list)} | {"lr_lambdas": []})
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


# -------------------------------------------------------------------------------- the share of this rank, by ZeRO stage


def _shares_of(engine: Any) -> _PartitionedGroups | _PartitionedParameters:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _PartitionedGroups(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.swap_optimizer:
        return _PartitionedParameters(optimizer)
    raise UserError(
        f"resuming from another layout knows ZeRO 1, 2 and 3 with optimizer states in memory, not {type(optimizer)}; "
        "resume with the layout that wrote the checkpoint"
    )


class _PartitionedGroups:
    """ZeRO 1 and 2: each rank has every weight, and the states of a stretch of each group's flat tensor."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        with _moves_nothing(optimizer.optimizer, optimizer.single_partition_of_fp32_groups):
            optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()

    def set_state(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        parameter.set_full_hp_param(value, None if key == "fp32" else key)

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.data.copy_(value)


class _PartitionedParameters:
    """ZeRO-3: each rank has an equal share of every parameter and of its states."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        flats = optimizer.fp32_partitioned_groups_flat
        with _moves_nothing(optimizer.optimizer, flats):
            for sub_group in range(len(flats)):
                optimizer._optimizer_step(sub_group)

    def set_state(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        share, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=None if key == "fp32" else key
        )
        share.copy_(self._share(parameter, value, share.numel()))

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.ds_tensor.copy_(self._share(parameter, value, parameter.ds_tensor.numel()))
        if parameter.data.numel() == value.numel():  # small ones stay whole between steps
            parameter.data.copy_(value)

    def _share(self, parameter: Any, value: torch.Tensor, numel: int) -> torch.Tensor:
        """This rank's values; the last share is filled up with zeros."""
        start = numel * self._optimizer._get_param_partition_rank(parameter)
        mine = value.flatten()[start : start + numel]
        return torch.nn.functional.pad(mine, (0, numel - mine.numel()))


@contextmanager
def _moves_nothing(optimizer: Any, flats: list[torch.Tensor]) -> Iterator[None]:
    """Adam makes its states in the first step; a step in here makes them and changes no weight."""
    gradients, rates = [flat.grad for flat in flats], [group["lr"] for group in optimizer.param_groups]
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for flat, gradient in zip(flats, gradients, strict=True):
        flat.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _set_step(optimizer: Any, step: int) -> None:
    """torch's Adam counts in a tensor for each state, DeepSpeed's in a number, for some in the group."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def _ep_rank(ep_size: int, group: Any) -> int:
    return dist.get_rank(group) if ep_size > 1 else 0


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


LAYOUT_FILE = "layout.json"
"""In a checkpoint folder: the layout that wrote it."""


def saved_layout(checkpoint: str | Path) -> dict[str, Any] | None:
    """The layout that wrote ``checkpoint``; None where it is not said."""
    file = Path(checkpoint) / LAYOUT_FILE
    return {"tp_size": 1, **read_json(file)} if file.is_file() else None
