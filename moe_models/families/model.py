"""An HF MoE model as its ``config.json`` describes it, before a weight is read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_models.families.sizes import ModelSizes, known_family, sizes_of
from moe_models.families.table import Family


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A family's row and one ``config.json`` of that family."""

    family: Family
    """What holds for every model of this ``model_type``."""
    config: Mapping[str, Any]
    """The model's ``config.json``."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """The model with this ``config.json``. Raises UserError for a ``model_type`` without a row."""
        return cls(family=known_family(config), config=config)

    @cached_property
    def sizes(self) -> ModelSizes:
        """Its sizes, read once. Raises UserError where config.json lacks a key."""
        return sizes_of(self.family, self.config)
