"""A sheet for figures: rectangles, lines, arrows and words, as one SVG. The same calls give the same bytes.

A figure has its own white paper, so that it can be read on a dark page too. Nothing in it is loaded from elsewhere.
Lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

INK = "#1f2937"
"""Words and outlines."""
FAINT = "#6b7280"
"""Notes, axes."""
PALE = "#eef2f7"
"""Boxes that hold others."""
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866")
"""Paul Tol's bright scheme: told apart by colour-blind readers too."""
FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif"


class Sheet:
    """One figure."""

    def __init__(self, width: int, height: int, title: str, about: str) -> None:
        """A white sheet; ``title`` and ``about`` are what a screen reader says."""
        self._size = (width, height)
        self._title = title
        self._about = about
        self._parts: list[str] = []
        self._arrow_colours: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "none", line: str = INK, round: int = 4
    ) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect x="{_short(x)}" y="{_short(y)}" width="{_short(width)}" height="{_short(height)}" rx="{round}" '
            f'fill="{fill}" stroke="{line}"/>'
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        colour: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """One line of text, its baseline at ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_short(x)}" y="{_short(y)}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        *,
        colour: str = INK,
        width: float = 1,
        dashed: bool = False,
        arrow: bool = False,
    ) -> None:
        """A straight line, with a head at its end if ``arrow``."""
        more = ' stroke-dasharray="4 3"' if dashed else ""
        if arrow:
            if colour not in self._arrow_colours:
                self._arrow_colours.append(colour)
            more += f' marker-end="url(#head{self._arrow_colours.index(colour)})"'
        self._parts.append(
            f'<line x1="{_short(x1)}" y1="{_short(y1)}" x2="{_short(x2)}" y2="{_short(y2)}" stroke="{colour}" '
            f'stroke-width="{_short(width)}"{more}/>'
        )

    def path(self, points: Iterable[tuple[float, float]], *, colour: str, width: float = 2) -> None:
        """Straight lines from point to point."""
        steps = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
        self._parts.append(f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="{_short(width)}"/>')

    def dot(self, x: float, y: float, *, colour: str, radius: float = 3.5) -> None:
        """A point of a curve."""
        self._parts.append(f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{_short(radius)}" fill="{colour}"/>')

    def svg(self) -> str:
        """The file."""
        width, height = self._size
        heads = "".join(
            f'<marker id="head{number}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>\n'
            for number, colour in enumerate(self._arrow_colours)
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img">',
            f"<title>{escape(self._title)}</title>",
            f"<desc>{escape(self._about)}</desc>",
        ]
        if heads:
            lines.append(f"<defs>\n{heads}</defs>")
        lines.append(f'<rect width="{width}" height="{height}" fill="#ffffff"/>')
        return "\n".join([*lines, *self._parts, "</svg>\n"])


def _short(number: float) -> str:
    """A length with at most one digit after the point."""
    return f"{number:.1f}".removesuffix(".0")
