"""fp16's dynamic loss scale with expert parallelism: an overflow on one rank leaves out the step on all, and no more.

CPU processes have no fp16 in DeepSpeed, so an fp32 run is given fp16's scaler; what overflows is planted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import parity
from tests.support.cluster import Cluster

OVERFLOWS_AT = 2  # steps counted from 1


def train_with_overflow(source: str, out: str, stage: int, dynamic: bool) -> dict[str, Any]:
    """Four steps; in the second one gradient of an expert of rank 1 is infinite. Runs on every rank."""
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from transformers import TrainerCallback

    from moe_models.trainer import TrainingStoppedError

    trainer = parity.build_trainer(
        source, out, parity.ds_config(stage, 2), balance={"bias_update_rate": 0.01}, max_steps=4, save_strategy="steps",
        save_steps=1, save_total_limit=1,
    )  # fmt: skip
    seen: dict[str, list[Any]] = {"scale": [], "bias": [], "sum": []}

    class Look(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            optimizer = trainer.model_wrapped.optimizer
            if dynamic:
                optimizer.loss_scaler = DynamicLossScaler(
                    init_scale=2**10, scale_window=100, min_scale=1, delayed_shift=1,
                    consecutive_hysteresis=False,
                )  # fmt: skip
                optimizer.dynamic_loss_scale, optimizer.check_grad_overflow = True, True
            expert = next(p for name, p in trainer.model.named_parameters() if ".experts." in name)

            def overflow(gradient: torch.Tensor) -> torch.Tensor:
                here = trainer.state.global_step + 1 == OVERFLOWS_AT and dist.get_rank() == 1
                return gradient * float("inf") if here else gradient

            expert.register_hook(overflow)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen["scale"].append(trainer.model_wrapped.optimizer.loss_scale)
            seen["sum"].append(sum(float(p.detach().double().sum()) for p in trainer.model.parameters()))
            seen["bias"].append(trainer.routing.bias.bias_LE.tolist())

    trainer.add_callback(Look())
    try:
        trainer.train()
    except TrainingStoppedError as error:
        return {"stopped": str(error), **seen}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"stopped": None, "norm": [entry["grad_norm"] for entry in history], **seen}


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.conformance)])
def test_a_step_that_overflows_is_left_out_on_all_ranks(
    stage: int, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Weights, selection bias and schedule stand still for one step; the run goes on, and its checkpoint is whole."""
    results = clusters(2).run(train_with_overflow, str(tiny_checkpoints("mixtral")), str(tmp_path), stage, True)
    for result in results:
        assert result["stopped"] is None
        assert result["scale"] == [1024, 512, 512, 512]
        for name in ("sum", "bias"):
            assert [result[name][step] != result[name][step - 1] for step in (1, 2, 3)] == [False, True, True], name
    norms = results[0]["norm"]
    assert norms[1] == float("inf")
    assert all(0.1 < norm < 100 for norm in (norms[0], *norms[2:]))
    assert (tmp_path / "checkpoint-4").is_dir()


def test_without_a_dynamic_scale_it_ends_the_run(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    results = clusters(2).run(train_with_overflow, str(tiny_checkpoints("mixtral")), str(tmp_path), 1, False)
    assert all("became NaN or infinite by step 2" in result["stopped"] for result in results)
