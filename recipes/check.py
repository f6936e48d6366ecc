"""What a ds_config would do with a model on N ranks: the grid, the groups, the bytes, every error and warning. No GPU.

    python recipes/check.py --deepspeed ds_configs/zero1_ep8.json --model_name_or_path mistralai/Mixtral-8x7B-v0.1 \\
        --world_size 16 --gpus_per_node 8

    # with the flags of the run, for its tokens (the defaults are finetune's own)
    python recipes/check.py ... --max_length 4096 --per_device_train_batch_size 2 --gradient_accumulation_steps 8

    # whether it fits, by the same figures as recipes/plan.py
    python recipes/check.py ... --device h200

It needs the ds_config and the model's config.json, no weights. `recipes/finetune.py` makes the same checks before it
reads a weight. It prints, from top to bottom:

    grid      one box for each rank, a row for each node; ranks of one colour hold one copy of the experts
    groups    EP exchanges tokens, EDP averages experts, DP the dense part, TP and SP split layers and sequences, PP
              passes hidden states on; and whether a group stays inside a node
    stages    of a pipeline: the layers of each, and how long it waits for the others
    memory    the peak of the fullest GPU by what holds it, with the figures of recipes/plan.py for the same batch:
              weights, gradients and optimizer states in their buffers, activations, routed rows. With --device NAME
              also what the GPU needs beside torch, and whether it fits: yes, tight (the memory is there only if the
              prediction is right, and it was off by up to 9%) or no. Native layers, fp32 and fp16 have no prediction:
              then it is what ZeRO's shares come to, before activations and buffers. Of a pipeline it is a GPU of the
              fullest stage
    host      memory of a node's host to read the model, to train (what is offloaded) and to export and prove it; the
              time to read; the disk that checkpoints and the export take
    traffic   what one rank sends in one optimizer step, over which group; in all exchanged, reduced and gathered

Warnings go to stderr and change nothing. Errors go to stderr, one line each, with exit code 2; then nothing is printed.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from rich.box import MINIMAL, SQUARE
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from moe_models.config.ds_config import DsConfig, load_ds_config
from moe_models.config.layout import Groups
from moe_models.config.work import Work
from moe_models.errors import Problems, UserError, run, warn
from moe_models.families.adapters import adapter_sizes
from moe_models.families.config_json import read_model_config
from moe_models.families.model import Model
from moe_models.families.stages import stage_bounds, stage_shares
from moe_models.families.table import FAMILIES
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, Device, device_names, read_device
from moe_models.planner.figures import PARTS, gib, sent_by_way
from moe_models.planner.host import (
    READ_GB_PER_S,
    adapter_bytes,
    checkpoint_bytes,
    export_bytes,
    has_safetensors,
    host_needs,
    offloaded_bytes,
)
from moe_models.planner.memory import Memory
from moe_models.planner.pipeline import pipeline_traffic, stage_cases, telling_stages
from moe_models.planner.predict import MEMORY_ERROR, Prediction, fullest_moment, predict, refuse_unpredicted
from moe_models.planner.shares import state_bytes
from moe_models.planner.traffic import Flow, spans_nodes
from moe_models.preflight.adapters import adapter_layout_problems, plan_problems
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.flags import length_problems
from moe_models.preflight.fused import dispatch_line
from moe_models.preflight.pipeline import bubble
from moe_models.preflight.run import check_run

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's parser is asked, and would look for a GPU

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
NODES_SHOWN = 2
"""First nodes in the grid; the last one is shown too."""
CELLS_IN_A_LINE = 8
"""Ranks side by side, half as many on a narrow screen."""
GROUPS_SHOWN = 2
"""First groups of each kind."""
MOMENTS = {"loss": "when the loss is taken", "backward": "in the backward pass", "step": "at the optimizer's step"}
"""When a GPU is fullest."""
RANKS_OF_A_GROUP = 4
"""Ranks of a group that are written out; of a larger one the first three and the last."""


def main(words: list[str]) -> int:
    """Read, check, print. Raises UserError with every error, after the warnings are printed."""
    arguments = parse(words)
    ds, config, device = read(arguments)
    world_size = arguments.world_size
    per_node = min(arguments.gpus_per_node, max(1, world_size))
    work = work_of(ds, arguments)

    problems = Problems(check_run(ds, config, world_size))
    problems.add(*length_problems(arguments.max_length, config))
    problems.add(*plan_problems(arguments, config))
    if arguments.use_peft:
        on_experts = bool(arguments.lora_target_parameters or not arguments.lora_target_modules)
        recompute = arguments.gradient_checkpointing
        problems.add(*adapter_layout_problems(ds, on_experts=on_experts, recompute=recompute))
    warnings = []
    if world_size > 0:
        warnings = warnings_for_run(ds, config, world_size, per_node, work=work)

    if not problems.lines:
        case = case_of(ds, config, work, arguments)
        print_case(case, device, arguments)
    warn(warnings)
    problems.refuse()
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", required=True, help="the ds_config JSON")
    parser.add_argument("--model_name_or_path", required=True, help="a folder with a config.json, or a hub id")
    parser.add_argument("--world_size", type=int, required=True, help="ranks (GPUs) in all")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="ranks in one node (8)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of the longest sequence (1024)")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="sequences in a forward pass (8)")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes in a step (1)")
    parser.add_argument(
        "--gradient_checkpointing",
        type=lambda text: text.lower() not in ("false", "no", "0"),
        default=True,
        help="activations are recomputed in the backward pass (true)",
    )
    parser.add_argument("--device", help=f"says whether it fits this GPU: one of {', '.join(device_names())}")
    parser.add_argument(
        "--calibration", nargs="+", default=[], metavar="FILE", help="measured figures of the device, as for plan"
    )
    parser.add_argument("--skew", type=float, default=1.3, help="tokens of the fullest expert over the mean (1.3)")
    parser.add_argument("--host_gib", type=float, default=1000, help="host memory of a node (1000)")
    parser.add_argument("--use_liger_kernel", action="store_true", help="the run uses Liger's kernels")
    parser.add_argument("--use_peft", action="store_true", help="an adapter (LoRA) is trained instead of all weights")
    parser.add_argument("--lora_r", type=int, default=16, help="its rank (16)")
    parser.add_argument("--lora_target_modules", nargs="+", help="its linear layers, as in recipes/finetune.py")
    parser.add_argument("--lora_target_parameters", nargs="+", help="its expert tensors, as in recipes/finetune.py")
    parser.add_argument("--save_total_limit", type=int, help="checkpoints that the run keeps (all of them)")
    parser.add_argument(
        "--read_gb_per_s",
        type=float,
        default=READ_GB_PER_S,
        help=f"GB/s at which one node reads the model's files ({READ_GB_PER_S:g}, assumed)",
    )
    return parser.parse_args(words)


def read(arguments: argparse.Namespace) -> tuple[DsConfig, dict[str, Any], Device | None]:
    """The ds_config, the model's config.json and the device, if one is named.

    Raises UserError with everything wrong in them and in the flags.
    """
    problems = Problems()
    device = None
    with problems.note():
        config = read_model_config(arguments.model_name_or_path)
    with problems.note():
        ds = load_ds_config(arguments.deepspeed)
    for name in ("gpus_per_node", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(arguments, name)
        if value < 1:
            problems.add(f"--{name} {value}: must be at least 1")
    if arguments.save_total_limit is not None and arguments.save_total_limit < 1:
        problems.add(f"--save_total_limit {arguments.save_total_limit}: must be at least 1; leave it out to keep all")
    with problems.note():
        if arguments.device:
            device = read_device(arguments.device, arguments.calibration)
        elif arguments.calibration:
            problems.add("--calibration: does nothing without --device; add the device, or drop this one")
    if not arguments.skew >= 1:
        problems.add(f"--skew {arguments.skew:g}: must be at least 1")
    if not arguments.read_gb_per_s > 0:
        problems.add(f"--read_gb_per_s {arguments.read_gb_per_s:g}: must be above 0")
    problems.refuse()
    return ds, config, device


def case_of(ds: DsConfig, config: dict[str, Any], work: Work, arguments: argparse.Namespace) -> Case:
    """What is checked, as recipes/plan.py plans it."""
    model = Model.of(config)
    adapter = None
    if arguments.use_peft:
        targets = (arguments.lora_target_modules, arguments.lora_target_parameters)
        adapter = adapter_sizes(model.sizes, FAMILIES[config["model_type"]], config, arguments.lora_r, *targets)
    return Case.of(
        ds,
        model,
        arguments.world_size,
        work,
        min(arguments.gpus_per_node, arguments.world_size),
        skew=arguments.skew,
        liger=arguments.use_liger_kernel,
        safetensors=has_safetensors(arguments.model_name_or_path),
        adapter=adapter,
    )


def work_of(ds: DsConfig, arguments: argparse.Namespace) -> Work:
    """The work of one rank. Numbers in the JSON win over flags, as in a run."""

    def in_json(key: str, otherwise: int) -> int:
        value = ds.raw.get(key)
        return value if isinstance(value, int) else otherwise

    return Work(
        micro_batch=in_json("train_micro_batch_size_per_gpu", arguments.per_device_train_batch_size),
        length=arguments.max_length,
        accumulation=in_json("gradient_accumulation_steps", arguments.gradient_accumulation_steps),
        element_bytes=4 if ds.precision == "fp32" else 2,
        recompute=arguments.gradient_checkpointing,
    )


def print_case(case: Case, device: Device | None, arguments: argparse.Namespace) -> None:
    """Everything that is known of the run."""
    console = Console(highlight=False)
    parts: list[RenderableType] = [
        f"[bold]{case.layout.describe(case.ds.zero_stage)}[/bold]  ({case.ds.path})\n",
        *grid(case, console.width),
        groups_table(case),
        *reach_line(case),
        *stage_lines(case),
        *memory_lines(case, device, arguments.host_gib),
        host_lines(case, arguments.read_gb_per_s, arguments.save_total_limit),
        traffic_table(case),
        *dispatch_lines(case),
    ]
    for part in parts:
        console.print(part)


# --- the grid


def grid(case: Case, width: int) -> Iterator[RenderableType]:
    """One box for each rank, a row for each node; ranks of one colour share one copy of the experts."""
    world_size = case.layout.world_size
    per_node = case.gpus_per_node

    # 1. How much fits on the screen: boxes side by side, and the first nodes with the last one.
    cell_width = len(f"rank {world_size - 1}")
    in_a_line = CELLS_IN_A_LINE
    if in_a_line * (cell_width + 1) >= width:
        in_a_line //= 2
    nodes = math.ceil(world_size / per_node)
    last = nodes - 1
    some_left_out = nodes > NODES_SHOWN + 1
    shown = [*range(NODES_SHOWN), last] if some_left_out else [*range(nodes)]

    # 2. The nodes.
    for node in shown:
        if some_left_out and node == last:
            yield f"  ... {nodes - NODES_SHOWN - 1} more nodes ..."
        if nodes > 1:
            yield f"[bold]node {node}[/bold]"
        ranks = range(node * per_node, min(world_size, (node + 1) * per_node))
        for start in range(0, len(ranks), in_a_line):
            yield _boxes(case, ranks[start : start + in_a_line], cell_width)

    # 3. How to read them.
    if case.spread:
        yield "[dim]ep 0.1: place 0 in EP group 1, whose ranks exchange tokens; e: experts held[/dim]"
    if case.layout.pp > 1:
        yield "[dim]pp: the stage; l: its decoder layers; ranks with the same dp in all stages read the same rows[/dim]"
    yield ""


def _boxes(case: Case, ranks: range, cell_width: int) -> Table:
    """Ranks side by side."""
    table = Table(box=SQUARE, show_header=False, padding=(0, 0), border_style="dim")
    for _ in ranks:
        table.add_column(min_width=cell_width)
    table.add_row(*(_box(case, rank) for rank in ranks))
    return table


def _box(case: Case, rank: int) -> str:
    """What one rank is in each kind of group."""
    layout = case.layout
    at = layout.coordinates(rank)
    lines = [f"rank {rank}"]
    if layout.pp > 1:
        bounds = stage_bounds(case.model.config, layout.pp)
        lines += [f"pp {at.pp}", f"l {bounds[at.pp]}-{bounds[at.pp + 1] - 1}"]
    lines.append(f"dp {at.dp}")
    if layout.tp_size > 1:
        lines.append(f"tp {at.tp}")
    if layout.sp_size > 1:
        lines.append(f"sp {at.sp}")
    colour = "default"
    if case.spread:
        held = layout.experts_of(rank, case.sizes.num_experts)
        experts = f"e {held[0]}"
        if len(held) > 1:
            experts += f"-{held[-1]}"
        lines += [f"ep {at.ep}.{at.edp}", experts]
        colour = COLOURS[(at.edp + at.pp * layout.edp_size) % len(COLOURS)]
    text = "\n".join(lines)
    return f"[{colour}]{text}[/{colour}]"


# --- the groups


def groups_table(case: Case) -> Table:
    """Every kind of process group: how many, how large, their first ranks, and whether they stay inside a node."""
    layout = case.layout
    kinds: list[tuple[str, str, Groups]] = []
    if case.spread:
        kinds.append(("EP", "one set of experts", layout.ep_groups()))
        kinds.append(("EDP", "the same experts", layout.edp_groups()))
    kinds.append(("DP", "the dense part", layout.zero_groups()))
    if layout.tp_size > 1:
        kinds.append(("TP", "matrices, and data", layout.tp_groups()))
    if layout.sp_size > 1:
        kinds.append(("SP", "sequences", layout.sp_groups()))
    if layout.pp > 1:
        kinds.append(("PP", "the layers, and data", layout.pp_groups()))

    table = Table(box=MINIMAL, title="process groups", title_justify="left", title_style="bold")
    for column in ("group", "ranks share", "groups", "the first", "nodes"):
        table.add_column(column, no_wrap=True)
    for name, shared, groups in kinds:
        across = "across" if spans_nodes(groups, case.gpus_per_node) else "inside"
        table.add_row(name, shared, f"{len(groups)} x {len(groups[0])}", _first(groups), across)
    return table


def _first(groups: Groups) -> str:
    """The first groups, each as the ranks it begins with: ``(0 1) (2 3) ..``."""
    texts = []
    for group in groups[:GROUPS_SHOWN]:
        if len(group) > RANKS_OF_A_GROUP:
            begin = " ".join(map(str, group[: RANKS_OF_A_GROUP - 1]))
            texts.append(f"({begin} .. {group[-1]})")
        else:
            texts.append("(" + " ".join(map(str, group)) + ")")
    if len(groups) > GROUPS_SHOWN:
        texts.append("..")
    return " ".join(texts)


def reach_line(case: Case) -> Iterator[str]:
    """How many nodes one token's experts can lie on, where an EP group has several."""
    if not case.spread:
        return
    groups = 1
    chosen = 1
    why = "no group limit"
    if _limits_groups(case.model.config):
        groups = case.model.config["n_group"]
        chosen = case.model.config["topk_group"]
        why = f"n_group {groups}, topk_group {chosen}"
    top_k = case.sizes.top_k
    reached, nodes = case.layout.nodes_of_a_token(case.gpus_per_node, case.sizes.num_experts, top_k, groups, chosen)
    if nodes > 1:
        yield f"[dim]the {top_k} experts of a token lie on at most {reached} of {nodes} nodes ({why})[/dim]\n"


