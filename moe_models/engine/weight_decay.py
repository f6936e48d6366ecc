"""Parameters in two groups of the optimizer: those that decay, and those that are spared."""

from __future__ import annotations

from typing import Any


def decay_groups(model: Any, decayed: set[str]) -> list[dict[str, Any]]:
    """The trained parameters of ``model``, those named in ``decayed`` apart; a group without any is left out."""
    groups: dict[str, dict[str, Any]] = {
        "decayed": {"name": "decayed", "params": []},  # by as much as the JSON or --weight_decay says
        "spared": {"name": "spared", "params": [], "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["decayed" if name in decayed else "spared"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
