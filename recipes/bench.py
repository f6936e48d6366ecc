"""Layouts side by side: the same model, tokens and optimizer step under several ds_configs and baselines, in one call.

    # 2 GPUs: two layouts of ours and the three baselines, 1 and 4 sequences per GPU
    python recipes/bench.py --config_name model_configs/bench-mixtral.json --num_gpus 2 --micro_batch 1 4 \\
        --deepspeed ds_configs/zero1_ep2.json ds_configs/zero1_ep2.json+liger hf_zero3 autoep_stock transformers_ep

    # what MoETrainer costs over a bare deepspeed.initialize loop on the same model and JSON
    python recipes/bench.py --config_name model_configs/bench-mixtral.json --num_gpus 2 --micro_batch 4 \\
        --deepspeed ds_configs/zero1_ep2.json bare:ds_configs/zero1_ep2.json

    # no GPU: two CPU processes, to see that it works; the figures mean nothing
    DS_ACCELERATOR=cpu python recipes/bench.py --config_name model_configs/mixtral-tiny.json --num_gpus 2 \\
        --seq_length 64 --micro_batch 1 --steps 2 --deepspeed ds_configs/zero1_ep2.json hf_zero3

A ds_config runs through MoETrainer as users run it; baselines by name:

    hf_zero3         the plain HF model under ds_configs/zero3.json without `timers`, a bare deepspeed.initialize loop
    autoep_stock     AutoEP at ZeRO-1 with DeepSpeed's defaults, a bare deepspeed.initialize loop
    transformers_ep  transformers' own expert parallelism (FSDP2)
    bare:FILE.json   a bare deepspeed.initialize loop with that JSON

`+liger`, `+checkpointing`, `+compile`, `+lora` and `+lora_attention` (adapters of rank 16 on attention and experts, or
on attention alone), and `+KEY.KEY=VALUE` of the JSON change a layout. Weights are random, also with
--model_name_or_path, of which only config.json is read: routers then route near uniformly, and the column `expert load`
shows how near. Times are taken between the ends of optimizer steps, clipping included; the profile is of further steps.
Exit code 1: a row has no figures; the others have theirs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_models.bench.layouts import read_layouts
from moe_models.bench.processes import make_jobs, measure
from moe_models.bench.table import finish_rows, table, write_report
from moe_models.errors import Problems, UserError, run


def main(words: list[str]) -> int:
    """Parse, check, measure row by row, report."""
    args = parse(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes below end with this one
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as name:
        scratch = Path(name)
        # 1. Everything that can be refused before a process is started.
        model_config = read_config(args)
        check_numbers(args, model_config)
        layouts = read_layouts(args.deepspeed, model_config, args.num_gpus, scratch)
        if any(layout.liger for layout in layouts):
            check_liger()

        # 2. The rows. The report is written after each, so that a call that is cut short leaves what it had.
        def report(rows: list[dict[str, Any]]) -> None:
            finish_rows(rows, model_config, args.num_gpus)
            write_report(Path(args.output_dir), rows, vars(args), model_config)

        jobs = make_jobs(args, layouts, model_config, scratch)
        rows = measure(jobs, args, scratch, report)
    print(table(rows))
    print(f"written: {args.output_dir}/bench.json, bench.md, bench.png, calibration.json")
    complete = all(row["status"] == "ok" for row in rows)
    return 0 if complete else 1


def check_liger() -> None:
    """Raises UserError if Liger's kernels cannot run here."""
    from moe_models.engine.cpu import on_cpu
    from moe_models.preflight.liger import cannot_run

    problems = list(cannot_run("+liger", on_gpu=not on_cpu()))
    if problems:
        raise UserError(problems)


def parse(words: list[str]) -> argparse.Namespace:
    """The flags."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_name_or_path", help="Folder or hub id; its config.json is read, weights are random.")
    model.add_argument("--config_name", help="A config.json, e.g. one of model_configs/.")
    parser.add_argument("--num_hidden_layers", type=int, help="Another depth than that of config.json.")
    parser.add_argument("--deepspeed", nargs="+", required=True, metavar="LAYOUT", help="ds_configs and baselines.")
    parser.add_argument("--num_gpus", type=int, default=2, help="GPUs, or CPU processes where there is none.")
    parser.add_argument("--seq_length", type=int, default=4096, help="Tokens in a sequence.")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[1, 4], help="Sequences per GPU in a forward.")
    parser.add_argument(
        "--accumulation", type=int, nargs="+", default=[1],
        help="Forward passes in an optimizer step: one number, or one for each --micro_batch.",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=8, help="Timed optimizer steps; their median counts.")
    parser.add_argument("--warmup", type=int, default=3, help="Optimizer steps before them.")
    parser.add_argument("--profile_steps", type=int, default=2, help="Profiled steps after them; 0 for none.")
    parser.add_argument("--attn_implementation", default="sdpa", help="As in transformers.")
    parser.add_argument(
        "--tokens", choices=("uniform", "zipf"), default="uniform",
        help="Random ids, all alike or as frequent as words are (token r as often as 1/r).",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="Of weights and tokens.")
    parser.add_argument("--isolate", action="store_true", help="Fresh processes for each row.")
    parser.add_argument("--row_timeout", type=float, default=240, help="Seconds after which a row counts as hung.")
    parser.add_argument("--output_dir", default="out/bench", help="Folder for the report.")
    return parser.parse_args(words)


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json with the depth asked for. Raises UserError."""
    from moe_models.families.config_json import read_model_config
    from moe_models.files import read_json

    if args.config_name and Path(args.config_name).is_file():
        config = read_json(args.config_name)
    else:
        config = read_model_config(args.config_name or args.model_name_or_path)
    if args.num_hidden_layers:
        config = {**config, "num_hidden_layers": args.num_hidden_layers}
    return config


LEAST = {"num_gpus": 1, "seq_length": 2, "steps": 1, "warmup": 1, "profile_steps": 0}
"""Flag -> its smallest value."""


def check_numbers(args: argparse.Namespace, model_config: dict[str, Any]) -> None:
    """Raise UserError for numbers that cannot be, with every problem found."""
    from moe_models.families.sizes import model_sizes
    from moe_models.preflight.flags import length_problems

    problems = Problems()
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value < least:
            problems.add(f"--{name} {value}: must be at least {least}")
    for name in ("micro_batch", "accumulation"):
        for value in getattr(args, name):
            if value < 1:
                problems.add(f"--{name} {value}: must be at least 1")
    if len(args.accumulation) not in (1, len(args.micro_batch)):
        given = " ".join(map(str, args.accumulation))
        problems.add(
            f"--accumulation {given}: give one number, or one for each of the {len(args.micro_batch)} --micro_batch"
        )
    for line in length_problems(args.seq_length, model_config):
        problems.add(line.replace("--max_length", "--seq_length"))
    problems.refuse()
    model_sizes(model_config)  # refuses a model whose MFU could not be computed


if __name__ == "__main__":
    run(main)
