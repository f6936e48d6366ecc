"""A section of the JSON that refuses unknown keys, and pydantic's errors in our words."""

from __future__ import annotations

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


def translate(error: ValidationError, section: str, values: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Pydantic's errors as one line for each key; the branches of a union become one line."""
    lines: list[str] = []
    wrong: dict[str, tuple[object, list[str], str]] = {}
    for problem in error.errors():
        where, inside = section, model
        value: Any = values
        parent, field = model, None
        for part in problem["loc"]:  # a union adds the branch's name to the location: stop where the JSON does
            if not isinstance(value, dict) or part not in value:
                break
            parent, field = inside, _fields(inside).get(str(part))
            inside = next((m for m in get_args(field.annotation) if _is_model(m)), BaseModel) if field else BaseModel
            where, value = f"{where}.{part}", value[part]
        if problem["type"] == "extra_forbidden":
            prefix, _, key = where.rpartition(".")
            lines.append(unknown_key(f"{prefix}.", key, value, _fields(parent)))
        elif problem["type"] == "missing":
            lines.append(f'{where}.{problem["loc"][-1]}: missing; DeepSpeed takes it as false; write "enabled": true')
        else:
            text = _MUST_BE.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
            text = text.replace(", 3 or 3", " or 3")  # ZeroStageEnum has two names for 3
            default = (
                f"; remove the key for the default {show(field.get_default(call_default_factory=True))}"
                if field
                else ""
            )
            wrong.setdefault(where, (value, [], default))[1].append(text)
    for where, (value, texts, mend) in wrong.items():
        shown = f"{where} = {show(value)}: must be" if where != section else f"{where}:"
        lines.append(f"{shown} {' or '.join(dict.fromkeys(texts))}{mend}")
    return lines


def _is_model(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}
