"""Fine-tune a Hugging Face MoE model with expert parallelism, and get a complete Hugging Face folder back.

    # 8 GPUs; the layout is the JSON: swap it for another one and nothing else changes
    deepspeed --num_gpus 8 recipes/finetune.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 \\
        --dataset_name my.jsonl --deepspeed ds_configs/zero1_ep8.json --output_dir out/mixtral

    # go on after an interruption, from the last complete checkpoint
    deepspeed --num_gpus 8 recipes/finetune.py ... --resume_from_checkpoint true

    # no GPU: two CPU processes, for trying things out (precision and optimizer are adapted, and it says so)
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/finetune.py ... --deepspeed ds_configs/zero1_ep2.json

Data: a hub id, a folder or a file (.txt, .jsonl, .json, .parquet) with `text`, `messages` (chat template; loss on the
assistant's turns only with --assistant_only_loss), or `prompt` and `completion`. All other flags are those of TRL's
SFTConfig and ModelConfig.

Afterwards `OUTPUT_DIR/model` holds the whole model in the layout of the hub, reloaded and compared with the trained one
before it got its name; `OUTPUT_DIR/checkpoint-N` resumes; `OUTPUT_DIR/summary.json` says what was measured. It is
written last, so where it is, the run came to its end (deepspeed 0.19.8 answers 0 when its own child was killed).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_models.errors import UserError, exit_with, tell

# Torch renames of this year, said once per call by every rank; they are DeepSpeed's and accelerate's to follow.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SUMMARY = "summary.json"


@dataclass
class RecipeArguments:
    """What this recipe adds to TRL's flags."""

    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out data (like --dataset_name): its loss is reported before and after training."},
    )
    export_max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the exported model."})


def main() -> int:
    """Check, load, train, export, summarise."""
    try:
        script, recipe, args, model_args, ds = read_command_line(sys.argv[1:])
        train_rows, eval_rows = load_data(script, recipe, args)
    except UserError as error:
        exit_with(error, rank=RANK)
    from moe_models.hf_folder import ExportError
    from moe_models.trainer import TrainingStoppedError

    try:
        trainer = build_trainer(recipe, args, model_args, ds, train_rows, eval_rows)
        if RANK == 0:
            (Path(args.output_dir) / SUMMARY).unlink(missing_ok=True)  # of the run that is now going on
        trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
        evaluate_and_export(trainer, ds, eval_rows)
    except UserError as error:
        exit_with(error, rank=RANK)
    except (TrainingStoppedError, ExportError) as error:
        print(file=sys.stderr)  # ends the progress bar's line
        exit_with(UserError(str(error)), rank=RANK, code=1)
    # Not in a finally: a rank that fails alone must end at once, for only then does the launcher stop the others.
    leave_process_group()
    return 0


# ------------------------------------------------------------------------------------- everything that needs no weights


def read_command_line(words: list[str]) -> tuple[Any, ...]:
    """Parse the flags and check everything that JSON, config.json and world size can tell, before any weight is read.

    Raises UserError with every problem found. Paths come first, for they need no import that takes seconds: their
    problems are said at once, and the rest follows.
    """
    words = [word for word in words if not word.startswith("--local_rank")]  # the launcher adds it
    problems, model_config, json_is_sound = check_paths(words)
    told = tell(problems, rank=RANK)

    from moe_models.config import adapt_for_cpu, load_ds_config
    from moe_models.preflight import check_run, warnings_for_run
    from moe_models.traffic import Work

    parser, given, problems = parse_flags(words)
    ds = None
    if json_is_sound:
        try:
            ds = load_ds_config(given.deepspeed)
        except UserError as error:
            problems += error.problems
    if ds is not None and model_config is not None:
        problems += check_run(ds, model_config, WORLD_SIZE)
    problems += refused_flags(given, model_config or {}, ds)
    if problems or told or ds is None or model_config is None:
        raise UserError(problems)

    from moe_models.cpu import join_cpu_ranks, on_cpu

    values = vars(given)
    notes: list[str] = []
    # The JSON decides the layout and the precision; DeepSpeed and HF see it as a value, our own section removed.
    values["deepspeed"] = ds.deepspeed
    if ds.precision != "auto":
        values |= {"bf16": ds.precision == "bf16", "fp16": ds.precision == "fp16"}
    if on_cpu():
        values["deepspeed"], notes = adapt_for_cpu(ds.deepspeed)
        values |= {"bf16": False, "fp16": False, "dataloader_pin_memory": False}
        values["accelerator_config"] = join_cpu_ranks()
    try:
        script, recipe, args, model_args = parser.parse_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    mismatches = args.hf_deepspeed_config.mismatches
    if mismatches:
        raise UserError(f'{ds.path}: {line.strip(" -")}; make them equal, or write "auto"' for line in mismatches)
    if recipe.eval_dataset is None and args.eval_strategy == "no":
        args.eval_on_start = False
    if RANK == 0:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
        work = Work(
            micro_batch=args.per_device_train_batch_size,
            length=args.max_length or model_config.get("max_position_embeddings") or 1,
            accumulation=args.gradient_accumulation_steps,
        )
        gpu = not on_cpu()
        warned = warnings_for_run(ds, model_config, WORLD_SIZE, per_node, on_gpu=gpu, work=work if gpu else None)
        notes += [f"warning: {line}" for line in warned]
        if ds.moe.layer is not None:
            notes += [f"moe.layer: {line}" for line in ds.moe.layer.departures()]
        print(f"layout: {describe(ds)}", *notes, sep="\n", flush=True)
    return script, recipe, args, model_args, ds


