"""Parameters in two groups of the optimizer: those that decay, and those that are spared."""

from __future__ import annotations

from typing import Any


def decay_groups(model: Any, decayed: set[str]) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` as parameter groups of an optimizer.

    Parameters named in ``decayed`` decay by as much as the JSON or ``--weight_decay`` says; the others are spared. A
    group without parameters is left out.
    """
    decays: dict[str, Any] = {"name": "decayed", "params": []}
    spared: dict[str, Any] = {"name": "spared", "params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = decays if name in decayed else spared
            group["params"].append(parameter)
    return [group for group in (decays, spared) if group["params"]]
