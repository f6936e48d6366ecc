"""What a ds_config would do with a model on N ranks: the grid, the groups, the bytes, every error and warning. No GPU.

    python recipes/check.py --deepspeed ds_configs/zero1_ep8.json --model_name_or_path mistralai/Mixtral-8x7B-v0.1 \\
        --world_size 16 --gpus_per_node 8

    # with the flags of the run, for its tokens (the defaults are finetune's own)
    python recipes/check.py ... --max_length 4096 --per_device_train_batch_size 2 --gradient_accumulation_steps 8

It needs the ds_config and the model's config.json, no weights. `recipes/finetune.py` makes the same checks before it
reads a weight. Errors go to stderr, one line each, with exit code 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import MINIMAL, SQUARE
from rich.console import Console
from rich.table import Table

from moe_models.config.layout import Groups, Layout
from moe_models.errors import UserError, exit_with
from moe_models.families.config_json import read_model_config

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's parser is asked, and would look for a GPU

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
NODES_SHOWN, CELLS_IN_A_LINE, GROUPS_SHOWN = 2, 8, 2


def main() -> int:
    """Read, check, print."""
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except UserError as error:
        exit_with(error)
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
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> None:
    """Print everything that is known of the run. Raises UserError with every error, after the warnings are printed."""
    from moe_models.config.ds_config import load_ds_config

    problems: list[str] = []
    found: dict[str, Any] = {}
    for name, path, reader in (
        ("config", arguments.model_name_or_path, read_model_config),
        ("ds", arguments.deepspeed, load_ds_config),
    ):
        try:
            found[name] = reader(path)
        except UserError as error:
            problems += error.problems
    for name in ("gpus_per_node", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            problems.append(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if problems:
        raise UserError(problems)

    from moe_models.config.work import Work
    from moe_models.families.sizes import model_sizes
    from moe_models.planner.traffic import traffic
    from moe_models.preflight.advice import warnings_for_run
    from moe_models.preflight.flags import length_problems
    from moe_models.preflight.run import check_run

    ds, config = found["ds"], found["config"]
    per_node = min(arguments.gpus_per_node, max(1, arguments.world_size))
    work = Work(
        micro_batch=_number(ds.raw, "train_micro_batch_size_per_gpu", arguments.per_device_train_batch_size),
        length=arguments.max_length,
        accumulation=_number(ds.raw, "gradient_accumulation_steps", arguments.gradient_accumulation_steps),
        element_bytes=4 if ds.precision == "fp32" else 2,
        recompute=arguments.gradient_checkpointing,
    )
    problems = [*check_run(ds, config, arguments.world_size), *length_problems(arguments.max_length, config)]
    warned = warnings_for_run(ds, config, arguments.world_size, per_node, work=work) if arguments.world_size > 0 else []
    console = Console(highlight=False)
    if not problems:
        sizes = model_sizes(config)
        layout = Layout(arguments.world_size, ds.ep_size, ds.tp_size, ds.sp_size)
        spread = ds.expert_parallel is not None or ds.moe.layer is not None
        console.print(f"[bold]{layout.describe(ds.zero_stage)}[/bold]  ({ds.path})\n")
        for part in (
            *grid(layout, per_node, sizes.num_experts, spread, console.width),
            groups_table(layout, per_node, spread),
            *(reach_line(layout, per_node, sizes, config) if spread else ()),
            memory_lines(ds, sizes, layout, work.element_bytes),
            traffic_table(traffic(ds, sizes, layout, work, per_node), work, layout.sp_size),
        ):
            console.print(part)
    for line in warned:
        print(f"warning: {line}", file=sys.stderr)
    if problems:
        raise UserError(problems)


def _number(raw: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = raw.get(key)
    return value if isinstance(value, int) else otherwise


def grid(layout: Layout, per_node: int, num_experts: int, spread: bool, width: int) -> Iterable[Any]:
    """One box for each rank, a row for each node; ranks of one colour share one copy of the experts."""
    nodes, cell = math.ceil(layout.world_size / per_node), len(f"rank {layout.world_size - 1}")
    in_a_line = CELLS_IN_A_LINE if CELLS_IN_A_LINE * (cell + 1) < width else CELLS_IN_A_LINE // 2
    shown = [*range(NODES_SHOWN), nodes - 1] if nodes > NODES_SHOWN + 1 else [*range(nodes)]
    for node in shown:
        if nodes > NODES_SHOWN + 1 and node == nodes - 1:
            yield f"  ... {nodes - NODES_SHOWN - 1} more nodes ..."
        if nodes > 1:
            yield f"[bold]node {node}[/bold]"
        ranks = range(node * per_node, min(layout.world_size, (node + 1) * per_node))
        for start in range(0, len(ranks), in_a_line):
            cells = [_cell(layout, rank, num_experts, spread) for rank in ranks[start : start + in_a_line]]
            table = Table(box=SQUARE, show_header=False, padding=(0, 0), border_style="dim")
            for _ in cells:
                table.add_column(min_width=cell)
            table.add_row(*cells)
            yield table
    if spread:
        yield "[dim]ep 0.1: place 0 in EP group 1, whose ranks exchange tokens; e: experts held[/dim]"
    yield ""


def _cell(layout: Layout, rank: int, num_experts: int, spread: bool) -> str:
    at = layout.coordinates(rank)
    lines = [f"rank {rank}", f"dp {at.dp}"]
    if layout.tp_size > 1:
        lines.append(f"tp {at.tp}")
    if layout.sp_size > 1:
        lines.append(f"sp {at.sp}")
    colour = "default"
    if spread:
        held = layout.experts_of(rank, num_experts)
        lines += [f"ep {at.ep}.{at.edp}", f"e {held[0]}" + (f"-{held[-1]}" if len(held) > 1 else "")]
        colour = COLOURS[at.edp % len(COLOURS)]
    return f"[{colour}]" + "\n".join(lines) + f"[/{colour}]"


def groups_table(layout: Layout, per_node: int, spread: bool) -> Table:
    """Every kind of process group: how many, how large, their first ranks, and whether they stay inside a node."""
    from moe_models.planner.traffic import spans_nodes

    table = Table(box=MINIMAL, title="process groups", title_justify="left", title_style="bold")
    for name in ("group", "ranks share", "groups", "the first", "nodes"):
        table.add_column(name, no_wrap=True)
    kinds: list[tuple[str, str, Groups]] = [("DP", "the dense part", layout.zero_groups())]
    if spread:
        kinds = [
            ("EP", "one set of experts", layout.ep_groups()),
            ("EDP", "the same experts", layout.edp_groups()),
            *kinds,
        ]
    if layout.tp_size > 1:
        kinds.append(("TP", "matrices, and data", layout.tp_groups()))
    if layout.sp_size > 1:
        kinds.append(("SP", "sequences", layout.sp_groups()))
    for name, shares, groups in kinds:
        across = "across" if spans_nodes(groups, per_node) else "inside"
        table.add_row(name, shares, f"{len(groups)} x {len(groups[0])}", _first(groups), across)
    return table


def reach_line(layout: Layout, per_node: int, sizes: Any, config: Mapping[str, Any]) -> Iterable[str]:
    """How many nodes one token's experts can lie on, where an EP group has several."""
    limited = config.get("topk_method", "group_limited_greedy") != "greedy" and config.get("n_group")
    groups, chosen = (config["n_group"], config["topk_group"]) if limited else (1, 1)
    reached, nodes = layout.nodes_of_a_token(per_node, sizes.num_experts, sizes.top_k, groups, chosen)
    if nodes > 1:
        why = f"n_group {groups}, topk_group {chosen}" if limited else "no group limit"
        yield f"[dim]the {sizes.top_k} experts of a token lie on at most {reached} of {nodes} nodes ({why})[/dim]\n"


