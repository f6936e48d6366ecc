"""Floating point operations that the mathematics of a training step asks for, from ``config.json``. Torch-free.

A multiplication and an addition count one each. Not counted: norms, softmax, rotary positions, the router's top-k, and
what activation recomputation repeats. A share of the machine's rate that is made of these figures is therefore an MFU
(arXiv 2204.02311, appendix B), not a hardware utilisation.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from moe_models.families.sizes import ModelSizes

PER_WEIGHT = 6.0
"""FLOP of one token for each weight of a matrix: 2 in the forward pass, 4 in the backward pass."""


@lru_cache(maxsize=64)
def train_flops(sizes: ModelSizes, length: int) -> tuple[float, float]:
    """FLOP of the forward and backward pass for one token in a sequence of ``length``: (outside the experts, in them).

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

    return PER_WEIGHT * (matrices + attention), PER_WEIGHT * experts
