"""Activation checkpointing: the backward pass routes every token again, and must send it to the same experts.

Recomputation runs the dispatch and combine of every MoE layer a second time, on all ranks together. Loss, gradient
norm and weights are compared with single-process Hugging Face without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.routing.test_load_stats import PLAIN, REENTRANT
from tests.support import parity
from tests.support.cluster import ChildError, Cluster
from tests.training import test_parity
from tests.training.test_native import native_config
from tests.training.test_parity import check_case

Clusters = Callable[[int], Cluster]
Tiny = Callable[[str], Path]
references = test_parity.references

CASES = [
    # family, ZeRO, who spreads the experts, reentrant
    ("mixtral", 1, "AutoEP", PLAIN),
    ("mixtral", 2, "AutoEP", PLAIN),
    ("qwen3_moe", 3, "AutoEP", PLAIN),
    ("mixtral", 2, "native", PLAIN),
    ("deepseek_v3", 1, "AutoEP", REENTRANT),  # the only kind without an auxiliary loss in the model
    ("deepseek_v3", 3, "AutoEP", REENTRANT),
]


@pytest.mark.parametrize(("model_type", "stage", "spread_by", "kind"), parity.daily(CASES, {0, 2, 4}))
def test_training_equals_hugging_face(
    model_type: str, stage: int, spread_by: str, kind: dict[str, bool],
    clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    config = parity.ds_config(stage, 2) if spread_by == "AutoEP" else native_config(stage, 2)
    check_case(
        clusters(2), references, tiny_checkpoints(model_type), tmp_path, config, 1,
        gradient_checkpointing=True, gradient_checkpointing_kwargs=kind,
    )  # fmt: skip


def other_experts_again(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank whose routers choose by other scores when they are asked again."""
    from deepspeed.moe import ep_router

    def route(self: Any, x: Any, *rest: Any, **more: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1
        return right(self, x.flip(0) if again else x, *rest, **more)

    owner = ep_router.TokenChoiceTopKRouter
    right = owner.forward
    with parity.planted(owner, "forward", route):
        return parity.train_case(*args, **kwargs)


@pytest.mark.parametrize("kind", [PLAIN, REENTRANT], ids=["plain", "reentrant"])
def test_other_experts_in_the_second_pass_are_seen(
    kind: dict[str, bool], clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    """torch compares shapes where it can, and ends the run; otherwise the gradient norm is another."""
    with pytest.raises((ChildError, AssertionError)) as seen:
        check_case(
            clusters(2), references, tiny_checkpoints("deepseek_v3"), tmp_path, parity.ds_config(1, 2), 1,
            run=partial(other_experts_again), gradient_checkpointing=True, gradient_checkpointing_kwargs=kind,
        )  # fmt: skip
    assert "CheckpointError" in str(seen.value) or "assert" in str(seen.value)


def train_unchecked(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank whose trainer refuses nothing."""
    from moe_models import trainer

    with parity.planted(trainer, "reentrant_problems", lambda *refused: []):
        return parity.train_case(*args, **kwargs)


def refusal(*args: Any, **kwargs: Any) -> str:
    """Runs on the ranks: why the trainer does not train."""
    try:
        parity.build_trainer(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def test_reentrant_would_take_the_auxiliary_loss_its_gradient(
    clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    """Refused by the trainer; without the refusal the first loss is right, and the first gradient is not."""
    flags = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT}
    source, config = tiny_checkpoints("mixtral"), parity.ds_config(1, 2)
    told = clusters(2).run(refusal, str(source), str(tmp_path), config, **flags)
    assert all("the auxiliary loss would have no gradient" in text for text in told)
    results = clusters(2).run(train_unchecked, str(source), str(tmp_path), config, **flags)
    expected = references(source, [result["batches"] for result in results], 1)
    assert results[0]["loss"][0] == pytest.approx(expected["loss"][0], rel=test_parity.LOSS_TOLERANCE)
    assert results[0]["grad_norm"][0] != pytest.approx(expected["grad_norm"][0], rel=3 * test_parity.NORM_TOLERANCE)
