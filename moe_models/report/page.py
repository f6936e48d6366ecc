"""One HTML file out of the data and the files beside this one; it may load nothing and run only what is in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

from moe_models.errors import UserError

SCRIPTS = ("data.js", "draw.js", "flow.js", "charts.js", "grid.js", "main.js")
"""In this order, one script: each part uses the ones before it."""
MAX_BYTES = 2_000_000


def assemble(data: dict[str, Any], title: str) -> str:
    """The page. Raises UserError if it is larger than ``MAX_BYTES``."""
    folder = files("moe_models.report")
    style = "\n" + folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n" + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": embed(data),
    }
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    # Cut at the placeholders, not replaced one after the other: what is filled in may look like a placeholder.
    pieces = page.split("@@")
    page = "".join(piece if n % 2 == 0 else parts[piece] for n, piece in enumerate(pieces))
    if (size := len(page.encode())) > MAX_BYTES:
        raise UserError(f"the page would have {size:,} bytes, more than {MAX_BYTES:,}; route less: --max_tokens 4096")
    return page


def embed(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for anything but text: ASCII, without < > and &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(source: str) -> str:
    """What a Content-Security-Policy names an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
