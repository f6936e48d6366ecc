"""What differs between families is a column of ``families/table.py``: nothing else compares a ``model_type``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAMILIES = ROOT / "moe_models" / "families"


def is_model_type(node: ast.expr) -> bool:
    """``model_type``, ``x.model_type``, ``x["model_type"]``, ``x.get("model_type", ...)``, ``str(...)`` of them."""
    if isinstance(node, ast.Name):
        return node.id.endswith("model_type")
    if isinstance(node, ast.Attribute):
        return node.attr.endswith("model_type")
    if isinstance(node, ast.NamedExpr):
        return is_model_type(node.target) or is_model_type(node.value)
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "model_type"
    if isinstance(node, ast.Call):
        return any(is_model_type(word) or is_key(word) for word in node.args)
    return False


def is_key(node: ast.expr) -> bool:
    """The string ``"model_type"``."""
    return isinstance(node, ast.Constant) and node.value == "model_type"


def is_literal(node: ast.expr | ast.pattern) -> bool:
    """A string, or a tuple, list, set or dict of strings."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(is_literal, node.elts))
    if isinstance(node, ast.Dict):
        return any(key is not None and is_literal(key) for key in node.keys)
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def comparisons(source: str) -> Iterator[int]:
    """Line numbers at which a ``model_type`` is compared with a literal (==, !=, in, not in, match)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(is_model_type, sides)) and any(map(is_literal, sides)):
                yield node.lineno
        if isinstance(node, ast.Match) and is_model_type(node.subject):
            yield node.lineno


def test_nothing_outside_families_compares_a_model_type() -> None:
    files = [*(ROOT / "moe_models").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    found = []
    for file in sorted(files):
        if FAMILIES in file.parents:
            continue
        place = str(file.relative_to(ROOT))
        found += [f"{place}:{line}" for line in comparisons(file.read_text())]
    assert not found, f"{found}: make it a column of moe_models/families/table.py"


def test_a_comparison_is_seen() -> None:
    planted = (
        'if family.model_type == "prmoe": pass',
        'if config["model_type"] != "mixtral": pass',
        'if config.get("model_type") in ("olmoe", "mixtral"): pass',
        'if str(config.get("model_type", "")) not in {"olmoe": "why"}: pass',
        'if (model_type := raw.get("x")) == "qwen3": pass',
        "match model_type:\n    case 'olmoe': pass",
    )
    for source in planted:
        assert list(comparisons(source)) == [1], source


def test_looking_up_a_row_is_no_comparison() -> None:
    for source in (
        "if model_type in FAMILIES: pass",
        'if config.get("model_type") not in FAMILIES: pass',
        'if kind == "column": pass',
        'if "model_type" in config: pass',
    ):
        assert not list(comparisons(source)), source
