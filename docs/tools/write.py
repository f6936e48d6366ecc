"""Write every part of docs/ that follows from the code: ``python -m docs.tools.write``, from the repository's root.

Whole files (figures, reference pages, the sample of the routing page) are replaced. In a page that people write, what
is between ``<!-- code: NAME -->`` and ``<!-- end of NAME -->`` is. ``tests/docs/test_figures.py`` and its neighbours
fail where this would change a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from docs.tools import reference
from docs.tools.figures import FIGURES
from docs.tools.models import ROOT
from docs.tools.tables import TABLES

DOCS = ROOT / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "reference/flags.md": reference.flags_page,
    "reference/training-flags.md": reference.training_flags_page,
    "reference/seams.md": reference.seams_page,
}
"""File in docs/ -> what writes it."""
BLOCK = re.compile(r"(<!-- code: (\S+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def figures() -> dict[Path, str]:
    """The figures as the code draws them."""
    return {DOCS / "figures" / name: draw() for name, draw in FIGURES.items()}


def pages() -> dict[Path, str]:
    """The reference pages."""
    return {DOCS / name: write() for name, write in PAGES.items()}


def sample() -> dict[Path, str]:
    """The sample of the routing page: the data that is in it, in the page as the code makes it today."""
    from moe_models.report.page import assemble

    file = DOCS / "samples" / "routing.html"
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{file}: has no data; make one with ./run.sh report")
    data = json.loads(found[1])
    return {file: assemble(data, f"Routing of {data['checkpoint']}")}


def blocks() -> dict[Path, str]:
    """The pages with tables of code in them, their tables new."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if BLOCK.search(text):
            found[page] = BLOCK.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[4], text)
    return found


def main() -> None:
    """Write what changed, and say so."""
    for group in (figures, pages, blocks, sample):
        for file, text in group().items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
                print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
