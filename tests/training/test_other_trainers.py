"""The parts of MoETrainer under another Trainer: plain ``transformers.Trainer``, same function, proven export.

Bounds are those of ``test_parity.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.tiny import save_tiny
from tests.training.test_parity import LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE, relative, weight_deviations


def plain_trainer() -> Any:
    """A Trainer without TRL that has the parts."""
    from transformers import DataCollatorForLanguageModeling, Trainer

    from moe_models.trainer import ExpertParallelTraining

    class PlainMoETrainer(ExpertParallelTraining, Trainer):
        def __init__(self, model: Any, **kwargs: Any) -> None:
            collator = DataCollatorForLanguageModeling(kwargs["processing_class"], mlm=False)
            super().__init__(model, data_collator=collator, **kwargs)

    return PlainMoETrainer


def train_plain(source: str, output_dir: str, model_loss: bool, stage: int = 1) -> dict[str, Any]:
    """``model_loss``: the model's own auxiliary loss is on in its config; otherwise moe.balance asks for ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_router_logits=model_loss)
    return parity.train_case(
        source, output_dir, parity.ds_config(stage, 2), accumulation=2, model=model, trainer_class=plain_trainer(),
        balance=None if model_loss else {},
    )  # fmt: skip


@pytest.mark.parametrize("model_loss", [False, True])
def test_plain_trainer_is_the_same_function(
    clusters: Callable[[int], Cluster], tmp_path: Path, model_loss: bool
) -> None:
    source = save_tiny(tmp_path / "tiny", "mixtral")
    ours = clusters(2).run(train_plain, str(source), str(tmp_path / "out"), model_loss)
    batches = [rank["batches"] for rank in ours]
    expected = parity.reference(source, batches, 2, tmp_path / "reference")
    assert relative(ours[0]["loss"], expected["loss"]) < LOSS_TOLERANCE
    assert relative(ours[0]["aux_loss"], expected["aux_loss"]) < LOSS_TOLERANCE
    assert relative(ours[0]["grad_norm"], expected["grad_norm"]) < NORM_TOLERANCE
    assert max(weight_deviations(ours[0]["folder"], expected["folder"]).values()) < WEIGHT_TOLERANCE
    assert ours[0]["proof"].missing_keys == 0