def stage_lines(case: Case) -> Iterator[str]:
    """The stages of a pipeline: how even they are, and how long each waits."""
    stages = case.layout.pp
    if stages == 1:
        return
    bounds = stage_bounds(case.model.config, stages)
    runs = [f"{start}-{stop - 1}" for start, stop in pairwise(bounds)]
    slower = max(stage_shares(case.model.config, stages)) * stages - 1
    micro_batches = case.work.accumulation
    idle = bubble(stages, micro_batches)
    yield (
        f"[bold]stages[/bold]  layers {', '.join(runs)}; the slowest is {slower:.0%} slower than the mean\n"
        f"        with {micro_batches} micro-batches a step each stage waits {idle:.0%} of it\n"
    )


def _limits_groups(config: Mapping[str, Any]) -> bool:
    """Whether a token's experts come from some groups of experts only (DeepSeek, arXiv 2412.19437, section 2.1.2)."""
    method = config.get("topk_method", "group_limited_greedy")
    return method != "greedy" and bool(config.get("n_group"))


# --- the bytes


def memory_lines(case: Case, device: Device | None, host_gib: float) -> Iterator[str]:
    """The model's size, what one GPU needs for it, and whether that fits."""
    sizes = case.sizes
    total = _billions(sizes.dense_params + sizes.expert_params)
    experts = _billions(sizes.expert_params)
    active = _billions(sizes.active_params)
    line = f"[bold]model[/bold]   {total} billion parameters: {experts} in experts; one token passes {active}"
    if case.adapter is not None:
        trained_here = case.trained.elements / 1e6
        line += f"; frozen, an adapter of rank {case.adapter.r} is trained ({trained_here:.3g} million on a rank)"
    yield line

    try:
        refuse_unpredicted(case)
    except UserError as error:
        yield from _shares_lines(case, f"[dim]        {error}[/dim]")
        return
    if device is None:
        yield from _memory_without_device(fullest_moment(telling_stages(case), reserved_gib=0))
    else:
        yield from _memory_of_device(predict(case, device), host_gib)
    if case.ds.offloaded:
        on_host = max(offloaded_bytes(stage) for stage in telling_stages(case))
        yield f"        in host memory, for each rank: {gib(on_host)} ({' and '.join(case.ds.offloaded)})"


