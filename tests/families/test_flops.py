"""flops.py against torch's own counter, and what a training run counts with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.tiny import TINY


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_flops_equal_those_that_torch_counts(model_type: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**TINY[model_type], "model_type": model_type}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 64, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    sizes = model_sizes(config)
    halved = 6 * sizes.layers * sizes.heads * (sizes.head_dim + sizes.value_dim) * 16 / 2
    # Eager attention computes the masked half too.
    assert counter.get_total_flops() / ids.numel() == pytest.approx(sum(train_flops(sizes, 16)) + halved, rel=1e-9)


def total_flos(source: str, out: str, config: dict[str, Any]) -> float:
    """Runs on every rank: what a run counts for each token; rows of 16, two steps of two micro-batches on two ranks."""
    rows = [{"input_ids": list(range(3, 19))} for _ in range(64)]
    trainer = parity.build_trainer(source, out, config, accumulation=2, max_steps=2, train_rows=rows)
    trainer.train()
    micro_batch = trainer.args.per_device_train_batch_size
    return float(trainer.state.total_flos) / (2 * 2 * 2 * micro_batch * 16)


def test_a_run_counts_the_experts_that_a_token_meets(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Hugging Face would count every expert that a rank holds."""
    each = clusters(2).run(total_flos, str(tiny_checkpoints("mixtral")), str(tmp_path), parity.ds_config(1, 2))
    sizes = model_sizes({**TINY["mixtral"], "model_type": "mixtral"})
    assert each == pytest.approx([sum(train_flops(sizes, 16))] * 2)
