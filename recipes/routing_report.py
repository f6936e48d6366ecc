"""Show how a MoE model routes real text: which token goes to which expert, on which GPU, and what the imbalance costs.

    python recipes/routing_report.py --checkpoint out/mixtral/model --text book.txt

    # with the training run that the checkpoint came from: how the load changed over its steps
    python recipes/routing_report.py --checkpoint out/mixtral/model --text heldout.jsonl --run out/mixtral

Writes one HTML page that needs no network (open it in any browser, or send it by mail), and PNGs beside it:
    routing_report.html         tokens, experts and GPUs; dispatch and combine step by step; load per expert and GPU;
                                the same routing under every JSON file of ds_configs/; the tokens each expert prefers
    routing_report.load.png     load of every expert of every layer
    routing_report.steps.png    the same over the steps of training (with --run)

The checkpoint is a Hugging Face folder of one of the families in the README; it is loaded with plain transformers (on
GPUs if there are, else on the CPU). The text is any text file, or a .jsonl with `text` in every line; the first
--max_tokens tokens of it are routed. Nothing is overwritten. Exit code 2: the input cannot work, and why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_models.errors import UserError, exit_with
from moe_models.families.table import FAMILIES, Family, moe_blocks

if TYPE_CHECKING:  # torch and transformers are imported when they are needed: --help takes no seconds
    from moe_models.report.history import History

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Check, route, write."""
    args = parse(argv)
    try:
        for file in write_report(args.checkpoint, args.text, args.output, args.run, args.max_tokens, args.ds_configs):
            print(file)
    except UserError as error:
        exit_with(error)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a Hugging Face MoE folder")
    add("--text", type=Path, required=True, metavar="FILE", help="what to route: a text file, or .jsonl with `text`")
    add("--run", type=Path, metavar="DIR", help="the --output_dir of a training run: adds its load over steps")
    add(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="a new file (default: routing_report.html in the --run folder, or here)",
    )
    add("--max_tokens", type=int, default=4096, metavar="N", help="tokens of the text to route (default 4096)")
    add(
        "--ds_configs",
        type=Path,
        default=ROOT / "ds_configs",
        metavar="DIR",
        help="layouts that the page offers (default: ds_configs/)",
    )
    return parser.parse_args(argv)


def write_report(
    checkpoint: Path,
    text: Path,
    output: Path | None = None,
    run: Path | None = None,
    max_tokens: int = 4096,
    ds_configs: Path = ROOT / "ds_configs",
) -> list[Path]:
    """Write the page and its PNGs; returns their paths. Raises UserError with all problems before weights are read."""
    from moe_models.report.history import compact, read_history
    from moe_models.report.layouts import read_layouts
    from moe_models.report.text import read_documents, visible

    output = output or (run or Path()) / "routing_report.html"
    written = [output, output.with_suffix(".load.png")] + ([output.with_suffix(".steps.png")] if run else [])
    problems = [f"--output {file}: exists already; remove it or give another name" for file in written if file.exists()]
    if output.suffix != ".html":
        problems.append(f"--output {output}: must end in .html")
    if not output.parent.is_dir():
        problems.append(f"--output {output}: no folder {output.parent}; make it first")
    elif not os.access(output.parent, os.W_OK):
        problems.append(f"--output {output}: {output.parent} may not be written to; name a file elsewhere")
    if max_tokens < 1:
        problems.append(f"--max_tokens {max_tokens}: must be at least 1")
    documents: list[str] = []
    notes: list[str] = []
    layouts: list[dict[str, Any]] = []
    family, config, history, start = None, dict[str, Any](), None, [""]
    try:
        documents, notes = read_documents(text)
    except UserError as error:
        problems += error.problems
    try:
        family, config = read_family(checkpoint)
        E, *others = sorted(set(family.expert_counts(config)))
        if others:
            raise UserError(
                f"--checkpoint {checkpoint}: has layers of {E} to {others[-1]} experts; the page is for equal layers"
            )
        layouts = read_layouts(ds_configs, E)
        history = read_history(run, len(list(moe_blocks(family, config))), E) if run else None
        start = start_layout(layouts, history)
    except UserError as error:
        problems += error.problems
    if problems or family is None:
        raise UserError(problems)
    recording, piece = route(checkpoint, config, documents, max_tokens)
    from moe_models.report.data import build
    from moe_models.report.page import assemble
    from moe_models.report.plots import plot_history, plot_load

    name = visible(checkpoint.resolve().name if checkpoint.name != "model" else str(checkpoint))
    data = {
        "checkpoint": name,
        "model_type": family.model_type,
        "hidden": int(config["hidden_size"]),
        "experts": E,
        "text": visible(text.name),
        "notes": [visible(note) for note in notes] + (history.notes if history else []),
        "layouts": layouts,
        "start": start,
        "run": compact(history) if history else None,
        **build(recording, E, piece),
    }
    title = f"{name}: {data['routed']:,} tokens of {visible(text.name)}"
    drafts = [file.with_name(f".{file.name}.writing") for file in written]
    try:
        drafts[0].write_text(assemble(data, f"Routing of {name}"), encoding="utf-8")
        plot_load(drafts[1], data["load"], title)
        if history:
            plot_history(drafts[2], history, f"{visible(str(run))}: load while training")
        for draft, file in zip(drafts, written, strict=True):
            os.replace(draft, file)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return written


