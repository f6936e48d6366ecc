"""Dispatch and combine at the sizes of a model: GB/s that the all-to-all of expert parallelism reaches, and why.

    # 4 GPUs that share the experts; what NVLink allows stands beside what was reached
    deepspeed --num_gpus 4 recipes/bench_alltoall.py --config_name model_configs/bench-finegrained.json \\
        --output_dir out/alltoall

    # the routing that a run recorded, layer by layer
    deepspeed --num_gpus 4 recipes/bench_alltoall.py --config_name ... --routing out/run/expert_load.jsonl

    # no GPU: gloo between CPU processes
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/bench_alltoall.py --config_name model_configs/mixtral-tiny.json \\
        --seq_length 256 --largest_mib 4

Each rank sends the rows of its tokens, top-k x tokens x hidden, to the ranks that hold their experts, and gets them
back. With uneven routing the fullest rank sets the time: `busiest` is the GB/s of what it receives. Beside it a sweep
over message sizes of all-to-all, all-reduce, all-gather and reduce-scatter, and the rates of matrix products and
memory; all of it goes to calibration.json, which recipes/plan.py takes (docs/calibration.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from moe_models.errors import UserError, exit_with
from moe_models.files import write

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main(words: list[str] | None = None) -> int:
    """Read, measure, report."""
    args = parse(sys.argv[1:] if words is None else words)
    try:
        model_config, cases = read_inputs(args)
    except UserError as error:
        exit_with(error, rank=RANK)
    device = start()
    report = measure(args, model_config, cases, device)
    if RANK == 0:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "alltoall.json", json.dumps(report, indent=1) + "\n")
        write(folder / "alltoall.md", markdown(report))
        write(folder / "calibration.json", json.dumps(report["calibration"], indent=1) + "\n")
        print(markdown(report), f"written: {folder}/alltoall.json, alltoall.md, calibration.json", sep="\n", flush=True)
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The flags."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_name_or_path", help="Folder or hub id; only its config.json is read.")
    model.add_argument("--config_name", help="A config.json, e.g. one of model_configs/.")
    parser.add_argument("--ep_size", type=int, default=WORLD_SIZE, help="Ranks that share the experts (all of them).")
    parser.add_argument("--seq_length", type=int, default=4096, help="Tokens in a sequence.")
    parser.add_argument("--micro_batch", type=int, default=1, help="Sequences per GPU.")
    parser.add_argument(
        "--skew", type=float, nargs="*", default=[1.25, 1.5, 2.0],
        help="Uneven cases: load of the fullest rank over the mean.",
    )  # fmt: skip
    parser.add_argument("--routing", help="expert_load.jsonl of a run: its last training step, layer by layer.")
    parser.add_argument(
        "--link_gb_per_s", type=float,
        help="10^9 bytes a second that a GPU can send; without it the figure of moe_models/planner/devices.json.",
    )  # fmt: skip
    parser.add_argument("--largest_mib", type=float, default=512, help="Largest message of the sweep.")
    parser.add_argument("--repeats", type=int, default=20, help="Calls of which the median counts.")
    parser.add_argument("--output_dir", default="out/alltoall", help="Folder for the report.")
    return parser.parse_args([word for word in words if not word.startswith("--local_rank")])


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(config.json, for each case the share of all routes that each expert gets). Raises UserError."""
    from moe_models.bench.collectives import recorded, skewed
    from moe_models.config.layout import size_problems
    from moe_models.families.config_json import read_model_config
    from moe_models.families.sizes import model_sizes
    from moe_models.files import read_json

    name = args.config_name or args.model_name_or_path
    config = read_json(name) if Path(name).is_file() else read_model_config(name)
    sizes = model_sizes(config)
    problems = list(size_problems(WORLD_SIZE, args.ep_size, names={"ep_size": "--ep_size"}))
    if not sizes.moe_layers:
        problems.append(f"{name}: has no MoE layer")
    elif args.ep_size > 0 and sizes.num_experts % args.ep_size:
        problems.append(f"--ep_size {args.ep_size}: does not divide the model's {sizes.num_experts} experts")
    problems += [
        f"--skew {skew:g}: must be 1 (even) to {args.ep_size} (--ep_size: all on one rank)"
        for skew in args.skew
        if not 1 <= skew <= max(args.ep_size, 1)
    ]
    for flag in ("seq_length", "micro_batch", "repeats"):
        problems += [f"--{flag} {getattr(args, flag)}: must be at least 1"] if getattr(args, flag) < 1 else []
    if "RANK" not in os.environ:
        problems.append("no RANK in the environment; start it as: deepspeed --num_gpus N recipes/bench_alltoall.py ...")
    if problems:
        raise UserError(problems)
    cases = {"uniform": [1 / sizes.num_experts] * sizes.num_experts}
    cases |= {f"skew {skew:g}": skewed(sizes.num_experts, args.ep_size, skew) for skew in args.skew}
    if args.routing:
        cases |= recorded(args.routing, sizes.num_experts)
    return config, cases


