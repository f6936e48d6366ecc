"""What recipes/bench.py writes: bench.json with every figure, the same as a Markdown table and a chart.

A row is a dictionary, as ``processes.measure`` returns it. Rows are "good" where their ``status`` is ok.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from moe_models.bench.adapter import sizes_of
from moe_models.bench.layouts import BASELINES
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.files import whole, write

COLUMNS = {
    "layout": "as on the command line; without a name of its own it ran through MoETrainer",
    "batch": "forward passes x sequences on each GPU, in one optimizer step",
    "tokens/s per GPU": "tokens of one GPU over the median time of an optimizer step, clipping included",
    "vs baselines": "over the fastest of hf_zero3, autoep_stock and transformers_ep with the same batch",
    "step ms": "median",
    "MFU": "share of the rate that a large bf16 matrix product reached on this machine (CPU: fp32), by the FLOP that "
    "the model's mathematics asks for",
    "peak GiB": "most that torch had allocated / reserved on a GPU from the first optimizer step on",
    "communication": "share of a profiled step in which NCCL kernels ran, waiting for other ranks included / that no "
    "other kernel hid",
    "idle": "share of a profiled step in which the GPU ran no kernel, because the host was not ahead of it",
    "optimizer": "share inside optimizer.step: norm, clipping, update, and ZeRO's gather of the new weights",
    "expert load": "tokens of the fullest expert over the mean, averaged over layers",
    "loss": "mean over all steps: layouts that compute the same function agree",
}
"""Column -> what it means, for the lines below the table."""


def finish_rows(rows: list[dict[str, Any]], model_config: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Add what follows from the measured figures: tokens/s, TFLOP/s, MFU, ratio to the fastest baseline."""
    # 1. Tokens of an optimizer step over all GPUs, whether it was measured or not.
    for row in rows:
        row["tokens_per_step"] = _tokens_per_gpu(row) * world_size
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return rows
    # 2. Speed, and its share of what a large matrix product reached here. FLOP are those of forward and backward for
    #    one token, by the model's mathematics; the reached rate is the median of all rows.
    sizes = model_sizes(model_config)
    peak_tflops = median(row["matmul_tflops"] for row in good)
    for row in good:
        row["tokens_per_second_per_gpu"] = _tokens_per_gpu(row) / row["step_seconds"]
        flop_per_token = sum(train_flops(sizes, row["seq_length"], sizes_of(row, model_config)))
        row["model_tflops_per_gpu"] = row["tokens_per_second_per_gpu"] * flop_per_token / 1e12
        row["mfu"] = row["model_tflops_per_gpu"] / peak_tflops
    # 3. Against the fastest baseline with the same batch.
    for row in good:
        rivals = [
            other["tokens_per_second_per_gpu"]
            for other in good
            if other["name"] in BASELINES and _batch(other) == _batch(row)
        ]
        row["vs_baselines"] = row["tokens_per_second_per_gpu"] / max(rivals) if rivals else None
    return rows


def _tokens_per_gpu(row: dict[str, Any]) -> int:
    """Tokens of one GPU in an optimizer step."""
    return int(row["micro_batch"] * row["accumulation"] * row["seq_length"])


