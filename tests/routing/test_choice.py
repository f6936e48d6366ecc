"""Which balancing loss acts: every way in, one value out."""

from __future__ import annotations

from typing import Any

import pytest

from moe_models.config.moe_section import Balance
from moe_models.routing.choice import Source, choose_balancing

ALONE: dict[str, Any] = {
    "balance": None,
    "coefficient": 0.02,
    "model_has_loss": True,
    "native_layers_balance": False,
    "layers_differ": False,
    "sequence_parallel": False,
    "trainer_weighs_it": True,
}
OURS = Balance.model_validate({"aux_loss_coef": 0.5})


@pytest.mark.parametrize(
    ("given", "source", "coefficient", "in_evaluation"),
    [
        ({}, Source.MODEL, 0.02, True),
        ({"model_has_loss": False}, Source.MODEL, 0.02, False),
        ({"balance": Balance.model_validate({})}, Source.ROUTING, 0.02, False),
        ({"balance": OURS}, Source.ROUTING, 0.5, False),
        ({"balance": OURS, "sequence_parallel": True}, Source.ROUTING, 0.5, False),
        ({"native_layers_balance": True}, Source.NATIVE, 0.02, False),
        ({"layers_differ": True}, Source.ROUTING, 0.02, False),
        ({"sequence_parallel": True}, Source.ROUTING, 0.02, True),
        ({"sequence_parallel": True, "model_has_loss": False}, Source.ROUTING, 0.02, False),
        ({"trainer_weighs_it": False}, Source.ROUTING, 0.02, True),
        ({"trainer_weighs_it": False, "model_has_loss": False}, Source.MODEL, 0.02, False),
    ],
)
def test_choice(given: dict[str, Any], source: Source, coefficient: float, in_evaluation: bool) -> None:
    chosen = choose_balancing(**{**ALONE, **given})
    assert chosen.source is source
    assert chosen.coefficient == coefficient
    assert chosen.model_loss_in_evaluation is in_evaluation
    assert (chosen.balance is not None) == (source is Source.ROUTING)


def test_layers_that_differ_are_not_pooled() -> None:
    balance = choose_balancing(**{**ALONE, "layers_differ": True}).balance
    assert balance is not None
    assert balance.per_layer


def test_two_ways_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="are two ways to balance the experts"):
        choose_balancing(**{**ALONE, "balance": OURS, "native_layers_balance": True})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "auxiliary loss: 0.02 (WHO), over all layers together, the tokens of a micro-batch (the model's own)"),
        ({"coefficient": 0.0, "model_has_loss": False}, "auxiliary loss: none, its coefficient is 0 (WHO)"),
        ({"model_has_loss": False}, "auxiliary loss: none, the model returns none (output_router_logits)"),
        (
            {"balance": OURS},
            "auxiliary loss: 0.5 (moe.balance.aux_loss_coef of the JSON), over all layers together, the tokens of a "
            "micro-batch (moe.balance)",
        ),
        (
            {"balance": Balance.model_validate({"per_layer": True, "scope": "global_batch", "z_loss_coef": 0.1})},
            "auxiliary loss: 0.02 (WHO), over each layer by itself, the tokens of all ranks (moe.balance); router "
            "z-loss 0.1",
        ),
        (
            {"coefficient": 0.0, "balance": Balance.model_validate({"bias_update_rate": 0.001})},
            "auxiliary loss: none, its coefficient is 0 (WHO); selection bias moved by 0.001 a step",
        ),
        (
            {"native_layers_balance": True},
            "auxiliary loss: 0.02 (WHO), over each layer by itself, the tokens of a micro-batch (l_aux of DeepSpeed's "
            "layers)",
        ),
    ],
)
def test_what_the_first_lines_say(given: dict[str, Any], words: str) -> None:
    assert choose_balancing(**{**ALONE, **given}).describe("WHO") == words
