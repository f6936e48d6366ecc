"""Going on from a checkpoint of another layout: ranks, ZeRO stage, EP or TP size, AutoEP, native or plain blocks.

DeepSpeed's way is to convert the checkpoint (``ds_to_universal``); its ZeRO-3 loader then cannot read what ZeRO 1 or 2
wrote. Here nothing is converted and nothing written. Every rank reads the tensors that it needs one after the other
(:mod:`moe_models.checkpoint.saved_states`) and keeps the share that the new layout gives it. Under ZeRO-3 it reads that
share only. Master weights and
Adam's moments arrive bit by bit; learning-rate schedule and counters go on. Random numbers are per rank: ranks that the
old run did not have start theirs anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from moe_models.checkpoint.adapter_states import AdapterStates
from moe_models.checkpoint.from_folder import find_step_folder, load_states
from moe_models.checkpoint.from_stages import StagesStates, open_folder, open_states
from moe_models.checkpoint.partitions import MASTER_WEIGHT, share_of
from moe_models.checkpoint.saved_states import KEYS, WEIGHT, SavedStates, TrainedStates
from moe_models.checkpoint.source import is_writer
from moe_models.checkpoint.tp_shards import own_shard, split_dimension
from moe_models.engine.blocks import ExpertParameter, find_blocks, whole_shape
from moe_models.engine.lora import adapter_facts, checkpoints_of_trained_tensors, is_adapted, weights_from_masters
from moe_models.engine.pipeline.cut import stage_held
from moe_models.engine.plain_checkpoints import reads_with
from moe_models.errors import Problems, UserError
from moe_models.families.table import Family
from moe_models.files import read_json
from moe_models.preflight.adapters import (
    ADAPTER_WEIGHTS,
    ADAPTERS,
    LAYOUT_FILE,
    adapter_resume_problems,
)

logger = logging.getLogger(__name__)


def describe_engine(engine: Any) -> dict[str, Any]:
    """What a checkpoint's files depend on; two engines that agree here read each other's."""
    blocks = find_blocks(engine.module)
    kinds = {block.kind for block in blocks}
    if "native" in kinds:
        experts = "native"
    elif "autoep" in kinds:
        experts = "autoep"
    else:
        experts = "plain"
    world_size = 1
    if dist.is_initialized():
        world_size = dist.get_world_size()
    precision = next(p.dtype for p in engine.module.parameters())
    description: dict[str, Any] = {
        "world_size": world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "experts": experts,
        "ep_size": max((block.ep_size for block in blocks), default=1),
        "tp_size": max(1, engine.autotp_size()),
        "pp_size": 1,
        "precision": str(precision).removeprefix("torch."),
    }
    stage = stage_held(engine)
    if stage is not None:
        description["pp_size"] = stage.count
        description["pp_bounds"] = list(stage.bounds)
    if is_adapted(engine.module):
        description[ADAPTERS] = adapter_facts(engine)
    return description


@contextmanager
def any_layout(family: Family, before_loading: Callable[[Any], None] | None = None) -> Iterator[None]:
    """In here, HF's Trainer resumes from a checkpoint of any layout; DeepSpeed reads those of its own.

    ``before_loading`` is called with the engine before its weights are replaced.

    Every file is read as plain tensors, mapped from the disk. Raises UserError, the same on every rank and before a
    weight is read, if one of them is missing, damaged, or would execute code.
    """
    from transformers import trainer

    load_own = trainer.deepspeed_load_checkpoint

    def load(engine: Any, checkpoint: str, **options: Any) -> None:
        saved = saved_layout(checkpoint)
        require_readable(Path(checkpoint), family, saved)
        here = describe_engine(engine)
        adapters = here.get(ADAPTERS)
        Problems(adapter_resume_problems(checkpoint, saved, adapters)).refuse()
        if before_loading is not None:
            before_loading(engine)
        if adapters is not None and saved == here:
            with reads_with(engine, load_states), checkpoints_of_trained_tensors(engine):
                load_own(engine, checkpoint, **options)
            weights_from_masters(engine)
            return
        if saved is None or saved == here:
            with reads_with(engine, load_states):
                load_own(engine, checkpoint, **options)
            return
        if is_writer():
            logger.warning("resume: %s was written by another layout (%s); it is read into this one", checkpoint, saved)
        if adapters is not None:
            load_adapter_of_other_layout(engine, Path(checkpoint), family, saved)
            return
        load_other_layout(engine, Path(checkpoint), family)

    # upstream: transformers 5.20.2, deepspeed 0.19.8: Trainer.train calls this function, which has no hook and hands
    # the folder to DeepSpeed's engine, which cannot read another layout. Remove when: the engine loads any layout.
    trainer.deepspeed_load_checkpoint = load
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = load_own


def require_readable(checkpoint: Path, family: Family, saved: dict[str, Any] | None) -> None:
    """Raise UserError on every rank if a file of the checkpoint is missing, damaged or would execute code; collective.

    Args:
        checkpoint: the ``checkpoint-N`` folder.
        family: the model's row.
        saved: the layout that wrote it, if the folder says it.
    """
    problems = Problems()
    rank = 0
    ranks = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        ranks = dist.get_world_size()
    # 1. Each rank opens some of the files. Tensors are mapped, so this reads what describes them only.
    with problems.note():
        files = sorted(find_step_folder(checkpoint).glob("*.pt"))
        for file in files[rank::ranks]:
            with problems.note():
                load_states(file)
    # 2. What is not there, nothing can open.
    if is_writer() and not problems.lines:
        with problems.note():
            _require_all_files(checkpoint, family, saved)
    # 3. One rank's finding ends all of them.
    if ranks > 1:
        found: list[list[str]] = [[] for _ in range(ranks)]
        dist.all_gather_object(found, problems.lines)
        told = [line for lines in found for line in lines]
        problems = Problems(dict.fromkeys(told))
    problems.refuse()


def _require_all_files(checkpoint: Path, family: Family, saved: dict[str, Any] | None) -> None:
    """Raise UserError if a rank's file is missing, or that of an expert."""
    if saved is None:
        return
    step = find_step_folder(checkpoint)
    kinds = []
    if ADAPTERS in saved:
        if not (checkpoint / ADAPTER_WEIGHTS).exists():
            raise UserError(f"{checkpoint}: holds no {ADAPTER_WEIGHTS}; it is incomplete, use an earlier one")
    elif saved["zero_stage"] < 3:
        open_folder(checkpoint, family)
    else:
        kinds.append("model")
    if saved["zero_stage"] > 0:
        kinds.append("optim")
    for kind in kinds:
        found = len(list(step.glob(f"*zero_pp_rank_*_{kind}_states.pt")))
        if found != saved["world_size"]:
            raise UserError(
                f"{step}: {found} of {saved['world_size']} files *_{kind}_states.pt are there; the checkpoint is "
                "incomplete, use an earlier one"
            )


