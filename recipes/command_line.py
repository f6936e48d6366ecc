"""The command line of the recipes that train: TRL's flags and ours, and all that can be refused without weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from config_file import with_config
from moe_models.errors import Problems, UserError, one_line, tell, warn
from moe_models.ranks import rank, ranks_per_node, several_nodes, world_size


@dataclass
class RecipeArguments:
    """What the recipes add to TRL's flags."""

    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out data (like --dataset_name): its loss is reported before and after training."},
    )
    export_max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the exported model."})
    adapter_layout: Literal["fused", "per_expert"] = field(
        default="fused",
        metadata={
            "help": "With --use_peft, how the adapter holds the experts' factors: PEFT's own way, or a pair for each "
            "expert's matrix under the hub's names, which vLLM reads by default."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "With --use_peft, the adapter (PEFT's folder) to go on from."}
    )
    export_merged: bool = field(
        default=False,
        metadata={
            "help": "With --use_peft, write the whole model with the adapter added to it, too (OUTPUT_DIR/model)."
        },
    )
    log_full: bool = field(
        default=False,
        metadata={"help": "Print all figures of a logged step and a progress bar, not only one line."},
    )
    check_conversion: Literal["auto", "all", "none"] = field(
        default="auto",
        metadata={
            "help": "MoE blocks that are compared before the first step with what they computed before their experts "
            "were spread: auto is all, or some evenly spread layers where they hold more than 32 GB."
        },
    )


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
    # 1. Parse and check.
    words = [word for word in words if not word.startswith("--local_rank")]  # the launcher adds it
    words, wrong_config = with_config(words)
    if wrong_config and not several_nodes():  # nothing else can be judged
        raise UserError(wrong_config)
    check_here = check_with_other_nodes if several_nodes() else check
    parser, given, ds, model_config = check_here(words, about, flags, wrong_config)

    from moe_models.engine.cpu import adapt_for_cpu, join_cpu_ranks, on_cpu
    from moe_models.engine.seams import check_seams
    from moe_models.families.table import FAMILIES
    from moe_models.preflight.adapters import adapter_warnings, chosen_adapter
    from moe_models.preflight.flags import mismatch_problems
    from moe_models.preflight.fused import dispatch_line

    check_seams()  # a run on libraries that changed would lose things without a word

    # 2. The JSON decides the layout and the precision; DeepSpeed and HF see it as a value, our own section removed.
    values = vars(given)
    notes: list[str] = []
    values["deepspeed"] = ds.deepspeed
    if ds.precision != "auto":
        values |= {"bf16": ds.precision == "bf16", "fp16": ds.precision == "fp16"}
    if given.use_peft:
        adapter = chosen_adapter(given, FAMILIES[model_config["model_type"]], model_config)
        values |= {"lora_target_modules": adapter.modules or None, "lora_target_parameters": adapter.parameters or None}
    if on_cpu():
        values["deepspeed"], notes = adapt_for_cpu(ds.deepspeed)
        values |= {"bf16": False, "fp16": False, "dataloader_pin_memory": False}
        values["accelerator_config"] = join_cpu_ranks()

    # 3. Make TRL's arguments of the flags. transformers compares them with the JSON while it does.
    try:
        script, recipe, args, model_args = parser.parse_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    Problems(mismatch_problems(ds, args.hf_deepspeed_config.mismatches)).refuse()
    if recipe.eval_dataset is None and args.eval_strategy == "no":
        args.eval_on_start = False

    # 4. Say what will run.
    if ds.moe.layer is not None:
        notes += [f"moe.layer: {line}" for line in ds.moe.layer.departures()]
    dispatch = dispatch_line(ds, model_config)
    if dispatch is not None:
        notes.append(dispatch)
    if rank() == 0:
        print(f"layout: {describe(ds)}", *notes, sep="\n", flush=True)
        warn([*start_warnings(ds, model_config, args, on_gpu=not on_cpu()), *adapter_warnings(given, model_config)])
    return script, recipe, args, model_args, ds


def start_warnings(ds: Any, model_config: Mapping[str, Any], args: Any, *, on_gpu: bool) -> list[str]:
    """What is unwise about this run, which goes on."""
    from moe_models.config.work import Work
    from moe_models.preflight.advice import warnings_for_run

    work = None
    if on_gpu:
        work = Work(
            micro_batch=args.per_device_train_batch_size,
            length=args.max_length or model_config.get("max_position_embeddings") or 1,
            accumulation=args.gradient_accumulation_steps,
        )
    return list(warnings_for_run(ds, model_config, world_size(), ranks_per_node(), on_gpu=on_gpu, work=work))


