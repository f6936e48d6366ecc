"""How evenly tokens are spread over experts: counts of the router's choices, and the figures that follow from them.

What is counted: each choice of an expert, so padding too, and of these what native layers then dropped. Each rank
counts on its device without waiting for it. Ranks are summed only when the counts are read, in one all-reduce of
[L, 2E + 2]. Training counts cover one optimizer step with all its micro-batches; evaluation has counts of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_models.routing.tap import scores

LOGGED = {
    "expert_load_max": "tokens of the fullest expert over the mean, averaged over layers; 1 is perfect",
    "expert_load_worst": "the same of the worst layer",
    "rank_load_max": "the same per EP rank, averaged over layers: how much longer than balanced the experts take",
    "expert_load_cv": "standard deviation over mean of tokens per expert, averaged over layers; 0 is perfect",
    "dead_experts": "experts of all layers that got no token",
    "router_entropy": "mean entropy of a token's router probabilities over log E; 1 is undecided, 0 is certain",
}
"""What is logged, by name; one optimizer step on all ranks, or one evaluation."""


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """One MoE layer."""

    layer: str
    """Module path of the MoE block."""
    tokens: list[int]
    """Choices of each expert: tokens x top-k in all."""
    max_mean: float
    """Fullest expert over the mean."""
    rank_max_mean: float
    """Fullest EP rank over the mean, all replicas of an expert taken together."""
    cv: float
    """Standard deviation over mean."""
    dead: int
    """Experts without a token."""
    entropy: float
    """Mean entropy of the router's probabilities over log E."""
    dropped: list[int] | None = None
    """Choices of each expert that found no place in it; None where the layer is not a native one."""


def layer_load(
    layer: str, tokens: list[int], entropy: float, ep_size: int, dropped: list[int] | None = None
) -> LayerLoad:
    """The figures of one layer from its counts. A layer without any token counts as balanced.

    Args:
        layer: module path of the MoE block.
        tokens: choices of each expert.
        entropy: mean entropy of the router's probabilities over log E.
        ep_size: EP ranks that share the experts: rank 0 has the first E / ep_size, and so on, as in AutoEP.
        dropped: choices of each expert that were dropped, of a native layer.
    """
    # 1. Experts: mean and variance of their counts.
    mean = sum(tokens) / len(tokens)
    variance = sum((count - mean) ** 2 for count in tokens) / len(tokens)

    # 2. EP ranks: each computes the tokens of the experts that it holds.
    per_rank = len(tokens) // ep_size
    ranks = [sum(tokens[first : first + per_rank]) for first in range(0, len(tokens), per_rank)]

    # 3. Relative to the mean; without any token there is none.
    max_mean = 1.0
    rank_max_mean = 1.0
    cv = 0.0
    if mean:
        max_mean = max(tokens) / mean
        rank_max_mean = max(ranks) * len(ranks) / sum(ranks)
        cv = variance**0.5 / mean
    return LayerLoad(
        layer=layer,
        tokens=tokens,
        max_mean=max_mean,
        rank_max_mean=rank_max_mean,
        cv=cv,
        dead=tokens.count(0),
        entropy=entropy,
        dropped=dropped,
    )


def overall(layers: list[LayerLoad]) -> dict[str, float]:
    """The figures of :data:`LOGGED`."""

    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "expert_load_max": average([layer.max_mean for layer in layers]),
        "expert_load_worst": max(layer.max_mean for layer in layers),
        "rank_load_max": average([layer.rank_max_mean for layer in layers]),
        "expert_load_cv": average([layer.cv for layer in layers]),
        "dead_experts": sum(layer.dead for layer in layers),
        "router_entropy": average([layer.entropy for layer in layers]),
    }


class LoadStats:
    """Counters of all MoE layers of one model on this rank; a :class:`~moe_models.routing.tap.RouterTap` feeds them."""

    def __init__(self, layers: list[str], experts: list[int], ep_size: int, score_func: str, device: Any) -> None:
        """Begin with zeros.

        Args:
            layers: module paths of the MoE blocks.
            experts: number of experts of each.
            ep_size: EP ranks that share the experts of a layer.
            score_func: ``softmax`` or ``sigmoid``, see :func:`~moe_models.routing.tap.scores`.
            device: where the routers compute.
        """
        self._layers = layers
        self._experts = experts
        self._ep_size = ep_size
        self._score_func = score_func
        self._drops = False  # becomes True with the first native layer that reports
        # One row per layer, with E that of the widest layer:
        #   [choices of each expert (E), dropped choices of each (E), sum of the tokens' entropies, tokens]
        # In fp64, which counts exactly to 2^53; fp32 would stop at 16.8 million tokens.
        columns = 2 * max(experts) + 2
        self._sums = {
            training: torch.zeros(len(layers), columns, dtype=torch.float64, device=device)
            for training in (True, False)
        }

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        training: bool,
        logits_TE: torch.Tensor,
        choices_TK: torch.Tensor,
        counted_2E: torch.Tensor | None = None,
    ) -> None:
        """Count one layer of one forward pass."""
        row = self._sums[training][layer]
        E = max(self._experts)
        # 1. Choices: one for each of the K experts of a token, or what a native layer counted itself.
        if counted_2E is None:
            chosen = choices_TK.reshape(-1)
            row.scatter_add_(0, chosen.long(), torch.ones_like(chosen, dtype=row.dtype))
        else:
            self._drops = True
            layer_E = counted_2E.shape[1]
            row[: 2 * E].view(2, E)[:, :layer_E] += counted_2E
        # 2. The sum of -p log p over tokens and experts, and the tokens that it is to be divided by.
        row[-2] += torch.special.entr(scores(logits_TE, self._score_func)).sum()
        row[-1] += choices_TK.shape[0]

    def reset(self, training: bool) -> None:
        """Forget what was counted in training, or in evaluation."""
        self._sums[training].zero_()

    def counts(self, training: bool, group: Any = None) -> torch.Tensor:
        """Tokens per expert of all ranks of ``group``, [L, E]; collective."""
        return self._reduced(training, group)[:, : max(self._experts)]

    def read(self, training: bool, group: Any = None, copies: int = 1) -> list[LayerLoad]:
        """The figures of all ranks of ``group``, layer by layer, or [] if nothing was counted; collective.

        ``copies`` ranks at a time counted the same tokens.
        """
        rows = (self._reduced(training, group) / copies).tolist()
        if not any(row[-1] for row in rows):
            return []
        return [self._figures(*layer) for layer in zip(self._layers, self._experts, rows, strict=True)]

    def _figures(self, name: str, E: int, row: list[float]) -> LayerLoad:
        """The figures of a layer with E experts from its row of sums."""
        tokens = [int(count) for count in row[:E]]
        dropped = None
        if self._drops:
            first_dropped = max(self._experts)
            dropped = [int(count) for count in row[first_dropped : first_dropped + E]]
        # Mean entropy over its maximum, log E. A layer that no token reached has 0, and so has one of a single expert.
        entropy = row[-2] / max(row[-1], 1.0) / max(math.log(E), 1e-12)
        return layer_load(name, tokens, entropy, self._ep_size, dropped)

    def _reduced(self, training: bool, group: Any) -> torch.Tensor:
        """The sums of all ranks of ``group``; the own ones stay as they are."""
        sums = self._sums[training].clone()
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        return sums
