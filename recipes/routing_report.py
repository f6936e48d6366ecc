"""Show how a MoE model routes real text: which token goes to which expert, on which GPU, and what the imbalance costs.

    python recipes/routing_report.py --checkpoint out/mixtral/model --text book.txt --output_dir out/report

    # with the training run that the checkpoint came from: how the load changed over its steps
    python recipes/routing_report.py --checkpoint out/mixtral/model --text heldout.jsonl --run out/mixtral

Writes one HTML page that needs no network (open it in any browser, or send it by mail), and PNGs beside it:
    routing_report.html         tokens, experts and GPUs; dispatch and combine step by step; load per expert and GPU;
                                the same routing under every JSON file of ds_configs/; the tokens each expert prefers
    routing_report.load.png     load of every expert of every layer
    routing_report.steps.png    the same over the steps of training (with --run)

The checkpoint is a Hugging Face folder of one of the families in the README. It is loaded with plain transformers, on
GPUs if there are any, else on the CPU. The text is any text file, or a .jsonl with `text` in every line; its first
--max_tokens tokens are routed. Nothing is overwritten. Exit code 2: the input cannot work, and why.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_models.errors import Problems, UserError, one_line, run, some_of
from moe_models.families.table import FAMILIES, Family, moe_blocks
from moe_models.files import whole

if TYPE_CHECKING:  # torch and transformers are imported when they are needed: --help takes no seconds
    from moe_models.report.history import History
    from moe_models.report.record import Recording

ROOT = Path(__file__).resolve().parents[1]
PAGE = "routing_report.html"


def main(words: list[str]) -> int:
    """Check, route, write."""
    args = parse(words)
    written = write_report(
        args.checkpoint, args.text, args.output, args.run, args.max_tokens, args.ds_configs, args.output_dir
    )
    for file in written:
        print(file)
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a Hugging Face MoE folder")
    add("--text", type=Path, required=True, metavar="FILE", help="what to route: a text file, or .jsonl with `text`")
    add("--run", type=Path, metavar="DIR", help="the --output_dir of a training run: adds its load over steps")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help=f"folder for {PAGE} and its PNGs (default: the --run folder, or here); made if it is not there",
    )
    where.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page under another name, in a folder that is there"
    )
    add("--max_tokens", type=int, default=4096, metavar="N", help="tokens of the text to route (default 4096)")
    add(
        "--ds_configs",
        type=Path,
        default=ROOT / "ds_configs",
        metavar="DIR",
        help="layouts that the page offers (default: ds_configs/)",
    )
    return parser.parse_args(words)


@dataclass(frozen=True)
class Model:
    """What is known about the checkpoint, the layouts and the training run before weights are read."""

    family: Family
    config: dict[str, Any]
    num_experts: int
    """Of every layer: the page is for models whose layers have equally many."""
    layouts: list[dict[str, Any]]
    start: list[str]
    """[layout's file, number of GPUs] that the page opens with."""
    history: History | None


def write_report(
    checkpoint: Path,
    text: Path,
    output: Path | None = None,
    run: Path | None = None,
    max_tokens: int = 4096,
    ds_configs: Path = ROOT / "ds_configs",
    output_dir: Path | None = None,
) -> list[Path]:
    """Write the page and its PNGs; returns their paths.

    The page is ``output``, or else ``routing_report.html`` in ``output_dir``, the folder of ``run``, or here. Raises
    UserError with all problems before weights are read.
    """
    from moe_models.report.text import read_documents

    # 1. Everything that can be refused without the model's weights.
    flag = "--output_dir" if output is None else "--output"
    page = output or (output_dir or run or Path()) / PAGE
    written = [page, page.with_suffix(".load.png")]
    if run is not None:
        written.append(page.with_suffix(".steps.png"))
    problems = Problems(output_problems(written, flag))
    if max_tokens < 1:
        problems.add(f"--max_tokens {max_tokens}: must be at least 1")
    with problems.note():
        documents, notes = read_documents(text)
    with problems.note():
        model = read_model(checkpoint, ds_configs, run)
    problems.refuse()  # goes on only if text and model are known
    # 2. The text through the routers, and what the page shows of it.
    recording, piece = route(checkpoint, model, documents, max_tokens)
    data = page_data(checkpoint, text, notes, model, recording, piece)
    # 3. All files, or none of them.
    page.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        drafts = [stack.enter_context(whole(file)) for file in written]
        draw(drafts, data, model.history, run)
    return written


def output_problems(written: list[Path], flag: str) -> list[str]:
    """Why these files cannot be written; the first of them is the page."""
    page = written[0]
    problems = [f"{flag} {file}: exists already; remove it or give another name" for file in written if file.exists()]
    if page.suffix != ".html":
        problems.append(f"{flag} {page}: must end in .html")
    folder = page.parent
    if flag == "--output_dir":  # it will be made: look at the nearest folder above it that is there
        while not folder.exists():
            folder = folder.parent
    if not folder.is_dir():
        problems.append(f"{flag} {page}: no folder {folder}; make it first")
    elif not os.access(folder, os.W_OK):
        problems.append(f"{flag} {page}: {folder} may not be written to; name a file elsewhere")
    return problems


def read_model(checkpoint: Path, ds_configs: Path, run: Path | None) -> Model:
    """What config.json, the layouts and the run's log tell. Raises UserError at the first thing that does not fit."""
    from moe_models.report.history import read_history
    from moe_models.report.layouts import read_layouts

    family, config = read_family(checkpoint)
    num_experts, *others = sorted(set(family.expert_counts(config)))
    if others:
        raise UserError(
            f"--checkpoint {checkpoint}: has layers of {num_experts} to {others[-1]} experts; the page is for equal "
            "layers"
        )
    layouts = read_layouts(ds_configs, num_experts)
    history = None
    if run is not None:
        num_layers = len(list(moe_blocks(family, config)))
        history = read_history(run, num_layers, num_experts)
    return Model(family, config, num_experts, layouts, start_layout(layouts, history), history)


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
    gpus = "8" if "8" in best["worlds"] else next(iter(best["worlds"]))
    return [best["file"], gpus]


# ----------------------------------------------------------------------------------------------- the text, and the page


def route(
    checkpoint: Path, model: Model, documents: list[str], max_tokens: int
) -> tuple[Recording, Callable[[int], str]]:
    """The recording, and a function token id -> text. Raises UserError if tokenizer or model cannot be used."""
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    from moe_models.report.record import ROW, cut, record
    from moe_models.report.text import piece

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    # 1. Token ids, in rows that the model can take.
    tokenizer, tokens = tokenize(checkpoint, documents, max_tokens)
    row = min(ROW, int(model.config.get("max_position_embeddings", ROW)))
    rows = cut(tokens, row, max_tokens)
    if not rows:
        raise UserError("--text: the tokenizer makes no token of it; give other text")
    largest = max(map(max, rows))
    if largest >= model.config["vocab_size"]:
        raise UserError(
            f"--checkpoint {checkpoint}: its tokenizer makes the id {largest}, and the model has "
            f"{model.config['vocab_size']} tokens; they do not belong together"
        )
    # 2. The model, and the rows through it.
    loaded = load_model(checkpoint)
    with Progress(transient=True) as bar:
        task = bar.add_task("routing", total=len(rows))
        recording = record(loaded, rows, lambda done, total: bar.update(task, completed=done, total=total))
    return recording, lambda token: piece(tokenizer, token)


def tokenize(checkpoint: Path, documents: list[str], max_tokens: int) -> tuple[Any, list[list[int]]]:
    """(tokenizer, the documents as token ids, as far as ``max_tokens`` needs them)."""
    from transformers import AutoTokenizer

    tokens: list[list[int]] = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        # No tokenizer makes fewer tokens of a text than one for every 20 characters, long runs of spaces aside.
        for text in documents:
            if sum(map(len, tokens)) < max_tokens:
                tokens.append(tokenizer(text[: 20 * max_tokens])["input_ids"])
    except Exception as error:  # whatever the tokenizer's own code says
        raise UserError(f"--checkpoint {checkpoint}: its tokenizer cannot be used: {one_line(error)}") from error
    return tokenizer, tokens


def load_model(checkpoint: Path) -> Any:
    """The whole model in evaluation mode, on GPUs if there are any."""
    import torch
    from transformers import AutoModelForCausalLM

    device_map = "auto" if torch.cuda.is_available() else None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", device_map=device_map, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch each have their own
        raise UserError(f"--checkpoint {checkpoint}: cannot be loaded: {one_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"--checkpoint {checkpoint}: {len(missing)} tensors are missing ({some_of(missing)}), and transformers "
            "would fill in random ones; export it again with recipes/export.py"
        )
    return model.eval()


def page_data(
    checkpoint: Path,
    text: Path,
    notes: list[str],
    model: Model,
    recording: Recording,
    piece: Callable[[int], str],
) -> dict[str, Any]:
    """Everything that the page shows, as it is embedded in it."""
    from moe_models.report.data import build
    from moe_models.report.history import compact
    from moe_models.report.text import visible

    # Every training run calls its result "model": then the folder around it is the name.
    name = str(checkpoint) if checkpoint.name == "model" else checkpoint.resolve().name
    notes = [visible(note) for note in notes]
    run = None
    if model.history is not None:
        notes += model.history.notes
        run = compact(model.history)
    return {
        "checkpoint": visible(name),
        "model_type": model.family.model_type,
        "hidden": int(model.config["hidden_size"]),
        "experts": model.num_experts,
        "expert_params": 3 * int(model.config["hidden_size"]) * int(model.config[model.family.expert_size_key]),
        "text": visible(text.name),
        "notes": notes,
        "layouts": model.layouts,
        "start": model.start,
        "run": run,
        **build(recording, model.num_experts, piece),
    }


def draw(files: list[Path], data: dict[str, Any], history: History | None, run: Path | None) -> None:
    """The page, the plot of the load, and with a run that of its steps: one for each of ``files``."""
    from moe_models.report.page import assemble
    from moe_models.report.plots import plot_history, plot_load
    from moe_models.report.text import visible

    name = data["checkpoint"]
    files[0].write_text(assemble(data, f"Routing of {name}"), encoding="utf-8")
    plot_load(files[1], data["load"], f"{name}: {data['routed']:,} tokens of {data['text']}")
    if history is not None:
        plot_history(files[2], history, f"{visible(str(run))}: load while training")


if __name__ == "__main__":
    run(main)
