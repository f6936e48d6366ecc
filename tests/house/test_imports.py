"""The rooms of ``moe_models/``: each package imports only what is below it, and no two import each other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("ranks", "versions", "prmoe", "meter", "disk"),
    ("errors",),
    ("files", "data", "held"),
    ("families",),
    ("config", "nodes"),
    ("preflight",),
    ("planner", "engine"),
    ("routing",),
    ("checkpoint",),
    ("upcycle", "report", "trainer"),
    ("bench",),
)
"""From the ground up. A room may import the rooms of lower floors, and none of its own floor."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(source: str) -> set[str]:
    """The rooms of ``moe_models`` that a module imports, at its top or inside a function."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "moe_models":
            names = [f"moe_models.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        rooms.update(name.split(".")[1] for name in names if name.startswith("moe_models."))
    return rooms


def upward_imports(package: Path) -> list[str]:
    """One line for each import that does not point downwards."""
    lines = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package)
        room = place.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in sorted(imported_rooms(file.read_text()) - {room}):
            if FLOOR_OF[other] >= FLOOR_OF[room]:
                lines.append(f"{place} imports {other}")
    return lines


def test_every_room_has_a_floor() -> None:
    here = {path.stem for path in (ROOT / "moe_models").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert here - {"__init__", "__pycache__"} == set(FLOOR_OF)


def test_imports_point_downwards() -> None:
    assert upward_imports(ROOT / "moe_models") == []


def test_an_import_that_points_upwards_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "layout.py").write_text("def late():\n    from moe_models.engine.cpu import on_cpu\n")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "cpu.py").write_text("from moe_models.planner import memory\n")
    assert upward_imports(tmp_path) == ["config/layout.py imports engine", "engine/cpu.py imports planner"]


def test_at_most_ten_modules_beside_the_packages() -> None:
    modules = [path.name for path in (ROOT / "moe_models").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 10, modules


def test_packages_say_what_they_are_for_and_import_nothing() -> None:
    """``import moe_models.engine.cpu`` must not import DeepSpeed, so packages do not re-export."""
    for file in (ROOT / "moe_models").glob("*/__init__.py"):
        body = ast.parse(file.read_text()).body
        assert len(body) == 1, file
        assert isinstance(body[0], ast.Expr), file