def _memory_without_device(memory: Memory) -> Iterator[str]:
    """The peak of the fullest GPU, as far as no device has a part in it."""
    known = memory.allocated + memory.skew
    yield from _peak_lines(memory, [part for part in PARTS if part != "outside"])
    yield f"        = {gib(known)}, {MOMENTS[memory.moment]}; --device NAME says whether it fits"


def _peak_lines(memory: Memory, parts: list[str]) -> Iterator[str]:
    """The parts of the peak, states first, the rest on a line of its own."""
    told = [f"{PARTS[part]} {gib(getattr(memory, part))}" for part in parts]
    yield f"[bold]memory[/bold]  GiB of the fullest GPU: {' + '.join(told[:3])}"
    yield f"        + {' + '.join(told[3:])}"


def _memory_of_device(prediction: Prediction, host_gib: float) -> Iterator[str]:
    """The peak of the fullest GPU as plan has it, and the verdict."""
    memory = prediction.memory
    yield from _peak_lines(memory, list(PARTS))
    yield f"        = {gib(memory.needed)} of {prediction.device.usable_gib:.1f}, {MOMENTS[memory.moment]}"
    verdict = prediction.verdict
    why = f"{prediction.device.name}"
    if verdict == "tight":
        why += f"; the prediction was off by up to {MEMORY_ERROR:.0%}"
    host = prediction.host
    if host.peak > host_gib * GIB:
        verdict = "no"
        why = f"the host of a node needs {host.peak / GIB:,.0f} GiB to {host.fullest}, and --host_gib says {host_gib:g}"
    yield f"[bold]fits[/bold]    {verdict}  ({why})"
    for line in prediction.device.measured:
        yield f"        calibrated by: {escape(line)}"