@torch.no_grad()
def load_other_layout(engine: Any, checkpoint: Path, family: Family) -> None:
    """Load ``checkpoint`` (a ``checkpoint-N`` folder) into an engine of another layout; every rank calls it.

    Raises:
        UserError: the files are damaged or incomplete, a trained parameter has no state in them, or the engine's
            optimizer is none of DeepSpeed's ZeRO 1, 2, 3 over Adam or AdamW in memory.
    """
    states = open_states(checkpoint, family)
    shares = _shares_of(engine)
    reader = _Reader(engine.module, family, states)
    # 1. Weights and moments: read what this rank keeps, one tensor after the other.
    for name, parameter in engine.module.named_parameters():
        keys: tuple[str, ...] = (WEIGHT,)
        if parameter.requires_grad:
            keys = KEYS
        places = shares.places(parameter)
        if states.tp_size > 1 or split_dimension(parameter) is not None:
            places = None
        for key in keys:
            if places is not None:
                value, shape = reader.part(name, key, places, whole_shape(parameter))
            else:
                value = own_shard(reader.whole(name, key), parameter)
                shape = value.shape
            if shape != whole_shape(parameter):
                raise UserError(f"{checkpoint}: {name} has shape {list(shape)}, here {list(whole_shape(parameter))}")
            if key in (MASTER_WEIGHT, WEIGHT):
                shares.set_weight(parameter, value)
            if key != WEIGHT:
                shares.set_state(parameter, key, value)
    # 2. Buffers that are part of the model, DeepSeek-V3's selection bias for one.
    _set_buffers(engine.module, family, states)
    _resume_counters(engine, states)