def _first(groups: Groups) -> str:
    """The first groups, each as the ranks it begins with."""
    texts = []
    for group in groups[:GROUPS_SHOWN]:
        dots = len(group) > 4
        texts.append("(" + " ".join(map(str, group[:3] if dots else group)) + (f" .. {group[-1]})" if dots else ")"))
    return " ".join(texts) + (" .." if len(groups) > GROUPS_SHOWN else "")


def memory_lines(ds: Any, sizes: Any, layout: Layout, element_bytes: int) -> str:
    """The model's size, and what one rank keeps of it."""
    from moe_models.planner.shares import offloaded, state_bytes

    states, elsewhere = state_bytes(ds, sizes, layout, element_bytes), offloaded(ds)
    parts = " + ".join(f"{name} {amount(count)}" for name, count in states.items() if name not in elsewhere)
    host = " + ".join(f"{name} {amount(count)}" for name, count in states.items() if name in elsewhere)
    total_here = sum(count for name, count in states.items() if name not in elsewhere)
    billions = (sizes.dense_params + sizes.expert_params, sizes.expert_params, sizes.active_params)
    total, experts, active = (f"{count / 1e9:.3g}" for count in billions)
    return (
        f"[bold]model[/bold]   {total} billion parameters: {experts} in experts; one token passes {active}\n"
        f"[bold]memory[/bold]  {parts}\n        = {amount(total_here)} on each rank with AdamW, "
        "before activations and buffers\n" + (f"        in host memory, for each rank: {host}\n" if host else "")
    )


def traffic_table(flows: list[Any], work: Any, sp_size: int) -> Any:
    """What each rank sends in one optimizer step, over which group."""
    length = -(-work.length // sp_size)
    title = f"one optimizer step, {work.accumulation} x {work.micro_batch} x {length} tokens on each rank at most"
    table = Table(box=MINIMAL, title=title, title_justify="left", title_style="bold")
    for name in ("what", "collective", "group", "a rank sends", "nodes"):
        table.add_column(name, justify="right" if name == "a rank sends" else "left", no_wrap=name != "what")
    for flow in flows:
        table.add_row(flow.what, flow.collective, flow.group, amount(flow.sent), "across" if flow.across else "inside")
    if not flows:
        return f"\n[bold]{title}[/bold]\nnothing is sent: one rank in every group"
    for where in (False, True):
        total = sum(flow.sent for flow in flows if flow.across == where)
        if total:
            table.add_row("in all", "", "", amount(total), "across" if where else "inside", style="bold")
    return table


def amount(count: int) -> str:
    """Bytes in words: 1.5 GB (powers of ten, as networks count)."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
