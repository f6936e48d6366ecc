"""The figures of the lessons: who holds what, who talks to whom, from ``config/layout.py`` and ``planner/traffic.py``.

Each function draws one figure. :data:`FIGURES` names the files. Nothing in a figure is written down twice: groups,
experts, rows and bytes are asked of the code that trains and plans. ``tests/docs/test_figures.py`` asks again in
another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import log10

from docs.tools.models import ROOT, model, short
from docs.tools.svg import COLOURS, FAINT, INK, PALE, Sheet
from moe_models.config.ds_config import load_ds_config
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.planner.case import Case
from moe_models.planner.traffic import Flow, traffic

EXPERTS = 64
"""Of the model in both grids."""
EXAMPLE = Work(micro_batch=1, length=4096, accumulation=4, element_bytes=2, recompute=False)
"""A step of the bytes figure: 4 micro-batches of one sequence on each GPU, bf16."""


# --- grids: a row for each EP group, a column for each EDP group


def span(numbers: Sequence[int]) -> str:
    """``0 to 15`` for neighbouring numbers, ``0 and 1`` for two."""
    word = "and" if len(numbers) == 2 else "to"
    return f"{numbers[0]} {word} {numbers[-1]}"


def names(ranks: Sequence[int]) -> str:
    """``0, 1, 2`` of a group's ranks."""
    return ", ".join(map(str, ranks))


def draw_grid(sheet: Sheet, layout: Layout, top: float, cell: float, title: str) -> float:
    """The ranks of a layout; returns where the drawing ends. EP groups are rows, EDP groups columns."""
    left = 150.0
    gap = 16.0
    height = 96.0
    row_height = height + 46

    # 1. Names of the columns: the ranks that hold the same experts.
    sheet.words(16, top + 18, title, anchor="start", size=16, bold=True)
    head = top + 34
    if layout.edp_size > 1:
        sheet.words(left - 12, head + 14, "average experts", anchor="end", size=12, colour=FAINT)
        for column, group in enumerate(layout.edp_groups()):
            x = left + column * (cell + gap) + cell / 2
            sheet.words(x, head + 14, f"EDP {names(group)}", size=12, colour=FAINT)
        head += 28

    # 2. Rows: the ranks that exchange tokens.
    for row, group in enumerate(layout.ep_groups()):
        y = head + row * row_height
        sheet.words(left - 12, y + height / 2 - 6, f"EP group {row}", anchor="end", bold=True)
        sheet.words(left - 12, y + height / 2 + 12, f"ranks {names(group)}", anchor="end", size=12, colour=FAINT)
        for column, rank in enumerate(group):
            draw_rank(sheet, layout, rank, left + column * (cell + gap), y, cell, height)
        # 3. What goes along the row.
        below = y + height + 16
        right = left + len(group) * (cell + gap) - gap
        sheet.line(left, below, right, below, colour=COLOURS[1], width=2, arrow=True)
        sheet.line(right, below, left, below, colour=COLOURS[1], width=2, arrow=True)
        text = "tokens: all-to-all, twice in each MoE layer"
        sheet.words((left + right) / 2, below + 15, text, size=12, colour=COLOURS[1])
        # 4. Tensor-parallel peers are neighbours: a frame around them.
        if layout.tp_size > 1:
            for start in range(0, len(group), layout.tp_size):
                x = left + start * (cell + gap) - 5
                wide = layout.tp_size * (cell + gap) - gap + 10
                sheet.box(x, y - 5, wide, height + 10, line=COLOURS[5], round=8)
    rows = len(layout.ep_groups())
    return head + rows * row_height


