"""Floating point operations that the mathematics of a training step asks for, from ``config.json``. Torch-free.

Multiplications and additions count one each. Left out: norms, softmax, rotary positions, the router's top-k, and what
activation recomputation repeats; so that a share of the machine's rate made of these figures is an MFU
(arXiv 2204.02311, appendix B), not a hardware utilisation.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from moe_models.families.sizes import ModelSizes


@lru_cache(maxsize=64)
def train_flops(sizes: ModelSizes, length: int) -> tuple[float, float]:
    """FLOP of forward and backward passes for one token of a sequence of ``length``: outside the experts, and in them.

    A matrix with P entries takes 2 P in the forward and 4 P in the backward pass. The embedding is a lookup; the head
    counts. Attention is causal: a token attends to half of the sequence on average.
    """
    matrices = sum(prod(shape) for name, shape in sizes.dense if len(shape) == 2 and "embed_tokens" not in name)
    if not any(name == "lm_head.weight" for name, _ in sizes.dense):  # tied: the embedding is the head too
        matrices += prod(dict(sizes.dense)["model.embed_tokens.weight"])
    attention = sizes.layers * sizes.heads * (sizes.head_dim + sizes.value_dim) * length / 2
    return 6.0 * (matrices + attention), 6.0 * sizes.moe_layers * sizes.top_k * sizes.expert_size
