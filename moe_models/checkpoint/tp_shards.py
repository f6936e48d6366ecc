"""What DeepSpeed's AutoTP split, made whole again: matrices of a live engine or of a checkpoint.

AutoTP (deepspeed 0.19.8) leaves on each parameter that it split the dimension (0: outputs, 1: inputs), and in each
checkpoint the patterns of the names: replicated, split by inputs, and all others, split by outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

_PARAMETER_MARK = "ds_autotp_universal_checkpoint_meta"
_CHECKPOINT_MARK = "universal_checkpoint_info"


def split_dimension(parameter: torch.Tensor) -> int | None:
    """The dimension that AutoTP split, or None where every tensor-parallel peer holds the whole parameter."""
    mark = getattr(parameter, _PARAMETER_MARK, None)
    dimension: int | None = mark["partition_dim"] if mark and mark["partition_sizes"] else None
    return dimension


def own_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What of ``whole`` this rank's ``parameter`` holds: all of it, or the shard that AutoTP gave this peer."""
    dimension = split_dimension(parameter)
    if dimension is None:
        return whole
    from deepspeed.utils import groups

    sizes = list(getattr(parameter, _PARAMETER_MARK)["partition_sizes"])
    peer = groups.get_tensor_model_parallel_rank()
    return whole.narrow(dimension, sum(sizes[:peer]), sizes[peer])


def join_on_rank_0(shard: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """The whole tensor on rank 0's CPU, None elsewhere; collective over the tensor-parallel group of rank 0."""
    from deepspeed.utils import groups

    group = groups.get_tensor_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:  # the groups of other data-parallel ranks hold the same shards
        return None
    sizes = [torch.zeros_like(torch.tensor(shard.shape, device=shard.device)) for _ in ranks]
    dist.all_gather(sizes, torch.tensor(shard.shape, device=shard.device), group=group)  # they may be uneven
    if dist.get_rank() != 0:
        dist.send(shard.contiguous(), dst=0, group=group)
        return None
    shards = [shard.cpu()]
    for owner, size in zip(ranks[1:], sizes[1:], strict=True):
        received = torch.empty(size.tolist(), dtype=shard.dtype, device=shard.device)
        dist.recv(received, src=owner, group=group)
        shards.append(received.cpu())
    return torch.cat(shards, dim=dimension)


def join_saved(name: str, shards: Sequence[torch.Tensor], states: Mapping[str, Any]) -> torch.Tensor:
    """The whole tensor ``name`` out of the shards of all tensor-parallel ranks, as the checkpoint describes them."""
    if len(shards) == 1:
        return shards[0]
    described = states[_CHECKPOINT_MARK]

    def listed(key: str) -> bool:
        return any(re.match(pattern, name) for pattern in described[key])

    if listed("tp_replicated_parameter_patterns"):
        return shards[0]
    return torch.cat(list(shards), dim=1 if listed("parameter_with_row_parallelism_patterns") else 0)
