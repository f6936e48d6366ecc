"""What must be equal on every node of a run, as short texts, and the lines that report a difference.

Plain data in, lines out. How the nodes meet is in ``moe_models/nodes/meeting.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_models.versions import installed_version

PACKAGE = Path(__file__).parents[1]
"""The folder of ``moe_models``, all rooms of it: every node must run the same code."""
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "accelerate", "datasets")
"""Other packages that must have the same version on every node."""
FIXES = {
    "launch": "start every node with the same hostfile (or --nnodes), each with its own node rank",
    "version": "install the same on every node",
    "flag": "give every node the same command line",
    "file": "copy the same file to every node, or read it from a folder that all of them share",
}
"""Kind of fact -> what to do where nodes differ."""
BYTES_AT_EACH_END = 65536
"""How much of a data file is hashed at its start, and as much at its end."""

Facts = dict[str, dict[str, str]]
"""Kind (a key of :data:`FIXES`) -> name -> value."""


def version_facts() -> dict[str, str]:
    """Versions of Python, of :data:`PACKAGES`, and of this package with a hash of its source."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        versions[name] = installed_version(name) or "absent"
    versions["moe-recipes"] = f"{installed_version('moe-recipes')} (source {source_hash(PACKAGE)})"
    return versions


def source_hash(package: Path) -> str:
    """12 hex digits that follow from the content of every ``.py`` file under ``package``."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def flag_facts(words: Iterable[str]) -> dict[str, str]:
    """``--name`` -> its words; "given" for a flag without any."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return {name: value or "given" for name, value in flags.items()}


def json_facts(where: str, content: Mapping[str, Any]) -> dict[str, str]:
    """``where: dotted.key`` -> value, for every leaf."""
    facts: dict[str, str] = {}
    separator = "." if ": " in where else ": "
    for key, value in content.items():
        name = f"{where}{separator}{key}"
        if isinstance(value, Mapping) and value:
            facts |= json_facts(name, value)
        else:
            facts[name] = json.dumps(value)
    return facts


def data_facts(name: str) -> dict[str, str]:
    """Size and a hash of both ends of a data file; names and sizes in a folder. Nothing for a hub id.

    The middle of a file is not read: it may be hundreds of GB, and every node would read it before it starts.
    """
    path = Path(name)
    if path.is_dir():
        sizes = [(str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file()]
        sizes.sort()
        digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
        total = sum(size for _, size in sizes)
        return {name: f"{len(sizes)} files, {total:,} bytes (names and sizes {digest})"}
    if not path.is_file():
        return {}
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(BYTES_AT_EACH_END)
        file.seek(max(0, size - BYTES_AT_EACH_END))
        end = file.read(BYTES_AT_EACH_END)
    digest = hashlib.sha256(start + end).hexdigest()[:12]
    return {name: f"{size:,} bytes (both ends {digest})"}


@dataclass(frozen=True)
class Report:
    """What one node brings to the comparison."""

    index: int
    """Node rank."""
    name: str
    """Host name, address and first rank, for messages."""
    address: str
    facts: Facts
    problems: tuple[str, ...]
    """What this node found wrong by itself."""


def differences(reports: list[Report]) -> list[str]:
    """A line for everything that is wrong on some node, or not equal on all. Empty: they may start."""
    reports = sorted(reports, key=lambda report: report.index)
    lines = _own_problems(reports)
    for kind, fix in FIXES.items():
        # A dict keeps the order in which the nodes name their facts; a set would not.
        names = dict.fromkeys(name for report in reports for name in report.facts.get(kind, {}))
        for name in names:
            holders = _holders(reports, kind, name)
            if len(holders) > 1:
                lines.append(f"{name}: {_against_the_majority(holders)}; {fix}")
    return lines


def _own_problems(reports: list[Report]) -> list[str]:
    """Each problem once: without a name where all nodes have it, else with the names of those that do."""
    holders: dict[str, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            holders.setdefault(problem, []).append(report.name)
    lines = []
    for problem, names in holders.items():
        if len(names) == len(reports):
            lines.append(problem)
        else:
            lines.append(f"{', '.join(names)}: {problem}")
    return lines


def _holders(reports: list[Report], kind: str, name: str) -> dict[str, list[str]]:
    """Each value that one fact has -> the names of the nodes that have it."""
    holders: dict[str, list[str]] = {}
    for report in reports:
        value = report.facts.get(kind, {}).get(name)
        if value is None and report.problems:
            continue  # what this node could not read is among its problems
        shown = "absent" if value is None else value
        holders.setdefault(shown, []).append(report.name)
    return holders


def _against_the_majority(holders: dict[str, list[str]]) -> str:
    """``2.12.0 on c; but 2.13.0 on a, b``: the nodes that differ first, then what most nodes have."""
    # Sorting is stable, and node 0 is the first holder of the first value: in a tie node 0 is right.
    (usual, most), *others = sorted(holders.items(), key=lambda item: -len(item[1]))
    told = "; ".join(f"{value} on {', '.join(names)}" for value, names in others)
    rest = ", ".join(most) if len(most) <= 3 else f"the other {len(most)} nodes"
    return f"{told}; but {usual} on {rest}"