def read_family(checkpoint: Path) -> tuple[Family, dict[str, Any]]:
    """The family and ``config.json`` of a Hugging Face MoE folder; raises UserError for anything else."""
    from transformers import AutoConfig

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.families.config_json import read_model_config

    if not checkpoint.is_dir():
        raise UserError(f"--checkpoint {checkpoint}: no such folder; give a Hugging Face model folder")
    config = read_model_config(checkpoint)
    family = FAMILIES.get(str(config.get("model_type")))
    known = ", ".join(sorted(FAMILIES))
    if family is None:
        raise UserError(
            f"--checkpoint {checkpoint}: model_type {config.get('model_type')!r} is not one of {known}; a dense model "
            "has no routers: make a MoE of it first (recipes/upcycle.py)"
        )
    if not any(checkpoint.glob("*.safetensors")):
        raise UserError(
            f"--checkpoint {checkpoint}: no *.safetensors in it; make a Hugging Face folder of a training checkpoint "
            "with recipes/export.py"
        )
    try:
        return family, AutoConfig.from_pretrained(checkpoint).to_dict()
    except Exception as error:  # whatever transformers says about values it cannot use
        raise UserError(f"--checkpoint {checkpoint}: its config.json cannot be used: {one_line(error)}") from error


def route(checkpoint: Path, config: Mapping[str, Any], documents: list[str], max_tokens: int) -> tuple[Any, Any]:
    """The recording, and a function token id -> text. Raises UserError if tokenizer or model cannot be used."""
    import torch
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    from moe_models.report.record import ROW, cut, record
    from moe_models.report.text import piece

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        # No tokenizer makes fewer tokens of a text than one for every 20 characters, long runs of spaces aside.
        tokens: list[list[int]] = []
        for text in documents:
            if sum(map(len, tokens)) < max_tokens:
                tokens.append(tokenizer(text[: 20 * max_tokens])["input_ids"])
    except Exception as error:  # whatever the tokenizer's own code says
        raise UserError(f"--checkpoint {checkpoint}: its tokenizer cannot be used: {one_line(error)}") from error
    rows = cut(tokens, min(ROW, int(config.get("max_position_embeddings", ROW))), max_tokens)
    if not rows:
        raise UserError("--text: the tokenizer makes no token of it; give other text")
    if (largest := max(map(max, rows))) >= config["vocab_size"]:
        raise UserError(
            f"--checkpoint {checkpoint}: its tokenizer makes the id {largest}, and the model has "
            f"{config['vocab_size']} tokens; they do not belong together"
        )
    gpu = torch.cuda.is_available()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", device_map="auto" if gpu else None, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch each have their own
        raise UserError(f"--checkpoint {checkpoint}: cannot be loaded: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"--checkpoint {checkpoint}: {len(missing)} tensors are missing ({missing[0]}, ...), and transformers "
            "would fill in random ones; export it again with recipes/export.py"
        )
    with Progress(transient=True) as bar:
        task = bar.add_task("routing", total=len(rows))
        recording = record(model.eval(), rows, lambda done, total: bar.update(task, completed=done, total=total))
    return recording, lambda token: piece(tokenizer, token)


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def start_layout(layouts: list[dict[str, Any]], history: History | None) -> list[str]:
    """[file, number of GPUs] that the page opens with: the run's own, or else the widest EP that fits one node of 8.

    Raises UserError if no layout fits the model.
    """
    fitting = [layout for layout in layouts if layout["worlds"]]
    for layout in fitting:
        if history and layout["file"] == history.ds_config and str(history.world_size) in layout["worlds"]:
            return [layout["file"], str(history.world_size)]
    if not fitting:
        raise UserError("--ds_configs: none of the layouts fits this model; add one whose size divides its experts")
    best = max(fitting, key=lambda layout: (layout["ep"] <= 8, layout["ep"], layout["kind"] == "autoep"))
    return [best["file"], "8" if "8" in best["worlds"] else next(iter(best["worlds"]))]


if __name__ == "__main__":
    sys.exit(main())
