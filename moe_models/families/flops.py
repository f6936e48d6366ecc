"""Floating point operations that the mathematics of a training step asks for, from ``config.json``. Torch-free.

A multiplication and an addition count one each. Not counted: norms, softmax, rotary positions, the router's top-k, and
what activation recomputation repeats. A share of the machine's rate that is made of these figures is therefore an MFU
(arXiv 2204.02311, appendix B), not a hardware utilisation.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from moe_models.families.adapters import AdapterSizes
from moe_models.families.sizes import ModelSizes

PER_WEIGHT = 6.0
"""FLOP of one token for each weight of a matrix: 2 in the forward pass, 4 in the backward pass."""

PER_FROZEN_WEIGHT = 4.0
"""The same for a weight that is not trained: no gradient of it is made."""


@lru_cache(maxsize=64)
def train_flops(sizes: ModelSizes, length: int, adapter: AdapterSizes | None = None) -> tuple[float, float]:
    """FLOP of the forward and backward pass for one token in a sequence of ``length``: (outside the experts, in them).

    With an ``adapter`` only that is trained.

    The embedding is a lookup and costs nothing; the head is a matrix product and counts, also where the two are tied.
    """
    # 1. Matrices and convolutions outside the experts, weights of one token.
    matrices = 0
    for name, shape in sizes.dense:
        if len(shape) >= 2 and "embed_tokens" not in name:
            matrices += prod(shape)
    if sizes.tied:
        matrices += sizes.head_params

    # 2. Attention. Scores take heads x head_dim and the weighted sum heads x value_dim for each token attended to.
    #    It is causal: on average a token attends to half of the sequence.
    attention = sizes.attention_layers * sizes.heads * (sizes.head_dim + sizes.value_dim) * length / 2

    # 3. Linear attention reads, updates and reads again the state of each head: three products of key x value width.
    attention += 3 * sizes.linear_states

    # 4. The experts that one token passes through.
    experts = sizes.moe_layers * sizes.top_k * sizes.expert_size

    if adapter is None:
        return PER_WEIGHT * (matrices + attention), PER_WEIGHT * experts

    # 4. With an adapter: the frozen weights, and the factors beside them.
    dense_factors = sum(adapter.dense)
    expert_factors = sizes.moe_layers * sizes.top_k * sum(adapter.expert)
    outside = PER_FROZEN_WEIGHT * matrices + PER_WEIGHT * (attention + dense_factors)
    inside = PER_FROZEN_WEIGHT * experts + PER_WEIGHT * expert_factors
    return outside, inside
