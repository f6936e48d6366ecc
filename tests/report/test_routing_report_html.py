"""What the routing report embeds: it cannot leave its place, and two megabytes hold it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import torch

from moe_models.report import data, history, layouts, page, record
from tests.report.test_routing_report import HOSTILE
from tests.support.recipe import ROOT
from tests.support.report import save_run


def test_what_is_embedded_cannot_leave_its_place() -> None:
    hostile = {"a": [HOSTILE, "@@data@@", "\ud800"], "@@policy@@": "</script>"}
    written = page.assemble(hostile, "</title><script>hit()</script>@@data@@")
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', written)
    assert embedded is not None
    assert json.loads(embedded[1]) == hostile
    assert embedded[1].isascii()
    assert not set("<>&") & set(embedded[1])
    assert written.count("</title>") == 1
    assert written.count("<script") == 2
    rest = written.replace(embedded[1], "")
    assert re.findall(r"\b(?:src|href)=.{4}", rest) == ['href="#fl']
    assert set(re.findall(r"\w+://[\w./]*", rest)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_policy_allows_this_script_and_style_and_nothing_else() -> None:
    written = page.assemble({}, "")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', written)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", written, flags=re.DOTALL)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert len(rules) == 5


def test_large_models_fit_into_two_megabytes(tmp_path: Path) -> None:
    layers, experts, top_k = 58, 256, 8  # DeepSeek-V3
    torch.manual_seed(0)
    rows = [torch.randint(0, 40, (480,)).tolist() for _ in range(2)]
    weights, choices = torch.randn(layers, 960, experts).softmax(-1).topk(top_k)
    blocks = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    built = data.build(
        record.Recording(blocks=blocks, rows=rows, choices_LNK=choices.short(), weights_LNK=weights),
        experts,
        lambda token: f" a longer piece {token}",
    )
    save_run(tmp_path / "run", range(1, 31), layers, experts, 8)
    run = history.compact(history.read_history(tmp_path / "run", layers, experts))
    shown = {**built, "run": run, "layouts": layouts.read_layouts(ROOT / "ds_configs", experts)}
    assert len(page.assemble(shown, "large")) < 1_800_000
    assert built["samples"]["count"] >= 5  # full: as many as the limit lets in
    assert len(run["first"]) < 30
    assert any(len(expert) == 2 for layer in built["top"] for expert in layer)
