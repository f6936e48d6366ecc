"""What DeepSpeed's AutoTP split, made whole again: matrices of a live engine or of a checkpoint.

AutoTP (deepspeed 0.19.8) marks each parameter that it split with the dimension: 0 for outputs, 1 for inputs. In a
checkpoint it writes patterns of the names that are replicated and of those that are split by inputs; all others are
split by outputs.
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
    if not mark or not mark["partition_sizes"]:
        return None
    return int(mark["partition_dim"])


def own_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What of ``whole`` this rank's ``parameter`` holds: all of it, or the shard that AutoTP gave this peer."""
    dimension = split_dimension(parameter)
    if dimension is None:
        return whole
    from deepspeed.utils import groups

    sizes = list(getattr(parameter, _PARAMETER_MARK)["partition_sizes"])  # of each peer; they may be uneven
    peer = groups.get_tensor_model_parallel_rank()
    start = sum(sizes[:peer])
    return whole.narrow(dimension, start, sizes[peer])


def join_on_rank_0(shard: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """The whole tensor on rank 0's CPU, None elsewhere; collective over the tensor-parallel group of rank 0."""
    from deepspeed.utils import groups

    group = groups.get_tensor_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:  # the groups of other data-parallel ranks hold the same shards
        return None
    # 1. Every peer learns the shapes, which may be uneven.
    own_shape = torch.tensor(shard.shape, device=shard.device)
    shapes = [torch.zeros_like(own_shape) for _ in ranks]
    dist.all_gather(shapes, own_shape, group=group)
    # 2. The shards travel to rank 0, one after the other.
    if dist.get_rank() != 0:
        dist.send(shard.contiguous(), dst=0, group=group)
        return None
    shards = [shard.cpu()]
    for owner, shape in zip(ranks[1:], shapes[1:], strict=True):
        received = torch.empty(shape.tolist(), dtype=shard.dtype, device=shard.device)
        dist.recv(received, src=owner, group=group)
        shards.append(received.cpu())
    return torch.cat(shards, dim=dimension)


def join_saved(name: str, shards: Sequence[torch.Tensor], states: Mapping[str, Any]) -> torch.Tensor:
    """The whole tensor ``name`` out of the shards of all tensor-parallel ranks, as the checkpoint describes them.

    ``states`` are the model states of one rank; without tensor parallelism there is one shard, and it is returned.
    """
    if len(shards) == 1:
        return shards[0]
    described = states[_CHECKPOINT_MARK]

    def listed(key: str) -> bool:
        return any(re.match(pattern, name) for pattern in described[key])

    if listed("tp_replicated_parameter_patterns"):
        return shards[0]
    if listed("parameter_with_row_parallelism_patterns"):
        return torch.cat(list(shards), dim=1)
    return torch.cat(list(shards), dim=0)
