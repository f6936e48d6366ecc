"""Auxiliary-loss-free balancing equals a plain-Python version, does not touch the combine weights, and survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import parity
from tests.support.cluster import Cluster

RATE = 0.02


def train(
    source: str, out: str, config: dict[str, Any], resume: str | None = None, export: bool = False, **options: Any
) -> dict[str, Any]:
    trainer = parity.build_trainer(source, out, config, balance={"bias_update_rate": RATE}, **options)
    trainer.train(resume_from_checkpoint=resume)
    if export:
        trainer.save_model()
    return {
        "batches": trainer.batches,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "bias": trainer.routing.bias.state(),
        "logged": [e["selection_bias_max"] for e in trainer.state.log_history if "selection_bias_max" in e],
        "left_out": trainer.routing.left_out,
    }


def plain_python(source: Path, model_type: str, steps: list[list[dict]]) -> dict[str, Any]:
    """Five steps without an optimizer: route, count, move each bias by the sign of its error."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    gates = {name.removesuffix(".gate"): m for name, m in model.named_modules() if name.endswith("mlp.gate")}
    coefficient = getattr(model.config, "router_aux_loss_coef", None)
    biases, counts = {}, {}
    for name, gate in gates.items():
        own = getattr(gate, "e_score_correction_bias", None)
        biases[name] = [0.0] * gate.num_experts if own is None else own.tolist()

        def hook(module: Any, inputs: Any, output: Any, name: str = name) -> Any:
            logits, weights, choices = output
            if model_type == "mixtral":  # no bias in the architecture: choose again, weigh as before
                probabilities = logits.softmax(-1)
                choices = (probabilities + torch.tensor(biases[name])).topk(module.top_k, -1).indices
                weights = probabilities.gather(1, choices)
                weights = weights / weights.sum(-1, keepdim=True)
            for token in choices.tolist():
                for expert in token:
                    counts[name][expert] += 1
            return logits, weights, choices

        gate.register_forward_hook(hook)
    losses, history = [], []
    for batches in steps:
        targets = sum(label != -100 for b in batches for row in b["labels"] for label in row[1:])
        counts.update({name: [0] * len(bias) for name, bias in biases.items()})
        loss, aux = 0.0, []
        for batch in batches:
            tensors = {key: torch.tensor(value) for key, value in batch.items()}
            labels = tensors.pop("labels")
            with torch.no_grad():
                output = model(**tensors)
            loss += torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
        losses.append(loss / targets)
        history.append({name: list(one) for name, one in counts.items()})
        for name, bias in biases.items():
            mean = sum(counts[name]) / len(bias)
            for expert, count in enumerate(counts[name]):
                bias[expert] += RATE * ((count < mean) - (count > mean))
            if hasattr(gates[name], "e_score_correction_bias"):
                gates[name].e_score_correction_bias.copy_(torch.tensor(bias))
    assert coefficient is None or aux == []
    return {"loss": losses, "bias": biases, "counts": history}


CASES = [
    # family, EP (None: Hugging Face's blocks), ZeRO, accumulation, gradient checkpointing
    ("mixtral", 2, 1, 1, False),
    ("mixtral", 2, 3, 2, True),
    ("mixtral", 1, 2, 1, True),
    ("deepseek_v3", 2, 2, 1, True),
    ("deepseek_v3", 2, 3, 1, False),
    ("deepseek_v3", None, 1, 2, True),
    ("deepseek_v3", None, 3, 1, False),
]


@pytest.mark.parametrize(
    ("model_type", "ep_size", "stage", "accumulation", "checkpointing"), parity.daily(CASES, {0, 1, 3, 6})
)
def test_five_steps_equal_plain_python(
    model_type: str, ep_size: int | None, stage: int, accumulation: int, checkpointing: bool,
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = tiny_checkpoints(model_type)
    results = clusters(2).run(
        train, str(source), str(tmp_path), parity.ds_config(stage, ep_size), accumulation=accumulation,
        learning_rate=0.0, gradient_checkpointing=checkpointing, router_aux_loss_coef=0.0,
    )  # fmt: skip
    a = accumulation
    steps = [[b for r in results for b in r["batches"][s * a : (s + 1) * a]] for s in range(parity.STEPS)]
    expected = plain_python(source, model_type, steps)
    rows = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    counts = [{layer["layer"]: layer["tokens"] for layer in row["layers"]} for row in rows]
    assert counts == expected["counts"]
    assert results[0]["bias"] == results[1]["bias"]
    for name, bias in expected["bias"].items():
        assert results[0]["bias"][name] == pytest.approx(bias, abs=1e-6)
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert counts[0] != counts[-1], "nothing was routed"


@pytest.mark.parametrize(("model_type", "stage"), [("mixtral", 1), ("mixtral", 3), ("deepseek_v3", 2)])
def test_resume_goes_on_with_the_bias_and_export_holds_it_or_says_so(
    model_type: str, stage: int, clusters: Callable[[int], Cluster], tiny_checkpoints: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    source, config = str(tiny_checkpoints(model_type)), parity.ds_config(stage, 2)
    through = clusters(2).run(
        train, source, str(tmp_path / "a"), config, save_strategy="steps", save_steps=3, export=True
    )  # fmt: skip
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed = clusters(2).run(train, source, str(tmp_path / "b"), config, resume=checkpoint, export=True)
    assert resumed[0]["bias"] == through[0]["bias"]
    assert resumed[0]["loss"][-2:] == pytest.approx(through[0]["loss"][-2:], rel=1e-6)
    assert json.loads(Path(f"{checkpoint}/selection_bias.json").read_text()).keys() == through[0]["bias"].keys()
    beside = tmp_path / "b" / "model" / "selection_bias.json"
    if model_type == "deepseek_v3":
        assert resumed[0]["left_out"] is None
        assert not beside.exists()
        tensors = load_file(tmp_path / "b" / "model" / "model.safetensors")
        for block, bias in resumed[0]["bias"].items():
            assert tensors[f"{block}.gate.e_score_correction_bias"].tolist() == pytest.approx(bias)
    else:
        assert "no place for the selection bias" in resumed[0]["left_out"]
        assert json.loads(beside.read_text()) == resumed[0]["bias"]
