"""Which decoder layers each pipeline stage holds, from ``config.json``. Torch-free.

Stages are runs of neighbouring layers. The slowest one decides how long a step takes, so the cut makes the costliest
stage as cheap as can be. What counts is the weights that one token passes, for these are what it multiplies with: the
experts that it is sent to, not those that a layer has. The head counts with all of its V x D, the embedding as the
lookup that it is.

The cut is a function of config.json and the number of stages. The engine, the checks and the planner ask it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from moe_models.families.sizes import ModelSizes, known_family, sizes_of
from moe_models.families.table import is_moe_layer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a pipeline: where it is, and what it holds."""

    index: int
    """Counts from 0, where the tokens come in."""
    bounds: tuple[int, ...]
    """First decoder layer of each stage, and the number of layers at the end: [S + 1]."""

    @property
    def count(self) -> int:
        """S, the stages of the pipeline."""
        return len(self.bounds) - 1

    @property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the last norm and the head, and computes the loss."""
        return self.index == self.count - 1

    @cached_property
    def layers(self) -> range:
        """Its decoder layers."""
        return range(self.bounds[self.index], self.bounds[self.index + 1])


def stage_of(config: Mapping[str, Any], stages: int, rank: int, world_size: int) -> Stage:
    """The stage of ``rank``: stages are runs of neighbouring ranks. Raises UserError where sizes cannot be read."""
    return Stage(index=rank // (world_size // stages), bounds=stage_bounds(config, stages))


def stage_bounds(config: Mapping[str, Any], stages: int) -> tuple[int, ...]:
    """First decoder layer of each stage, and the number of layers at the end: [S + 1].

    Every stage has an MoE layer: one without experts would have other parameter groups than its neighbours, and
    DeepSpeed's collectives over them would not match.

    Raises:
        UserError: for a family whose sizes are not known.
        ValueError: if there are fewer MoE layers than stages.
    """
    family = known_family(config)
    sizes = sizes_of(family, config)
    moe = [is_moe_layer(family, config, layer) for layer in range(sizes.layers)]
    return cheapest_cut(tuple(layer_costs(sizes, moe)), tuple(moe), stages)


def layer_costs(sizes: ModelSizes, moe: Sequence[bool]) -> list[int]:
    """Weights that one token passes in each decoder layer; the embedding is in the first, the head in the last."""
    # 1. The experts that one token is sent to, and all else in a layer.
    costs = [sizes.top_k * sizes.expert_size * has_experts for has_experts in moe]
    for name, shape in sizes.dense:
        layer = layer_of(name)
        if layer is not None:
            costs[layer] += prod(shape)
    # 2. One row of the embedding, and the whole head.
    costs[0] += sizes.hidden
    costs[-1] += sizes.head_params
    return costs


@lru_cache(maxsize=256)
def cheapest_cut(costs: tuple[int, ...], moe: tuple[bool, ...], stages: int) -> tuple[int, ...]:
    """The bounds at which the costliest of ``stages`` runs is cheapest, each with an MoE layer.

    Among equals that with the smallest sum of squares, so that the other stages are even too. Raises ValueError if
    there are fewer MoE layers than stages.
    """
    # 1. Costs and MoE layers before each layer, so that those of a run are a difference.
    L = len(costs)
    cost_before = list(accumulate(costs, initial=0))
    moe_before = list(accumulate(moe, initial=0))

    # 2. One stage more in each turn. best[l] is the best cut of the first l layers into the stages so far.
    best = {0: _Cut(costliest=0, squares=0, bounds=(0,))}
    for _ in range(stages):
        longer: dict[int, _Cut] = {}
        for start, cut in best.items():
            for stop in range(start + 1, L + 1):
                # A stage without experts is none.
                if moe_before[stop] == moe_before[start]:
                    continue
                candidate = cut.with_stage(cost_before[stop] - cost_before[start], stop)
                longer[stop] = min(candidate, longer.get(stop, candidate))
        best = longer

    # 3. That of all layers.
    if L not in best:
        raise ValueError(f"{sum(moe)} MoE layers do not make {stages} stages with one each")
    return best[L].bounds


@dataclass(frozen=True, order=True)
class _Cut:
    """Stages of the first layers; the smaller one is better."""

    costliest: int
    squares: int
    """Sum of the squares of the stages' costs."""
    bounds: tuple[int, ...]

    def with_stage(self, cost: int, stop: int) -> _Cut:
        """One stage more, up to layer ``stop``."""
        return _Cut(max(self.costliest, cost), self.squares + cost**2, (*self.bounds, stop))


def stage_sizes(sizes: ModelSizes, moe: Sequence[bool], stage: Stage) -> ModelSizes:
    """The sizes of one stage, as if it were a model. A tied weight is in the first and in the last one."""
    # 1. Its tensors: those of its layers, and what stands before the first and after the last layer.
    dense = []
    attending = set()
    for name, shape in sizes.dense:
        layer = layer_of(name)
        if layer is not None:
            held = layer in stage.layers
        elif name == EMBEDDING:
            held = stage.first
        else:
            held = stage.last
        if not held:
            continue
        dense.append((name, shape))
        if ".self_attn." in name:
            attending.add(layer)
    if stage.last and sizes.tied and not stage.first:
        dense.append((HEAD, (sizes.vocabulary, sizes.hidden)))

    # 2. Its layers with attention. The others have a state each, as large in every layer.
    others = len(stage.layers) - len(attending)
    others_in_all = sizes.layers - sizes.attention_layers
    linear_states = 0
    if others_in_all:
        linear_states = sizes.linear_states // others_in_all * others

    return replace(
        sizes,
        layers=len(stage.layers),
        attention_layers=len(attending),
        linear_states=linear_states,
        moe_layers=sum(moe[layer] for layer in stage.layers),
        dense=tuple(dense),
        has_head=stage.last,
    )


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor by its module name; None for embedding, last norm and head."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2])
    return None


def stage_shares(config: Mapping[str, Any], stages: int) -> list[float]:
    """Each stage's share of what the whole model costs. Raises as :func:`stage_bounds`."""
    family = known_family(config)
    sizes = sizes_of(family, config)
    costs = layer_costs(sizes, [is_moe_layer(family, config, layer) for layer in range(sizes.layers)])
    total = sum(costs)
    return [sum(costs[start:stop]) / total for start, stop in pairwise(stage_bounds(config, stages))]
