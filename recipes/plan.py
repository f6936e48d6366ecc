"""Which layout trains this model fastest on these GPUs, and why. Plain Python: no GPU, no weights, seconds.

    python recipes/plan.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --gpus 8 --device h200 --seq_length 4096

    # two nodes, 256 sequences in a step; write the ds_config of the best layout (recipes/check.py accepts it)
    python recipes/plan.py ... --gpus 16 --gpus_per_node 8 --global_batch_size 256 --write ds_configs/mine.json

    # an adapter (LoRA) instead of all weights
    python recipes/plan.py ... --gpus 2 --use_peft --lora_r 16

    # the same as a page: layouts, ranks, traffic, and sliders for GPUs, length, micro-batch and load
    python recipes/plan.py ... --html plan.html

    # hours and cost of a run over a billion tokens
    python recipes/plan.py ... --dataset_tokens 1e9 --price_per_gpu_hour 2.50

    # with figures measured on your machine instead of those of moe_models/planner/devices.json: the calibration.json
    # that recipes/bench.py and recipes/bench_alltoall.py write (docs/calibration.md)
    python recipes/plan.py ... --calibration out/bench/calibration.json out/alltoall/calibration.json

Compared are ZeRO 1 to 3 x expert (EP), tensor (TP) and sequence (SP) parallelism x micro-batch x activation
checkpointing x offload, as far as the preflight accepts them, all with the same tokens in an optimizer step. EP above 1
is DeepSpeed's AutoEP; without EP it is the plain Hugging Face model. On several nodes pipeline stages (PP) of whole
nodes are compared, too. On one node they are not: they divide the 4 bytes of weights and gradients of each parameter,
which EP inside a node does as well, and wait for each other.

These tables have one row for each layout, the best first:

    layouts   the batch (sequences of a micro-batch x micro-batches of a step), activation checkpointing (ckpt), the
              memory that a GPU needs, whether it fits, the time of a step, tokens a second and GPU, model FLOP
              utilisation. It fits "tight" where the memory is there only if the prediction is right: the prediction was
              off by up to 9%. Tight layouts come after those that fit
    run       with --dataset_tokens: hours, GPU hours and, with --price_per_gpu_hour, what they cost
    memory    the peak of the fullest GPU by what holds it; "skew" is room for a GPU whose experts get more tokens than
              the mean, "other" the CUDA context, NCCL and fragments
    time      of a step, by what it is spent on; "stages" is what a pipeline's stage waits for the others and sends them
    wire      what one rank sends in a step: exchanged (all-to-all), reduced (gradients, tensor-parallel sums), gathered
              (weights), passed on (between the stages of a pipeline), and how much of it in groups that span nodes
    host      the memory that a node's host needs to read the model, to train (what is offloaded) and to export and
              prove it, which of the three is the peak, the time to read, and the size of one checkpoint

Layouts that are equal in time and memory within half a percent, which is less than the model can tell, share one row.
It has the figures of the first and names them all, those after the first behind a "=":

    1  ZeRO-1  4 x 1    no  110.0   yes    0.33     49,287  25%
    =  ZeRO-2

The figures come from a model of DeepSpeed 0.19.8 in bf16 with AdamW and TRL's loss. benchmarks/plan.md says how far it
was off where it was compared with runs.

Exit code 2: the request cannot be planned, or nothing fits; then the lines say what would fit.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moe_models.errors import Problems, UserError, run, warn
from moe_models.families.adapters import adapter_sizes
from moe_models.families.config_json import read_model_config
from moe_models.families.model import Model
from moe_models.families.table import FAMILIES
from moe_models.files import write
from moe_models.planner.devices import GIB, device_names, read_device
from moe_models.planner.figures import (
    PARTS,
    STAGES,
    TIMES,
    gib,
    memory_cells,
    sent_across,
    sent_by_way,
    times_of,
    ways_of,
)
from moe_models.planner.host import READ_GB_PER_S, adapter_bytes, checkpoint_bytes, export_bytes, has_safetensors
from moe_models.planner.pipeline import pipeline_traffic
from moe_models.planner.predict import MEMORY_ERROR, Verdict
from moe_models.planner.search import ALIKE, PRESETS, Plan, Request, nothing_fits, search
from moe_models.preflight.adapters import plan_problems
from moe_models.preflight.liger import no_kernels
from moe_models.preflight.pipeline import bubble

PHASES = ("read", "train", "export")
"""Fields of :class:`~moe_models.planner.host.Host`, and the columns of their table."""
MEASURED_GPUS = 4
"""Most GPUs that the step-time model was compared with."""
NEAR_MISSES = 2
"""Rows of layouts that do not fit, shown below those that do."""
SEQUENCES_OF_A_GPU = 4
"""Sequences in an optimizer step for each GPU, where --global_batch_size does not say."""
LARGE_STEP = 4_000_000
"""Tokens of an optimizer step from which on a batch that nobody chose is reported. Fine-tuning runs take fewer."""
DATA = "my.jsonl"
"""The training rows in the line to paste."""


def main(words: list[str]) -> int:
    """Read, search, print, write. Raises UserError for a request that cannot be planned, and where nothing fits."""
    arguments = parse(words)
    request = read(arguments)
    plans = search(request)
    if not any(plan.fits for plan in plans):
        raise UserError(nothing_fits(request, plans))
    print_plans(request, plans, arguments)
    warn(batch_warnings(request, arguments))
    if arguments.write:
        write(arguments.write, json.dumps(plans[0].case.ds.raw, indent=2) + "\n")
        Console(highlight=False).print(f"\nwritten: {arguments.write}", markup=False)
    if arguments.html:
        write_page(request, plans, arguments)
        Console(highlight=False).print(f"\nwritten: {arguments.html}", markup=False)
    return 0


def write_page(request: Request, plans: list[Plan], arguments: argparse.Namespace) -> None:
    """The plan as one HTML file."""
    from moe_models.report.page import PLAN, assemble
    from moe_models.report.plans import plan_data
    from moe_models.report.text import visible

    name = visible(str(arguments.model_name_or_path))
    run = (arguments.dataset_tokens, arguments.price_per_gpu_hour)
    data = plan_data(request, plans, arguments.gpus_per_node, name, *run)
    write(arguments.html, assemble(data, f"Plan of {name}", PLAN))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a folder with a config.json, or a hub id")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in one node (8)")
    parser.add_argument("--device", required=True, help=f"the GPU: one of {', '.join(device_names())}")
    parser.add_argument("--seq_length", type=int, required=True, help="tokens in one sequence (packed or padded to it)")
    parser.add_argument(
        "--global_batch_size",
        type=int,
        help=f"sequences in one optimizer step, all GPUs together ({SEQUENCES_OF_A_GPU} for each GPU)",
    )
    parser.add_argument(
        "--dataset_tokens",
        type=float,
        metavar="TOKENS",
        help="tokens of the whole run (the data set's, times the epochs): shows its hours",
    )
    parser.add_argument("--price_per_gpu_hour", type=float, metavar="PRICE", help="shows what these hours cost")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the ds_config of the best layout")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plan as one page that needs no network")
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="measured figures of the machine (calibration.json); a later file wins, key by key",
    )
    parser.add_argument("--skew", type=float, default=1.3, help="tokens of the fullest expert over the mean (1.3)")
    parser.add_argument("--host_gib", type=float, default=1000, help="host memory of a node (1000)")
    parser.add_argument(
        "--read_gb_per_s",
        type=float,
        default=READ_GB_PER_S,
        help=f"GB/s at which one node reads the model's files ({READ_GB_PER_S:g}, assumed)",
    )
    parser.add_argument("--use_peft", action="store_true", help="an adapter (LoRA) is trained instead of all weights")
    parser.add_argument("--lora_r", type=int, default=16, help="its rank (16)")
    parser.add_argument("--lora_target_modules", nargs="+", help="its linear layers, as in recipes/finetune.py")
    parser.add_argument("--lora_target_parameters", nargs="+", help="its expert tensors, as in recipes/finetune.py")
    parser.add_argument("--use_liger_kernel", action="store_true", help="the run uses Liger's kernels")
    parser.add_argument("--top", type=int, default=6, help="rows to show (6)")
    return parser.parse_args(words)


def read(arguments: argparse.Namespace) -> Request:
    """The request; raises UserError with everything wrong in it."""
    problems = Problems()

    # 1. The flags by themselves.
    for name in ("gpus", "gpus_per_node", "seq_length", "global_batch_size", "skew", "top"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.add(f"--{name} {value}: must be at least 1")
    numbers_are_right = not problems.lines
    for name in ("dataset_tokens", "price_per_gpu_hour"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            problems.add(f"--{name} {value:g}: must be a number above 0")
    if arguments.price_per_gpu_hour is not None and arguments.dataset_tokens is None:
        problems.add(
            f"--price_per_gpu_hour {arguments.price_per_gpu_hour:g}: does nothing without --dataset_tokens; "
            "add the tokens of the run, or drop this one"
        )
    if not arguments.read_gb_per_s > 0:
        problems.add(f"--read_gb_per_s {arguments.read_gb_per_s:g}: must be above 0")
    if numbers_are_right and arguments.gpus > arguments.gpus_per_node and arguments.gpus % arguments.gpus_per_node:
        problems.add(
            f"--gpus {arguments.gpus}: is not a whole number of nodes of --gpus_per_node {arguments.gpus_per_node}"
        )
    for name in ("write", "html"):
        path = getattr(arguments, name)
        if path and (path.is_dir() or not path.resolve().parent.is_dir()):
            problems.add(f"--{name} {path}: must be a file in a folder that is there")

    # 2. What they name.
    with problems.note():
        device = read_device(arguments.device, arguments.calibration)
    with problems.note():
        config = read_model_config(arguments.model_name_or_path)
        if arguments.use_liger_kernel:
            problems.add(*no_kernels(config, "--use_liger_kernel"))
        problems.add(*plan_problems(arguments, config))
    problems.refuse()

    model = Model.of(config)
    adapter = None
    if arguments.use_peft:
        family = FAMILIES[config["model_type"]]
        targets = (arguments.lora_target_modules, arguments.lora_target_parameters)
        adapter = adapter_sizes(model.sizes, family, config, arguments.lora_r, *targets)
    return Request(
        model=model,
        adapter=adapter,
        gpus=arguments.gpus,
        gpus_per_node=min(arguments.gpus_per_node, arguments.gpus),
        device=device,
        length=arguments.seq_length,
        batch=arguments.global_batch_size or SEQUENCES_OF_A_GPU * arguments.gpus,
        skew=arguments.skew,
        liger=arguments.use_liger_kernel,
        host_gib=arguments.host_gib,
        safetensors=has_safetensors(arguments.model_name_or_path),
    )


def print_plans(request: Request, plans: list[Plan], arguments: argparse.Namespace) -> None:
    """What was asked, the tables, why the first row is the first, and its command."""
    rows = rows_of(plans)
    fitting = [row for row in rows if row.fits]
    others = [row for row in rows if not row.fits]
    shown = fitting[: arguments.top]
    tight_one = faster_and_tight(rows)
    if tight_one is not None and tight_one not in shown:
        shown.append(tight_one)
    shown += others[:NEAR_MISSES]
    names = {plan.name for plan in plans}
    fit = {plan.name for plan in plans if plan.verdict == "yes"}
    tight = {plan.name for plan in plans if plan.verdict == "tight"} - fit
    tokens = request.batch * request.length

    console = Console(highlight=False)
    console.print(
        f"[bold]{request.gpus} x {request.device.name}[/bold], {request.batch} sequences of {request.length} tokens in "
        f"a step ({tokens / 1e6:.2f} million tokens); {len(names)} layouts, {len(fit)} fit, "
        f"{len(tight)} tightly\n"
    )
    host = host_table(shown, request, arguments.read_gb_per_s)
    console.print(ranking(shown))
    if arguments.dataset_tokens:
        run = (request, arguments.dataset_tokens, arguments.price_per_gpu_hour)
        console.print(run_table(shown, *run))
        console.print(f"[dim]{under_run_table(*run)}[/dim]\n")
    console.print(memory_table(shown, request), time_table(shown), wire_table(shown), host, sep="\n")
    console.print(f"[dim]{under_host_table(plans[0], arguments.read_gb_per_s)}[/dim]\n")
    console.print(f"[bold]why[/bold]  {why(plans)}\n")
    print_command(console, plans[0], request, arguments)
    for line in request.device.measured:
        console.print(f"calibrated by: {line}", markup=False)
    if request.gpus > MEASURED_GPUS:
        console.print(f"[dim]By model: it was compared with runs on at most {MEASURED_GPUS} GPUs of one node.[/dim]")


# --- the rows


@dataclass(frozen=True)
class Row:
    """Layouts that are equal in time and memory within :data:`ALIKE`, the best first."""

    plans: tuple[Plan, ...]

    @property
    def first(self) -> Plan:
        """The plan whose figures are printed."""
        return self.plans[0]

    @property
    def verdict(self) -> Verdict:
        """Whether they fit."""
        return self.first.verdict

    @property
    def fits(self) -> bool:
        """Whether they fit, surely or tightly."""
        return self.first.fits

    @property
    def style(self) -> str:
        """Of the row in a table."""
        return "" if self.fits else "dim"

    @property
    def name(self) -> str:
        """Their names in a sentence: ``ZeRO-1 = ZeRO-2``, with ``= 4 more`` from the third on."""
        names = [plan.name for plan in self.plans[:2]]
        more = len(self.plans) - len(names)
        if more:
            names.append(f"{more} more")
        return " = ".join(names)

    def cells(self, number: int) -> tuple[str, str, str]:
        """The first cells of the row: its number and below it a "=" for each equal layout, all names, all batches."""
        marks = [str(number)] + ["="] * (len(self.plans) - 1)
        names = [plan.name for plan in self.plans]
        batches = [batch_of(plan) for plan in self.plans]
        return "\n".join(marks), "\n".join(names), "\n".join(batches)


def rows_of(plans: list[Plan]) -> list[Row]:
    """The plans in their order, equal ones together at the place of the first of them."""
    rows: list[list[Plan]] = []
    for plan in plans:
        place = next((row for row in rows if _equal(row[0], plan)), None)
        if place is None:
            rows.append([plan])
        else:
            place.append(plan)
    return [Row(tuple(row)) for row in rows]


def _equal(one: Plan, other: Plan) -> bool:
    """Whether nothing that the model can tell speaks for one of two plans."""
    same_compute = one.case.work.recompute == other.case.work.recompute
    same_host = host_cells(one, READ_GB_PER_S) == host_cells(other, READ_GB_PER_S)
    needed = one.prediction.memory.needed
    as_large = abs(other.prediction.memory.needed - needed) < ALIKE * needed
    as_fast = abs(_faster(other, one)) < ALIKE
    return one.verdict == other.verdict and same_compute and same_host and as_large and as_fast


def batch_of(plan: Plan) -> str:
    """Sequences of a micro-batch, and micro-batches of a step."""
    work = plan.case.work
    return f"{work.micro_batch} x {work.accumulation}"


def ranking_cells(plan: Plan) -> list[str]:
    """Checkpointing, memory, whether it fits, and speed."""
    prediction = plan.prediction
    return [
        "yes" if plan.case.work.recompute else "no",
        gib(prediction.memory.needed),
        plan.verdict,
        f"{prediction.time.total:.2f}",
        f"{prediction.tokens_per_s:,.0f}",
        f"{prediction.mfu:.0%}",
    ]


def time_cells(plan: Plan, columns: Mapping[str, str]) -> list[str]:
    """Milliseconds by what they are spent on, their sum last; ``columns`` are those of :func:`times_of`."""
    time = plan.prediction.time
    parts = [f"{1e3 * getattr(time, part):,.0f}" for part in columns]
    return [*parts, f"{1e3 * time.total:,.0f}"]


def wire_cells(plan: Plan, ways: list[str]) -> list[str]:
    """GB that one rank sends in a step, by what becomes of them, and across nodes.

    Of a pipeline it is a rank of the costliest stage. ``ways`` are those of
    :func:`~moe_models.planner.figures.ways_of`.
    """
    flows = pipeline_traffic(plan.case)
    by_way = sent_by_way(flows)
    sent = [*(by_way[way] for way in ways), sent_across(flows)]
    return [f"{count / 1e9:,.1f}" for count in sent]


def run_cells(plan: Plan, request: Request, tokens: float, price: float | None) -> list[str]:
    """Hours, GPU hours and cost of a run over so many tokens."""
    gpu_hours = tokens / plan.prediction.tokens_per_s / 3600
    cells = [hours(gpu_hours / request.gpus), hours(gpu_hours)]
    if price is not None:
        cells.append(f"{gpu_hours * price:,.0f}" if gpu_hours * price >= 100 else f"{gpu_hours * price:.2f}")
    return cells


def hours(count: float) -> str:
    """Hours, with a digit behind the point below ten and two below one."""
    digits = 0 if count >= 10 else 1 if count >= 1 else 2
    return f"{count:,.{digits}f}"


def host_cells(plan: Plan, gb_per_s: float) -> list[str]:
    """GiB of host memory in each phase and the fullest one, seconds to read, GB of a checkpoint."""
    host = plan.prediction.host
    phases = [f"{getattr(host, phase) / GIB:.0f}" for phase in PHASES]
    checkpoint = checkpoint_bytes(plan.case)
    return [*phases, host.fullest, f"{host.seconds_to_read(gb_per_s):,.0f}", f"{checkpoint / 1e9:,.1f}"]


# --- the tables


def _table(title: str, names: list[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), pad_edge=False
    )
    for name in names:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    return table


def ranking(rows: list[Row]) -> Table:
    """The best row first."""
    table = _table("layouts", ["", "layout", "batch", "ckpt", "GiB", "fits", "s/step", "tok/s/GPU", "MFU"])
    for number, row in enumerate(rows, 1):
        table.add_row(*row.cells(number), *ranking_cells(row.first), style=row.style)
    return table


def memory_table(rows: list[Row], request: Request) -> Table:
    """Where the memory of the fullest GPU goes."""
    title = f"peak memory of a GPU in GiB, of {request.device.usable_gib:.1f}"
    table = _table(title, ["", *PARTS.values()])
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *memory_cells(row.first.prediction.memory), style=row.style)
    return table


def time_table(rows: list[Row]) -> Table:
    """Where the time of a step goes."""
    columns = times_of(row.first.case for row in rows)
    table = _table("time of a step in ms, what is hidden left out", ["", *columns.values(), "in all"])
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *time_cells(row.first, columns), style=row.style)
    return table


def wire_table(rows: list[Row]) -> Table:
    """What one rank sends: expert parallelism exchanges tokens, ZeRO-3 gathers every weight, stages pass on."""
    ways = ways_of(row.first.case for row in rows)
    table = _table("a rank sends in a step, in GB", ["", *ways, "across nodes"])
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *wire_cells(row.first, ways), style=row.style)
    return table


def run_table(rows: list[Row], request: Request, tokens: float, price: float | None) -> Table:
    """How long a run takes and what it costs: its steps alone, without reading, checkpoints and export."""
    columns = ["", "hours", "GPU hours"]
    if price is not None:
        columns.append("cost")
    table = _table(f"{tokens / 1e9:,.3g} billion tokens", columns)
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *run_cells(row.first, request, tokens, price), style=row.style)
    return table


def under_run_table(request: Request, tokens: float, price: float | None) -> str:
    """What its rows count."""
    steps = tokens / (request.batch * request.length)
    paid = "" if price is None else f", {price:g} for a GPU hour"
    return f"{steps:,.0f} steps{paid}. To read, to evaluate, to write checkpoints and to export come on top."


def host_table(rows: list[Row], request: Request, gb_per_s: float) -> Table:
    """What the host of a node needs, and the disk."""
    title = f"host memory of a node in GiB, of {request.host_gib:,.0f}; disk in GB"
    table = _table(title, ["", *PHASES, "peak", "s to read", "checkpoint"])
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *host_cells(row.first, gb_per_s), style=row.style)
    return table


def under_host_table(plan: Plan, gb_per_s: float) -> str:
    """What holds for all its rows."""
    speed = f"Read at {gb_per_s:g} GB/s a node"
    if gb_per_s == READ_GB_PER_S:
        speed += " (assumed; --read_gb_per_s sets it)"
    text = f"{speed}; the exported model takes {export_bytes(plan.case) / 1e9:,.1f} GB of disk."
    if plan.case.adapter is not None:
        text = f"{speed}; the adapter takes {adapter_bytes(plan.case) / 1e9:,.2f} GB of disk."
    whole = plan.prediction.host.whole
    if whole:
        text += f" Each rank reads the whole model: {whole}."
    return text


# --- why


def why(plans: list[Plan]) -> str:
    """What the first row wins over the next one that really differs, what it pays, and which tight ones are faster."""
    rows = rows_of(plans)
    first = rows[0]
    as_sure = [row for row in rows if row.verdict == first.verdict]
    text = ""
    for row in as_sure[1:]:
        if not text and _differ(first.first, row.first):
            text = _comparison(first, row)
    if not text:
        text = _nothing_to_compare([plan for row in as_sure for plan in row.plans], plans)
    return text + _of_stages(first.first, plans) + _of_tight(first, rows)


def _of_stages(first: Plan, plans: list[Plan]) -> str:
    """On several nodes, where the first is no pipeline: what the best pipeline would pay; else empty."""
    staged = [plan for plan in plans if plan.fits and plan.case.ds.pp_size > 1]
    if first.case.ds.pp_size > 1 or not staged:
        return ""
    as_sure = [plan for plan in staged if plan.verdict == first.verdict]
    best = max(as_sure or staged, key=lambda plan: plan.prediction.tokens_per_s)
    if _faster(first, best) <= 0:  # it fits tightly, which is told elsewhere
        return ""
    ours = first.prediction.time
    theirs = best.prediction.time
    idle = bubble(best.case.ds.pp_size, best.case.work.accumulation)
    return (
        f" The best pipeline, {best.name}, takes {_percent(_faster(first, best))} longer: its stages wait {idle:.0%} "
        f"of the turns and send for {1e3 * theirs.stages:,.0f} ms a step, where the first gathers and reduces for "
        f"{1e3 * ours.reduce_gather:,.0f} ms (and {1e3 * theirs.reduce_gather:,.0f} there)."
    )


def _of_tight(first: Row, rows: list[Row]) -> str:
    """What is to be known of tight rows: that all are, or that one is faster than the first."""
    off = f"the prediction was off by up to {MEMORY_ERROR:.0%}"
    if first.verdict == "tight":
        return f" It fits tightly: {_of_usable(first.first)}, and {off}."
    row = faster_and_tight(rows)
    if row is None:
        return ""
    faster = _percent(_faster(row.first, first.first))
    return f" {row.name} is {faster} faster and fits tightly: {_of_usable(row.first)}, and {off}."


def faster_and_tight(rows: list[Row]) -> Row | None:
    """The first tight row, if it is faster than the first row, which is not tight."""
    for row in rows:
        if row.verdict == "tight" and rows[0].verdict == "yes" and _faster(row.first, rows[0].first) >= ALIKE:
            return row
    return None


def _of_usable(plan: Plan) -> str:
    needed = gib(plan.prediction.memory.needed)
    return f"{needed} of {plan.prediction.device.usable_gib:.1f} GiB"


def _percent(faster: float) -> str:
    """How much faster, in whole percent: the model is no better than that."""
    return f"{faster:.0%}" if faster >= 0.01 else "less than 1%"


def _nothing_to_compare(fitting: list[Plan], plans: list[Plan]) -> str:
    """Where all that fit as surely as the first are one layout, or several that are equal."""
    tight = [plan for plan in plans if plan.verdict == "tight"]
    how = "surely fits" if fitting[0].verdict == "yes" and tight else "fits"
    if len(fitting) == 1:
        name = fitting[0].name
        alone = f"{name} is the only layout there is."
        only = f"{name} is the only layout that {how}"
    else:
        names = ", ".join(plan.name for plan in fitting[:-1]) + f" and {fitting[-1].name}"
        alone = f"{names} are equal in time and memory; there is no other layout."
        only = f"{names} are equal in time and memory, and no other layout {how}"
    others = [plan for plan in plans if plan.verdict != fitting[0].verdict]
    if not others:
        return alone
    least = min(others, key=lambda plan: plan.prediction.memory.needed)
    needed = least.prediction.memory.needed / GIB
    return f"{only}; the next, {least.name}, needs {needed:.0f} GiB and {least.host_gib:.0f} GiB of the host."


def _faster(first: Plan, second: Plan) -> float:
    """How much faster the first is: 0.1 is 10%."""
    return first.prediction.tokens_per_s / second.prediction.tokens_per_s - 1


def _spare_gib(first: Plan, second: Plan) -> float:
    """GiB that the first leaves free and the second does not."""
    return (second.prediction.memory.needed - first.prediction.memory.needed) / GIB


def _differ(first: Plan, second: Plan) -> bool:
    """Whether the speeds or the memory of two plans differ by what would be printed."""
    return abs(_faster(first, second)) >= ALIKE or abs(_spare_gib(first, second)) >= 0.05


def _comparison(one: Row, other: Row) -> str:
    first = one.first
    second = other.first
    faster = _faster(first, second)
    spare = _spare_gib(first, second)

    # 1. As fast as the next: memory decides.
    if faster < ALIKE and spare >= 0.05:
        return f"{one.name} is as fast as {other.name} within 0.5% and leaves {spare:.1f} GiB more free."
    if faster < ALIKE:
        more = f"{-spare:.1f} GiB more" if spare <= -0.05 else "as much memory"
        return f"{one.name} is as fast as {other.name} within 0.5% and needs {more}."

    # 2. Faster: by the part of the step in which it wins most, against the one in which it loses most. In seconds.
    gains = {}
    for part in TIMES | STAGES:
        gains[part] = getattr(second.prediction.time, part) - getattr(first.prediction.time, part)
    best = max(gains, key=lambda part: gains[part])
    worst = min(gains, key=lambda part: gains[part])
    names = {**TIMES, "stages": "stages that wait"}
    text = f"{one.name} beats {other.name} by {_percent(faster)}: "
    text += f"{1e3 * gains[best]:,.0f} ms a step less for {names[best]}"
    reason = _reason(best, first, second)
    if reason:
        text += f" ({reason})"
    if -gains[worst] > 0.05 * gains[best]:
        text += f", against {-1e3 * gains[worst]:,.0f} ms more for {names[worst]}"
    return text + "."


def _reason(part: str, first: Plan, second: Plan) -> str:
    """Why ``first`` spends less time on this part of a step; empty where there is no short answer."""
    match part:
        case "compute":
            return _reason_of_compute(first, second)
        case "all_to_all":
            fewer = first.case.ds.ep_size <= second.case.ds.ep_size
            if first.case.ds.ep_size < second.case.ds.ep_size and first.case.ds.pp_size > 1:
                return "tokens stay in the node, and only hidden states pass from stage to stage"
            return "fewer tokens leave the GPU" if fewer else ""
        case "optimizer":
            on_host = second.offload and not first.offload
            if on_host:
                return "nothing waits for the host"
            fewer_states = first.case.trained.partition < second.case.trained.partition
            return "fewer states on each GPU" if fewer_states else ""
        case _:
            return _reason_of_reduce_gather(first, second)


def _reason_of_compute(first: Plan, second: Plan) -> str:
    work = first.case.work
    other_work = second.case.work
    ep = first.case.ds.ep_size
    other_ep = second.case.ds.ep_size
    if other_work.recompute and not work.recompute:
        return "no activation is computed twice"
    if work.micro_batch > other_work.micro_batch:
        return f"micro-batches of {work.micro_batch} instead of {other_work.micro_batch} sequences"
    if ep > other_ep:
        return "more rows for each expert in one product"
    if ep < other_ep:
        return "no GPU waits for the one with the fullest experts"
    return ""


def _reason_of_reduce_gather(first: Plan, second: Plan) -> str:
    ds = first.case.ds
    other = second.case.ds
    if other.zero_stage == 3 and ds.zero_stage < 3:
        return "ZeRO-3 gathers every weight for each pass"
    if ds.pp_size > other.pp_size:
        return "a stage reduces and gathers its own layers only"
    if ds.ep_size > other.ep_size:
        return "experts that stay where they are need no gathering and fewer reductions"
    if other.tp_size > ds.tp_size:
        return "no sums over tensor-parallel peers"
    if other.zero_stage == 2 and first.case.work.accumulation > 1:
        return "gradients travel once a step"
    return ""


# --- the run


def batch_warnings(request: Request, arguments: argparse.Namespace) -> Iterator[str]:
    """One line where the batch that --global_batch_size does not say is larger than a run is likely to have."""
    tokens = request.batch * request.length
    if arguments.global_batch_size is None and tokens > LARGE_STEP:
        yield (
            f"--global_batch_size: not given, so that {request.gpus:,} GPUs have {request.batch:,} sequences in a "
            f"step, {tokens / 1e6:.1f} million tokens; few runs take more than {LARGE_STEP / 1e6:.0f} million. Give "
            "the batch of your run: with a smaller one each GPU computes less between two reductions"
        )


def print_command(console: Console, plan: Plan, request: Request, arguments: argparse.Namespace) -> None:
    """The run of the first layout, as lines that a shell takes as they are."""
    preset = preset_of(plan)
    file = arguments.write or preset or Path("mine.json")
    needed = []
    if not arguments.write and preset is None:
        needed.append(f"{file} (the same command with --write {file} writes it)")
    needed.append(f"{DATA} (your rows)")
    if request.gpus > request.gpus_per_node:
        needed.append(f"hosts (a line for each machine: ADDRESS slots={request.gpus_per_node})")
    console.print(f"[bold]run[/bold]  the first layout; it needs {' and '.join(needed)}:\n")
    # No markup and no wrapping: what is pasted is what is here.
    console.print(command(plan, file, request, arguments), markup=False, soft_wrap=True)
    console.print()


def preset_of(plan: Plan) -> Path | None:
    """The file in ``ds_configs/`` that is this layout, as run.sh's folder has it; None where there is none."""
    for path in sorted(PRESETS.glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8")) == plan.case.ds.raw:
            return Path(PRESETS.name) / path.name
    return None


def command(plan: Plan, file: Path, request: Request, arguments: argparse.Namespace) -> str:
    """The run of a plan: one command of a shell over several lines, a flag on each."""
    work = plan.case.work
    model = str(arguments.model_name_or_path)
    start = f"GPUS={request.gpus}"
    if request.gpus > request.gpus_per_node:
        start = "HOSTFILE=hosts"
    lines = [
        [start, "./run.sh", "finetune"],
        ["--model_name_or_path", model],
        ["--dataset_name", DATA],
        ["--deepspeed", str(file)],
        ["--output_dir", f"out/{Path(model).name or 'run'}"],
        ["--max_length", str(work.length)],
        ["--per_device_train_batch_size", str(work.micro_batch)],
        ["--gradient_accumulation_steps", str(work.accumulation)],
        ["--gradient_checkpointing", str(work.recompute).lower()],
    ]
    if arguments.use_liger_kernel:
        lines.append(["--use_liger_kernel"])
    if arguments.use_peft:
        lines.append(["--use_peft", "--lora_r", str(arguments.lora_r)])
        for name in ("lora_target_modules", "lora_target_parameters"):
            if getattr(arguments, name):
                lines.append([f"--{name}", *getattr(arguments, name)])
    return " \\\n    ".join(" ".join(map(shlex.quote, words)) for words in lines)


if __name__ == "__main__":
    run(main)