@torch.no_grad()
def load_adapter_of_other_layout(engine: Any, checkpoint: Path, family: Family, saved: dict[str, Any]) -> None:
    """:func:`load_other_layout` of a run that trains an adapter; what is frozen came with the base model.

    ``saved`` is the layout that wrote the checkpoint. Raises UserError as there.
    """
    states = AdapterStates(checkpoint, family, saved, engine.module)
    shares = _shares_of(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in KEYS:
            value = states.whole(name, key)
            if value.shape != whole_shape(parameter):
                raise UserError(
                    f"{checkpoint}: {name} has shape {list(value.shape)}, here {list(whole_shape(parameter))}"
                )
            if key == MASTER_WEIGHT:
                shares.set_weight(parameter, value)
            shares.set_state(parameter, key, value)
    _resume_counters(engine, states)


def _resume_counters(engine: Any, states: TrainedStates | StagesStates) -> None:
    """What is counted: by Adam, by the loss scaler of fp16, by the engine and by the schedule."""
    _set_step(engine.optimizer.optimizer, states.optimizer_step)
    scaler = states.loss_scaler
    if getattr(engine.optimizer, "dynamic_loss_scale", False) and type(scaler) is type(engine.optimizer.loss_scaler):
        engine.optimizer.loss_scaler = scaler
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, states.counters[counter])
    _resume_schedule(engine.lr_scheduler, states.counters.get("lr_scheduler"))