def check_paths(words: list[str]) -> tuple[list[str], dict[str, Any] | None, bool]:
    """(problems with the flags that name files and folders, the model's config.json, whether the JSON can be read)."""
    from moe_models.config import read_json
    from moe_models.inputs import check_dataset_path, check_output_dir, read_model_config

    required = ("model_name_or_path", "dataset_name", "deepspeed", "output_dir")
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*required, "eval_dataset", "resume_from_checkpoint"):
        flags.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", dest=name)
    given, _ = flags.parse_known_args(words)
    if {"-h", "--help"} & set(words):
        return [], None, False
    problems = [f"--{name}: is required; see --help" for name in required if not getattr(given, name)]
    if "RANK" not in os.environ:
        problems.append("no RANK in the environment; start it as: deepspeed --num_gpus N recipes/finetune.py ...")
    read: dict[str, Any] = {}
    for name, path, reader in (
        ("model", given.model_name_or_path, read_model_config),
        ("json", given.deepspeed, read_json),
    ):
        try:
            read |= {name: reader(path)} if path else {}
        except UserError as error:
            problems += error.problems
    for name in (given.dataset_name, given.eval_dataset):
        problems += check_dataset_path(name) if name else []
    if given.output_dir:
        problems += check_output_dir(given.output_dir, _resume(given.resume_from_checkpoint))
    return problems, read.get("model"), "json" in read


def parse_flags(words: list[str]) -> tuple[Any, Any, list[str]]:
    """(parser, what it understood, a line for every flag that it did not)."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    kinds = (ScriptArguments, RecipeArguments, SFTConfig, ModelConfig)
    parser = TrlParser(kinds, description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    # Training text should not be cut where it is too long, progress should be kept, and experiments should be seen.
    parser.set_defaults_with_config(
        packing_strategy="bfd_split", report_to=["tensorboard"], eval_on_start=True, output_dir=None
    )

    def refuse(message: str) -> None:
        raise UserError(message)

    parser.error = refuse
    problems: list[str] = []
    while True:
        try:
            given, unknown = parser.parse_known_args(words)
            break
        except UserError as error:  # argparse stops at the first: note it, take that flag out, and go on
            found = re.match(r"argument (--[\w-]+)(?:/[\w/-]+)?: (.*)", str(error), re.DOTALL)
            start = next((i for i, word in enumerate(words) if found and word.split("=")[0] == found[1]), None)
            if found is None or start is None:
                raise
            problems.append(f"{found[1]}: {' '.join(found[2].split())}")
            end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
            words = words[:start] + words[end:]
    problems += [f"{word.split('=')[0]}: no such flag; see --help" for word in unknown if word.startswith("-")]
    strays = [word for word in unknown if not word.startswith("-")]
    if strays and not any(word.startswith("-") for word in unknown):
        problems.append(f"{' '.join(strays)}: belongs to no flag; see --help")
    return parser, given, problems


def refused_flags(given: Any, model_config: dict[str, Any], ds: Any) -> list[str]:
    """Flags of TRL that this recipe cannot honour, or that cannot fit the model or the JSON."""
    from moe_models.hf_folder import parse_size
    from moe_models.preflight import length_problems

    problems = []
    if given.use_peft or given.load_in_4bit or given.load_in_8bit:
        problems.append("--use_peft, --load_in_4bit, --load_in_8bit: not supported; all weights are trained whole")
    if given.trust_remote_code:
        problems.append("--trust_remote_code: not supported; every family of this recipe is part of transformers")
    problems += length_problems(given.max_length, model_config)
    for name in ("bf16", "fp16"):
        if getattr(given, name) and ds is not None and ds.precision not in ("auto", name):
            problems.append(
                f'--{name}: the precision of {ds.path} is {ds.precision}; set {name}.enabled to true or "auto" there, '
                f"or drop --{name}"
            )
    if given.dataset_streaming and given.max_steps <= 0:
        problems.append("--dataset_streaming: the number of rows is not known then; set --max_steps")
    try:
        parse_size(given.export_max_shard_size)
    except ValueError as error:
        problems.append(f"--export_max_shard_size {error}")
    return problems


def _resume(value: str | None) -> bool | str | None:
    """What HF calls ``resume_from_checkpoint``: True is the last checkpoint of the output folder."""
    return True if str(value).lower() == "true" else None if str(value).lower() in ("none", "false") else value


def describe(ds: Any) -> str:
    """The layout in one line."""
    from moe_models.layout import Layout

    name = Layout(WORLD_SIZE, ds.ep_size, ds.tp_size, ds.sp_size).describe(ds.zero_stage)
    return f"{name}  ({ds.path})"


# ------------------------------------------------------------------------------------------------- data, model, trainer


def load_data(script: Any, recipe: Any, args: Any) -> tuple[Any, Any]:
    """Training and held-out rows; rank 0 of each node prepares the cache that the others read."""
    from moe_models.data import load_rows

    options = {"config": script.dataset_config, "streaming": script.dataset_streaming}
    with args.main_process_first(desc="reading the data"):
        train_rows = load_rows(script.dataset_name, split=script.dataset_train_split, **options)
        eval_rows = None
        if recipe.eval_dataset is not None:
            eval_rows = load_rows(recipe.eval_dataset, split=script.dataset_train_split)
        elif args.eval_strategy != "no":
            eval_rows = load_rows(script.dataset_name, split=script.dataset_test_split, **options)
    return train_rows, eval_rows


def build_trainer(recipe: Any, args: Any, model_args: Any, ds: Any, train_rows: Any, eval_rows: Any) -> Any:
    """Read the weights and put the trainer together. Raises UserError for a folder or data that do not fit together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moe_models.data import check_chat_template, warnings_for_rows
    from moe_models.families import FAMILIES
    from moe_models.hf_folder import parse_size
    from moe_models.meter import StepClock
    from moe_models.native import register_deepspeed_moe
    from moe_models.trainer import MoETrainer

    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        if not args.chat_template_path:
            check_chat_template(tokenizer, train_rows, name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            attn_implementation=model_args.attn_implementation,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, all of them by name
        )
    except (OSError, ValueError, RuntimeError) as error:  # missing or damaged files, in the words of transformers
        raise error if isinstance(error, UserError) else UserError(f"{name}: {' '.join(str(error).split())}") from error
    absent = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if absent:  # transformers would fill them with random numbers
        raise UserError(
            f"{name}: {len(absent)} weights are missing or incomplete ({', '.join(absent[:4])}); give the whole model"
        )
    if ds.moe.layer is not None:
        model = register_deepspeed_moe(model, ds.moe.layer, FAMILIES[model.config.model_type])
    try:
        trainer = MoETrainer(
            model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            max_shard_bytes=parse_size(recipe.export_max_shard_size),
            balance=ds.moe.balance,
        )
    except ValueError as error:  # flags that TRL finds at odds with each other or with the data
        raise UserError(" ".join(str(error).split())) from error
    trainer.clock = StepClock()
    trainer.add_callback(trainer.clock)
    for line in warnings_for_rows(train_rows, trainer.train_dataset, args) if RANK == 0 else []:
        print(f"warning: {line}", flush=True)
    return trainer


