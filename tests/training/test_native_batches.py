"""Native layers where ranks and batches are unequal: nothing hangs, nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import parity
from tests.support.cluster import ChildError, Cluster
from tests.training.test_native import native_checkpoints, native_config  # noqa: F401
from tests.training.test_native_runs import SECONDS, Checkpoints, Clusters
from tests.training.test_parity import relative


def unequal_runs(source: str, layer: dict[str, Any], agree: bool = True) -> list[float]:
    """Forward and backward with other token counts on each rank, and an expert that nobody chooses; the losses."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from moe_models.config.moe_section import MoeLayer
    from moe_models.engine import native
    from moe_models.engine.library_globals import forget_engines
    from moe_models.families.table import FAMILIES

    forget_engines()
    model = AutoModelForCausalLM.from_pretrained(source)
    for router in (m for m in model.modules() if type(m).__name__.endswith("TopKRouter")):
        with torch.no_grad():  # two experts' logits are each other's negative: one of them is always positive
            router.weight[1], router.weight[2], router.weight[3] = 0, router.weight[0] * 9, router.weight[0] * -9
    hook = native._agree_on_capacity
    if not agree:
        native._agree_on_capacity = lambda gate, args, routing: routing
    try:
        native.register_deepspeed_moe(model, MoeLayer(**layer), FAMILIES[model.config.model_type])
    finally:
        native._agree_on_capacity = hook
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "zero_optimization": {"stage": 1},
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    losses = []
    for lengths in ((5, 40), (40, 5), (1, 30), (33, 32)):
        length = lengths[dist.get_rank() % 2]
        ids = torch.arange(3, 3 + max(2, length))[None] % 64
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            engine(input_ids=ids[:, : 1 + length // 2], use_cache=False)
        engine.train()
        losses.append(loss.item())
    engine.destroy()
    return losses


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral-k2", {}),
    ("mixtral-k2", {"drop_tokens": True, "capacity_factor": 0.5}),
    ("qwen3_moe-k4", {"drop_tokens": True}),
    ("olmoe-k1", {}),
    ("olmoe-k1", {"drop_tokens": True, "use_rts": True}),
]


@pytest.mark.parametrize(("name", "layer"), LAYERS, ids=[f"{name}-{layer}" for name, layer in LAYERS])
def test_unequal_token_counts_and_idle_experts(
    name: str,
    layer: dict[str, Any],
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
) -> None:
    """Training, and evaluation between the steps, each rank with its own number of tokens."""
    arguments = (str(native_checkpoints(name)), {"ep_size": 2, **layer})
    together = clusters(2).run(unequal_runs, *arguments, timeout=SECONDS)
    assert all(0 < loss < 20 for losses in together for loss in losses)
    if not layer:  # nothing is dropped, so spreading the experts changes nothing
        apart = clusters(2).run(unequal_runs, arguments[0], {"ep_size": 1}, timeout=SECONDS)
        for ours, reference in zip(together, apart, strict=True):
            assert relative(ours, reference) < 1e-5


def test_without_the_agreed_capacity_it_would_fail(
    native_checkpoints: Checkpoints,  # noqa: F811
) -> None:
    cluster = Cluster(2)
    layer = {"ep_size": 2, "drop_tokens": True}
    try:
        with pytest.raises(ChildError):
            cluster.run(unequal_runs, str(native_checkpoints("mixtral-k2")), layer, agree=False, timeout=20)
    finally:
        cluster.stop()


def train_an_epoch(source: str, out: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One epoch of 13 rows, with evaluation at start and after each step on rows that do not fill the last batch."""
    trainer = parity.build_trainer(
        source, out, config, accumulation=2, max_steps=-1, num_train_epochs=1, train_rows=parity.rows(13),
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3, eval_on_start=False,
        eval_rows=parity.rows(7, seed=1),
    )  # fmt: skip
    trainer.train()
    return list(trainer.state.log_history)


@pytest.mark.parametrize("layer", [{}, {"drop_tokens": True}, {"aux_loss": "layer"}], ids=str)
def test_evaluation_between_steps_and_the_last_incomplete_batch(
    layer: dict[str, Any],
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = native_config(2, 2, **layer)
    arguments = (str(native_checkpoints("mixtral-k2")), str(tmp_path / "out"), config)
    history = clusters(2).run(train_an_epoch, *arguments, timeout=SECONDS)[0]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == len(held_out) == 2
    assert losses[1] != losses[0]
    assert held_out[1] != held_out[0]