def draw_rank(sheet: Sheet, layout: Layout, rank: int, x: float, y: float, width: float, height: float) -> None:
    """One GPU: its share of the dense part, and its experts in the colour of its place in the EP group."""
    place = layout.coordinates(rank)
    sheet.box(x, y, width, height, fill="#ffffff")
    sheet.words(x + width / 2, y + 18, f"GPU {rank}", bold=True)
    dense = "dense part: all"
    if layout.tp_size > 1:
        dense = f"dense: part {place.tp + 1} of {layout.tp_size}"
    sheet.box(x + 6, y + 26, width - 12, 26, fill=PALE, line="none")
    sheet.words(x + width / 2, y + 44, dense, size=12)
    sheet.box(x + 6, y + 56, width - 12, 34, fill=COLOURS[place.ep], line="none")
    dark = COLOURS[place.ep] in (COLOURS[0], COLOURS[2], COLOURS[5])
    colour = "#ffffff" if dark else INK
    sheet.words(x + width / 2, y + 70, "experts", size=12, colour=colour)
    sheet.words(x + width / 2, y + 85, span(layout.experts_of(rank, EXPERTS)), size=12, colour=colour)


def grid_2d() -> str:
    """4 GPUs, 64 experts, in the two ways to spread them: EP 4, and EP 2 with two copies."""
    about = f"Two ways to spread {EXPERTS} experts over 4 GPUs that each hold the whole dense part."
    sheet = Sheet(740, 596, "The 2D grid: data and expert parallelism", about)
    one = Layout(4, ep_size=4)
    two = Layout(4, ep_size=2)
    end = draw_grid(sheet, one, 12, 128, f"EP 4: one copy of the experts, {EXPERTS // 4} on each GPU")
    end = draw_grid(sheet, two, end + 24, 128, f"EP 2 x EDP 2: two copies, {EXPERTS // 2} experts on each GPU")
    ranks = names(two.zero_groups()[0])
    draw_note(sheet, end + 14, f"In both, ranks {ranks} read different tokens and average the dense part's gradients.")
    return sheet.svg()


def grid_3d() -> str:
    """8 GPUs as TP pairs x expert groups x replicas."""
    layout = Layout(8, ep_size=4, tp_size=2)
    about = f"8 GPUs: 4 tensor-parallel pairs, 2 EP groups of 4, {EXPERTS} experts in 2 copies."
    sheet = Sheet(740, 454, "The 3D grid: data, expert and tensor parallelism", about)
    title = f"TP {layout.tp_size} x EP {layout.ep_size} x EDP {layout.edp_size}: {EXPERTS} experts in two copies"
    end = draw_grid(sheet, layout, 12, 128, title)
    pairs = ", ".join(f"({names(group)})" for group in layout.tp_groups())
    dense = " and ".join(f"({names(group)})" for group in layout.zero_groups())
    draw_note(sheet, end + 10, f"Frames: TP pairs {pairs} read the same tokens", COLOURS[5])
    draw_note(sheet, end + 28, "and sum activations in every layer (all-reduce).", COLOURS[5])
    draw_note(sheet, end + 52, f"{dense} hold the same part of the dense matrices")
    draw_note(
        sheet, end + 70, f"and average its gradients. Columns average the experts of their {layout.edp_size} GPUs."
    )
    return sheet.svg()


def draw_note(sheet: Sheet, y: float, text: str, colour: str = FAINT) -> None:
    """A line below a grid."""
    sheet.words(16, y, text, anchor="start", size=13, colour=colour)


# --- two ranks, from tokens to tokens

TWO = Layout(2, ep_size=2)
FEW = 4
"""Experts of the data flow."""
CHOICES = (
    ((0, 2), (3, 1), (2, 3), (0, 3)),
    ((1, 2), (2, 0), (0, 2), (3, 1)),
)
"""CHOICES[rank][token]: the experts that its router picked, the heaviest first. Uneven, as real ones are."""
TOKENS = ("abcd", "efgh")
"""Names of the tokens of each rank."""

Row = tuple[str, int]
"""(token, expert): one row [D] on its way."""


def packed(rank: int) -> list[Row]:
    """The rows that a rank sends, in the order of the experts: what ``argsort`` of the choices gives (stable)."""
    rows = [(token, expert) for token, experts in zip(TOKENS[rank], CHOICES[rank], strict=True) for expert in experts]
    return sorted(rows, key=lambda row: row[1])


