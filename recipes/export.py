"""Turn a DeepSpeed checkpoint that training wrote into a complete Hugging Face folder. No GPU, no launcher.

    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500
    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500 --max_shard_size 2GB

    # a checkpoint of a run with --use_peft gives PEFT's folder; with --merge the whole model, the adapter added to it
    python recipes/export.py --checkpoint out/lora/checkpoint-500 --output_dir out/adapter-500
    python recipes/export.py --checkpoint out/lora/checkpoint-500 --output_dir out/merged-500 --merge

    # any plain LoRA in PEFT's folder
    python recipes/export.py --checkpoint out/lora/adapter --output_dir out/merged --merge --base_model my/Mixtral-8x7B

Every expert is collected from the files of all ranks, ZeRO partitions are joined, and the weights are written in the
hub's names and layout, with config.json, tokenizer, generation config and a model card. The folder appears under its
name only when nothing is missing, no shape is wrong and every value is finite. It is byte for byte what the running
training would have exported at that step, except for what the card says was measured. It is compared with the model
that training started from, which the checkpoint names. What the trained class does not hold of that model is passed
on. Memory: one projection of one layer's experts.

Adapters: what is written is read back by plain PEFT or plain transformers, and must answer as plain PEFT answers with
the adapter on its base model, one decoder layer of which is in memory at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_models.disk import is_full
from moe_models.errors import Problems, UserError, one_line, run, warn

if TYPE_CHECKING:
    from moe_models.checkpoint.per_expert import AdapterLayout
    from moe_models.families.table import Family

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading files needs no GPU


def main(words: list[str]) -> int:
    """Check, read, write, summarise."""
    arguments = parse(words)
    if is_adapter(arguments.checkpoint):
        export_adapter(arguments)
        return 0
    refuse_flags_of_adapters(arguments)
    export_checkpoint(arguments.checkpoint, arguments.output_dir, arguments.max_shard_size, arguments.source)
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint-N folder that training wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the Hugging Face folder appears")
    parser.add_argument(
        "--max_shard_size", default="5GB", help="largest safetensors file, as 5GB or 500MB (default 5GB)"
    )
    parser.add_argument("--merge", action="store_true", help="of an adapter: write its base model with it added")
    parser.add_argument("--base_model", help="of an adapter: folder or hub id, if not the one that it names")
    parser.add_argument(
        "--adapter_layout", choices=("fused", "per_expert"), help="of an adapter: how it holds the experts' factors"
    )
    parser.add_argument(
        "--source",
        help="the model that training started from, if it is no longer where it was: a folder or hub id; none: do not "
        "compare, and pass nothing on that the trained class does not hold",
    )
    return parser.parse_args(words)


# ------------------------------------------------------------------------------------------------------------ adapters


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is PEFT's, or a checkpoint of a run that trained an adapter."""
    return (folder / "adapter_config.json").is_file()