def _batch(row: dict[str, Any]) -> str:
    """``2 x 4``: forward passes x sequences of one GPU in an optimizer step."""
    return f"{row['accumulation']} x {row['micro_batch']}"


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of :data:`COLUMNS`."""

    def show(key: str, form: str) -> str:
        if row.get(key) is None:
            return "-"
        return format(row[key], form)

    def pair(first: str, second: str, form: str) -> str:
        if row.get(second) is None:
            return show(first, form)
        return f"{show(first, form)} / {show(second, form)}"

    if row["status"] != "ok":
        empty = ["-"] * (len(COLUMNS) - 3)
        return [row["name"], _batch(row), row["status"], *empty]
    return [
        row["name"],
        _batch(row),
        show("tokens_per_second_per_gpu", ",.0f"),
        show("vs_baselines", ".2f"),
        f"{row['step_seconds'] * 1e3:,.1f}",
        show("mfu", ".1%"),
        pair("peak_allocated_gib", "peak_reserved_gib", ".1f"),
        pair("communication_share", "exposed_communication_share", ".0%"),
        show("idle_share", ".0%"),
        show("optimizer_share", ".0%"),
        show("expert_load_max", ".2f"),
        show("loss", ".4f"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table, by batch, then as asked for."""
    ordered = sorted(rows, key=lambda row: (row["micro_batch"], row["accumulation"], row["row"]))
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells(row) for row in ordered)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: Path, rows: list[dict[str, Any]], asked: dict[str, Any], model_config: dict[str, Any]) -> None:
    """bench.json and bench.md in ``folder``; bench.png and calibration.json if some row has figures."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row["status"] == "ok"]
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": None, "torch": None, "matmul_tflops": None}
    if good:
        about["device"] = good[0]["device"]
        about["torch"] = good[0]["torch"]
        about["matmul_tflops"] = median(row["matmul_tflops"] for row in good)
    report = {"about": about, "asked": asked, "model_config": model_config, "rows": rows}
    write(folder / "bench.json", json.dumps(report, indent=1) + "\n")
    write(folder / "bench.md", markdown(rows, about, asked))
    if good:
        write(folder / "calibration.json", json.dumps(calibration(good, about, asked), indent=1) + "\n")
        draw(folder / "bench.png", good, about, asked)


def markdown(rows: list[dict[str, Any]], about: dict[str, Any], asked: dict[str, Any]) -> str:
    """The table with what one must know to read it."""
    model = asked["config_name"] or asked["model_name_or_path"]
    tokens = "uniform" if asked["tokens"] == "uniform" else "Zipf"
    lines = [
        f"# {asked['num_gpus']} x {about['device']}, {asked['seq_length']} tokens, {about['date']}",
        "",
        f"{model}, random weights, {tokens} tokens: the routers are untrained and route near uniformly. torch "
        f"{about['torch']}; median of {asked['steps']} optimizer steps after {asked['warmup']}.",
        "",
    ]
    if about["device"] == "cpu":
        lines += ["CPU processes: no memory column, and speeds mean nothing for GPUs.", ""]
    elif about["matmul_tflops"]:
        lines += [f"A large bf16 matrix product reached {about['matmul_tflops']:.0f} TFLOP/s here.", ""]
    lines += [table(rows), ""]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"- {row['name']}, {_batch(row)}: {row['status']}: {row['error']}")
    lines.append("")
    lines += [f"- {name}: {meaning}" for name, meaning in COLUMNS.items()]
    return "\n".join(lines) + "\n"


def calibration(good: list[dict[str, Any]], about: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a plan can take from these rows: see docs/calibration.md."""
    where = f"{asked['num_gpus']} x {about['device']}"
    content: dict[str, Any] = {
        "measured": f"{about['date']}, {where}, torch {about['torch']}: recipes/bench.py",
        "matmul_tflops": round(about["matmul_tflops"], 3),
    }
    if good[0]["usable_gib"] is not None:
        content["usable_gib"] = round(good[0]["usable_gib"], 2)
        content["reserved_gib"] = round(median(row["reserved_gib"] for row in good), 2)
    return content


def draw(path: Path, good: list[dict[str, Any]], about: dict[str, Any], asked: dict[str, Any]) -> None:
    """Bars of tokens/s per GPU, one panel for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # 1. One panel for each batch; all are as tall as the one with most bars needs.
    bars_of_batch = Counter((row["micro_batch"], row["accumulation"]) for row in good)
    batches = sorted(bars_of_batch)
    height = 0.5 + 0.45 * max(bars_of_batch.values())
    figure, axes = pyplot.subplots(
        len(batches), 1, figsize=(9, height * len(batches) + 1), squeeze=False, layout="constrained"
    )
    # 2. The bars, the first row on top.
    for axis, (micro_batch, accumulation) in zip(axes[:, 0], batches, strict=True):
        here = [row for row in good if (row["micro_batch"], row["accumulation"]) == (micro_batch, accumulation)]
        here.reverse()
        bars = axis.barh(
            [row["name"] for row in here],
            [row["tokens_per_second_per_gpu"] for row in here],
            color=["#8a8f98" if row["name"] in BASELINES else "#2a78d6" for row in here],
        )
        axis.bar_label(bars, [_bar_label(row) for row in here], fontsize=8)
        axis.margins(x=0.25)
        axis.set_title(f"{accumulation} x {micro_batch} sequences per GPU and step", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # 3. What all panels share.
    axes[-1, 0].set_xlabel("tokens/s per GPU (grey: baselines)", fontsize=8)
    figure.suptitle(f"{asked['num_gpus']} x {about['device']}, {asked['seq_length']} tokens", fontsize=10)
    with whole(path) as draft:
        figure.savefig(draft, dpi=130)
    pyplot.close(figure)


def _bar_label(row: dict[str, Any]) -> str:
    label = f" {row['tokens_per_second_per_gpu']:,.0f}"
    if "peak_allocated_gib" in row:
        label += f", {row['peak_allocated_gib']:.0f} GiB"
    return label
