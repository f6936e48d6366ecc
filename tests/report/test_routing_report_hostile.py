"""Hostile text in the routing report: shown as text, and nothing breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report import test_routing_report_page
from tests.report.test_routing_report_page import Page
from tests.support.recipe import save_model
from tests.support.report import recipe

pytestmark = pytest.mark.browser
browser = test_routing_report_page.browser

PIECES = [
    "</script><img/src=x/onerror=window.hit=1>",
    "<svg/onload=window.hit=1>",
    "<!--<script>",
    "javascript:window.hit=1",
    "${window.hit=1}",
    "'\"`&lt;&amp;",
    "\u202eover",
    "\x07\x1b[31m",
    "مرحبا",
    "עולם",
    "👩‍🚀🎉",
    "e\u0301\u0301",
    "__proto__",
    "constructor",
    "\ufffd",
]


def test_hostile_text_is_shown_as_text(browser: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    checkpoint = save_model(tmp_path / "<img src=x onerror=window.hit=1>")
    core = Tokenizer(WordLevel({piece: n for n, piece in enumerate(["<pad>", *PIECES])}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(checkpoint)
    text = tmp_path / "\udcff\u202e<b onclick=window.hit=1>&lt;.jsonl"
    rows = [" ".join([*PIECES, "\ud800"] * 4), " \u2028 ".join(PIECES)]
    text.write_bytes(b"\n".join(json.dumps({"text": row}).encode() for row in rows) + b'\n{"text": "\xff\xc3 a"}')
    file = recipe()["write_report"](checkpoint, text, tmp_path / "x.html")[0]
    page = Page(browser, file)
    for _ in range(2):
        for stage in ("dispatch", "compute", "combine"):
            page.driver.execute_script("document.querySelector(arguments[0]).click()", f"[value={stage}]")
        page.click("#route")
    seen = "".join(page.texts("#batch bdi"))
    shown = [p.replace("\u202e", "⟨U+202E⟩").replace("\x07\x1b", "␇␛").replace("\u200d", "⟨U+200D⟩") for p in PIECES]
    for piece in shown:
        assert piece in seen, piece
    assert checkpoint.name in page.text("#about")
    assert "⟨U+202E⟩<b onclick=window.hit=1>&lt;.jsonl" in page.text("#about")
    assert "lone surrogates are shown as \ufffd" in page.text("#notes")
    assert "2 places are not UTF-8" in page.text("#notes")
    assert page.driver.execute_script(
        "return [typeof window.hit, document.images.length, document.scripts.length]"
    ) == [
        "undefined",
        0,
        2,
    ]
    assert page.driver.execute_script("return getComputedStyle(document.querySelector('#told')).direction") == "ltr"
    assert page.told_badly() == []
    # Seen to bite: the same script, allowed in, would have been noticed.
    page.driver.execute_script("document.body.append(Object.assign(document.createElement('img'), {src: 'x.png'}))")
    assert any("Content Security Policy" in line["message"] for line in page.driver.get_log("browser"))