def refuse_flags_of_adapters(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that need an adapter where there is none."""
    problems = Problems()
    for name in ("merge", "base_model", "adapter_layout"):
        if getattr(arguments, name):
            problems.add(f"--{name}: {arguments.checkpoint} holds no adapter (adapter_config.json); drop it")
    problems.refuse()


def export_adapter(arguments: argparse.Namespace) -> None:
    """Write an adapter's folder, or its base model with it added. Raises UserError for input that cannot work."""
    from moe_models.checkpoint.hf_folder import ExportError, refuse_foreign_folder
    from moe_models.files import parse_size

    # 1. The flags.
    problems = Problems()
    layout: AdapterLayout = arguments.adapter_layout or "fused"
    max_shard_bytes = 0
    if arguments.source is not None:
        problems.add("--source: of a checkpoint that holds a whole model; an adapter's is --base_model")
    if arguments.merge and arguments.adapter_layout:
        problems.add("--adapter_layout with --merge: a merged model has no adapter; drop one of them")
    try:
        max_shard_bytes = parse_size(arguments.max_shard_size)
    except ValueError as error:
        problems.add(f"--max_shard_size {error}")
    with problems.note():
        read_problems(arguments, layout)
    try:
        if arguments.merge:
            refuse_foreign_folder(arguments.output_dir)
        else:
            from moe_models.checkpoint.adapter import refuse_foreign_adapter

            refuse_foreign_adapter(arguments.output_dir)
    except (ExportError, OSError) as error:
        problems.add(f"--output_dir {error}")
    problems.refuse()

    # 2. Write, prove, and say what was compared.
    from rich.progress import Progress

    from moe_models.checkpoint.merging import merge_folder, rewrite_adapter

    proof: Any
    comparison: Any = None
    try:
        if not arguments.merge:
            proof = rewrite_adapter(
                arguments.checkpoint, arguments.output_dir, base=arguments.base_model, layout=layout
            )
        else:
            with Progress(transient=True) as bar:
                task = bar.add_task("merge", total=None)
                proof, comparison = merge_folder(
                    arguments.checkpoint,
                    arguments.output_dir,
                    base=arguments.base_model,
                    max_shard_bytes=max_shard_bytes,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
    except ExportError as error:
        if is_full(error):
            raise
        raise UserError(f"{arguments.checkpoint}: cannot be exported: {error}") from error
    kind = "merged model" if arguments.merge else "adapter"
    print(
        f"{arguments.output_dir}: {kind}, complete; logits within {proof.max_logit_difference:.1e} of plain PEFT's on "
        "the base model"
    )
    if comparison is not None:
        print(f"source: {comparison}")


def read_problems(arguments: argparse.Namespace, layout: str) -> None:
    """Raise UserError for an adapter that is not plain LoRA, or cannot be written in this layout."""
    from moe_models.checkpoint.from_peft import read_adapter_config
    from moe_models.families.config_json import read_model_config
    from moe_models.families.table import family_of
    from moe_models.preflight.adapters import per_expert_problems

    config = read_adapter_config(arguments.checkpoint)
    base = arguments.base_model or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{arguments.checkpoint}: its adapter_config.json names no base model; give --base_model")
    model_config = read_model_config(base)
    family = family_of(model_config)
    if family is None:
        raise UserError(f"{base}: model_type {model_config.get('model_type')!r} is none of this package's families")
    if layout == "per_expert":
        Problems(per_expert_problems(family, config.get("target_parameters") or [])).refuse()


# --------------------------------------------------------------------------------------------------------- whole models


def export_checkpoint(checkpoint: Path, output_dir: Path, max_shard_size: str, source: str | None = None) -> None:
    """Export ``checkpoint`` to ``output_dir``. Raises UserError for input that cannot work."""
    # 1. Everything that needs no heavy import: all problems at once.
    family, max_shard_bytes, folder = check(checkpoint, output_dir, max_shard_size, source)

    from rich.progress import Progress
    from transformers import AutoConfig

    from moe_models.checkpoint.card import measured_in, read_facts, write_card
    from moe_models.checkpoint.export import export
    from moe_models.checkpoint.from_stages import open_folder
    from moe_models.checkpoint.hf_folder import ExportError
    from moe_models.checkpoint.origin import compare, read_origin
    from moe_models.routing.callback import BIAS_FILE

    # 2. The checkpoint's files, the model's config, and the model that it started from.
    tensors = open_folder(checkpoint, family)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # transformers raises many kinds for values that it cannot use
        raise UserError(f"{checkpoint}: its config.json cannot be used: {one_line(error)}") from error
    origin = None
    if folder is not None:
        try:
            origin = read_origin(folder, family, config)
        except Exception as error:  # of a damaged folder, in the words of transformers and safetensors
            raise UserError(
                f"{folder}: the model that training started from cannot be read: {one_line(error)}; repair it, or give "
                "--source none: the export is then not compared with it"
            ) from error
    comparisons = []

    # 3. Write, with a model card. A selection bias that the architecture has no place for goes into a file of its own.
    bias_left_out = (checkpoint / BIAS_FILE).exists() and not family.selection_bias

    def finish(staged: Path) -> None:
        if origin is not None:
            comparisons.append(compare(staged, origin))
        if bias_left_out:
            shutil.copy(checkpoint / BIAS_FILE, staged / BIAS_FILE)
        write_card(staged, "model", read_facts(checkpoint), measured_in(checkpoint))

    try:
        with Progress(transient=True) as bar:
            task = bar.add_task("export", total=None)
            export(
                tensors,
                family,
                config,
                output_dir,
                companions=checkpoint,
                max_shard_bytes=max_shard_bytes,
                before_rename=finish,
                origin=origin,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except ExportError as error:
        if is_full(error):
            raise
        raise UserError(f"{checkpoint}: cannot be exported: {error}") from error
    # 4. Summarise.
    size = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
    print(f"{output_dir}: {size / 1e9:.2f} GB, {tensors.dtype}, complete; load it with from_pretrained")
    for comparison in comparisons:
        print(f"source: {comparison}")
    if bias_left_out:
        warn(
            [
                f"{family.model_type} has no place for the selection bias that this model was trained with: it routes "
                f"without it; the bias of each layer is in {BIAS_FILE} beside it"
            ]
        )


def started_from(checkpoint: Path, source: str | None) -> Path | None:
    """The folder of the model that training started from. Raises UserError where it should be there and is not."""
    from moe_models.checkpoint.origin import noted_origin, origin_folder

    if source == "none":
        return None
    noted = noted_origin(checkpoint)
    name, revision = (source, None) if source is not None else noted or ("", None)
    if not name:  # drawn, or a checkpoint of an earlier version
        return None
    folder = origin_folder(name, revision)
    if folder is None:
        raise UserError(
            f"{name}: the model that training started from is not there; give its folder with --source, or --source "
            "none: the export is then not compared with it, and lacks what the trained class does not hold"
        )
    return folder


def check(
    checkpoint: Path, output_dir: Path, max_shard_size: str, source: str | None = None
) -> tuple[Family, int, Path | None]:
    """(the model's family, largest shard in bytes, the folder that training started from).

    Raises UserError with every problem of the flags.
    """
    from moe_models.checkpoint.hf_folder import ExportError, refuse_foreign_folder
    from moe_models.families.config_json import read_model_config
    from moe_models.families.table import FAMILIES
    from moe_models.files import parse_size

    problems = Problems()
    max_shard_bytes = 0
    try:
        max_shard_bytes = parse_size(max_shard_size)
    except ValueError as error:
        problems.add(f"--max_shard_size {error}")
    try:
        refuse_foreign_folder(output_dir)
    except (ExportError, OSError) as error:
        problems.add(f"--output_dir {error}")
    family = None
    folder = None
    if not checkpoint.is_dir():
        problems.add(f"--checkpoint {checkpoint}: no such folder; give a checkpoint-N folder that training wrote")
    else:
        with problems.note():
            model_type = read_model_config(checkpoint).get("model_type")
            family = FAMILIES.get(str(model_type))
            if family is None:
                problems.add(f"{checkpoint}: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
        with problems.note():
            folder = started_from(checkpoint, source)
    problems.refuse()
    assert family is not None  # else there was a problem
    return family, max_shard_bytes, folder


if __name__ == "__main__":
    run(main)
