"""Reads the lessons (docs/concepts, docs/cookbook): their prose, and the numbers in it that state something."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LESSONS = [page for folder in ("concepts", "cookbook") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]

NUMBER = re.compile(r"(?<![\w.,/-])\d[\d,]*(?:\.\d+)?(?![\w])")
"""A number that is no part of a name: not that of top-2, H200, 2D or Mixtral-8x7B."""
NAMES = (
    r"```.*?```",  # code
    r"<!-- code: (\S+) -->.*?<!-- end of \1 -->",  # written by the code and compared as a whole
    r"<!--.*?-->",
    r"`[^`]*`",
    r"\]\([^)]*\)",  # where a link leads
    r"(?m)^\d+\. ",  # of a list
    r"(?m)^#+ [^\n]*$",  # headings
    r"arXiv [\d.]+(?:, section \d)?",
    r"\b(?:EP|EDP|TP|PP|DP|SP|ZeRO|stages?|[Ss]teps?|K of)[ -]\d+(?:(?:, | to | and )\d+)*",  # a label
)
"""What is no statement, however many digits it has."""


def prose(page: Path) -> str:
    """The page's text with everything blanked that states nothing, white space joined."""
    text = page.read_text()
    for pattern in NAMES:
        text = re.sub(pattern, lambda found: re.sub(r"\S", " ", found[0]), text, flags=re.DOTALL)
    return text


def joined(text: str) -> str:
    """The text with runs of white space as one space."""
    return re.sub(r"\s+", " ", text)


def unexplained(page: Path, sentences: list[str]) -> list[str]:
    """Numbers of the page's prose that none of the sentences covers, each with what is around it.

    Sentences are as they stand in the page, line breaks aside.
    """
    blanked = prose(page)
    original = page.read_text()
    covered: list[tuple[int, int]] = []
    for sentence in sentences:
        pattern = r"\s+".join(map(re.escape, sentence.split()))
        covered += [found.span() for found in re.finditer(pattern, original)]
    left = []
    for found in NUMBER.finditer(blanked):
        if not any(start <= found.start() and found.end() <= end for start, end in covered):
            around = joined(original[max(0, found.start() - 60) : found.end() + 40])
            left.append(f"{page.name}: {found[0]}: ...{around}...")
    return left
