"""The figures and tables in docs/ are what the code draws, and what they show is asked again in another way."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.tools import figures, write
from docs.tools.svg import Sheet
from moe_models.config.layout import Layout

ROOT = Path(__file__).parents[2]
TEXT = "{http://www.w3.org/2000/svg}text"
AGAIN = "write them anew: python -m docs.tools.write"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_committed_figure_is_what_the_code_draws(name: str) -> None:
    assert (ROOT / "docs" / "figures" / name).read_text() == figures.FIGURES[name](), AGAIN


def test_pages_have_the_tables_that_the_code_writes() -> None:
    for file, text in write.blocks().items():
        assert file.read_text() == text, f"{file.name}: {AGAIN}"
    named = {block[1] for page in write.DOCS.rglob("*.md") for block in write.BLOCK.findall(page.read_text())}
    assert named == set(write.TABLES)


def test_reference_pages_are_what_the_code_writes() -> None:
    for file, text in write.pages().items():
        assert file.read_text() == text, f"{file.name}: {AGAIN}"


def test_the_sample_is_the_page_of_today() -> None:
    """Its data was recorded once; the page around it is what ``./run.sh report`` would write now."""
    for file, text in write.sample().items():
        assert file.read_text() == text, f"{file.name}: {AGAIN}"
        assert len(text) < 250_000, "a sample is small"
        assert "/work" not in text
        assert "/tmp" not in text


def test_no_figure_is_left_over() -> None:
    assert {path.name for path in (ROOT / "docs" / "figures").iterdir()} == set(figures.FIGURES)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_readable_and_loads_nothing(name: str) -> None:
    root = ElementTree.fromstring((ROOT / "docs" / "figures" / name).read_text())
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    assert root.find("{*}title") is not None
    assert root.find("{*}desc") is not None
    for element in root.iter():
        assert not any(key.endswith("href") or key.startswith("on") for key in element.attrib), element.attrib
        for key in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(key, 0)) <= width
        for key in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.attrib.get(key, 0)) <= height
        if element.tag == TEXT:
            assert int(element.attrib["font-size"]) >= 12, "too small for a phone"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(TEXT)]


def test_the_grids_name_every_rank_with_its_experts() -> None:
    """By arithmetic of its own: experts are dealt in runs, EP groups are neighbours, EDP peers are ep_size apart."""
    two_d, three_d = texts(figures.grid_2d()), texts(figures.grid_3d())
    for words, ep_sizes, ranks in ((two_d, (4, 2), 4), (three_d, (4,), 8)):
        assert [int(text.split()[1]) for text in words if text.startswith("GPU ")] == [*range(ranks)] * len(ep_sizes)
        held = [text for text in words if re.fullmatch(r"\d+ to \d+", text)]
        expected = []
        for ep_size in ep_sizes:
            each = 64 // ep_size
            expected += [f"{rank % ep_size * each} to {rank % ep_size * each + each - 1}" for rank in range(ranks)]
        assert held == expected
    assert [text for text in two_d if text.startswith("EDP ")] == ["EDP 0, 2", "EDP 1, 3"]
    assert [text for text in three_d if text.startswith("EDP ")] == ["EDP 0, 4", "EDP 1, 5", "EDP 2, 6", "EDP 3, 7"]
    assert [text for text in three_d if "part" in text and "of 2" in text] == [
        "dense: part 1 of 2",
        "dense: part 2 of 2",
    ] * 4
    assert "Frames: TP pairs (0, 1), (2, 3), (4, 5), (6, 7) read the same tokens" in three_d


def test_the_data_flow_is_what_torch_computes() -> None:
    """Order, split sizes and sums of the figure against tensors: each row finds its way home."""
    import torch

    size = figures.TWO.ep_size
    each = figures.FEW // size
    chosen = [torch.tensor(choices) for choices in figures.CHOICES]
    order = [torch.argsort(choices.view(-1), stable=True) for choices in chosen]
    for rank in range(size):
        K = chosen[rank].shape[1]
        rows = [(figures.TOKENS[rank][int(place) // K], int(chosen[rank].view(-1)[place])) for place in order[rank]]
        assert rows == figures.packed(rank)
        counts = torch.bincount(chosen[rank].view(-1), minlength=figures.FEW).view(size, each).sum(1)
        assert counts.tolist() == figures.send_counts(rank)
        # What arrives is what all senders have for this rank's experts.
        assert len(figures.arrived(rank)) == sum(figures.send_counts(sender)[rank] for sender in range(size))
        assert {expert for _, expert in figures.arrived(rank)} <= set(figures.TWO.experts_of(rank, figures.FEW))
    everywhere = sorted(row for rank in range(size) for row in figures.arrived(rank))
    assert everywhere == sorted(row for rank in range(size) for row in figures.packed(rank))


def test_the_bars_are_bytes_by_hand() -> None:
    """Mixtral-8x7B at EP 2 and EP 8 on 8 GPUs, from its shapes alone."""
    layers, D, F, E, K, T, steps = 32, 4096, 14336, 8, 2, 4096, 4
    expert_bytes = layers * E * 3 * D * F * 2
    for ep_size in (2, 8):
        found = figures.sent_gb(figures.flows_of("mistralai/Mixtral-8x7B-v0.1", f"zero1_ep{ep_size}.json"))
        tokens = 4 * steps * layers * T * K * D * 2 * (ep_size - 1) / ep_size
        assert found["EP"] == pytest.approx(tokens / 1e9, rel=1e-6)
        copies = 8 // ep_size
        held = expert_bytes / ep_size
        # All-reduce of gradients (2 x), all-gather of new weights (1 x).
        assert found["EDP"] == pytest.approx(3 * held * (copies - 1) / copies / 1e9, rel=1e-6)


def test_a_wrong_layout_changes_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is asked of the layout: one that deals experts in turns is drawn otherwise."""
    before = figures.grid_2d()
    monkeypatch.setattr(Layout, "experts_of", lambda self, rank, experts: range(rank, experts, self.ep_size))
    assert figures.grid_2d() != before


def test_words_in_a_figure_are_escaped() -> None:
    sheet = Sheet(10, 10, "<b>", "a & b")
    sheet.words(5, 5, "<script>alert(1)</script>")
    root = ElementTree.fromstring(sheet.svg())
    assert [element.text for element in root.iter(TEXT)] == ["<script>alert(1)</script>"]
