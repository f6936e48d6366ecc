"""Tables inside the lessons, computed from the code. Each function returns one Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from docs.tools.models import HUB, ROOT, model, short
from moe_models.config.ds_config import load_ds_config
from moe_models.config.layout import Layout
from moe_models.planner.shares import state_bytes

BF16 = 2
"""Bytes of one number."""
LENGTH = 4096
"""Tokens T of one rank in one forward pass."""
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
QWEN3 = "Qwen/Qwen3-30B-A3B"
GLM = "zai-org/GLM-4.5-Air"
DEEPSEEK = "deepseek-ai/DeepSeek-V3"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    lines = [list(head), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def billions(number: float) -> str:
    """Parameters, as ``46.7``."""
    return f"{number / 1e9:,.1f}"


def models() -> str:
    """Dense and expert parts of published models."""
    rows = []
    for hub_id in HUB:
        sizes = model(hub_id).sizes
        rows.append(
            [
                short(hub_id),
                f"{sizes.moe_layers} of {sizes.layers}",
                f"{sizes.num_experts}, top-{sizes.top_k}",
                f"{sizes.expert_size / 1e6:,.1f}",
                billions(sizes.dense_params),
                billions(sizes.expert_params),
                billions(sizes.active_params),
            ]
        )
    return markdown(
        [
            "model",
            "layers with experts",
            "experts in one",
            "one expert, millions",
            "outside the experts, billions",
            "in experts, billions",
            "used by one token, billions",
        ],
        rows,
    )


def shapes() -> str:
    """One MoE layer of Mixtral-8x7B, step by step, on one of 8 ranks with EP 8."""
    sizes = model(MIXTRAL).sizes
    layout = Layout(8, ep_size=8)
    T, D, F, K, E = LENGTH, sizes.hidden, sizes.expert_inner, sizes.top_k, sizes.num_experts
    local = len(layout.experts_of(0, E))

    def mib(*shape: int) -> str:
        numbers = 1
        for side in shape:
            numbers *= side
        return f"{numbers * BF16 / 2**20:,.1f}"

    steps = [
        ("tokens", "[T, D]", (T, D)),
        ("router's logits", "[T, E]", (T, E)),
        ("rows, one for each choice", "[T x K, D]", (T * K, D)),
        ("rows that arrive, evenly routed", "[R, D]", (T * K, D)),
        ("inside the experts", "[R, F]", (T * K, F)),
        ("rows that are back", "[T x K, D]", (T * K, D)),
        ("weighted sums", "[T, D]", (T, D)),
        (f"weights of its {local} expert", "3 x [D, F]", (3, D, F)),
    ]
    return markdown(
        ["what", "shape", "Mixtral-8x7B, EP 8", "MiB"],
        [(what, shape, " x ".join(f"{side:,}" for side in sides), mib(*sides)) for what, shape, sides in steps],
    )


def volumes() -> str:
    """The volume of one direction in one layer, what of it leaves the GPU, and a whole forward pass."""
    rows = []
    for hub_id in HUB:
        sizes = model(hub_id).sizes
        volume = LENGTH * sizes.hidden * sizes.top_k * BF16
        for ep_size in (2, 8):
            leaves = volume * (ep_size - 1) // ep_size
            rows.append(
                [
                    short(hub_id) if ep_size == 2 else "",
                    f"{sizes.hidden:,} x {sizes.top_k}",
                    f"{volume / 2**20:,.0f}",
                    str(ep_size),
                    f"{leaves / 2**20:,.0f}",
                    f"{2 * sizes.moe_layers * leaves / 1e9:,.1f}",
                ]
            )
    return markdown(
        ["model", "D x K", "MiB of one direction in one layer", "EP", "MiB that leave the GPU", "GB of a forward pass"],
        rows,
    )


def states() -> str:
    """GB of weights, gradients and optimizer states on each of 8 GPUs."""
    presets = {
        "ZeRO-1 EP 2": "zero1_ep2.json",
        "EP 4": "zero1_ep4.json",
        "EP 8": "zero1_ep8.json",
        "EP 4 TP 2": "zero1_ep4_tp2.json",
        "ZeRO-3 EP 8": "zero3_ep8.json",
    }
    rows = []
    for hub_id in (MIXTRAL, QWEN3):
        row = [short(hub_id)]
        for preset in presets.values():
            ds = load_ds_config(ROOT / "ds_configs" / preset)
            row.append(f"{sum(state_bytes(ds, model(hub_id).sizes, ds.layout(8), BF16).values()) / 1e9:,.1f}")
        rows.append(row)
    return markdown(["GB on each of 8 GPUs", *presets], rows)


TABLES: dict[str, Callable[[], str]] = {"models": models, "shapes": shapes, "volumes": volumes, "states": states}
"""Name between the marks of a page -> what writes it."""
