"""Turn a DeepSpeed checkpoint that training wrote into a complete Hugging Face folder. No GPU, no launcher.

    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500
    python recipes/export.py --checkpoint out/mixtral/checkpoint-500 --output_dir out/mixtral-500 --max_shard_size 2GB

Every expert is collected from the files of all ranks, ZeRO partitions are joined, and the weights are written in the
hub's names and layout, with config.json, tokenizer and generation config. The folder appears under its name only when
nothing is missing, no shape is wrong and every value is finite. It is byte for byte what the running training would
have exported at that step. Memory: one projection of one layer's experts, and one shard.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from moe_models.errors import UserError, exit_with

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading files needs no GPU


def main() -> int:
    """Check, read, write, summarise."""
    arguments = parse()
    try:
        run(arguments.checkpoint, arguments.output_dir, arguments.max_shard_size)
    except UserError as error:
        exit_with(error)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint-N folder that training wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the Hugging Face folder appears")
    parser.add_argument(
        "--max_shard_size", default="5GB", help="largest safetensors file, as 5GB or 500MB (default 5GB)"
    )
    return parser.parse_args()


def run(checkpoint: Path, output_dir: Path, max_shard_size: str) -> None:
    """Export ``checkpoint`` to ``output_dir``. Raises UserError for input that cannot work."""
    from moe_models.checkpoint.hf_folder import ExportError, refuse_foreign_folder
    from moe_models.families.config_json import read_model_config
    from moe_models.families.table import FAMILIES, Family
    from moe_models.files import parse_size

    problems: list[str] = []
    max_shard_bytes = 0
    try:
        max_shard_bytes = parse_size(max_shard_size)
    except ValueError as error:
        problems.append(f"--max_shard_size {error}")
    try:
        refuse_foreign_folder(output_dir)
    except (ExportError, OSError) as error:
        problems.append(f"--output_dir {error}")
    family: Family | None = None
    if not checkpoint.is_dir():
        problems.append(f"--checkpoint {checkpoint}: no such folder; give a checkpoint-N folder that training wrote")
    else:
        try:
            model_type = read_model_config(checkpoint).get("model_type")
            family = FAMILIES.get(str(model_type))
            if family is None:
                problems.append(f"{checkpoint}: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
        except UserError as error:
            problems += error.problems
    if problems or family is None:
        raise UserError(problems)

    from rich.progress import Progress
    from transformers import AutoConfig

    from moe_models.checkpoint.export import export
    from moe_models.checkpoint.from_folder import FolderSource
    from moe_models.routing.callback import BIAS_FILE

    source = FolderSource(checkpoint, family)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # whatever transformers says about values it cannot use
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{checkpoint}: its config.json cannot be used: {reason}") from error
    bias_left_out = (checkpoint / BIAS_FILE).exists() and not family.selection_bias

    def add_bias(staged: Path) -> None:
        if bias_left_out:
            shutil.copy(checkpoint / BIAS_FILE, staged / BIAS_FILE)

    try:
        with Progress(transient=True) as bar:
            task = bar.add_task("export", total=None)
            export(
                source,
                family,
                config,
                output_dir,
                companions=checkpoint,
                max_shard_bytes=max_shard_bytes,
                prove=add_bias,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except ExportError as error:
        raise UserError(f"{checkpoint}: cannot be exported: {error}") from error
    size = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
    print(f"{output_dir}: {size / 1e9:.2f} GB, {source.dtype}, complete; load it with from_pretrained")
    if bias_left_out:
        print(
            f"warning: {family.model_type} has no place for the selection bias that this model was trained with: it "
            f"routes without it; the bias of each layer is in {BIAS_FILE} beside it"
        )


if __name__ == "__main__":
    sys.exit(main())
