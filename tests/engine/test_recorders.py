"""The registry of output recorders of transformers 5.23, as DeepSpeed 0.19.8 reads it.

The class below behaves as that of 5.23.0: keyed by model, ``get`` with one argument. The installed one may be older.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import output_capturing

from moe_models.engine.autoep import name_recorders_by_class


class Registry(dict[Any, Any]):
    def __setitem__(self, model: Any, recorders: Any) -> None:
        super().__setitem__(type(model), recorders)

    def get(self, model: Any) -> Any:  # type: ignore[override]
        return super().get(type(model)) or {}


class Model:
    """A model's class."""


def test_it_answers_to_models_and_to_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    monkeypatch.setattr(output_capturing, "_CanRecordRegistry", Registry, raising=False)
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", registry)
    with pytest.raises(TypeError):
        registry.get(str(Model), None)  # type: ignore[call-arg]  # as DeepSpeed does

    name_recorders_by_class()
    name_recorders_by_class()
    model = Model()
    registry[model] = {"router_logits": 1}
    assert registry.get(model) == {"router_logits": 1}
    assert registry.get(str(Model), None) == {"router_logits": 1}  # type: ignore[call-arg]
    registry.update({str(Model): {"router_logits": 2}})  # how DeepSpeed points it at its router
    assert registry.get(model) == {"router_logits": 2}
    assert registry.get("another", 3) == 3  # type: ignore[call-arg]
    assert registry.get(registry) == {}


def test_before_5_23_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, Any] = {}
    monkeypatch.delattr(output_capturing, "_CanRecordRegistry", raising=False)
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", registry)
    name_recorders_by_class()
    assert type(registry) is dict
