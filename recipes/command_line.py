"""The command line of the recipes that train: TRL's flags and ours, and all that can be refused without weights."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_models.errors import UserError, tell
from moe_models.ranks import RANK, WORLD_SIZE, ranks_per_node, several_nodes


@dataclass
class RecipeArguments:
    """What the recipes add to TRL's flags."""

    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out data (like --dataset_name): its loss is reported before and after training."},
    )
    export_max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the exported model."})


def read_checkpoint_config(name: str) -> dict[str, Any]:
    """config.json of a model folder or hub id."""
    from moe_models.families.config_json import read_model_config

    return read_model_config(name)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a recipe is told which model it trains."""

    recipe: str = "recipes/finetune.py"
    """For messages."""
    required: tuple[str, ...] = ("model_name_or_path",)
    """The flags that say it; the first one leads to the model's config.json."""
    read_config: Callable[[str], dict[str, Any]] = read_checkpoint_config
    """From that flag's value to config.json. Raises UserError."""
    arguments: type = RecipeArguments
    """:class:`RecipeArguments`, or a class with more flags."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Other defaults for flags of TRL."""


FROM_CHECKPOINT = ModelFlags()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """``--help``: the recipe's docstring as it is written, then the flags with their defaults."""


def read_command_line(words: list[str], about: str = "", flags: ModelFlags = FROM_CHECKPOINT) -> tuple[Any, ...]:
    """Parse the flags and check everything that JSON, config.json and world size can tell, before any weight is read.

    On several machines they then compare what must be equal. Raises UserError with every problem found.
    """
    words = [word for word in words if not word.startswith("--local_rank")]  # the launcher adds it
    if several_nodes():
        parser, given, ds, model_config = check_with_other_nodes(words, about, flags)
    else:
        parser, given, ds, model_config = check(words, about, flags)

    from moe_models.config.work import Work
    from moe_models.engine.cpu import adapt_for_cpu, join_cpu_ranks, on_cpu
    from moe_models.preflight.run import warnings_for_run

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
        per_node = ranks_per_node()
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


