"""Stages of a model, one after the other in this process, against the whole model. No ranks, no DeepSpeed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from moe_models.engine.pipeline.cut import Elsewhere, keep_stage
from moe_models.families.stages import Stage, stage_bounds
from tests.support.tiny import TINY, four_layers, make_model


def through_stages(stages: list[Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [B, T, V]: hidden states pass from stage to stage, as ``engine/pipeline/stages.py`` passes them."""
    mask = {"attention_mask": batch["attention_mask"]}
    hidden_BTD = stages[0].model(input_ids=batch["input_ids"], use_cache=False, **mask).last_hidden_state
    for stage in stages[1:-1]:
        hidden_BTD = stage.model(inputs_embeds=hidden_BTD, use_cache=False, **mask).last_hidden_state
    logits: torch.Tensor = stages[-1](inputs_embeds=hidden_BTD, use_cache=False, **mask).logits
    return logits


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_the_stages_together_are_the_model(model_type: str) -> None:
    """Logits and gradients bit for bit, with padding: each operation is the same one."""
    changes = four_layers(model_type)
    whole = make_model(model_type, **changes)
    bounds = stage_bounds(whole.config.to_dict(), 3)
    stages = []
    for index in range(3):
        part = make_model(model_type, **changes)
        keep_stage(part, Stage(index=index, bounds=bounds))
        stages.append(part)
    batch = {"input_ids": torch.randint(3, 64, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, 9:] = 0

    expected = whole(**batch, use_cache=False).logits
    expected.square().mean().backward()
    found = through_stages(stages, batch)
    found.square().mean().backward()

    assert torch.equal(found, expected)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    held: list[str] = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            held.append(name)
            wanted = gradients[name]
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or torch.equal(parameter.grad, wanted), name
    assert sorted(held) == sorted(gradients), "each parameter is in one stage"
    assert [stop - start for start, stop in pairwise(bounds)] == [
        sum(not isinstance(layer, Elsewhere) for layer in stage.model.layers) for stage in stages
    ]
