"""Which balancing loss acts in a run: one value, chosen once, before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moe_models.config.moe_section import Balance


class Source(Enum):
    """Where the auxiliary loss of the training forward pass comes from."""

    MODEL = "the model"
    """The Hugging Face model computes it and TRL adds it; without a coefficient there is none."""
    ROUTING = "moe.balance"
    """:class:`~moe_models.routing.callback.Routing`: one or more terms of ``moe_models/routing/losses.py``."""
    NATIVE = "native layers"
    """``l_aux`` of DeepSpeed's own layers."""


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """What balances the experts of a run."""

    source: Source
    balance: Balance | None
    """The section that acts; None where the model's or the native layers' own loss does."""
    coefficient: float
    """Weight of the auxiliary loss."""
    model_loss_in_evaluation: bool
    """Whether evaluation adds the model's own auxiliary loss, as TRL does."""

    def describe(self, coefficient_from: str) -> str:
        """One line for the start of a run: the coefficient, who said it, and what it acts on.

        ``coefficient_from``: who said it, where ``moe.balance`` did not.
        """
        terms = []
        scope = "the tokens of a micro-batch"
        layers = "over all layers together"
        whose = "the model's own"
        if self.balance is not None:
            scope = _SCOPES[self.balance.scope]
            layers = "over each layer by itself" if self.balance.per_layer else layers
            whose = "moe.balance"
            if self.balance.aux_loss_coef is not None:
                coefficient_from = "moe.balance.aux_loss_coef of the JSON"
            if self.balance.z_loss_coef:
                terms.append(f"router z-loss {self.balance.z_loss_coef:g}")
            if self.balance.bias_update_rate:
                terms.append(f"selection bias moved by {self.balance.bias_update_rate:g} a step")
        if self.source is Source.NATIVE:
            layers = "over each layer by itself"
            whose = "l_aux of DeepSpeed's layers"
        acts = self.source is not Source.MODEL or self.model_loss_in_evaluation
        if self.coefficient == 0:
            first = f"auxiliary loss: none, its coefficient is 0 ({coefficient_from})"
        elif not acts:
            first = "auxiliary loss: none, the model returns none (output_router_logits)"
        else:
            first = f"auxiliary loss: {self.coefficient:g} ({coefficient_from}), {layers}, {scope} ({whose})"
        return "; ".join([first, *terms])


_SCOPES = {
    "micro_batch": "the tokens of a micro-batch",
    "global_batch": "the tokens of all ranks",
    "sequence": "each sequence",
}
"""``moe.balance.scope`` -> whose tokens are balanced."""


def choose_balancing(
    *,
    balance: Balance | None,
    coefficient: float,
    model_has_loss: bool,
    native_layers_balance: bool,
    layers_differ: bool,
    sequence_parallel: bool,
    trainer_weighs_it: bool,
) -> Balancing:
    """The balancing of a run.

    Args:
        balance: ``"moe": {"balance": ...}`` of the JSON, if it has one.
        coefficient: TRL's ``router_aux_loss_coef``: the flag, or the config's own.
        model_has_loss: whether TRL would add the model's own auxiliary loss.
        native_layers_balance: ``"moe": {"layer": {"aux_loss": "layer"}}``.
        layers_differ: layers have different numbers of experts, so that they cannot be pooled (PR-MoE).
        sequence_parallel: a rank sees only a part of each sequence.
        trainer_weighs_it: the Trainer adds the model's loss itself, as TRL's do, and weighs it over accumulation and
            ranks. A plain Trainer leaves it inside the model's loss, where it is multiplied by the number of ranks.

    Raises:
        ValueError: if the JSON asks for two ways at once.
    """
    # Native layers hand out a loss of their own; it takes the place of the model's.
    if native_layers_balance:
        if balance is not None:
            raise ValueError(
                'moe.layer.aux_loss = "layer" and moe.balance are two ways to balance the experts; remove one of them'
            )
        return Balancing(source=Source.NATIVE, balance=None, coefficient=coefficient, model_loss_in_evaluation=False)

    # The JSON asks for our terms.
    if balance is not None:
        if balance.aux_loss_coef is not None:
            coefficient = balance.aux_loss_coef
        return Balancing(
            source=Source.ROUTING, balance=balance, coefficient=coefficient, model_loss_in_evaluation=False
        )

    # The model's own loss pools the layers.
    if layers_differ:
        per_layer = Balance.model_validate({"per_layer": True})
        return Balancing(
            source=Source.ROUTING, balance=per_layer, coefficient=coefficient, model_loss_in_evaluation=False
        )

    # The model's own loss would balance the tokens of each rank alone. Evaluation is not split and keeps it.
    # upstream: transformers 5.20.2 (issue 48690): average_tokens_across_devices multiplies the auxiliary loss by the
    # ranks. Remove `trainer_weighs_it` when: Trainer scales the language loss only.
    if sequence_parallel or (model_has_loss and not trainer_weighs_it):
        return Balancing(
            source=Source.ROUTING,
            balance=Balance.model_validate({}),
            coefficient=coefficient,
            model_loss_in_evaluation=model_has_loss,
        )

    return Balancing(
        source=Source.MODEL, balance=None, coefficient=coefficient, model_loss_in_evaluation=model_has_loss
    )
