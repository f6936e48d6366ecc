"""Turn a DeepSpeed checkpoint that training wrote into a complete Hugging Face folder. No GPU, no launcher.

    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500
    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500 --max_shard_size 2GB

Every expert is collected from the files of all ranks, ZeRO partitions are joined, and the weights are written in the
hub's names and layout, with config.json, tokenizer and generation config. The folder appears under its name only when
nothing is missing, no shape is wrong and every value is finite. It is byte for byte what the running training would
have exported at that step. It is compared with the model that training started from, which the checkpoint names. What
the trained class does not hold of that model is passed on. Memory: one projection of one layer's experts.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moe_models.disk import is_full
from moe_models.errors import Problems, UserError, one_line, run, warn

if TYPE_CHECKING:
    from moe_models.families.table import Family

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading files needs no GPU


def main(words: list[str]) -> int:
    """Check, read, write, summarise."""
    arguments = parse(words)
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
    parser.add_argument(
        "--source",
        help="the model that training started from, if it is no longer where it was: a folder or hub id; none: do not "
        "compare, and pass nothing on that the trained class does not hold",
    )
    return parser.parse_args(words)


def export_checkpoint(checkpoint: Path, output_dir: Path, max_shard_size: str, source: str | None = None) -> None:
    """Export ``checkpoint`` to ``output_dir``. Raises UserError for input that cannot work."""
    # 1. Everything that needs no heavy import: all problems at once.
    family, max_shard_bytes, folder = check(checkpoint, output_dir, max_shard_size, source)

    from rich.progress import Progress
    from transformers import AutoConfig

    from moe_models.checkpoint.export import export
    from moe_models.checkpoint.from_folder import FolderSource
    from moe_models.checkpoint.hf_folder import ExportError
    from moe_models.checkpoint.origin import compare, read_origin
    from moe_models.routing.callback import BIAS_FILE

    # 2. The checkpoint's files, the model's config, and the model that it started from.
    tensors = FolderSource(checkpoint, family)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # transformers raises many kinds for values that it cannot use
        raise UserError(f"{checkpoint}: its config.json cannot be used: {one_line(error)}") from error
    origin = read_origin(folder, family, config) if folder is not None else None
    comparisons = []

    # 3. Write. A selection bias that the architecture has no place for goes into a file of its own.
    bias_left_out = (checkpoint / BIAS_FILE).exists() and not family.selection_bias

    def finish(staged: Path) -> None:
        if origin is not None:
            comparisons.append(compare(staged, origin))
        if bias_left_out:
            shutil.copy(checkpoint / BIAS_FILE, staged / BIAS_FILE)

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
