"""Which layout trains this model fastest on these GPUs, and why. Plain Python: no GPU, no weights, seconds.

    python recipes/plan.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --gpus 8 --device h200 --seq_length 4096

    # two nodes, 256 sequences in a step; write the ds_config of the best layout (recipes/check.py accepts it)
    python recipes/plan.py ... --gpus 16 --gpus_per_node 8 --global_batch_size 256 --write ds_configs/mine.json

    # with figures measured on your machine (docs/calibration.md) in the place of those of
    moe_models/planner/devices.json python recipes/plan.py ... --calibration bench.json all_to_all.json

It compares ZeRO 1 to 3 x expert (EP), tensor (TP) and sequence (SP) parallelism x micro-batch x activation
checkpointing x offload, as far as the preflight accepts them, at the same tokens per optimizer step: the peak memory of
the fullest GPU, split by what holds it, and the time of a step. "skew" is room for a GPU whose experts get more tokens
than the mean. Memory and time are those of a model of DeepSpeed 0.19.8 in bf16 with AdamW and TRL's loss; what was
compared with it is in benchmarks/. EP above 1 is DeepSpeed's AutoEP; without EP it is the plain Hugging Face model.

Nothing fits: exit code 2, and what would fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moe_models.errors import UserError, exit_with
from moe_models.families.config_json import read_model_config
from moe_models.planner.devices import device_names, read_device
from moe_models.planner.predict import GIB
from moe_models.planner.search import Plan, Request, nothing_fits, search
from moe_models.preflight.liger import no_kernels

MEASURED_GPUS = 4
"""Most GPUs that the step-time model was compared with."""
NEAR_MISSES = 2
"""Layouts that do not fit, shown below those that do."""
PARTS = ("parameters", "gradients", "optimizer", "activations", "dispatch", "buffers", "skew", "outside")
TIMES = {"compute": "compute", "all_to_all": "all-to-all", "reduce_gather": "reduce, gather", "optimizer": "optimizer"}


def main() -> int:
    """Read, search, print, write."""
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except UserError as error:
        exit_with(error)
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a folder with a config.json, or a hub id")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in one node (8)")
    parser.add_argument("--device", required=True, help=f"one of {', '.join(device_names())}")
    parser.add_argument("--seq_length", type=int, required=True, help="tokens in one sequence (packed or padded to it)")
    parser.add_argument("--global_batch_size", type=int, help="sequences in one optimizer step (4 for each GPU)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the ds_config of the best layout")
    parser.add_argument("--calibration", nargs="+", default=[], metavar="FILE", help="measured figures of the machine")
    parser.add_argument("--skew", type=float, default=1.3, help="tokens of the fullest expert over the mean (1.3)")
    parser.add_argument("--host_gib", type=float, default=1000, help="host memory of a node for offloading (1000)")
    parser.add_argument("--use_liger_kernel", action="store_true", help="the run uses Liger's kernels")
    parser.add_argument("--top", type=int, default=6, help="layouts to show (6)")
    return parser.parse_args(words)


def read(arguments: argparse.Namespace) -> Request:
    """The request; raises UserError with everything wrong in it."""
    problems = [
        f"--{name} {value}: must be at least 1"
        for name in ("gpus", "gpus_per_node", "seq_length", "global_batch_size", "skew", "top")
        if (value := getattr(arguments, name)) is not None and value < 1
    ]
    if not problems and arguments.gpus > arguments.gpus_per_node and arguments.gpus % arguments.gpus_per_node:
        problems.append(
            f"--gpus {arguments.gpus}: is not a whole number of nodes of --gpus_per_node {arguments.gpus_per_node}"
        )
    if arguments.write and (arguments.write.is_dir() or not arguments.write.resolve().parent.is_dir()):
        problems.append(f"--write {arguments.write}: must be a file in a folder that is there")
    config, device = {}, None
    try:
        device = read_device(arguments.device, arguments.calibration)
    except UserError as error:
        problems += error.problems
    try:
        config = read_model_config(arguments.model_name_or_path)
        if arguments.use_liger_kernel:
            problems += no_kernels(config, "--use_liger_kernel")
    except UserError as error:
        problems += error.problems
    if problems or device is None:
        raise UserError(problems)
    return Request(
        config=config,
        gpus=arguments.gpus,
        gpus_per_node=min(arguments.gpus_per_node, arguments.gpus),
        device=device,
        length=arguments.seq_length,
        batch=arguments.global_batch_size or 4 * arguments.gpus,
        skew=arguments.skew,
        liger=arguments.use_liger_kernel,
        host_gib=arguments.host_gib,
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plan and write its file. Raises UserError if nothing fits."""
    request = read(arguments)
    plans = search(request)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise UserError(nothing_fits(request, plans))
    shown = [*fitting[: arguments.top], *plans[len(fitting) : len(fitting) + NEAR_MISSES]]
    console = Console(highlight=False)
    tokens = request.batch * request.length
    console.print(
        f"[bold]{request.gpus} x {request.device.name}[/bold], {request.batch} sequences of {request.length} tokens in "
        f"a step ({tokens / 1e6:.2f} million tokens); {len(plans)} layouts, {len(fitting)} fit\n"
    )
    console.print(ranking(shown), memory_table(shown, request), time_table(shown), sep="\n")
    console.print(f"[bold]why[/bold]  {why(plans)}\n")
    console.print(command(fitting[0], arguments))
    for line in request.device.measured:
        console.print(f"calibrated by: {line}", markup=False)
    if request.gpus > MEASURED_GPUS:
        console.print(f"[dim]By model: it was compared with runs on at most {MEASURED_GPUS} GPUs of one node.[/dim]")
    if arguments.write:
        write(arguments.write, fitting[0].ds.raw)
        console.print(f"\nwritten: {arguments.write}", markup=False)