def check(
    words: list[str], about: str, flags: ModelFlags, found: Sequence[str] = ()
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(parser, parsed flags, checked JSON, the model's config.json), or UserError with every problem found.

    Paths come first, for they need no import that takes seconds: their problems are reported at once, and the rest
    follows. ``found``: problems that were found before.
    """
    if found:
        raise UserError(found)
    # 1. Paths. On several nodes nothing is reported yet: they first look whose problems these are.
    paths, model_config, json_is_sound = check_paths(words, flags)
    told = not several_nodes() and tell(paths.lines, rank=rank())

    from moe_models.config.ds_config import load_ds_config
    from moe_models.engine.cpu import on_cpu
    from moe_models.preflight.adapters import resume_problems
    from moe_models.preflight.flags import flag_problems
    from moe_models.preflight.run import check_run

    # 2. Flags, the JSON, and both together with the model.
    problems = Problems() if told else Problems(paths.lines)
    parser, given, wrong = parse_flags(words, about, flags)
    problems.add(*wrong)
    ds = None
    if json_is_sound:
        with problems.note():
            ds = load_ds_config(given.deepspeed)
    if ds is not None and model_config is not None:
        problems.add(*check_run(ds, model_config, world_size()))
    problems.add(*flag_problems(given, model_config or {}, ds, on_gpu=not on_cpu()))
    if ds is not None and model_config is not None:
        with problems.note():
            checkpoint = checkpoint_to_resume(given.output_dir, given.resume_from_checkpoint)
            problems.add(*resume_problems(given, model_config, ds, world_size(), checkpoint))

    # 3. What was told already still ends the run.
    if paths.lines or ds is None or model_config is None:
        raise UserError(problems.lines)
    problems.refuse()
    return parser, given, ds, model_config


def check_with_other_nodes(
    words: list[str], about: str, flags: ModelFlags, found: Sequence[str] = ()
) -> tuple[Any, ...]:
    """:func:`check` on every node, and the comparison of what must be equal on all of them."""
    from moe_models.nodes.meeting import Meeting
    from moe_models.nodes.watch import start

    problems = Problems()
    checked = None
    with problems.note():
        checked = check(words, about, flags, found)
    meeting = Meeting()
    meeting.compare(node_facts(words, flags), problems.lines)
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


def check_paths(words: list[str], kind: ModelFlags) -> tuple[Problems, dict[str, Any] | None, bool]:
    """(problems with the flags that name files and folders, the model's config.json, whether the JSON can be read)."""
    from moe_models.files import read_json
    from moe_models.preflight.paths import check_dataset_path, check_output_dir, start_problems

    problems = Problems()
    if {"-h", "--help"} & set(words):
        return problems, None, False

    # 1. A parser of these flags only: TRL's takes seconds to import.
    required = (*kind.required, "dataset_name", "deepspeed", "output_dir")
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*required, "eval_dataset", "resume_from_checkpoint"):
        flags.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", dest=name)
    given, _ = flags.parse_known_args(words)
    problems.add(*start_problems(given, required, kind.recipe))

    # 2. What is read, and what must be there or must not.
    model_config: dict[str, Any] | None = None
    json_is_sound = False
    model = getattr(given, kind.required[0])
    if model:
        with problems.note():
            model_config = kind.read_config(model)
    if given.deepspeed:
        with problems.note():
            read_json(given.deepspeed)
            json_is_sound = True
    for data in (given.dataset_name, given.eval_dataset):
        if data:
            problems.add(*check_dataset_path(data))
    if given.output_dir:
        problems.add(*check_output_dir(given.output_dir, resume_value(given.resume_from_checkpoint)))
    return problems, model_config, json_is_sound


def parse_flags(words: list[str], about: str, kind: ModelFlags) -> tuple[Any, Any, list[str]]:
    """(parser, what it understood, a line for every flag that it did not)."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    from moe_models.data import GPU_LOADER
    from moe_models.engine.cpu import on_cpu

    # 1. TRL's flags and ours, with other defaults: training text should not be cut where it is too long, progress
    # should be kept, and experiments should be seen.
    # --config was taken out before.
    kinds = (ScriptArguments, kind.arguments, SFTConfig, ModelConfig)
    usage = f"deepspeed --num_gpus N {kind.recipe} --FLAG VALUE ..."  # instead of TRL's 200 flags on two pages
    parser = TrlParser(kinds, usage=usage, description=about, formatter_class=_Help, allow_abbrev=False)
    parser.set_defaults_with_config(
        packing_strategy="bfd_split", report_to=["tensorboard"], eval_on_start=True, output_dir=None, lora_dropout=0.0,
        logging_steps=1,
        **({} if on_cpu() else GPU_LOADER), **kind.defaults,
    )  # fmt: skip

    def refuse(message: str) -> None:
        raise UserError(message)

    parser.error = refuse  # argparse would print usage and exit at the first bad value

    # 2. Parse; at a bad value note it, take that flag out, and go on.
    problems: list[str] = []
    while True:
        try:
            given, unknown = parser.parse_known_args(words)
            break
        except UserError as error:
            problem, words = without_bad_flag(words, error)
            problems.append(problem)

    # 3. Flags that nothing took. A word without dashes is reported only where no unknown flag could own it.
    no_such = [word for word in unknown if word.startswith("-")]
    strays = [word for word in unknown if not word.startswith("-")]
    problems += [f"{word.split('=')[0]}: no such flag; see --help" for word in no_such]
    if strays and not no_such:
        problems.append(f"{' '.join(strays)}: belongs to no flag; see --help")
    return parser, given, problems


def without_bad_flag(words: list[str], error: UserError) -> tuple[str, list[str]]:
    """(a line for the flag that argparse complains of, the words without it). Raises ``error`` if it names none."""
    found = re.match(r"argument (--[\w-]+)(?:/[\w/-]+)?: (.*)", str(error), re.DOTALL)
    if found is None:
        raise error
    flag = found[1]
    starts = [place for place, word in enumerate(words) if word.split("=")[0] == flag]
    if not starts:
        raise error
    end = starts[0] + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    return f"{flag}: {' '.join(found[2].split())}", words[: starts[0]] + words[end:]


def resume_value(value: str | None) -> bool | str | None:
    """What HF calls ``resume_from_checkpoint``: True is the last checkpoint of the output folder."""
    word = str(value).lower()
    if word == "true":
        return True
    if word in ("none", "false"):
        return None
    return value


def checkpoint_to_resume(output_dir: Any, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint that a run with these flags goes on from, if it is there."""
    value = resume_value(resume_from_checkpoint)
    if not value:
        return None
    if isinstance(value, str):
        return Path(value)
    found = [path for path in Path(output_dir or "").glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def describe(ds: Any) -> str:
    """The layout in one line."""
    return f"{ds.layout(world_size()).describe(ds.zero_stage)}  ({ds.path})"