# ------------------------------------------------------------------------------------------------ export, and a summary


def evaluate_and_export(trainer: Any, ds: Any, eval_rows: Any) -> None:
    """Held-out loss after training, the exported model with its proof, and `summary.json`."""
    from rich.progress import Progress

    from moe_models.meter import peak_memory_gib
    from moe_models.trainer import MODEL_FOLDER

    if eval_rows is not None:
        trainer.evaluate()
    peak = peak_memory_gib()  # of training; the proof below holds a second model on rank 0
    with Progress(disable=RANK != 0, transient=True) as bar:
        task = bar.add_task("export", total=None)
        trainer.export_progress = lambda done, total: bar.update(task, completed=done, total=total)
        trainer.save_model()
    if RANK != 0:
        return
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    folder = Path(trainer.args.output_dir)
    summary = {
        "layout": describe(ds),
        "world_size": WORLD_SIZE,
        "device": trainer.args.device.type,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "steps": trainer.state.global_step,
        "tokens_per_second": round(trainer.clock.tokens_per_second(trainer._total_train_tokens), 1),
        "peak_memory_gib": round(peak, 2),
        "train_loss": losses[-1] if losses else None,
        "eval_loss_before": held_out[0] if trainer.args.eval_on_start and held_out else None,
        "eval_loss_after": held_out[-1] if held_out else None,
        "verified": asdict(trainer.last_proof),
        "left_out": trainer.routing.left_out,
        "checkpoint": str(folder / MODEL_FOLDER),
    }
    temporary = folder / f".{SUMMARY}"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, folder / SUMMARY)
    print_summary(summary)


def print_summary(summary: dict[str, Any]) -> None:
    """The closing lines of a run."""
    proof = summary["verified"]
    held_out = [loss for loss in (summary["eval_loss_before"], summary["eval_loss_after"]) if loss is not None]
    lines = {
        "layout": summary["layout"],
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, peak {summary['peak_memory_gib']} GiB per process",
        "held-out loss": " -> ".join(f"{loss:.4f}" for loss in held_out),
        "model": f"{summary['checkpoint']}  (reloaded: no key missing, logits within "
        f"{proof['max_logit_difference']:.1e} of the trained model's, same top token at {proof['same_top1']:.0%})",
    }
    if not held_out:
        del lines["held-out loss"]
    if summary["left_out"]:
        lines["warning"] = summary["left_out"]
    print(*(f"{name:14}{text}" for name, text in lines.items()), sep="\n", flush=True)


def leave_process_group() -> None:
    """Close the process group, so that the launcher ends without warnings."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
