"""Adapters beside full training, on one GPU: speed, memory beside what a plan says, and the largest model that fits.

    python -m benchmarks.adapters                         # one GPU, bf16; about ten minutes
    python -m benchmarks.adapters --shapes fine --no_depth
    python -m benchmarks.adapters --shapes                # the depth alone
    DS_ACCELERATOR=cpu python -m benchmarks.adapters --cpu    # a tiny shape in fp32: does the script run?

Rank 16, AutoEP with EP 1, ZeRO-1, one sequence in a forward pass, four in an optimizer step: the rows of
`recipes/bench.py`, one after the other. Liger's rows only where it is installed. Then the fine-grained shape grows,
with recomputation, from the depth that the plan says fits, until one more step of layers does not fit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from moe_models.bench.adapter import sizes_of
from moe_models.bench.layouts import BenchLayout, read_layouts
from moe_models.bench.processes import Row, make_jobs, measure
from moe_models.bench.table import finish_rows
from moe_models.config.ds_config import load_ds_config
from moe_models.config.work import Work
from moe_models.errors import run
from moe_models.families.model import Model
from moe_models.files import read_json, write
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, Device, read_device
from moe_models.planner.predict import predict

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"fine": "bench-finegrained.json", "mixtral": "bench-mixtral.json", "tiny": "mixtral-tiny.json"}
DEPTH = {"fine": 4, "mixtral": 4, "tiny": 2}
"""Layers at which full training of each shape is tried, too; of Mixtral's it does not fit 80 GB."""
BASE = "ds_configs/zero1_ep8.json+expert_parallel.autoep_size=1"
KINDS = ("", "+lora_attention", "+lora")
COLUMNS = ("shape", "layers", "row", "tokens/s", "over full", "GiB", "planned GiB", "off", "loss")