def send_counts(rank: int) -> list[int]:
    """Rows that a rank sends to each rank: the input splits of the first all-to-all."""
    owners = [TWO.ep_rank_of(expert, FEW) for _, expert in packed(rank)]
    return [owners.count(owner) for owner in range(TWO.ep_size)]


def arrived(rank: int) -> list[Row]:
    """The rows that a rank gets, one sender after the other, regrouped by expert."""
    rows = [row for sender in range(TWO.ep_size) for row in packed(sender) if row[1] in TWO.experts_of(rank, FEW)]
    return sorted(rows, key=lambda row: row[1])


CHIP = 33.0
HALF = 370.0
"""Width of a rank's side."""


def two_ranks() -> str:
    """Both all-to-alls of one MoE layer on two ranks."""
    about = "Each rank routes its tokens, sends each row to the rank of its expert, and gets it back."
    sheet = Sheet(760, 850, "One MoE layer on two ranks", about)
    for rank in range(TWO.ep_size):
        left = 15 + rank * HALF
        experts = span(TWO.experts_of(rank, FEW))
        sheet.box(left - 5, 8, HALF - 12, 834, fill="none", line="#d1d5db", round=8)
        sheet.words(left + 8, 30, f"rank {rank}: holds experts {experts}", anchor="start", size=15, bold=True)
        draw_side(sheet, rank, left)
    draw_exchange(sheet, 318, "first all-to-all: dispatch", send_counts)
    draw_exchange(sheet, 572, "second all-to-all: combine", lambda rank: [send_counts(to)[rank] for to in range(2)])
    return sheet.svg()


def draw_side(sheet: Sheet, rank: int, left: float) -> None:
    """One rank from top to bottom."""
    # 1. Tokens and what the router says of them.
    step(sheet, left, 58, f"1  tokens  [T, D], T = {len(TOKENS[rank])}")
    for place, token in enumerate(TOKENS[rank]):
        chip(sheet, left + 8 + place * 80, 68, token, "#ffffff")
    step(sheet, left, 132, f"2  router: top-{len(CHOICES[rank][0])} of {FEW} experts")
    for place, (token, experts) in enumerate(zip(TOKENS[rank], CHOICES[rank], strict=True)):
        for number, expert in enumerate(experts):
            chip(sheet, left + 8 + place * 80 + number * (CHIP + 1), 142, f"{token}{expert}", COLOURS[expert])

    # 2. Rows in the order of the experts: what is sent.
    counts = send_counts(rank)
    step(sheet, left, 206, "3  rows in the order of experts  [T x K, D]")
    draw_rows(sheet, left, 216, packed(rank))
    splits = ", ".join(f"{count} to rank {to}" for to, count in enumerate(counts))
    sheet.words(left + 8, 270, f"input splits: {splits}", anchor="start", size=12, colour=FAINT)

    # 3. Rows that came: what the experts compute.
    rows = arrived(rank)
    step(sheet, left, 424, f"4  rows of its own experts  [R, D], R = {len(rows)}")
    draw_rows(sheet, left, 434, rows)
    step(sheet, left, 498, "5  experts: down(silu(gate(x)) * up(x))")
    sheet.words(left + 8, 518, "on each run of equal colour, in one grouped product", anchor="start", size=12)

    # 4. Home again.
    step(sheet, left, 678, "6  its own rows are back  [T x K, D]")
    draw_rows(sheet, left, 688, packed(rank))
    step(sheet, left, 754, "7  weighted sums, in the order of tokens  [T, D]")
    for place, token in enumerate(TOKENS[rank]):
        chip(sheet, left + 8 + place * 80, 764, token, "#ffffff")
    chosen = " and ".join(map(str, CHOICES[rank][0]))
    first = TOKENS[rank][0]
    sheet.words(left + 8, 826, f"{first}: the sum of what experts {chosen} say of it", anchor="start", size=12)


