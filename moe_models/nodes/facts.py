"""What must be equal on every node of a run, as short texts, and what is said where it is not.

Plain data in, lines out; how the nodes meet is in ``moe_models/nodes/meeting.py``.
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

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "accelerate", "datasets")
"""What must have the same version on every node, beside this package's own source and Python."""
MENDS = {
    "launch": "start every node with the same hostfile (or --nnodes), each with its own node rank",
    "version": "install the same on every node",
    "flag": "give every node the same command line",
    "file": "copy the same file to every node, or read it from a folder that all of them share",
}
"""Kind of fact -> what to do where nodes differ."""

Facts = dict[str, dict[str, str]]
"""Kind (a key of :data:`MENDS`) -> name -> value."""


def version_facts() -> dict[str, str]:
    """Python, the packages, and a hash of this package's own source."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    own = f"{installed_version('moe-recipes')} (source {source.hexdigest()[:12]})"
    found = {name: installed_version(name) or "absent" for name in PACKAGES}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found, "moe-recipes": own}


def flag_facts(words: Iterable[str]) -> dict[str, str]:
    """``--name`` -> its words."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, word = word.partition("=")
            flags[name] = word
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return {name: value or "given" for name, value in flags.items()}


def json_facts(where: str, content: Mapping[str, Any]) -> dict[str, str]:
    """``where: dotted.key`` -> value, for every leaf."""
    facts: dict[str, str] = {}
    for key, value in content.items():
        name = f"{where}.{key}" if ": " in where else f"{where}: {key}"
        facts |= json_facts(name, value) if isinstance(value, Mapping) and value else {name: json.dumps(value)}
    return facts


def data_facts(name: str) -> dict[str, str]:
    """Size and a hash of both ends of a data file; names and sizes in a folder. Nothing for a hub id."""
    path, ends = Path(name), 65536
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
        digest = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
        return {name: f"{len(files)} files, {sum(size for _, size in files):,} bytes (names and sizes {digest})"}
    if not path.is_file():
        return {}
    size = path.stat().st_size
    with path.open("rb") as file:
        read = file.read(ends)
        file.seek(max(0, size - ends))
        digest = hashlib.sha256(read + file.read(ends)).hexdigest()[:12]
    return {name: f"{size:,} bytes (both ends {digest})"}


@dataclass(frozen=True)
class Report:
    """What one node says."""

    index: int
    """Node rank."""
    name: str
    """Host name, address and first rank, for messages."""
    address: str
    facts: Facts
    problems: tuple[str, ...]
    """What it found wrong by itself."""


def differences(reports: list[Report]) -> list[str]:
    """A line for everything that is wrong on some node, or not equal on all. Empty: they may start."""
    reports = sorted(reports, key=lambda report: report.index)
    lines: dict[str, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            lines.setdefault(problem, []).append(report.name)
    found = [line if len(on) == len(reports) else f"{', '.join(on)}: {line}" for line, on in lines.items()]
    for kind, mend in MENDS.items():
        for name in dict.fromkeys(name for report in reports for name in report.facts.get(kind, {})):
            values: dict[str, list[str]] = {}
            for report in reports:
                value = report.facts.get(kind, {}).get(name)
                if value is not None or not report.problems:  # what it could not read is among its problems
                    values.setdefault("absent" if value is None else value, []).append(report.name)
            if len(values) > 1:
                (usual, most), *others = sorted(
                    values.items(), key=lambda item: -len(item[1])
                )  # a tie: node 0 is right
                said = "; ".join(f"{value} on {', '.join(on)}" for value, on in others)
                rest = ", ".join(most) if len(most) <= 3 else f"the other {len(most)} nodes"
                found.append(f"{name}: {said}; but {usual} on {rest}; {mend}")
    return found