class _Reader:
    """What this rank's parameters are made of: a block's experts may be spread, stacked or fused, here and there."""

    def __init__(self, module: torch.nn.Module, family: Family, states: SavedStates | StagesStates) -> None:
        self._family = family
        self._states = states
        # A tied head that has a pipeline stage of its own.
        self._saved_as: dict[str, str] = getattr(module, "saved_as", {})
        self._experts: dict[str, tuple[str, ExpertParameter]] = {}
        for block in find_blocks(module):
            for parameter in block.parameters():
                self._experts[parameter.name] = (block.path, parameter)

    def whole(self, name: str, key: str) -> torch.Tensor:
        """What parameter ``name`` stands for on this rank, all of it: with experts that are spread, those of this
        rank."""
        if name not in self._experts:
            return self._states.dense(self._module_name(name), key)
        path, parameter = self._experts[name]
        return self._built(path, parameter, key)

    def part(self, name: str, key: str, places: range, here: torch.Size) -> tuple[torch.Tensor, torch.Size]:
        """The values at ``places`` of the flattened parameter, [N], and the shape that it has in the checkpoint.

        ``here`` is its shape in the engine. Of experts those are read that have values at ``places``.
        """
        if name not in self._experts:
            module_name = self._module_name(name)
            return self._states.part(module_name, key, places), self._states.shape(module_name, key)
        path, parameter = self._experts[name]
        # 1. Which of the parameter's experts have values there.
        each = here[1:].numel()
        first = places.start // each
        last = -(-places.stop // each)
        if not places:
            return torch.empty(0), here
        # 2. These experts, and what of them is asked for.
        some = replace(parameter, experts=parameter.experts[first:last])
        built = self._built(path, some, key)
        shape = torch.Size((here[0], *built.shape[1:]))
        start = places.start - first * each
        return built.flatten()[start : start + len(places)], shape

    def _module_name(self, name: str) -> str:
        return self._saved_as.get(name) or self._family.autoep_to_module(name)

    def _built(self, path: str, parameter: ExpertParameter, key: str) -> torch.Tensor:
        def read(projection: str, expert: int) -> torch.Tensor:
            return self._states.expert(path, projection, expert, key)

        return parameter.build(read)


def _set_buffers(module: torch.nn.Module, family: Family, states: SavedStates | StagesStates) -> None:
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
    # 1. The counters. Lists have an entry for each parameter group, and layouts differ in their groups.
    counters = {key: value for key, value in saved.items() if not isinstance(value, list)}
    scheduler.load_state_dict(counters | {"lr_lambdas": []})
    # 2. The rate of each group at that step, as LambdaLR computes it.
    rates = []
    for base_rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rates.append(base_rate * factor(scheduler.last_epoch))
    # 3. Where LambdaLR, and the optimizer, keep it until the next step.
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
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
        # DeepSpeed links the parameters to the states that the step has just made.
        optimizer._lazy_init_hp_params_optimizer_state()

    def places(self, parameter: Any) -> range | None:
        """Which values of the flattened parameter this rank needs: all, so that it is read in its shape."""
        return None

    def set_state(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        parameter.set_full_hp_param(value, _optimizer_key(key))

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

    def places(self, parameter: Any) -> range | None:
        """Which values of the flattened parameter this rank needs; None: all, so that it is read in its shape."""
        if _stays_whole(parameter):
            return None
        size = parameter.ds_tensor.numel()
        start = min(size * self._optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
        return range(start, min(start + size, parameter.ds_numel))

    def set_state(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        share, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=_optimizer_key(key)
        )
        share.copy_(self._share(parameter, value, share.numel()))

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.ds_tensor.copy_(self._share(parameter, value, parameter.ds_tensor.numel()))
        if _stays_whole(parameter):
            parameter.data.copy_(value)

    def _share(self, parameter: Any, value: torch.Tensor, size: int) -> torch.Tensor:
        """``value`` is the whole parameter, or what is at :meth:`places` of it."""
        if value.shape == whole_shape(parameter):
            return share_of(value, self._optimizer._get_param_partition_rank(parameter), size)
        return share_of(value, 0, size)


def _stays_whole(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps the parameter whole between steps, beside its shares: small ones."""
    return bool(parameter.data.numel() == parameter.ds_numel)


def _optimizer_key(key: str) -> str | None:
    """What DeepSpeed calls ``key``: None is the master weight."""
    if key == MASTER_WEIGHT:
        return None
    return key


@contextmanager
def _moves_nothing(optimizer: Any, flats: list[torch.Tensor]) -> Iterator[None]:
    """Adam makes its states in the first step; a step in here makes them and changes no weight."""
    # 1. Gradients and rates of zero, the real ones remembered.
    gradients = [flat.grad for flat in flats]
    rates = [group["lr"] for group in optimizer.param_groups]
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    # 2. As they were.
    for flat, gradient in zip(flats, gradients, strict=True):
        flat.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _set_step(optimizer: Any, step: int) -> None:
    """torch's Adam counts in a tensor for each state; DeepSpeed's in a number, some of them in the group."""
    for state in optimizer.state.values():
        if "step" not in state:
            continue
        if torch.is_tensor(state["step"]):
            state["step"] = torch.full_like(state["step"], step)
        else:
            state["step"] = step
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def saved_layout(checkpoint: str | Path) -> dict[str, Any] | None:
    """The layout that wrote ``checkpoint``; None where the folder does not say it."""
    file = Path(checkpoint) / LAYOUT_FILE
    if not file.is_file():
        return None
    # Early files do not have the keys; then there was no tensor parallelism, and there were no stages.
    return {"tp_size": 1, "pp_size": 1, **read_json(file)}
