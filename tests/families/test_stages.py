"""The cut of a model into stages, against every other cut."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest

from moe_models.errors import UserError
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.families.stages import (
    Stage,
    cheapest_cut,
    layer_costs,
    stage_bounds,
    stage_of,
    stage_shares,
    stage_sizes,
)
from moe_models.families.table import FAMILIES, is_moe_layer
from tests.support.tiny import TINY

QWEN3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
    "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def every_cut(costs: list[int], moe: list[bool], stages: int) -> list[tuple[int, ...]]:
    """All cuts whose stages have an MoE layer each."""
    found = []
    for inside in combinations(range(1, len(costs)), stages - 1):
        bounds = (0, *inside, len(costs))
        if all(any(moe[start:stop]) for start, stop in pairwise(bounds)):
            found.append(bounds)
    return found


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_cut_is_cheaper(stages: int) -> None:
    costs = [7, 1, 4, 9, 2, 2, 8, 3]
    moe = [False, True, True, False, True, True, False, True]

    def costliest(bounds: tuple[int, ...]) -> int:
        return max(sum(costs[start:stop]) for start, stop in pairwise(bounds))

    chosen = cheapest_cut(tuple(costs), tuple(moe), stages)
    cuts = every_cut(costs, moe, stages)
    assert chosen in cuts
    assert costliest(chosen) == min(map(costliest, cuts))


def test_the_head_makes_the_last_stage_shorter() -> None:
    sizes = model_sizes(QWEN3_235B)
    costs = layer_costs(sizes, [True] * 94)
    assert sum(costs) == sizes.active_params - sizes.head_params  # but for the embedding; the last norm is as small
    bounds = stage_bounds(QWEN3_235B, 8)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    assert sum(lengths) == 94
    assert lengths[-1] < lengths[0]
    assert max(stage_shares(QWEN3_235B, 8)) < 1.06 / 8
    assert sum(stage_shares(QWEN3_235B, 8)) == pytest.approx(1.0)


def test_each_stage_has_experts() -> None:
    config = {**TINY["deepseek_v3"], "model_type": "deepseek_v3", "num_hidden_layers": 4}
    assert stage_bounds(config, 3) == (0, 2, 3, 4)  # the first layer has none
    with pytest.raises(ValueError, match="3 MoE layers do not make 4 stages"):
        stage_bounds(config, 4)


def test_stages_are_runs_of_ranks() -> None:
    config = {**TINY["mixtral"], "model_type": "mixtral", "num_hidden_layers": 4}
    found = [stage_of(config, 2, rank, 4) for rank in range(4)]
    assert [stage.index for stage in found] == [0, 0, 1, 1]
    assert [list(stage.layers) for stage in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [(stage.first, stage.last) for stage in found] == [(True, False)] * 2 + [(False, True)] * 2
    assert Stage(index=0, bounds=(0, 4)).count == 1


@pytest.mark.parametrize("model_type", sorted(set(TINY) - {"prmoe"}))
def test_stages_together_are_the_model(model_type: str) -> None:
    """Each product, each parameter, each layer with attention and each state of linear attention is in one stage."""
    config = {"model_type": model_type, **TINY[model_type], "num_hidden_layers": 4, "tie_word_embeddings": False}
    for key in ("layer_types", "mlp_layer_types"):
        if key in config:
            config[key] = (list(config[key]) * 4)[:4]
    whole = model_sizes(config)
    moe = [is_moe_layer(FAMILIES[model_type], config, layer) for layer in range(4)]
    bounds = stage_bounds(config, 2)
    parts = [stage_sizes(whole, moe, Stage(index=index, bounds=bounds)) for index in range(2)]
    assert sum(sum(train_flops(part, 4096)) for part in parts) == pytest.approx(sum(train_flops(whole, 4096)))
    for name in ("layers", "attention_layers", "linear_states", "moe_layers", "dense_params", "expert_params"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name), name


def test_a_dense_model_has_no_cut_here() -> None:
    with pytest.raises(UserError, match="sizes are known for"):
        stage_bounds({**TINY["mixtral"], "model_type": "llama"}, 2)
