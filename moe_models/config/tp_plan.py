"""Which matrices the JSON splits over tensor-parallel peers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["column", "row", "skip"]
"""Outputs of a matrix split over the peers, inputs split, or the whole matrix on each of them."""


def layer_specs(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of ``tensor_parallel.partition_config.layer_specs`` of a ds_config; empty if there are none."""
    section = raw.get("tensor_parallel") or {}
    plan = section.get("partition_config") or {}
    return list(plan.get("layer_specs") or [])


def spec_of(name: str, specs: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry that AutoTP applies to the module of parameter ``name``: the first that matches, or None."""
    weight = re.sub(r"\.bias$", ".weight", name)  # AutoTP matches modules by their weight
    for spec in specs:
        if any(re.match(pattern, weight) for pattern in spec.get("patterns", [])):
            return spec
    return None


def kind_of(name: str, specs: list[Mapping[str, Any]]) -> Kind:
    """How AutoTP splits parameter ``name``; the bias of a row-parallel layer stays whole."""
    spec = spec_of(name, specs)
    if spec is None:
        return "skip"
    kind: Kind = spec.get("partition_type", "column").lower()
    if kind == "row" and name.endswith(".bias"):
        return "skip"
    return kind
