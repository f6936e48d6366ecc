"""One HTML file out of the data and the files beside this one. It may load nothing and run only what is in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any, NamedTuple

from moe_models.errors import UserError


class Kind(NamedTuple):
    """One kind of page: its files beside this one."""

    body: str
    styles: tuple[str, ...]
    scripts: tuple[str, ...]
    """In this order, one script: each part uses the ones before it."""
    smaller: str
    """What makes the page smaller."""


ROUTING = Kind(
    body="page.html",
    styles=("page.css",),
    scripts=("data.js", "draw.js", "flow.js", "charts.js", "grid.js", "main.js"),
    smaller="route less: --max_tokens 4096",
)
PLAN = Kind(
    body="plan.html",
    styles=("page.css", "plan.css"),
    scripts=("draw.js", "plan.js", "plan_grid.js", "plan_scale.js", "plan_main.js"),
    smaller="plan for one number of GPUs that is a power of two",
)
MAX_BYTES = 2_000_000


def assemble(data: dict[str, Any], title: str, kind: Kind = ROUTING) -> str:
    """The page. Raises UserError if it is larger than ``MAX_BYTES``."""
    # 1. The parts. The policy names script and style by their hashes, so nothing else in the page can run.
    folder = files("moe_models.report")
    style = "\n" + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in kind.styles)
    script = "\n" + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in kind.scripts)
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": embed(data),
    }
    # 2. Put together: text and names of parts alternate. Cut at the placeholders, not replaced one after the other,
    # because what is filled in may look like a placeholder.
    pieces = folder.joinpath(kind.body).read_text(encoding="utf-8").split("@@")
    for place in range(1, len(pieces), 2):
        pieces[place] = parts[pieces[place]]
    page = "".join(pieces)
    # 3. A page that can still be sent by mail.
    size = len(page.encode())
    if size > MAX_BYTES:
        raise UserError(f"the page would have {size:,} bytes, more than {MAX_BYTES:,}; {kind.smaller}")
    return page


def embed(data: dict[str, Any]) -> str:
    """JSON that every HTML parser reads as text only: ASCII, without < > and &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(source: str) -> str:
    """The name of an inline script or style in a Content-Security-Policy."""
    digest = hashlib.sha256(source.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