def start() -> Any:
    """Join the process group; returns this rank's device."""
    import deepspeed
    import torch

    from moe_models.engine.cpu import join_cpu_ranks, on_cpu

    if on_cpu():
        join_cpu_ranks()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl", verbose=False)
    return device


# ------------------------------------------------------------------------------------------------------ measurement


def measure(args: argparse.Namespace, config: dict[str, Any], cases: dict[str, list[float]], device: Any) -> Any:
    """All figures; collective."""
    import torch
    import torch.distributed as dist

    from moe_models.bench.collectives import exchange, sweep
    from moe_models.bench.machine import (
        grouped_matmul_efficiency,
        matmul_tflops,
        memory_gb_per_s,
        reserved_gib,
        usable_gib,
    )
    from moe_models.config.layout import Layout
    from moe_models.families.sizes import model_sizes
    from moe_models.planner.devices import link_gb_per_s

    sizes = model_sizes(config)
    usable = usable_gib(device)
    rates: dict[str, Any] = {"matmul_tflops": round(matmul_tflops(device), 3)}
    inner = sizes.expert_size // 3 // sizes.hidden
    held = sizes.num_experts // args.ep_size
    most = args.micro_batch * args.seq_length * sizes.top_k * args.ep_size // sizes.num_experts  # evenly routed
    counts = sorted({max(16, int(most * part) // 16 * 16) for part in (1 / 16, 1 / 4, 1, 4)})
    rates["grouped_matmul_efficiency"] = grouped_matmul_efficiency(
        device, sizes.hidden, inner, held, counts, rates["matmul_tflops"]
    )
    rates["memory_gb_per_s"] = round(memory_gb_per_s(device), 1)
    if usable is not None:
        rates["usable_gib"] = round(usable, 2)
    group: Any = None
    for ranks in Layout(WORLD_SIZE, args.ep_size).ep_groups():
        made = dist.new_group(list(ranks))
        group = made if RANK in ranks else group
    rows = args.micro_batch * args.seq_length * sizes.top_k
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    exchanges = [
        {"case": name, **exchange(shares, rows, sizes.hidden, dtype, group, device, args.repeats)}
        for name, shares in cases.items()
    ]
    if not all(row["came_back"] for row in exchanges):
        raise RuntimeError("rows came back from dispatch and combine changed: the fabric or its library is broken")
    links = {
        name: sweep(name, args.largest_mib, group, device, args.repeats)
        for name in ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")
    }
    outside = reserved_gib(device)
    if outside is not None:
        rates["reserved_gib"] = round(outside, 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
    # What a group with several GPUs in each of several nodes reaches is neither the one nor the other.
    where = "node" if on_node % args.ep_size == 0 else "network" if on_node == 1 else None
    if args.link_gb_per_s is None:
        args.link_gb_per_s = link_gb_per_s(name)
    said = f"{time.strftime('%Y-%m-%d')}, {WORLD_SIZE} x {name}, EP {args.ep_size}, torch {torch.__version__}"
    collectives = (
        {where: {key: links[key] for key in ("all_to_all", "all_reduce", "all_gather")}}
        if where and args.ep_size > 1
        else {}
    )
    return {
        "measured": said,
        "asked": vars(args),
        "sizes": {"hidden": sizes.hidden, "top_k": sizes.top_k, "experts": sizes.num_experts, "rows": rows},
        "exchanges": exchanges,
        "sweep": links,
        "calibration": {"measured": f"{said}: recipes/bench_alltoall.py", **rates, **collectives},
    }


# ----------------------------------------------------------------------------------------------------------- report


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    link, sizes = report["asked"]["link_gb_per_s"], report["sizes"]

    def against(rate: float) -> str:
        return f"{rate:,.1f}" + (f" ({rate / link:.0%})" if link else "")

    lines = [
        f"# All-to-all: {report['measured']}",
        "",
        f"{sizes['rows']} rows of {sizes['hidden']} a rank (top-{sizes['top_k']} of {sizes['experts']} experts)"
        + (f"; in brackets the share of {link:g} GB/s." if link else "."),
        "",
        "| routing | fullest rank / mean | MiB sent | dispatch ms | combine ms | GB/s per rank | GB/s of the busiest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['max_mean']:.2f} | {row['mean_sent_mib']:,.1f} | {row['dispatch_ms']:.3f} | "
        f"{row['combine_ms']:.3f} | {against(row['gb_per_s'])} | {against(row['busiest_gb_per_s'])} |"
        for row in report["exchanges"]
    ]
    lines += ["", "| collective | GB/s by MiB that a rank puts on the wire |", "|---|---|"]
    lines += [
        f"| {name.replace('_', '-')} | {'; '.join(f'{wire / 2**20:g}: {against(rate)}' for wire, rate in pairs)} |"
        for name, pairs in report["sweep"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
