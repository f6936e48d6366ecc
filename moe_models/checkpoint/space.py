"""How large a checkpoint of this engine is, and whether the disk has room for what a run will write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_models.disk import free_bytes, size
from moe_models.engine.blocks import find_blocks, whole_shape
from moe_models.engine.lora import is_adapted
from moe_models.engine.pipeline.cut import stage_held


def checkpoint_bytes(engine: Any) -> int:
    """Bytes of the tensors in a checkpoint of all ranks. Collective.

    A lower bound, and close: the rest is names, counters and random states. Before the first step the optimizer counts
    as Adam.
    """
    adapted = is_adapted(engine.module)
    weights = 0
    if adapted or not engine.zero_optimization_partition_weights():
        weights = _weight_bytes(engine, trained_only=adapted)
    return _of_all_ranks(_state_bytes(engine.optimizer) + weights)


def adapter_bytes(engine: Any) -> int:
    """Bytes of the weights of the adapter that ``engine`` trains. Collective."""
    return _of_all_ranks(_weight_bytes(engine, trained_only=True))


def _of_all_ranks(mine: int) -> int:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return mine
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sum(everyone)


def _state_bytes(optimizer: Any) -> int:
    """Master weights and the optimizer's states of this rank's partition."""
    flats: Iterable[torch.Tensor]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        flats = optimizer.fp32_partitioned_groups_flat
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        flats = optimizer.single_partition_of_fp32_groups
    else:
        return 0
    masters = sum(flat.nbytes for flat in flats if flat is not None)
    states = 0
    for state in optimizer.optimizer.state.values():
        states += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    if not states:  # Adam's, before the first step makes them
        states = 2 * masters
    return masters + states


def _weight_bytes(engine: Any, *, trained_only: bool) -> int:
    """This rank's part of the weights, each of which is written once. ZeRO-3 writes those of an adapter only."""
    blocks = find_blocks(engine.module)
    ep_size = max((block.ep_size for block in blocks), default=1)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    stage = stage_held(engine)
    if stage is not None:  # the ranks of this stage, which writes its own layers
        world //= stage.count
        rank %= world
    dense = 0
    experts = 0
    for parameter in engine.module.parameters():
        if trained_only and not parameter.requires_grad:
            continue
        nbytes = whole_shape(parameter).numel() * parameter.element_size()
        # DeepSpeed's own mark of a parameter that not all ranks share.
        if getattr(parameter, "allreduce", True):
            dense += nbytes
        else:
            experts += nbytes
    # One rank of each EDP group writes its experts, so a rank's mean part is EP of the world.
    return (dense if rank == 0 else 0) + experts * ep_size // world


def room_warnings(
    folder: Path, *, checkpoint: int, export: int, limit: int | None, planned: int, present: int
) -> list[str]:
    """A line if ``folder`` has no room for what the run will write.

    Args:
        folder: the output folder.
        checkpoint: bytes of one checkpoint.
        export: bytes of the exported model.
        limit: ``--save_total_limit``; the next checkpoint is complete before an older one is removed.
        planned: checkpoints that the run will still write.
        present: checkpoints that are there already.
    """
    # 1. The most that is there at a time: while a checkpoint grows, or the model beside those that are kept.
    most = present + planned
    kept = most
    if limit:
        most = min(most, limit + 1)
        kept = min(kept, limit)
    needed = max(most * checkpoint, kept * checkpoint + export) - present * checkpoint

    # 2. Is there room?
    free = free_bytes(folder)
    if needed <= free:
        return []
    return [
        f"--output_dir {folder}: {most} checkpoints of {size(checkpoint)} and the model of {size(export)} need "
        f"{size(needed)} more at a time, {size(free)} are free; the run will stop when they are used up. Make room, "
        f"lower --save_total_limit ({limit or 'none given'}), or save less often"
    ]