def check(words: list[str], about: str, flags: ModelFlags) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(parser, parsed flags, checked JSON, the model's config.json), or UserError with every problem found.

    Paths come first, for they need no import that takes seconds: their problems are said at once, and the rest follows.
    """
    found, model_config, json_is_sound = check_paths(words, flags)
    told = not several_nodes() and tell(found, rank=RANK)  # several nodes first look whose problems these are

    from moe_models.config.ds_config import load_ds_config
    from moe_models.preflight.run import check_run

    parser, given, problems = parse_flags(words, about, flags)
    ds = None
    if json_is_sound:
        try:
            ds = load_ds_config(given.deepspeed)
        except UserError as error:
            problems += error.problems
    if ds is not None and model_config is not None:
        problems += check_run(ds, model_config, WORLD_SIZE)
    problems += refused_flags(given, model_config or {}, ds)
    if problems or found or ds is None or model_config is None:
        raise UserError(problems if told else found + problems)
    return parser, given, ds, model_config


def check_with_other_nodes(words: list[str], about: str, flags: ModelFlags) -> tuple[Any, ...]:
    """:func:`check` on every node, and the comparison of what must be equal on all of them."""
    from moe_models.nodes.meeting import Meeting
    from moe_models.nodes.watch import start

    problems, checked = [], None
    try:
        checked = check(words, about, flags)
    except UserError as error:
        problems = error.problems
    meeting = Meeting()
    meeting.compare(node_facts(words, flags), problems)
    assert checked is not None
    given = checked[1]
    if str(given.save_strategy) != "no" or resume_value(given.resume_from_checkpoint):
        meeting.require_shared(Path(given.output_dir), "--output_dir")
    start(meeting)
    return checked


def node_facts(words: list[str], kind: ModelFlags) -> dict[str, dict[str, str]]:
    """What must be equal on every node; what cannot be read is left out, for :func:`check_paths` has a line for it."""
    from moe_models.files import read_json
    from moe_models.nodes.facts import data_facts, flag_facts, json_facts, version_facts

    flags = flag_facts(words)
    given = {name.lstrip("-").replace("-", "_"): value for name, value in flags.items()}
    files: dict[str, str] = {}
    for name, reader in ((kind.required[0], kind.read_config), ("deepspeed", read_json)):
        with suppress(UserError):
            files |= json_facts(given.get(name, ""), reader(given.get(name, "")))
    for name in ("dataset_name", "eval_dataset"):
        files |= data_facts(given[name]) if given.get(name) else {}
    return {"version": version_facts(), "flag": flags, "file": files}


def check_paths(words: list[str], kind: ModelFlags) -> tuple[list[str], dict[str, Any] | None, bool]:
    """(problems with the flags that name files and folders, the model's config.json, whether the JSON can be read)."""
    from moe_models.files import read_json
    from moe_models.preflight.paths import check_dataset_path, check_output_dir

    required = (*kind.required, "dataset_name", "deepspeed", "output_dir")
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*required, "eval_dataset", "resume_from_checkpoint"):
        flags.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", dest=name)
    given, _ = flags.parse_known_args(words)
    if {"-h", "--help"} & set(words):
        return [], None, False
    problems = [f"--{name}: is required; see --help" for name in required if not getattr(given, name)]
    if "RANK" not in os.environ:
        problems.append(f"no RANK in the environment; start it as: deepspeed --num_gpus N {kind.recipe} ...")
    read: dict[str, Any] = {}
    for name, path, reader in (
        ("model", getattr(given, kind.required[0]), kind.read_config),
        ("json", given.deepspeed, read_json),
    ):
        try:
            read |= {name: reader(path)} if path else {}
        except UserError as error:
            problems += error.problems
    for name in (given.dataset_name, given.eval_dataset):
        problems += check_dataset_path(name) if name else []
    if given.output_dir:
        problems += check_output_dir(given.output_dir, resume_value(given.resume_from_checkpoint))
    return problems, read.get("model"), "json" in read


def parse_flags(words: list[str], about: str, kind: ModelFlags) -> tuple[Any, Any, list[str]]:
    """(parser, what it understood, a line for every flag that it did not)."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    from moe_models.data import GPU_LOADER
    from moe_models.engine.cpu import on_cpu

    kinds = (ScriptArguments, kind.arguments, SFTConfig, ModelConfig)
    usage = f"deepspeed --num_gpus N {kind.recipe} --FLAG VALUE ..."  # instead of TRL's 200 flags on two pages
    parser = TrlParser(kinds, usage=usage, description=about, formatter_class=_Help, allow_abbrev=False)
    # Training text should not be cut where it is too long, progress should be kept, and experiments should be seen.
    parser.set_defaults_with_config(
        packing_strategy="bfd_split", report_to=["tensorboard"], eval_on_start=True, output_dir=None,
        **({} if on_cpu() else GPU_LOADER), **kind.defaults,
    )  # fmt: skip

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
    from moe_models.engine.cpu import on_cpu
    from moe_models.files import parse_size
    from moe_models.preflight.liger import cannot_run, no_kernels
    from moe_models.preflight.run import length_problems, reentrant_problems
    from moe_models.preflight.sequence_parallel import sequence_parallel_flags
    from moe_models.preflight.torch_compile import compile_problems

    problems = []
    if ds is not None:
        wanted = bool(given.torch_compile or given.torch_compile_backend or given.torch_compile_mode)
        problems += [*sequence_parallel_flags(given, ds), *compile_problems(ds, wanted, given.use_liger_kernel)]
    if given.use_liger_kernel:
        flag = "--use_liger_kernel"
        problems += [*no_kernels(model_config, flag), *cannot_run(flag, on_gpu=not on_cpu())]
    if given.use_peft or given.load_in_4bit or given.load_in_8bit:
        problems.append("--use_peft, --load_in_4bit, --load_in_8bit: not supported; all weights are trained whole")
    if given.trust_remote_code:
        problems.append(
            "--trust_remote_code: not supported; every family of this recipe is part of transformers or of this package"
        )
    problems += length_problems(given.max_length, model_config)
    coefficient = given.router_aux_loss_coef
    problems += reentrant_problems(
        given, bool(model_config.get("router_aux_loss_coef") if coefficient is None else coefficient)
    )
    if given.bf16 and given.fp16:
        problems.append("--bf16 and --fp16: a run has one precision; drop one of them")
    for name in ("bf16", "fp16"):
        if getattr(given, name) and ds is not None and ds.precision not in ("auto", name):
            problems.append(
                f'--{name}: the precision of {ds.path} is {ds.precision}; set {name}.enabled to true or "auto" there, '
                f"or drop --{name}"
            )
        elif getattr(given, name) and ds is not None and ds.precision == "auto" and name not in ds.raw:
            problems.append(f'--{name}: {ds.path} has no {name} section; add "{name}": {{"enabled": "auto"}}')
    if given.dataset_streaming and given.max_steps <= 0:
        problems.append("--dataset_streaming: the number of rows is not known then; set --max_steps")
    if given.dataset_streaming and ds is not None and ds.tp_size * ds.sp_size > 1:
        problems.append(
            "--dataset_streaming: with tensor or sequence parallelism accelerate would give all ranks the same rows; "
            "drop it"
        )
    try:
        parse_size(given.export_max_shard_size)
    except ValueError as error:
        problems.append(f"--export_max_shard_size {error}")
    return problems


def resume_value(value: str | None) -> bool | str | None:
    """What HF calls ``resume_from_checkpoint``: True is the last checkpoint of the output folder."""
    return True if str(value).lower() == "true" else None if str(value).lower() in ("none", "false") else value


def describe(ds: Any) -> str:
    """The layout in one line."""
    from moe_models.config.layout import Layout

    name = Layout(WORLD_SIZE, ds.ep_size, ds.tp_size, ds.sp_size).describe(ds.zero_stage)
    return f"{name}  ({ds.path})"