def step(sheet: Sheet, left: float, y: float, text: str) -> None:
    """Name of a step."""
    sheet.words(left + 8, y, text, anchor="start", size=13, bold=True)


def chip(sheet: Sheet, x: float, y: float, text: str, colour: str) -> None:
    """A token or a row."""
    sheet.box(x, y, CHIP, 36, fill=colour)
    sheet.words(x + CHIP / 2, y + 23, text, colour="#ffffff" if colour in (COLOURS[0], COLOURS[2]) else INK)


def draw_rows(sheet: Sheet, left: float, y: float, rows: list[Row]) -> None:
    """Rows side by side; a gap between experts of two ranks."""
    for place, (token, expert) in enumerate(rows):
        chip(sheet, left + 8 + place * (CHIP + 1), y, f"{token}{expert}", COLOURS[expert])


def draw_exchange(sheet: Sheet, top: float, title: str, counts: Callable[[int], list[int]]) -> None:
    """Four arrows between two ranks, with the rows that go along them."""
    sheet.words(374, top - 22, title, size=15, bold=True, colour=COLOURS[1])
    for sender in range(TWO.ep_size):
        for receiver, number in enumerate(counts(sender)):
            from_x = 15 + sender * HALF + 120 + receiver * 100
            to_x = 15 + receiver * HALF + 120 + sender * 100
            stays = sender == receiver
            colour = FAINT if stays else COLOURS[1]
            sheet.line(from_x, top - 8, to_x, top + 78, colour=colour, width=1 + number / 2, arrow=True)
            x = from_x + (to_x - from_x) * 0.25
            y = top - 8 + 86 * 0.25
            sheet.box(x - 11, y - 11, 22, 22, fill="#ffffff", line=colour, round=11)
            sheet.words(x, y + 5, str(number), colour=colour, bold=True)


# --- bytes

KINDS = {"EP": "tokens to experts and back", "EDP": "experts' weights", "DP": "other weights; without EP, all"}
"""What the groups of the bytes figure carry."""
KIND_COLOURS = {"EP": COLOURS[1], "EDP": COLOURS[3], "DP": COLOURS[0]}


def flows_of(hub_id: str, preset: str, gpus: int = 8, per_node: int = 8) -> list[Flow]:
    """What one GPU sends in the example's step under a preset."""
    ds = load_ds_config(ROOT / "ds_configs" / preset)
    return traffic(Case.of(ds, model(hub_id), gpus, EXAMPLE, per_node))


def sent_gb(flows: list[Flow]) -> dict[str, float]:
    """10^9 bytes that one GPU puts on the wire, by kind of group."""
    return {kind: sum(flow.sent for flow in flows if flow.group == kind) / 1e9 for kind in KINDS}


def bytes_by_layout() -> str:
    """What 8 GPUs send in one step: the larger EP, the more tokens and the fewer expert weights travel."""
    about = "Gigabytes that each of 8 GPUs sends in one optimizer step, by process group."
    sheet = Sheet(740, 450, "Bytes of one step by layout", about)
    scale = 3.2
    left = 150.0
    most = 160
    presets = ("zero1_ep2.json", "zero1_ep4.json", "zero1_ep8.json", "zero3.json")
    labels = ("ZeRO-1, EP 2", "ZeRO-1, EP 4", "ZeRO-1, EP 8", "ZeRO-3, no EP")

    # 1. How to read it.
    sheet.words(16, 26, "GB that each of 8 GPUs sends in a step", anchor="start", size=16, bold=True)
    x = 16.0
    for kind, text in KINDS.items():
        legend = f"{kind}: {text}"
        sheet.box(x, 40, 14, 14, fill=KIND_COLOURS[kind], line="none", round=2)
        sheet.words(x + 20, 52, legend, anchor="start", size=12)
        x += 40 + 7 * len(legend)

    # 2. Bars, one model below the other.
    y = 84.0
    for hub_id in ("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"):
        sheet.words(16, y, short(hub_id), anchor="start", bold=True)
        y += 12
        for label, preset in zip(labels, presets, strict=True):
            sent = sent_gb(flows_of(hub_id, preset))
            total = sum(sent.values())
            sheet.words(left - 10, y + 18, label, anchor="end", size=12)
            x = left
            for kind, amount in sent.items():
                wide = min(amount * scale, left + most * scale - x)
                if wide > 0:
                    sheet.box(x, y + 4, wide, 20, fill=KIND_COLOURS[kind], line="none", round=0)
                    x += wide
            if total > most:
                sheet.words(x - 8, y + 19, f"{total:,.0f}  (the bar is cut)", anchor="end", size=12, colour="#ffffff")
            else:
                sheet.words(x + 8, y + 19, f"{total:,.0f}", anchor="start", size=12)
            y += 34
        y += 26
    sheet.words(16, 436, describe_example(), anchor="start", size=12, colour=FAINT)
    return sheet.svg()


