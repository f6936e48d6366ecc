"""What the tests of the routing report share: the recipe, a run's log, and what plain transformers' routers choose."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_models.routing.load import layer_load
from tests.support.recipe import ROOT

RECIPE = ROOT / "recipes" / "routing_report.py"


def recipe() -> dict[str, Any]:
    """The names of ``recipes/routing_report.py``."""
    return runpy.run_path(str(RECIPE), run_name="recipe")


def save_run(folder: Path, steps: Iterable[int], layers: int, experts: int, ep_size: int) -> list[list[list[int]]]:
    """Write an ``expert_load.jsonl`` as training does; returns tokens per step, layer and expert."""
    counts = [[[(7 * s + 3 * x + 5 * e) % 23 for e in range(experts)] for x in range(layers)] for s in steps]
    rows = [
        {"step": s, "split": "train", "layers": [asdict(layer_load("", tokens, 0.5, ep_size)) for tokens in layer_rows]}
        for s, layer_rows in zip(steps, counts, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "expert_load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return counts


def routers(model: Any) -> list[Any]:
    """The routers of a Hugging Face model, in layer order."""
    names = ("mlp.gate", "feed_forward.gate", "block_sparse_moe.router", "mlp.router")
    return [module for name, module in model.named_modules() if name.endswith(names)]


def choices_of(checkpoint: Path, rows: list[list[int]]) -> list[list[list[dict[int, float]]]]:
    """[layer][row][token] -> {expert: weight}, from the routers of plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    gates = routers(model)
    seen: list[list[list[dict[int, float]]]] = [[] for _ in gates]

    def listen(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            choices = output[2] if output[0].is_floating_point() else output[0]  # GraniteMoE's comes first
            pairs = zip(choices.tolist(), output[1].tolist(), strict=True)
            seen[layer].append([dict(zip(experts, weights, strict=True)) for experts, weights in pairs])

        return hook

    for layer, gate in enumerate(gates):
        gate.register_forward_hook(listen(layer))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return seen
