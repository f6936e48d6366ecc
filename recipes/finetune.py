"""Fine-tune a Hugging Face MoE model with expert parallelism, and get a complete Hugging Face folder back.

    # 8 GPUs; the layout is the JSON: give another one and nothing else changes
    deepspeed --num_gpus 8 recipes/finetune.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 \\
        --dataset_name my.jsonl --deepspeed ds_configs/zero1_ep8.json --output_dir out/mixtral

    # go on after an interruption, from the last complete checkpoint
    deepspeed --num_gpus 8 recipes/finetune.py ... --resume_from_checkpoint true

    # the same in another layout: another JSON, another number of GPUs
    deepspeed --num_gpus 4 recipes/finetune.py ... --resume_from_checkpoint true --deepspeed ds_configs/zero3_ep4.json

    # adapters (LoRA) on attention and experts instead of all weights; --lora_r and the other flags are TRL's own
    deepspeed --num_gpus 2 recipes/finetune.py ... --deepspeed ds_configs/zero1_ep2.json --use_peft --lora_r 16

    # no GPU: two CPU processes, for trying things out (precision and optimizer are adapted, and it says so)
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/finetune.py ... --deepspeed ds_configs/zero1_ep2.json

    # more than one machine: the launcher's hostfile (lines such as "10.0.0.1 slots=8"), over pdsh, or once on each;
    # ./run.sh does it with HOSTFILE and NODE_RANK, recipes/slurm.sbatch under SLURM
    deepspeed --hostfile hosts recipes/finetune.py ...
    deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr 10.0.0.1 recipes/finetune.py ...

`torchrun --nproc_per_node 8` and `accelerate launch --use_deepspeed --num_processes 8` start the same run.

Data: a hub id, a folder or a file (.txt, .jsonl, .json, .parquet) with `text`, with `messages`, or with `prompt` and
`completion`. Messages go through the chat template; --assistant_only_loss takes the loss on the assistant's turns only.
All other flags are those of TRL's SFTConfig and ModelConfig. --config run.yaml reads flags from a file; those that are
given beside it win. --push_to_hub uploads the result, with its card, when it is proven.

On several machines the versions, the flags, the JSON, the model's config.json and the data must be equal, and
--output_dir must be shared (except with --save_strategy no). The nodes compare these first. If one differs, all refuse
and name it; if one fails later, the others end too.

Results, in OUTPUT_DIR:
    model           the whole model under hub names, reloaded and compared with the trained one before it got its name
    adapter         with --use_peft, instead: PEFT's own folder, read back by plain PEFT before it got its name
    log.jsonl       every figure of every logged step; --report_to sends them to TensorBoard (default), W&B or trackio
    checkpoint-N    what --resume_from_checkpoint goes on from
    summary.json    what was measured. It is written last: where it exists, the run came to its end. (Exit code 0 does
                    not prove that: deepspeed 0.19.8 also returns 0 when its own child was killed.)

Exit codes: 0 complete; 2 the input cannot work, and nothing was written; 1 the run had to stop, and says why; 143 it
was told to stop (SIGTERM or SIGUSR1 to any rank, or the launcher is gone), and what can be resumed is saved.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line import FROM_CHECKPOINT, ModelFlags, describe, read_command_line, resume_value
from moe_models.disk import ends_if_full
from moe_models.engine.compile_locks import watch_compile_locks
from moe_models.engine.signals import ToldToStopError, end_as_told, listen
from moe_models.errors import RunError, UserError, one_line, run, warn
from moe_models.files import write
from moe_models.held import give_up, hold, let_go
from moe_models.nodes.watch import end_with, leave
from moe_models.ranks import rank, world_size

# Torch renames of this year, reported once per call by every rank. DeepSpeed and accelerate have to follow them.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

SUMMARY = "summary.json"
complete = False
"""Set by :func:`train` when nothing is left to do."""


# Registered before all other handlers, so it is called after all of them.
@atexit.register
def skip_teardown() -> None:
    """End a complete run at once, instead of taking the interpreter apart.

    DeepSpeed keeps process groups that destroy_process_group() cannot end. Their threads sometimes abort a process
    that is being taken apart ("terminate called without an active exception"). A complete run would then have failed.
    """
    if complete:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


ModelMaker = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]
"""(recipe's arguments, SFTConfig, ModelConfig, training rows, DsConfig) -> (model, tokenizer). Raises UserError."""


def main(words: list[str]) -> int:
    """Train a model that exists."""
    return train(words, __doc__ or "", FROM_CHECKPOINT, read_model)


def train(words: list[str], about: str, flags: ModelFlags, make_model: ModelMaker) -> int:
    """Check, load, train, export, summarise: what recipes/finetune.py and recipes/pretrain.py share.

    Args:
        words: the command line.
        about: the recipe's docstring, with which ``--help`` begins.
        flags: the flags that say which model, and other defaults for those of TRL.
        make_model: makes model and tokenizer of them.

    Raises:
        UserError: for input that cannot work.
        RunError: for a run that stopped to protect what it had, or whose export is not whole.
    """
    listen()
    # 1. Refuse what cannot work, before a weight is read.
    script, recipe, args, model_args, ds = read_command_line(words, about, flags)
    if rank() == 0:
        hold(Path(args.output_dir))
        watch_compile_locks()

    # 2. Data and model. The prepared rows go into a cache. What is uploaded is the proven folder, at the end: the
    #    Trainer itself would upload checkpoints.
    push = args.push_to_hub
    args.push_to_hub = False
    try:
        with ends_if_full(data_cache(), RunError):
            train_rows, eval_rows = load_data(script, recipe, args)
            model, tokenizer = make_model(recipe, args, model_args, train_rows, ds)
            trainer = build_trainer(model, tokenizer, recipe, args, ds, train_rows, eval_rows, model_args)
            if rank() == 0:
                trainer.run_facts = run_facts(script, args, model_args, ds)
    except UserError:
        give_up()
        raise

    # 3. Train, and make a Hugging Face folder of the result.
    from moe_models.engine.step_log import LOG_FILE
    from moe_models.routing.callback import LOAD_FILE

    resume = resume_value(args.resume_from_checkpoint)
    if rank() == 0:
        # A summary says that its run ended; this one has not. The log of a run that was killed before its first
        # checkpoint is not this one's.
        (Path(args.output_dir) / SUMMARY).unlink(missing_ok=True)
        if resume is None:
            (Path(args.output_dir) / LOAD_FILE).unlink(missing_ok=True)
            (Path(args.output_dir) / LOG_FILE).unlink(missing_ok=True)
    try:
        with ends_if_full(args.output_dir, RunError):
            trainer.train(resume_from_checkpoint=resume)
            evaluate_and_export(trainer, recipe, ds, eval_rows)
    except ToldToStopError as told:
        end_as_told(told)
    except RunError:
        print(file=sys.stderr)  # ends the progress bar's line
        raise

    # 4. Leave. Not in a finally: a rank that fails alone must end at once, because only then does the launcher stop
    # the others.
    leave_process_group()
    if push and rank() == 0:
        push_result(args, model_args)
    let_go()
    global complete
    complete = True
    return 0


# ------------------------------------------------------------------------------------------------- data, model, trainer


def data_cache() -> Path:
    """Where ``datasets`` keeps the prepared rows (``HF_DATASETS_CACHE``)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


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


def weights_dtype(args: Any) -> Any:
    """The torch dtype of the weights that training holds, by the precision of the JSON."""
    import torch

    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return torch.float32


def read_model(recipe: Any, args: Any, model_args: Any, train_rows: Any, ds: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or hub id; experts that the layout spreads are still on disk.

    Raises UserError if the model is not whole, or does not fit the data.
    """
    from transformers import AutoTokenizer

    from moe_models.checkpoint import reading
    from moe_models.data import check_assistant_marks, check_chat_template

    name = model_args.model_name_or_path
    revision = model_args.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # missing or damaged files, in the words of transformers
        raise UserError(f"{name}: {one_line(error)}") from error
    if not args.chat_template_path:
        check_chat_template(tokenizer, train_rows, name)
    if args.assistant_only_loss:
        check_assistant_marks(tokenizer, name, args.chat_template_path)
    model = reading.read_model(
        name,
        ds,
        dtype=weights_dtype(args),
        device=args.device,
        revision=revision,
        attn_implementation=model_args.attn_implementation,
    )
    return model, tokenizer


def build_trainer(
    model: Any, tokenizer: Any, recipe: Any, args: Any, ds: Any, train_rows: Any, eval_rows: Any, model_args: Any
) -> Any:
    """Put the trainer together. Raises UserError for a model and data that do not fit together."""
    from moe_models.checkpoint.reading import reading_bar
    from moe_models.data import warnings_for_rows
    from moe_models.engine.lora import continued_adapter, lora_config
    from moe_models.engine.native import register_deepspeed_moe
    from moe_models.engine.step_log import log_in_lines
    from moe_models.families.table import FAMILIES
    from moe_models.files import parse_size
    from moe_models.meter import StepClock
    from moe_models.trainer import MoETrainer

    if ds.moe.layer is not None:
        with reading_bar(model, share=1 / ds.moe.layer.ep_size):
            family = FAMILIES[model.config.model_type]
            model = register_deepspeed_moe(model, ds.moe.layer, family, recipe.check_conversion)
    peft_config = lora_config(model_args)
    if recipe.adapter is not None:
        model = continued_adapter(model, recipe.adapter, model_args)
        peft_config = None  # it is on the model
    try:
        trainer = MoETrainer(
            model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            max_shard_bytes=parse_size(recipe.export_max_shard_size),
            balance=ds.moe.balance,
            kernels=ds.moe.kernels,
            dispatch=ds.moe.dispatch,
            check_conversion=recipe.check_conversion,
            peft_config=peft_config,
        )
    except ValueError as error:  # flags that TRL finds at odds with each other or with the data
        raise UserError(one_line(error)) from error
    trainer.adapter_layout = recipe.adapter_layout
    trainer.clock = StepClock(lambda: trainer._total_train_tokens)
    trainer.add_callback(trainer.clock)
    trainer.step_log = log_in_lines(trainer, trainer.clock, full=recipe.log_full)
    if rank() == 0:  # it reads every prepared row
        warn(warnings_for_rows(train_rows, trainer.train_dataset, args))
    return trainer


def run_facts(script: Any, args: Any, model_args: Any, ds: Any) -> Any:
    """What the model card says of this run before it has measured anything: a RunFacts."""
    from moe_models.checkpoint.card import RunFacts, facts_of_base, facts_of_data, versions

    replicas = ds.layout(world_size()).dp_size
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * replicas
    settings = {
        "sequences per step": str(sequences),
        "longest sequence": str(args.max_length),
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "precision": str(weights_dtype(args)).removeprefix("torch."),
        "seed": str(args.seed),
    }
    if args.packing:
        settings["packing"] = str(args.packing_strategy)
    if args.assistant_only_loss:
        settings["loss"] = "on the assistant's turns"
    if model_args.use_peft:
        settings["adapter"] = f"LoRA, rank {model_args.lora_r}, alpha {model_args.lora_alpha}"
    if not model_args.model_name_or_path:
        settings["start"] = "weights drawn at random"
    return RunFacts(
        **facts_of_base(model_args.model_name_or_path, model_args.model_revision),
        **facts_of_data([script.dataset_name]),
        layout=ds.layout(world_size()).describe(ds.zero_stage),
        settings=settings,
        versions=versions(),
    )


# ------------------------------------------------------------------------------------------------ export, and a summary


def evaluate_and_export(trainer: Any, recipe: Any, ds: Any, eval_rows: Any) -> None:
    """Held-out loss after training, the exported model with its proof, and `summary.json`."""
    from rich.progress import Progress

    from moe_models.meter import peak_memory_gib

    if eval_rows is not None:
        trainer.evaluate()
    peak_gib = peak_memory_gib()  # of training, without the proof below
    with Progress(disable=rank() != 0, transient=True) as bar:
        task = bar.add_task("export", total=None)
        trainer.export_progress = lambda done, total: bar.update(task, completed=done, total=total)
        trainer.save_model()
        merged = trainer.save_merged() if recipe.export_merged else None
    if rank() == 0:
        summary = summarise(trainer, ds, peak_gib, merged)
        write(Path(trainer.args.output_dir) / SUMMARY, json.dumps(summary, indent=2) + "\n")
        print_summary(summary)


def summarise(trainer: Any, ds: Any, peak_gib: float, merged: Any = None) -> dict[str, Any]:
    """What `summary.json` holds; ``merged`` is the proof of the model with its adapter added."""
    from moe_models.engine.lora import is_adapted
    from moe_models.trainer import ADAPTER_FOLDER, MODEL_FOLDER

    adapted = is_adapted(trainer.model)
    speed = trainer.clock.speed
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    evaluated_before = trainer.args.eval_on_start and held_out
    summary = {
        "base_model": trainer.source_config.name_or_path or None,
        "layout": describe(ds),
        "world_size": world_size(),
        "device": trainer.args.device.type,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "steps": trainer.state.global_step,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "speed": speed.as_json(),
        "peak_memory_gib": round(peak_gib, 2),
        "train_loss": losses[-1] if losses else None,
        "eval_loss_before": held_out[0] if evaluated_before else None,
        "eval_loss_after": held_out[-1] if held_out else None,
        "verified": asdict(trainer.last_proof),
        "source": asdict(trainer.last_comparison) if trainer.last_comparison else None,
        "left_out": trainer.routing.left_out,
        "checkpoint": str(Path(trainer.args.output_dir) / (ADAPTER_FOLDER if adapted else MODEL_FOLDER)),
    }
    if merged is not None:
        summary["merged"] = {"folder": str(Path(trainer.args.output_dir) / MODEL_FOLDER), "verified": asdict(merged)}
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """The closing lines of a run."""
    from moe_models.checkpoint.origin import Comparison

    proof = summary["verified"]
    held_out = [loss for loss in (summary["eval_loss_before"], summary["eval_loss_after"]) if loss is not None]
    # Only an adapter's proof has a base model to compare with.
    kind = "model"
    reloaded = "no key missing"
    if "median_without_adapter" in proof:
        kind = "adapter"
        reloaded = "by plain PEFT"
    lines = {
        "layout": summary["layout"],
        "speed": f"{summary['speed']['text']}, peak {summary['peak_memory_gib']} GiB per process",
        "slow steps": summary["speed"]["left_out"],
        "held-out loss": " -> ".join(f"{loss:.4f}" for loss in held_out),
        kind: f"{summary['checkpoint']}  (reloaded: {reloaded}, logits within "
        f"{proof['max_logit_difference']:.1e} of the trained model's, same top token at {proof['same_top1']:.0%})",
        "source": str(Comparison(**summary["source"])) if summary.get("source") else "",
    }
    if "merged" in summary:
        proof = summary["merged"]["verified"]
        lines["merged"] = (
            f"{summary['merged']['folder']}  (reloaded: no key missing, logits within "
            f"{proof['max_logit_difference']:.1e} of the trained model's, same top token at {proof['same_top1']:.0%})"
        )
    lines = {name: text for name, text in lines.items() if text}
    print(*(f"{name:14}{text}" for name, text in lines.items()), sep="\n", flush=True)
    if summary["left_out"]:
        warn([summary["left_out"]])


def push_result(args: Any, model_args: Any) -> None:
    """Upload what came out, an adapter or a model, with its card."""
    from moe_models.checkpoint.hub import upload
    from moe_models.trainer import ADAPTER_FOLDER, MODEL_FOLDER

    out = Path(args.output_dir)
    folder = out / (ADAPTER_FOLDER if model_args.use_peft else MODEL_FOLDER)
    address = upload(
        folder,
        args.hub_model_id or out.absolute().name,
        private=args.hub_private_repo,
        token=args.hub_token,
        revision=args.hub_revision,
    )
    print(f"uploaded      {address}", flush=True)


def leave_process_group() -> None:
    """Close the process group, so that the launcher ends without warnings."""
    import torch.distributed as dist

    leave()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, end=end_with)