def describe_example() -> str:
    """The step that the bytes are of."""
    work = EXAMPLE
    tokens = f"{work.accumulation} micro-batches of {work.micro_batch} x {work.length:,} tokens"
    return f"{tokens} on each GPU, bf16, all weights trained"


def link_points() -> dict[str, list[tuple[float, float]]]:
    """Collective -> (MiB on the wire, GB/s reached), as measured (``benchmarks/alltoall.md``)."""
    measured = json.loads((ROOT / "benchmarks" / "calibration-h200-mixtral.json").read_text())["node"]
    return {kind: [(sent / 2**20, rate) for sent, rate in points] for kind, points in measured.items()}


def link() -> str:
    """Measured: the rate of a collective by the size of its message."""
    about = "Two H200 over NVLink: small messages reach a few percent of the link, large ones at most two thirds."
    sheet = Sheet(740, 420, "What a link reaches", about)
    left, right, top, bottom = 70.0, 710.0, 60.0, 360.0
    limit = 450.0

    def at(mib: float, rate: float) -> tuple[float, float]:
        across = (log10(mib) - log10(1 / 64)) / (log10(512) - log10(1 / 64))
        return left + across * (right - left), bottom - rate / 500 * (bottom - top)

    # 1. Axes.
    sheet.words(16, 26, "GB/s that one GPU reaches, by the size of the message", anchor="start", size=16, bold=True)
    for rate in range(0, 501, 100):
        _, y = at(1, rate)
        sheet.line(left, y, right, y, colour="#e5e7eb")
        sheet.words(left - 10, y + 4, str(rate), anchor="end", size=12, colour=FAINT)
    for mib, text in ((1 / 32, "1/32"), (1 / 4, "1/4"), (2, "2"), (16, "16"), (128, "128 MiB")):
        x, _ = at(mib, 0)
        sheet.words(x, bottom + 20, text, size=12, colour=FAINT)
    _, y = at(1, limit)
    sheet.line(left, y, right, y, colour=FAINT, dashed=True)
    sheet.words(right, y - 6, "NVLink 4: 450 GB/s a direction", anchor="end", size=12, colour=FAINT)

    # 2. Curves.
    for number, (kind, points) in enumerate(link_points().items()):
        colour = (COLOURS[1], COLOURS[0], COLOURS[2])[number]
        places = [at(mib, rate) for mib, rate in points]
        sheet.path(places, colour=colour)
        for x, y in places:
            sheet.dot(x, y, colour=colour)
        name = kind.replace("_", "-")
        sheet.line(90, 116 + 20 * number, 110, 116 + 20 * number, colour=colour, width=3)
        sheet.words(118, 120 + 20 * number, name, anchor="start", size=12)
    sheet.words(16, 406, "2 H200 of one host; benchmarks/alltoall.md", anchor="start", size=12, colour=FAINT)
    return sheet.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "grid-2d.svg": grid_2d,
    "grid-3d.svg": grid_3d,
    "two-ranks.svg": two_ranks,
    "bytes-by-layout.svg": bytes_by_layout,
    "link.svg": link,
}
"""File in docs/figures -> what draws it."""