def _table(title: str, names: list[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), pad_edge=False
    )
    for name in names:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    return table


def ranking(plans: list[Plan]) -> Table:
    """One row for each layout, the best first."""
    table = _table("layouts", ["", "layout", "batch", "ckpt", "GiB", "fits", "s/step", "tok/s/GPU", "MFU"])
    for number, plan in enumerate(plans, 1):
        p, work = plan.prediction, plan.work
        table.add_row(
            str(number), plan.name, f"{work.micro_batch} x {work.accumulation}", "yes" if work.recompute else "no",
            f"{p.memory.needed / GIB:.1f}", "yes" if plan.fits else "no", f"{p.time.total:.2f}",
            f"{p.tokens_per_s:,.0f}", f"{p.mfu:.0%}", style="" if plan.fits else "dim",
        )  # fmt: skip
    return table


def memory_table(plans: list[Plan], request: Request) -> Table:
    """Where the memory of the fullest GPU goes."""
    usable = f"peak memory of a GPU in GiB, of {request.device.usable_gib:.1f}"
    short = ["weights", "grads", "optim.", "activ.", "dispatch", "buckets", "skew", "other"]
    table = _table(usable, ["", *short, "host/node"])
    for number, plan in enumerate(plans, 1):
        parts = [f"{getattr(plan.prediction.memory, part) / GIB:.1f}" for part in PARTS]
        table.add_row(str(number), *parts, f"{plan.host_gib:.0f}", style="" if plan.fits else "dim")
    return table


def time_table(plans: list[Plan]) -> Table:
    """Where the time of a step goes."""
    table = _table("time of a step in ms, what is hidden left out", ["", *TIMES.values(), "in all"])
    for number, plan in enumerate(plans, 1):
        time = plan.prediction.time
        parts = [f"{1e3 * getattr(time, part):,.0f}" for part in TIMES]
        table.add_row(str(number), *parts, f"{1e3 * time.total:,.0f}", style="" if plan.fits else "dim")
    return table


def why(plans: list[Plan]) -> str:
    """What the first layout wins over the second, and what it pays."""
    fitting = [plan for plan in plans if plan.fits]
    first = fitting[0]
    if len(fitting) == 1:
        if len(plans) == 1:
            return f"{first.name} is the only layout there is."
        least = min((plan for plan in plans[1:]), key=lambda plan: plan.prediction.memory.needed)
        return (
            f"{first.name} is the only layout that fits; the next, {least.name}, needs "
            f"{least.prediction.memory.needed / GIB:.0f} GiB and {least.host_gib:.0f} GiB of the host."
        )
    second = fitting[1]
    gains = {part: getattr(second.prediction.time, part) - getattr(first.prediction.time, part) for part in TIMES}
    part, gain = max(gains.items(), key=lambda item: item[1])
    other, loss = min(gains.items(), key=lambda item: item[1])
    faster = first.prediction.tokens_per_s / second.prediction.tokens_per_s - 1
    spare = (second.prediction.memory.needed - first.prediction.memory.needed) / GIB
    if faster < 0.005 and spare > 0:
        return f"{first.name} is as fast as {second.name} within 0.5% and leaves {spare:.1f} GiB more free."
    text = f"{first.name} beats {second.name} by {faster:.1%}: {1e3 * gain:,.0f} ms a step less for {TIMES[part]}"
    if reason := _reason(part, first, second):
        text += f" ({reason})"
    if -loss > 0.05 * gain:
        text += f", against {-1e3 * loss:,.0f} ms more for {TIMES[other]}"
    return text + "."


def _reason(part: str, first: Plan, second: Plan) -> str:
    one, two = first.ds, second.ds
    if part == "compute":
        if second.work.recompute and not first.work.recompute:
            return "no activation is computed twice"
        if first.work.micro_batch > second.work.micro_batch:
            return f"micro-batches of {first.work.micro_batch} instead of {second.work.micro_batch} sequences"
        if one.ep_size > two.ep_size:
            return "more rows for each expert in one product"
        return "no GPU waits for the one with the fullest experts" if one.ep_size < two.ep_size else ""
    if part == "all_to_all":
        return "fewer tokens leave the GPU" if one.ep_size <= two.ep_size else ""
    if part == "optimizer":
        return "nothing waits for the host" if second.offload and not first.offload else "fewer states on each GPU"
    if two.zero_stage == 3 and one.zero_stage < 3:
        return "ZeRO-3 gathers every weight for each pass"
    if one.ep_size > two.ep_size:
        return "experts that stay where they are need no gathering and fewer reductions"
    if two.tp_size > one.tp_size:
        return "no sums over tensor-parallel peers"
    return "gradients travel once a step" if two.zero_stage == 2 and first.work.accumulation > 1 else ""


def command(plan: Plan, arguments: argparse.Namespace) -> str:
    """The flags that make the run the first row."""
    work = plan.work
    file = arguments.write or "mine.json"
    return ("" if arguments.write else "--write mine.json writes the ds_config of the first. ") + (
        f"Its run: recipes/finetune.py --deepspeed {file} --max_length {work.length} --per_device_train_batch_size "
        f"{work.micro_batch} --gradient_accumulation_steps {work.accumulation} --gradient_checkpointing "
        f"{str(work.recompute).lower()}{' --use_liger_kernel' if arguments.use_liger_kernel else ''}"
    )


def write(path: Path, raw: dict[str, Any]) -> None:
    """Write the ds_config under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
