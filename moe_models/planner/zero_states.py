"""What DeepSpeed's ZeRO keeps of one rank's parameters: partitions, optimizer groups, gradient copies. Torch-free.

Read from deepspeed 0.19.8: ``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``moe/utils.py``. ``shares.py`` has the
textbook's bytes; here is what the buffers come to.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from math import ceil, prod

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.families.sizes import ModelSizes
from moe_models.planner.shares import share_of_one_rank

BF16, FP32, FP64 = 2, 4, 8
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
    size = ceil(sum(tensors) / ranks)
    held = [0] * ranks
    start = 0
    for numel in tensors:
        for rank in range(start // size, (start + numel - 1) // size + 1):
            held[rank] += numel
        start += numel
    return tuple(held)


@lru_cache(maxsize=256)
def expert_groups(numel: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Optimizer groups of ``count`` equal expert tensors, in the model's order."""
    each = max(1, EXPERT_GROUP // numel)
    return tuple((numel,) * min(each, count - start) for start in range(0, count, each))


class StateBytes:
    """Weights, gradients and optimizer states of one rank. Sizes count elements."""

    def __init__(self, ds: DsConfig, sizes: ModelSizes, layout: Layout) -> None:
        self.share, self.sizes = share_of_one_rank(ds, sizes, layout), sizes
        self.stage, self.spread = ds.zero_stage, ds.expert_parallel is not None or ds.moe.layer is not None
        self.ranks, self._layout = layout.zero_size, layout
        self.copies = layout.edp_size if self.spread else layout.zero_size  # ranks that hold the same experts
        one = sizes.expert_size // 3  # a matrix [F, D] of an expert
        local = sizes.num_experts // layout.ep_size if self.spread else sizes.num_experts
        # AutoEP keeps gate, down and up apart; transformers keeps gate and up in one tensor.
        layer = (local * one,) * 3 if self.spread else (2 * local * one, local * one)
        self.expert_tensors: tuple[int, ...] = layer * sizes.moe_layers
        dense = self.share.dense if self.spread else self.share.dense - sizes.expert_params
        scale = dense / max(1, sizes.dense_params)  # tensor parallelism cuts the matrices
        self.dense_tensors = tuple(max(1, int(prod(shape) * scale)) for _, shape in sizes.dense)

    @property
    def partition(self) -> int:
        """Elements whose optimizer states this rank keeps."""
        return ceil(self.share.dense / self.ranks) + ceil(self.share.expert / self.copies)

    @property
    def elements(self) -> int:
        """Elements of this rank before ZeRO shards anything."""
        return self.share.dense + self.share.expert

    def groups(self) -> list[tuple[tuple[int, ...], int]]:
        """(tensors, ranks) of each optimizer group, weight decay left aside."""
        if not self.spread:
            return [(self._in_order(), self.ranks)]
        experts = expert_groups(self.expert_tensors[0], len(self.expert_tensors))
        return [(self.dense_tensors, self.ranks), *((group, self.copies) for group in experts)]

    def _in_order(self) -> tuple[int, ...]:
        """All tensors of the plain model as its class declares them: a block's experts follow its router."""
        experts, tensors = iter(self.expert_tensors), list[int]()
        for (name, _), numel in zip(self.sizes.dense, self.dense_tensors, strict=True):
            tensors.append(numel)
            if name.endswith(".mlp.gate.weight"):
                tensors += [next(experts), next(experts)]
        return tuple(tensors)

    @cached_property
    def whole_gradients(self) -> int:
        """Elements of the gradients that touch the partition of the rank that has most (ZeRO 1 and 2)."""
        (dense, ranks), *experts = self.groups()
        held: tuple[int, ...] = overlaps(dense, ranks)
        if not experts:
            return max(held)
        summed: list[int] = [sum(column) for column in zip(*(overlaps(*group) for group in experts), strict=True)]
        world, layout = self._layout.world_size, self._layout
        return max(held[rank // layout.tp_size] + summed[rank // layout.ep_size] for rank in range(world))

    @cached_property
    def step_temporaries(self) -> int:
        """Bytes at the optimizer's step: fp32 gradients and their flat bf16 copy, or an fp64 copy for the norm."""
        if self.stage == 3:
            sub_group = min(self.partition, SUB_GROUP + ceil(max(self.expert_tensors) / self.copies))
            tensor = max(ceil(max(self.dense_tensors) / self.ranks), ceil(max(self.expert_tensors) / self.copies))
            return max(sub_group * (FP32 + BF16), FP64 * tensor)
        largest = max(ceil(sum(group) / ranks) for group, ranks in self.groups())
        tensor = max(min(max(group), ceil(sum(group) / ranks)) for group, ranks in self.groups())
        return max(largest * (FP32 + BF16), FP64 * tensor)
