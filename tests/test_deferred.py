"""Metrics that are read when they are logged are those that TRL reads in every micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.deferred import Deferred
from tests import parity
from tests.cluster import Cluster


@pytest.mark.parametrize(("total", "valid"), [(7.3, 3), (7.3, 0), (float("nan"), 3), (5, 2)])
def test_quotients_are_those_of_trl(total: float, valid: int) -> None:
    """The lines of TRL's ``compute_loss``, asked of plain and of deferred tensors."""
    answers = []
    for kind in (torch.Tensor, Deferred):
        sums, counts = (torch.tensor([x, x]).as_subclass(kind).sum() for x in (total, valid))
        answer = (sums / counts).item() if counts > 0 else 0.0
        answers.append(float(torch.as_tensor(answer).double()))
    assert repr(answers[0]) == repr(answers[1])


def histories(
    source: str, out: str, config: dict[str, Any], deferred: bool
) -> tuple[list[dict[str, Any]], int]:  # runs on every rank
    """What four steps log with an evaluation between them, and how often TRL's ``compute_loss`` read a number."""
    import sys

    from datasets import Dataset
    from torch.utils._python_dispatch import TorchDispatchMode
    from trl import SFTTrainer

    from moe_models.trainer import MoETrainer

    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frame: Any = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if "_local_scalar_dense" in str(func) and frame and frame.f_code.co_filename.endswith("sft_trainer.py"):
                reads.append(frame.f_lineno)
            return func(*args, **(kwargs or {}))

    class Plain(MoETrainer):
        """Reads as TRL does."""

        def create_accelerator_and_postprocess(self) -> None:
            SFTTrainer.create_accelerator_and_postprocess(self)

    trainer = parity.build_trainer(
        source, out, config, accumulation=2, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2,
        eval_rows=parity.rows(8, seed=1), trainer_class=None if deferred else Plain,
    )  # fmt: skip
    assert isinstance(trainer.eval_dataset, Dataset)
    compute_loss = trainer.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not trainer.model.training:
            return compute_loss(*args, **kwargs)
        with Reads():
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = counted
    trainer.train()
    assert type(trainer._total_train_tokens) is int
    return trainer.state.log_history, len(reads)


@pytest.mark.parametrize(("family", "stage", "ep"), [("mixtral", 1, 2), ("qwen3_moe", 3, None)])
def test_logged_figures_are_trl_s_without_its_reads(
    family: str, stage: int, ep: int | None, clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    source, config = str(tiny_checkpoints(family)), parity.ds_config(stage, ep)
    logs, reads = {}, {}
    for deferred in (False, True):
        results = clusters(2).run(histories, source, str(tmp_path / str(deferred)), config, deferred)
        logs[deferred] = [
            [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in history]
            for history, _ in results
        ]
        reads[deferred] = [count for _, count in results]
    assert logs[True] == logs[False]
    trained = [entry for entry in logs[True][0] if "loss" in entry]
    assert len(trained) == 2
    for name in ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss"):
        assert all(type(entry[name]) is float for entry in trained)
    assert all(count >= 6 * 8 for count in reads[False])  # six in each of eight micro-batches
    assert reads[True] == [0, 0]
