"""What all loops of recipes/bench.py share: model, tokens, settings of the optimizer, and how a row ends.

A ``job`` is one row, as ``processes.make_jobs`` writes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moe_models.routing.load import LoadStats, overall

ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
"""AdamW's settings, by the names of torch."""
CLIP = 1.0
"""Largest norm of the gradient."""


def build_model(job: dict[str, Any], device: torch.device) -> Any:
    """The model of the row with random weights, whole, on the device of each rank; the same in every layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.engine.plain_transformers import without_zero3

    # 1. The model's config, with its auxiliary loss on as in training.
    config = AutoConfig.for_model(**job["model_config"])
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = True
    # 2. Weights: from the same seed on every rank, and whole also under ZeRO-3, which would draw them in other orders.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(job["seed"])
    with without_zero3(), device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=job["attn_implementation"], dtype=dtype)
    return model.to(device).train()


def make_rows(job: dict[str, Any], steps: int) -> torch.Tensor:
    """Token ids [sequences, length] of all ranks and optimizer steps; the same on every rank."""
    generator = torch.Generator().manual_seed(job["seed"])
    vocab = job["model_config"]["vocab_size"]
    count = steps * job["micro_batch"] * job["accumulation"] * dist.get_world_size()
    if job["tokens"] == "uniform":
        return torch.randint(0, vocab, (count, job["seq_length"]), generator=generator)
    # Zipf: token r is as frequent as 1/r.
    weights = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, count * job["seq_length"], replacement=True, generator=generator)
    return drawn.view(count, job["seq_length"])


def mean_of_ranks(loss: torch.Tensor) -> float:
    """The loss as HF's Trainer reports it; collective."""
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def load_figures(stats: LoadStats | None, group: Any = None) -> dict[str, float]:
    """Load of experts and ranks in the last step, averaged over layers; collective. Empty if nothing was counted."""
    if stats is None:
        return {}
    layers = stats.read(True, group)
    if not layers:
        return {}
    figures = overall(layers)
    return {name: figures[name] for name in ("expert_load_max", "expert_load_worst", "rank_load_max")}


def destroy(engine: Any) -> None:
    """End an engine and empty its tensors, so that the next row does not start with a full GPU."""
    optimizer = engine.optimizer
    engine.destroy()
    # upstream: deepspeed 0.19.8: engine.destroy() leaves ZeRO-3's engine in a cycle through autograd that Python's
    # collector does not see, so every tensor would stay allocated. Remove when: test_a_row_leaves_no_model_behind
    # (tests/bench/test_bench.py) passes without these lines.
    for parameter in engine.module.parameters():
        parameter.grad = None
        for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
            held.data = torch.empty(0, dtype=held.dtype, device=held.device)
    for holder in (getattr(optimizer, "optimizer", None), optimizer):
        if holder is not None:
            holder.__dict__.clear()
