"""What DeepSpeed's ZeRO keeps of one rank's parameters: partitions, optimizer groups, gradient copies. Torch-free.

Read from deepspeed 0.19.8: ``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``moe/utils.py``. ``shares.py`` has the
textbook's bytes; here is what the buffers come to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import NamedTuple

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.families.adapters import AdapterSizes
from moe_models.families.sizes import ModelSizes
from moe_models.planner.shares import Share, share_of_one_rank

BF16 = 2
FP32 = 4
FP64 = 8
"""Bytes of one number."""
EXPERT_GROUP = 178_956_971
"""Elements after which DeepSpeed starts another optimizer group of experts (``moe/utils.py``: max_group_size)."""
SUB_GROUP = 10**9
"""ZeRO-3's ``sub_group_size``: it ends a group of partitions once it has so many elements."""


@lru_cache(maxsize=4096)
def overlaps(tensors: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Elements of the tensors that reach into each rank's ZeRO partition, whole tensors counted.

    ZeRO 1 and 2 lay the tensors end to end and cut at equal lengths; a gradient that a cut divides is kept whole on
    both sides (``stage_1_and_2.py``: copy_grads_in_partition).
    """
    partition = max(1, ceil(sum(tensors) / ranks))
    held = [0] * ranks
    start = 0
    for numel in tensors:
        first = start // partition
        last = (start + numel - 1) // partition
        for rank in range(first, last + 1):
            held[rank] += numel
        start += numel
    return tuple(held)


@lru_cache(maxsize=256)
def expert_groups(numel: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Optimizer groups of ``count`` equal expert tensors of ``numel`` elements, in the model's order."""
    in_a_group = max(1, EXPERT_GROUP // numel)
    groups = []
    for start in range(0, count, in_a_group):
        size = min(in_a_group, count - start)
        groups.append((numel,) * size)
    return tuple(groups)


class OptimizerGroup(NamedTuple):
    """Tensors that ZeRO lays end to end, and the ranks over which it cuts them."""

    tensors: tuple[int, ...]
    """Elements of each tensor."""
    ranks: int

    @property
    def partition(self) -> int:
        """Elements of one rank."""
        return ceil(sum(self.tensors) / self.ranks)

    @property
    def largest_piece(self) -> int:
        """Elements of the largest tensor in one partition, as far as it is in it."""
        return min(max(self.tensors, default=0), self.partition)


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroStates:
    """Weights, gradients and optimizer states of one rank, counted in elements. They do not depend on the batch."""

    ds: DsConfig
    sizes: ModelSizes
    layout: Layout
    adapter: AdapterSizes | None = None
    """If given, what is counted is the adapter, not the model."""

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.ds.zero_stage

    @property
    def spread(self) -> bool:
        """Whether AutoEP or native layers spread the experts over ranks."""
        return self.ds.spreads_experts

    @cached_property
    def share(self) -> Share:
        """Elements of this rank before ZeRO shards anything, by kind."""
        if self.adapter is None:
            return share_of_one_rank(self.ds, self.sizes, self.layout)
        dense = sum(self.adapter.dense)
        experts = sum(self.expert_tensors)
        if self.spread:
            return Share(dense=dense, replicated=dense, expert=experts)
        return Share(dense=dense + experts, replicated=dense + experts, expert=0)

    @property
    def elements(self) -> int:
        """Elements of this rank before ZeRO shards anything."""
        return self.share.dense + self.share.expert

    @property
    def ranks(self) -> int:
        """Ranks over which ZeRO shards the dense part."""
        return self.layout.zero_size

    @property
    def copies(self) -> int:
        """Ranks that hold the same experts, over which ZeRO shards them."""
        return self.layout.edp_size if self.spread else self.layout.zero_size

    @property
    def partition(self) -> int:
        """Elements whose optimizer states this rank keeps."""
        return ceil(self.share.dense / self.ranks) + ceil(self.share.expert / self.copies)

    @cached_property
    def layer_expert_tensors(self) -> tuple[int, ...]:
        """Elements of each expert tensor of one MoE layer."""
        if self.adapter is not None:
            held = self.sizes.num_experts // self.layout.ep_size if self.spread else self.sizes.num_experts
            return tuple(held * numel for numel in self.adapter.expert)
        matrix = self.sizes.expert_size // 3  # [F, D]
        if self.spread:
            local = self.sizes.num_experts // self.layout.ep_size
            return (local * matrix,) * 3  # AutoEP keeps gate, down and up apart
        # transformers keeps gate and up in one tensor
        return (2 * self.sizes.num_experts * matrix, self.sizes.num_experts * matrix)

    @cached_property
    def expert_tensors(self) -> tuple[int, ...]:
        """Elements of each expert tensor of this rank."""
        return self.layer_expert_tensors * self.sizes.moe_layers

    @cached_property
    def dense_tensors(self) -> tuple[int, ...]:
        """Elements of each tensor outside the experts, all shrunk alike where tensor parallelism cuts the matrices."""
        if self.adapter is not None:
            return self.adapter.dense
        dense = self.share.dense
        if not self.spread:
            dense -= self.sizes.expert_params
        scale = dense / max(1, self.sizes.dense_params)
        return tuple(max(1, int(prod(shape) * scale)) for _, shape in self.sizes.dense)

    @cached_property
    def groups(self) -> tuple[OptimizerGroup, ...]:
        """The optimizer groups, the dense one first. Weight decay, which splits them further, is left aside."""
        if not self.spread:
            return (OptimizerGroup(self._tensors_in_order(), self.ranks),)
        if not self.expert_tensors:  # an adapter on attention alone
            return (OptimizerGroup(self.dense_tensors, self.ranks),)
        experts = expert_groups(max(self.expert_tensors), len(self.expert_tensors))
        return (
            OptimizerGroup(self.dense_tensors, self.ranks),
            *(OptimizerGroup(tensors, self.copies) for tensors in experts),
        )

    def _tensors_in_order(self) -> tuple[int, ...]:
        """All tensors of the plain model as its class declares them: a block's experts follow its router."""
        if self.adapter is not None:
            return (*self.dense_tensors, *self.expert_tensors)
        tensors: list[int] = []
        for (name, _), numel in zip(self.sizes.dense, self.dense_tensors, strict=True):
            tensors.append(numel)
            if name.endswith(self.sizes.router_weight):
                tensors += self.layer_expert_tensors
        return tuple(tensors)

    @cached_property
    def whole_gradients(self) -> int:
        """Elements of the gradients that touch the partition of the rank that has most (ZeRO 1 and 2)."""
        # 1. Of the dense group, by place in a ZeRO group.
        dense, *experts = self.groups
        of_dense: tuple[int, ...] = overlaps(*dense)
        if not experts:
            return max(of_dense)

        # 2. Of all expert groups together, by place in an EDP group.
        of_experts = [0] * self.copies
        for group in experts:
            for place, held in enumerate(overlaps(*group)):
                of_experts[place] += held

        # 3. A rank has one place in each; the fullest sum counts.
        layout = self.layout
        return max(
            of_dense[rank // layout.tp_size] + of_experts[rank // layout.ep_size] for rank in range(layout.world_size)
        )

    @cached_property
    def step_temporary_bytes(self) -> int:
        """Bytes at the optimizer's step: fp32 gradients and their flat bf16 copy, or an fp64 copy for the norm."""
        # 1. The group that is updated at a time, and the tensor of which the norm takes a copy, both of one rank.
        if self.stage == 3:
            largest_expert = ceil(max(self.expert_tensors, default=0) / self.copies)
            largest_dense = ceil(max(self.dense_tensors, default=0) / self.ranks)
            updated = min(self.partition, SUB_GROUP + largest_expert)  # the tensor that fills a group goes into it
            normed = max(largest_dense, largest_expert)
        else:
            updated = max(group.partition for group in self.groups)
            normed = max(group.largest_piece for group in self.groups)

        # 2. The norm is done when the update begins.
        return max(updated * (FP32 + BF16), normed * FP64)