def main(words: list[str]) -> int:
    """Measure, print, and write a JSON file with every figure."""
    args = parse(words)
    device = read_device(args.device, [])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moe-adapters-") as name:
        scratch = Path(name)
        for shape in args.shapes:
            config = model_config(shape, args.layers or DEPTH[shape])
            rows += measured(shape, config, layouts_of(args, config, scratch), args, device, scratch)
            report(rows, args)
        if args.depth:
            rows += deepest(args, device, scratch)
            report(rows, args)
    print(table(rows))
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The flags, with those of recipes/bench.py that its machinery asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["fine", "mixtral"])
    parser.add_argument("--layers", type=int, help="another depth than 4")
    parser.add_argument("--device", default="h100-80g", help="what the plan is made for")
    parser.add_argument("--no_depth", dest="depth", action="store_false", help="leave out how deep a model fits")
    parser.add_argument("--depth_step", type=int, default=2, help="layers between two tries")
    parser.add_argument("--depth_tries", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seq_length", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path("out/adapters.json"))
    parser.add_argument("--cpu", action="store_true", help="tiny shapes")
    args = parser.parse_args(words)
    if args.cpu:
        args.shapes = ["tiny"] * bool(args.shapes)
        args.seq_length = 64
    more = {
        "micro_batch": [1],
        "accumulation": [4],
        "profile_steps": 0,
        "attn_implementation": "sdpa",
        "tokens": "uniform",
        "seed": 0,
        "isolate": True,
        "num_gpus": 1,
        "row_timeout": 240.0,
    }
    return argparse.Namespace(**vars(args), **more)


def model_config(shape: str, layers: int) -> dict[str, Any]:
    """The shape's config.json at this depth."""
    return {**read_json(str(ROOT / "model_configs" / SHAPES[shape])), "num_hidden_layers": layers}


def layouts_of(args: argparse.Namespace, config: dict[str, Any], scratch: Path) -> list[BenchLayout]:
    """Full training and both adapters; with Liger's kernels again."""
    kinds = list(KINDS)
    if importlib.util.find_spec("liger_kernel") is not None and not args.cpu:
        kinds += [f"+liger{kind}" for kind in KINDS]
    return read_layouts([f"{ROOT}/{BASE}{kind}" for kind in kinds], config, 1, scratch)


def measured(
    shape: str,
    config: dict[str, Any],
    layouts: list[BenchLayout],
    args: argparse.Namespace,
    device: Device,
    scratch: Path,
) -> list[Row]:
    """Rows of one model, each with what the plan says of its memory."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:  # rows of other models have the same numbers
        jobs = make_jobs(args, layouts, config, Path(folder))
        rows = measure(jobs, args, Path(folder), lambda rows: None)
        finish_rows(rows, config, 1)
        for row, job in zip(rows, jobs, strict=True):
            row["shape"] = shape
            row["layers"] = config["num_hidden_layers"]
            row["planned_gib"] = planned_gib(job, config, args, device)
    return rows


def planned_gib(job: dict[str, Any], config: dict[str, Any], args: argparse.Namespace, device: Device) -> float:
    """What torch will have allocated at the fullest moment, by the plan."""
    work = Work(micro_batch=1, length=args.seq_length, accumulation=4, recompute=job["checkpointing"])
    case = Case.of(
        load_ds_config(job["json_path"]),
        Model.of(config),
        1,
        work,
        1,
        liger=job["liger"],
        adapter=sizes_of(job, config),
    )
    return predict(case, device).memory.allocated / GIB


def deepest(args: argparse.Namespace, device: Device, scratch: Path) -> list[Row]:
    """Rows around the largest depth at which an adapter on attention and experts trains."""
    shape = "tiny" if args.cpu else "fine"
    layers = planned_depth(shape, args, device, scratch)
    rows: list[Row] = []
    tried: set[int] = set()
    while layers > 0 and layers not in tried and len(tried) < args.depth_tries:
        tried.add(layers)
        config = model_config(shape, layers)
        layouts = read_layouts([f"{ROOT}/{BASE}+checkpointing+lora"], config, 1, scratch)
        rows += measured(shape, config, layouts, args, device, scratch)
        fitted = rows[-1]["status"] == "ok"
        layers += args.depth_step if fitted else -args.depth_step
    return rows


def planned_depth(shape: str, args: argparse.Namespace, device: Device, scratch: Path) -> int:
    """The largest multiple of the step that the plan says fits."""
    layers = args.depth_step
    if args.cpu:
        return layers
    limit = device.usable_gib - 1
    while layers < 400:
        config = model_config(shape, layers + args.depth_step)
        layouts = read_layouts([f"{ROOT}/{BASE}+checkpointing+lora"], config, 1, scratch)
        job = make_jobs(args, layouts, config, scratch)[0]
        if planned_gib(job, config, args, device) > limit:
            break
        layers += args.depth_step
    return layers


def table(rows: list[Row]) -> str:
    """Markdown."""
    full = {
        (row["shape"], row["layers"], row["liger"]): row["tokens_per_second_per_gpu"]
        for row in rows
        if row["status"] == "ok" and not row["lora"] and not row["lora_attention"]
    }
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in rows:
        first = [row["shape"], str(row["layers"]), row["name"].partition("autoep_size=1")[2] or "full"]
        if row["status"] != "ok":
            lines.append([*first, row["status"], "-", "-", f"{row['planned_gib']:.1f}", "-", "-"])
            continue
        speed = row["tokens_per_second_per_gpu"]
        of_full = full.get((row["shape"], row["layers"], row["liger"]))
        ratio = "-"
        if of_full:
            ratio = f"{speed / of_full:.2f}"
        memory = "-"
        off = "-"
        if row.get("peak_allocated_gib"):
            memory = f"{row['peak_allocated_gib']:.1f} / {row['peak_reserved_gib']:.1f}"
            off = f"{row['planned_gib'] / row['peak_allocated_gib'] - 1:+.0%}"
        planned = f"{row['planned_gib']:.1f}"
        lines.append([*first, f"{speed:,.0f}", ratio, memory, planned, off, f"{row['loss']:.4f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(rows: list[Row], args: argparse.Namespace) -> None:
    """Every figure so far, so that a call that is cut short leaves what it had."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(args).items() if name != "output"}
    write(args.output, json.dumps({"asked": asked, "rows": rows}, indent=1) + "\n")
    write(args.output.with_suffix(".md"), table(rows) + "\n")


if __name__ == "__main__":
    run(main)