def _shares_lines(case: Case, reason: str) -> Iterator[str]:
    """What ZeRO's shares come to, where the planner has no prediction; of a pipeline those of the largest stage."""
    trained = case.trained.share if case.adapter is not None else None
    of_each = []
    for stage in stage_cases(case):
        of_each.append(state_bytes(case.ds, stage.sizes, stage.layout, case.work.element_bytes, trained))
    states = max(of_each, key=lambda of_one: sum(of_one.values()))
    here: dict[str, int] = {}
    on_host: dict[str, int] = {}
    for name, count in states.items():
        place = on_host if name in case.ds.offloaded else here
        place[name] = count
    of_stage = " of the largest stage" if case.layout.pp > 1 else ""
    yield f"[bold]memory[/bold]  GiB: {_sum_of(here)}"
    yield f"        = {gib(sum(here.values()))} on each rank{of_stage} with AdamW, before activations and buffers"
    if on_host:
        yield f"        in host memory, for each rank: {_sum_of(on_host)}"
    yield reason


def host_lines(case: Case, gb_per_s: float, save_total_limit: int | None) -> str:
    """Memory of a node's host in each phase, the time to read, and the disk."""
    needs = host_needs(stage_cases(case)[0])
    speed = f"{gb_per_s:g} GB/s a node"
    if gb_per_s == READ_GB_PER_S:
        speed += " (assumed; --read_gb_per_s)"
    lines = [
        f"[bold]host[/bold]    a node: read {_whole_gib(needs.read)}, train {_whole_gib(needs.train)}, "
        f"export {_whole_gib(needs.export)}; peak: {needs.fullest}",
        f"        reads {amount(needs.from_disk)} in {needs.seconds_to_read(gb_per_s):,.0f} s at {speed}",
    ]
    if needs.whole:
        lines.append(f"        each rank reads the whole model: {needs.whole}")

    checkpoint = checkpoint_bytes(case)
    exported = adapter_bytes(case) or export_bytes(case)
    lines.append(f"[bold]disk[/bold]    {amount(checkpoint)} a checkpoint, {amount(exported)} the export")
    if save_total_limit is None:
        lines.append("        every checkpoint is kept; --save_total_limit 2 keeps two")
    else:
        # The oldest is removed when the new one is complete.
        at_once = (save_total_limit + 1) * checkpoint
        lines.append(f"        {save_total_limit} kept, and one more while it is written: {amount(at_once)}")
    return "\n".join(lines) + "\n"


