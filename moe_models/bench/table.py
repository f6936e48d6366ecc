"""What recipes/bench.py writes: bench.json with every figure, the same as a Markdown table and a chart."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.files import write

NAMED = ("hf_zero3", "autoep_stock", "transformers_ep")
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


def finish_rows(rows: list[dict[str, Any]], model_config: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Add what follows from the measured figures: tokens/s, TFLOP/s, MFU, ratio to the fastest baseline."""
    good = [row for row in rows if row["status"] == "ok"]
    peak = median(row["matmul_tflops"] for row in good) if good else 0.0
    for row in rows:
        tokens = row["micro_batch"] * row["accumulation"] * row["seq_length"]
        row["tokens_per_step"] = tokens * world_size
        if row["status"] == "ok":
            row["tokens_per_second_per_gpu"] = tokens / row["step_seconds"]
            flops = sum(train_flops(model_sizes(model_config), row["seq_length"]))
            row["model_tflops_per_gpu"] = row["tokens_per_second_per_gpu"] * flops / 1e12
            row["mfu"] = row["model_tflops_per_gpu"] / peak
    for row in good:
        rivals = [
            other["tokens_per_second_per_gpu"]
            for other in good
            if other["name"] in NAMED and _batch(other) == _batch(row)
        ]
        row["vs_baselines"] = row["tokens_per_second_per_gpu"] / max(rivals) if rivals else None
    return rows


def _batch(row: dict[str, Any]) -> str:
    return f"{row['accumulation']} x {row['micro_batch']}"


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of :data:`COLUMNS`."""

    def show(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    def pair(first: str, second: str, form: str) -> str:
        return show(first, form) + (f" / {show(second, form)}" if row.get(second) is not None else "")

    if row["status"] != "ok":
        return [row["name"], _batch(row), row["status"], *["-"] * (len(COLUMNS) - 3)]
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
    """bench.json, bench.md, bench.png and calibration.json in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row["status"] == "ok"]
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "device": good[0]["device"] if good else None,
        "torch": good[0]["torch"] if good else None,
        "matmul_tflops": median(row["matmul_tflops"] for row in good) if good else None,
    }
    report = {"about": about, "asked": asked, "model_config": model_config, "rows": rows}
    write(folder / "bench.json", json.dumps(report, indent=1) + "\n")
    write(folder / "bench.md", markdown(rows, about, asked))
    if good:
        write(folder / "calibration.json", json.dumps(calibration(good, about, asked), indent=1) + "\n")
        draw(folder / "bench.png", good, about, asked)


def markdown(rows: list[dict[str, Any]], about: dict[str, Any], asked: dict[str, Any]) -> str:
    """The table with what one must know to read it."""
    lines = [f"# {asked['num_gpus']} x {about['device']}, {asked['seq_length']} tokens, {about['date']}", ""]
    lines += [
        f"{asked['config_name'] or asked['model_name_or_path']}, random weights, "
        f"{'uniform' if asked['tokens'] == 'uniform' else 'Zipf'} tokens: the routers are untrained and route near "
        f"uniformly. torch {about['torch']}; median of {asked['steps']} optimizer steps after {asked['warmup']}.",
        "",
    ]
    if about["device"] == "cpu":
        lines += ["CPU processes: no memory column, and speeds mean nothing for GPUs.", ""]
    elif about["matmul_tflops"]:
        lines += [f"A large bf16 matrix product reached {about['matmul_tflops']:.0f} TFLOP/s here.", ""]
    lines += [table(rows), ""]
    failures = [row for row in rows if row["status"] != "ok"]
    lines += [f"- {row['name']}, {_batch(row)}: {row['status']}: {row['error']}" for row in failures]
    lines += ["", *(f"- {name}: {what}" for name, what in COLUMNS.items())]
    return "\n".join(lines) + "\n"


def calibration(good: list[dict[str, Any]], about: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a plan can take from these rows: see docs/calibration.md."""
    content: dict[str, Any] = {
        "measured": f"{about['date']}, {asked['num_gpus']} x {about['device']}, torch {about['torch']}: "
        "recipes/bench.py",
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

    batches = sorted({(row["micro_batch"], row["accumulation"]) for row in good})
    tallest = max(sum((row["micro_batch"], row["accumulation"]) == batch for row in good) for batch in batches)
    figure, axes = pyplot.subplots(
        len(batches), 1, figsize=(9, (0.5 + 0.45 * tallest) * len(batches) + 1), squeeze=False, layout="constrained"
    )
    for axis, batch in zip(axes[:, 0], batches, strict=True):
        here = [row for row in good if (row["micro_batch"], row["accumulation"]) == batch][::-1]
        bars = axis.barh(
            [row["name"] for row in here],
            [row["tokens_per_second_per_gpu"] for row in here],
            color=["#8a8f98" if row["name"] in NAMED else "#2a78d6" for row in here],
        )
        labels = [
            f" {row['tokens_per_second_per_gpu']:,.0f}"
            + (f", {row['peak_allocated_gib']:.0f} GiB" if "peak_allocated_gib" in row else "")
            for row in here
        ]
        axis.bar_label(bars, labels, fontsize=8)
        axis.margins(x=0.25)
        axis.set_title(f"{batch[1]} x {batch[0]} sequences per GPU and step", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("tokens/s per GPU (grey: baselines)", fontsize=8)
    figure.suptitle(f"{asked['num_gpus']} x {about['device']}, {asked['seq_length']} tokens", fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    os.replace(temporary, path)
