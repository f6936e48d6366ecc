"""docs/support-matrix.md: what the parity tests of a `-m conformance` run saw, what is refused; and README's table.

Every case that holds is noted with its largest deviations from single-process Hugging Face; a layout is one row, over
accumulation 1 and 2. tests/conftest.py writes both at the end of a run that selected everything and had no failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = tuple[str, int, str, int, int, int, int, int, int]
"""(family, experts per token, who spreads the experts, ZeRO stage, ranks, EP, TP, SP, PP)"""

SEEN: dict[Row, dict[str, float]] = {}
REFUSED: dict[str, str] = {}
FILLED_BY = {
    "test_parity", "test_native", "test_prmoe", "test_tensor_parallel", "test_sequence_parallel", "test_pipeline",
    "test_support_matrix",
}  # fmt: skip
COLUMNS = ("loss", "auxiliary loss", "gradient norm", "weights")
MARKS = ("<!-- support table: from docs/support-matrix.md -->", "<!-- end of the support table -->")
HEAD = """# Support matrix

`python -m pytest -m conformance` writes this page, on CPU processes in fp32. Each row is five AdamW steps with active
clipping, compared with single-process Hugging Face on the same tokens. Gradient accumulation is 1 and 2 where both were
run. The numbers are the largest relative deviations seen. Weights are the exported ones after the five steps, relative
to the tensor's largest value or to the farthest that AdamW can move. `tests/training/test_parity.py` says what is
allowed, and why.

"""


def note(config: dict[str, Any], model: dict[str, Any], ranks: int, found: dict[str, float]) -> None:
    """Keep the largest deviations of a layout."""
    native = (config.get("moe") or {}).get("layer")
    autoep = (config.get("expert_parallel") or {}).get("autoep_size")
    row = (
        model["model_type"], model["num_experts_per_tok"], "native" if native else "AutoEP" if autoep else "none",
        config["zero_optimization"]["stage"], ranks, native["ep_size"] if native else autoep or 1,
        (config.get("tensor_parallel") or {}).get("autotp_size", 1),
        config.get("sequence_parallel_size", 1),
        (config.get("pipeline") or {}).get("stages", 1),
    )  # fmt: skip
    kept = SEEN.setdefault(row, {})
    kept.update({name: max(value, kept.get(name, 0.0)) for name, value in found.items()})


def text() -> str:
    """The page."""
    lines = ["| family | top-k | experts by | ZeRO | ranks | EP | TP | SP | PP | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (9 + len(COLUMNS)) + "|")
    for row, found in sorted(SEEN.items()):
        figures = [f"{found[name]:.0e}" if name in found else "has none" for name in COLUMNS]
        lines.append("| " + " | ".join([*map(str, row), *figures]) + " |")
    refused = ["", "## Refused before a weight is read", "", "| what | the line on stderr |", "|---|---|"]
    refused += [f"| {name} | {line.replace('|', chr(92) + '|')} |" for name, line in REFUSED.items()]
    return HEAD + "\n".join([*lines, *refused]) + "\n"


def summary(page: str) -> str:
    """README's table: a line for each family and way to spread experts, out of the page."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.count("|") > 13]
    kinds: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows[1:]:
        if not row[0].startswith("-"):
            kinds.setdefault((row[0], row[2]), []).append(row)
    lines = ["| family (`model_type`) | experts by | ZeRO | EP | TP | SP | PP | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (7 + len(COLUMNS)) + "|")
    for (family, spread), found in sorted(kinds.items()):
        values = [", ".join(sorted({row[column] for row in found})) for column in (3, 5, 6, 7, 8)]
        for column in range(9, 9 + len(COLUMNS)):
            numbers = [float(row[column]) for row in found if row[column] != "has none"]
            values.append(f"{max(numbers):.0e}" if numbers else "has none")
        lines.append("| " + " | ".join([f"`{family}`", spread, *values]) + " |")
    return "\n".join(lines)


def in_readme(readme: str, page: str) -> str:
    """README with the table of ``page`` between its marks."""
    before, rest = readme.split(MARKS[0])
    return before + MARKS[0] + "\n" + summary(page) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    readme, page = path.parents[1] / "README.md", text()
    for target, content in ((path, page), (readme, in_readme(readme.read_text(), page))):
        temporary = target.with_suffix(".tmp")
        temporary.write_text(content)
        temporary.replace(target)
