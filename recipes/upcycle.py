"""Turn a dense checkpoint into a Mixture-of-Experts checkpoint that computes the same thing, ready to train.

From a folder, 8 experts of which each token uses 2 (Mixtral's shape):
    python recipes/upcycle.py --model_name_or_path path/to/dense --output_dir path/to/moe

From the hub (needs the network once), more and fewer experts:
    python recipes/upcycle.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir qwen3-moe --num_experts 16
    python recipes/upcycle.py --model_name_or_path path/to/dense --output_dir path/to/moe --num_experts 4

Then train it:
    deepspeed --num_gpus 2 recipes/finetune.py --deepspeed ds_configs/zero1_ep2.json --model_name_or_path path/to/moe \\
        --dataset_name path/to/train.jsonl --output_dir out/first

Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE. At --noise 0 the new model's logits
are the dense model's. No GPU is needed. Memory for one output shard (--max_shard_size) is enough whatever the model's
size. The output folder appears complete or not at all. Exit code 2: the input cannot work, and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as hf_logging

from moe_models.errors import UserError, run
from moe_models.upcycle.upcycle import RouterInit, UpcycleReport, upcycle

NO_HUB = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
"""What huggingface_hub raises for a name that it does not know or cannot reach."""
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*"]


def main(words: list[str]) -> int:
    """Parse, find the dense folder, upcycle it with a progress bar, sum up."""
    hf_logging.set_verbosity_error()
    args = parse(words)
    console = Console()
    dense = find_folder(args.model_name_or_path)
    report = upcycle_with_bar(console, dense, args)
    console.print(summary(report))
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; `--help` says what each choice does to the model."""
    parser = argparse.ArgumentParser(
        usage="python recipes/upcycle.py --model_name_or_path DIR --output_dir DIR [--FLAG VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="DIR", help="dense checkpoint: a folder, or a hub id")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="where the MoE goes: a new or empty folder")
    add("--num_experts", type=int, default=8, metavar="E", help="experts per layer (default 8): memory grows with it")
    add(
        "--num_experts_per_tok",
        type=int,
        default=2,
        metavar="K",
        help="experts that each token uses (default 2): time per token grows with it",
    )
    add(
        "--router_init",
        choices=get_args(RouterInit),
        default="normal",
        help="normal (default): small random scores, so tokens spread from step one; zeros: every score ties, so all "
        "tokens go to the same K experts (a worst case for tests, not for training)",
    )
    add(
        "--noise",
        type=float,
        default=0.0,
        help="0 (default): experts are equal and the model computes what the dense one did; they drift apart as they "
        "see different tokens; 0.01: each expert's weights shifted at random by 1%% of their own deviation",
    )
    add("--seed", type=int, default=0, help="fixes the random numbers of router and noise (default 0)")
    add(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="largest output file, and the memory that is needed (default 5GB)",
    )
    return parser.parse_args(words)


def find_folder(model_name_or_path: str) -> Path:
    """A local folder as it is; anything else is a hub id, which is downloaded or found in the hub's cache.

    Raises:
        UserError: neither a folder nor a model that the hub or its cache can give.
    """
    if Path(model_name_or_path).exists() or model_name_or_path.startswith((".", "/", "~")):
        return Path(model_name_or_path).expanduser()
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=HUB_FILES))
    except NO_HUB as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0]
        raise UserError(
            f"--model_name_or_path={model_name_or_path}: is no folder here, and the hub did not give it ({reason}); "
            "name a folder that holds config.json, or connect to the hub"
        ) from error


def upcycle_with_bar(console: Console, dense: Path, args: argparse.Namespace) -> UpcycleReport:
    """Run `moe_models.upcycle.upcycle.upcycle`; the bar counts output bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("upcycling", total=None)
        return upcycle(
            dense,
            args.output_dir,
            num_experts=args.num_experts,
            num_experts_per_tok=args.num_experts_per_tok,
            router_init=args.router_init,
            noise=args.noise,
            seed=args.seed,
            max_shard_size=args.max_shard_size,
            dense_name=args.model_name_or_path,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def summary(report: UpcycleReport) -> Table:
    """Parameters before and after, and where the result is."""
    table = Table(show_header=False, title="Upcycled", title_justify="left")
    table.add_row("model type", report.model_type)
    table.add_row("parameters, dense", f"{report.dense_parameters / 1e6:,.1f} M")
    table.add_row("parameters, total", f"{report.total_parameters / 1e6:,.1f} M")
    table.add_row("parameters, active per token", f"{report.active_parameters / 1e6:,.1f} M")
    table.add_row("on disk", f"{report.nbytes / 1e9:,.2f} GB in {report.shards} file(s)")
    table.add_row("folder", str(report.output_dir))
    return table


if __name__ == "__main__":
    run(main)