def _whole_gib(count: int) -> str:
    return f"{count / GIB:.0f} GiB"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}"


def _sum_of(states: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {gib(count)}" for name, count in states.items())


def traffic_table(case: Case) -> RenderableType:
    """What each rank sends in one optimizer step, over which group."""
    work = case.work
    flows = pipeline_traffic(case)
    length = math.ceil(work.length / case.layout.sp_size)
    title = f"one optimizer step, {work.accumulation} x {work.micro_batch} x {length} tokens on each rank at most"
    if not flows:
        return f"\n[bold]{title}[/bold]\nnothing is sent: one rank in every group"

    table = Table(box=MINIMAL, title=title, title_justify="left", title_style="bold")
    table.add_column("what")
    table.add_column("collective", no_wrap=True)
    table.add_column("group", no_wrap=True)
    table.add_column("a rank sends", justify="right", no_wrap=True)
    table.add_column("nodes", no_wrap=True)
    for flow in flows:
        table.add_row(flow.what, flow.collective, flow.group, amount(flow.sent), _where(flow))
    for way, total in sent_by_way(flows).items():
        if total:
            table.add_row(f"in all {way}", "", "", amount(total), "", style="bold")
    for where in ("inside", "across"):
        total = sum(flow.sent for flow in flows if _where(flow) == where)
        if total:
            table.add_row("in all", "", "", amount(total), where, style="bold")
    return table


def dispatch_lines(case: Case) -> Iterator[str]:
    """How tokens travel under fused kernels, and why."""
    line = dispatch_line(case.ds, case.model.config)
    if line is not None:
        yield f"[dim]{line}[/dim]\n"


def _where(flow: Flow) -> str:
    return "across" if flow.across else "inside"


def amount(count: int) -> str:
    """Bytes in words: 1.5 GB (powers of ten, as networks count)."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count < size:
            continue
        if count < 999.5 * size:
            return f"{count / size:.3g} {unit}"
        return f"{count / size:,.0f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    run(main)
