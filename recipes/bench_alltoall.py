"""Dispatch and combine at the sizes of a model: GB/s that the all-to-all of expert parallelism reaches, and why.

    # 4 GPUs that share the experts; what NVLink allows is beside what was reached
    deepspeed --num_gpus 4 recipes/bench_alltoall.py --config_name model_configs/bench-finegrained.json \\
        --output_dir out/alltoall

    # the routing that a run recorded, layer by layer
    deepspeed --num_gpus 4 recipes/bench_alltoall.py --config_name ... --routing out/run/expert_load.jsonl

    # no GPU: gloo between CPU processes
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/bench_alltoall.py --config_name model_configs/mixtral-tiny.json \\
        --seq_length 256 --largest_mib 4

Each rank sends the rows of its tokens, top-k x tokens x hidden, to the ranks that hold their experts, and gets them
back. With uneven routing the fullest rank sets the time: `busiest` is the GB/s of what it receives. Then follow a sweep
over message sizes of all-to-all, all-reduce, all-gather and reduce-scatter, and the rates of matrix products and
memory. All of it goes to calibration.json, which recipes/plan.py takes (docs/calibration.md).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from moe_models.errors import Problems, run
from moe_models.files import write
from moe_models.ranks import rank, world_size

FRACTIONS_OF_EVEN = (1 / 16, 1 / 4, 1, 4)
"""Rows of an expert for which the grouped product is timed, over those of an expert under even routing."""


def main(words: list[str]) -> int:
    """Read, measure, report."""
    args = parse(words)
    model_config, cases = read_inputs(args)
    import torch.distributed as dist

    from moe_models.bench.machine import join_process_group

    device = join_process_group()
    report = measure(args, model_config, cases, device)
    if rank() == 0:
        write_report(Path(args.output_dir), report)
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
    parser.add_argument("--ep_size", type=int, default=world_size(), help="Ranks that share the experts (all of them).")
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

    # 1. The model.
    name = args.config_name or args.model_name_or_path
    config = read_json(name) if Path(name).is_file() else read_model_config(name)
    sizes = model_sizes(config)
    # 2. The flags.
    problems = Problems(size_problems(world_size(), args.ep_size, names={"ep_size": "--ep_size"}))
    if not sizes.moe_layers:
        problems.add(f"{name}: has no MoE layer")
    elif args.ep_size > 0 and sizes.num_experts % args.ep_size:
        problems.add(f"--ep_size {args.ep_size}: does not divide the model's {sizes.num_experts} experts")
    for skew in args.skew:
        if not 1 <= skew <= max(args.ep_size, 1):
            problems.add(f"--skew {skew:g}: must be 1 (even) to {args.ep_size} (--ep_size: all on one rank)")
    for flag in ("seq_length", "micro_batch", "repeats"):
        value = getattr(args, flag)
        if value < 1:
            problems.add(f"--{flag} {value}: must be at least 1")
    if "RANK" not in os.environ:
        problems.add("no RANK in the environment; start it as: deepspeed --num_gpus N recipes/bench_alltoall.py ...")
    problems.refuse()
    # 3. The cases.
    experts = sizes.num_experts
    cases = {"uniform": [1 / experts] * experts}
    for skew in args.skew:
        cases[f"skew {skew:g}"] = skewed(experts, args.ep_size, skew)
    if args.routing:
        cases |= recorded(args.routing, experts)
    return config, cases


# ------------------------------------------------------------------------------------------------------ measurement


def measure(args: argparse.Namespace, config: dict[str, Any], cases: dict[str, list[float]], device: Any) -> Any:
    """All figures; collective."""
    import torch

    from moe_models.bench.collectives import exchange, sweep
    from moe_models.bench.machine import reserved_gib, usable_gib
    from moe_models.families.sizes import model_sizes
    from moe_models.planner.devices import link_gb_per_s

    # 1. The GPU alone: memory that is free before torch takes any, then the rates of its products and its memory.
    sizes = model_sizes(config)
    usable = usable_gib(device)
    rates = machine_rates(args, sizes, device)
    if usable is not None:
        rates["usable_gib"] = round(usable, 2)

    # 2. Dispatch and combine, as the model's layers call them, for every case of routing.
    group = own_ep_group(args.ep_size)
    rows = args.micro_batch * args.seq_length * sizes.top_k
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    exchanges = []
    for case, shares in cases.items():
        figures = exchange(shares, rows, sizes.hidden, dtype, group, device, args.repeats)
        exchanges.append({"case": case, **figures})
    # A traceback, and no line of rank 0: the rank that sees it may be the only one.
    if not all(row["came_back"] for row in exchanges):
        raise RuntimeError("rows came back from dispatch and combine changed: the fabric or its library is broken")

    # 3. Message sizes.
    links = {}
    for collective in ("all_to_all", "all_reduce", "all_gather", "reduce_scatter"):
        links[collective] = sweep(collective, args.largest_mib, group, device, args.repeats)

    # 4. What torch does not count, now that NCCL has its buffers.
    outside = reserved_gib(device)
    if outside is not None:
        rates["reserved_gib"] = round(outside, 2)

    # 5. The report, and the part of it that a plan takes.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if args.link_gb_per_s is None:
        args.link_gb_per_s = link_gb_per_s(name)
    measured = f"{time.strftime('%Y-%m-%d')}, {world_size()} x {name}, EP {args.ep_size}, torch {torch.__version__}"
    calibration = {"measured": f"{measured}: recipes/bench_alltoall.py", **rates}
    place = place_of_links(args.ep_size)
    if place is not None and args.ep_size > 1:
        calibration[place] = {key: links[key] for key in ("all_to_all", "all_reduce", "all_gather")}
    return {
        "measured": measured,
        "asked": vars(args),
        "sizes": {"hidden": sizes.hidden, "top_k": sizes.top_k, "experts": sizes.num_experts, "rows": rows},
        "exchanges": exchanges,
        "sweep": links,
        "calibration": calibration,
    }


def machine_rates(args: argparse.Namespace, sizes: Any, device: Any) -> dict[str, Any]:
    """What this rank's device reaches in matrix products and memory, in the units of calibration.json."""
    from moe_models.bench.machine import grouped_matmul_efficiency, matmul_tflops, memory_gb_per_s

    # Rows of one expert, in steps of 16: around what it gets under even routing.
    inner = sizes.expert_size // 3 // sizes.hidden  # an expert has three matrices: gate, up, down
    held = sizes.num_experts // args.ep_size
    even = args.micro_batch * args.seq_length * sizes.top_k * args.ep_size // sizes.num_experts
    counts = sorted({max(16, int(even * fraction) // 16 * 16) for fraction in FRACTIONS_OF_EVEN})
    rates: dict[str, Any] = {"matmul_tflops": round(matmul_tflops(device), 3)}
    rates["grouped_matmul_efficiency"] = grouped_matmul_efficiency(
        device, sizes.hidden, inner, held, counts, rates["matmul_tflops"]
    )
    rates["memory_gb_per_s"] = round(memory_gb_per_s(device), 1)
    return rates


def own_ep_group(ep_size: int) -> Any:
    """The process group of this rank's EP group. Every rank makes all groups: ``new_group`` is collective."""
    import torch.distributed as dist

    from moe_models.config.layout import Layout

    own: Any = None
    for ranks in Layout(world_size(), ep_size).ep_groups():
        group = dist.new_group(list(ranks))
        if rank() in ranks:
            own = group
    return own


def place_of_links(ep_size: int) -> str | None:
    """The key of calibration.json for what the group's links reached: "node", "network", or None.

    A group with several GPUs in each of several nodes measures neither the one nor the other.
    """
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if on_node % ep_size == 0:
        return "node"
    if on_node == 1:
        return "network"
    return None


# ----------------------------------------------------------------------------------------------------------- report


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """alltoall.json, alltoall.md and calibration.json in ``folder``; the tables go to stdout, too."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = markdown(report)
    write(folder / "alltoall.json", json.dumps(report, indent=1) + "\n")
    write(folder / "alltoall.md", tables)
    write(folder / "calibration.json", json.dumps(report["calibration"], indent=1) + "\n")
    print(tables, f"written: {folder}/alltoall.json, alltoall.md, calibration.json", sep="\n", flush=True)


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    link = report["asked"]["link_gb_per_s"]
    sizes = report["sizes"]

    def against(rate: float) -> str:
        """``412.3 (92%)``: GB/s, and their share of what the link can do."""
        share = f" ({rate / link:.0%})" if link else ""
        return f"{rate:,.1f}{share}"

    told = f"; in brackets the share of {link:g} GB/s." if link else "."
    lines = [
        f"# All-to-all: {report['measured']}",
        "",
        f"{sizes['rows']} rows of {sizes['hidden']} a rank (top-{sizes['top_k']} of {sizes['experts']} experts){told}",
        "",
        "| routing | fullest rank / mean | MiB sent | dispatch ms | combine ms | GB/s per rank | GB/s of the busiest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["exchanges"]:
        lines.append(
            f"| {row['case']} | {row['max_mean']:.2f} | {row['mean_sent_mib']:,.1f} | {row['dispatch_ms']:.3f} | "
            f"{row['combine_ms']:.3f} | {against(row['gb_per_s'])} | {against(row['busiest_gb_per_s'])} |"
        )
    lines += ["", "| collective | GB/s by MiB that a rank puts on the wire |", "|---|---|"]
    for name, pairs in report["sweep"].items():
        rates = "; ".join(f"{wire / 2**20:g}: {against(rate)}" for wire, rate in pairs)
        lines.append(f"| {name.replace('_', '-')} | {rates} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
