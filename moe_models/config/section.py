"""A section of the JSON that refuses unknown keys, and pydantic's errors in our words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_models.errors import show, unknown_key


class Section(BaseModel):
    """A section that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "float_type": "a number",
    "float_parsing": "a number",
    "none_required": "null",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "a string that is not empty",
    "string_pattern_mismatch": "one attribute name, without dots",
    "value_error": "{error}",
    "assertion_error": "{error}",
}
"""Pydantic's error types in words."""


@dataclass
class _Place:
    """Where in the JSON an error is."""

    where: str
    """The path, e.g. ``zero_optimization.offload_param.device``."""
    value: Any
    """What the JSON says there."""
    model: type[BaseModel]
    """The model of that section; BaseModel where it is a plain value."""
    parent: type[BaseModel]
    """The model of the section around it."""
    field: Any = None
    """The field of ``parent``; None for a key that it does not have."""


def translate(error: ValidationError, section: str, values: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Pydantic's errors as one line for each key; the branches of a union become one line."""
    lines: list[str] = []
    places: dict[str, _Place] = {}
    needs: dict[str, list[str]] = {}

    # 1. Keys too many and too few are a line each. Wrong values are collected, for a union reports one per branch.
    for problem in error.errors():
        place = _find(problem["loc"], section, values, model)
        if problem["type"] == "extra_forbidden":
            prefix, _, key = place.where.rpartition(".")
            lines.append(unknown_key(f"{prefix}.", key, place.value, _fields(place.parent)))
        elif problem["type"] == "missing":
            missing = problem["loc"][-1]
            lines.append(f'{place.where}.{missing}: missing; DeepSpeed takes it as false; write "enabled": true')
        else:
            text = _MUST_BE.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
            text = text.replace(", 3 or 3", " or 3")  # ZeroStageEnum has two names for 3
            places.setdefault(place.where, place)
            needs.setdefault(place.where, []).append(text)

    # 2. One line for each wrong value, with everything that it may be.
    for where, place in places.items():
        allowed = " or ".join(dict.fromkeys(needs[where]))
        fix = ""
        if place.field:
            default = place.field.get_default(call_default_factory=True)
            fix = f"; remove the key for the default {show(default)}"
        if where == section:
            lines.append(f"{where}: {allowed}{fix}")
        else:
            lines.append(f"{where} = {show(place.value)}: must be {allowed}{fix}")
    return lines


def _find(location: tuple[int | str, ...], section: str, values: dict[str, Any], model: type[BaseModel]) -> _Place:
    """The place in the JSON that pydantic's ``location`` means.

    A union adds the branch's name to the location, which the JSON does not have: stop there.
    """
    place = _Place(where=section, value=values, model=model, parent=model)
    for part in location:
        if not isinstance(place.value, dict) or part not in place.value:
            break
        field = _fields(place.model).get(str(part))
        inside: type[BaseModel] = BaseModel
        if field:
            inside = next((kind for kind in get_args(field.annotation) if _is_model(kind)), BaseModel)
        place = _Place(
            where=f"{place.where}.{part}", value=place.value[part], model=inside, parent=place.model, field=field
        )
    return place


def _is_model(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}
