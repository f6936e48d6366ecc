"""Which matrices the JSON splits over tensor-parallel peers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

Kind = Literal["column", "row", "skip"]


def layer_specs(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of ``tensor_parallel.partition_config.layer_specs`` of a ds_config; empty if there are none."""
    return list(((raw.get("tensor_parallel") or {}).get("partition_config") or {}).get("layer_specs") or [])


def spec_of(name: str, specs: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry that AutoTP applies to the module of parameter ``name``, or None."""
    if not specs:
        return None
    weight = re.sub(r"\.bias$", ".weight", name)
    return next((spec for spec in specs if any(re.match(p, weight) for p in spec.get("patterns", []))), None)


def kind_of(name: str, specs: list[Mapping[str, Any]]) -> Kind:
    """How AutoTP splits parameter ``name``; the bias of a row-parallel layer stays whole."""
    spec = spec_of(name, specs)
    kind: Kind = "skip" if spec is None else spec.get("partition_type", "column").lower()
    return "skip" if kind == "row" and name.endswith(".bias") else kind
