"""Adapters (LoRA) under expert parallelism are the same function as single-process PEFT.

Every case trains five AdamW steps with active clipping and weight decay, and compares each step's loss, auxiliary loss
and gradient norm, and every tensor of PEFT's file at the end. Everything is fp32, so what differs is the order of
summation. Largest differences seen: 1e-7 (losses), 1e-6 (norms), 3e-5 (factors, of 0.1 to 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import adapters, parity
from tests.support.cluster import Cluster
from tests.training.test_parity import relative

LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-5
FACTOR_TOLERANCE = 1e-4
"""Absolute. AdamW moves a factor by up to 5 x 2e-2, and divides by the gradient's own size: see parity.ADAM_EPS."""


def check_case(
    cluster: Cluster, source: Path, out: Path, config: dict[str, Any], which: str, accumulation: int = 1,
    run: Callable[..., Any] = adapters.train_case, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train on the ranks and in one process, compare, and return what rank 0 saw."""
    results = cluster.run(run, str(source), str(out), config, which, accumulation, **options)
    batches = [result["batches"] for result in results]
    assert len(batches) == 1 or batches[0] != batches[1], "the ranks must train on different data"
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    expected = adapters.reference(source, model_type, which, batches, accumulation, out / "reference")
    ours = results[0]
    assert relative(ours["loss"], expected["loss"]) < LOSS_TOLERANCE
    assert relative(ours["grad_norm"], expected["grad_norm"]) < NORM_TOLERANCE
    assert min(expected["grad_norm"]) > parity.CLIP, "clipping must be active"
    if expected["aux_loss"][0] is not None:
        assert relative(ours["aux_loss"], expected["aux_loss"]) < LOSS_TOLERANCE
    mine, theirs = adapters.file_of(ours["folder"]), adapters.file_of(expected["folder"])
    assert set(mine) == set(theirs), "the two files hold different tensors"
    worst = max((float((mine[name] - theirs[name]).abs().max()), name) for name in theirs)
    assert worst[0] < FACTOR_TOLERANCE, worst
    ours["found"] = worst
    assert all(theirs[name].abs().max() > 1e-2 for name in theirs), "an untrained factor proves nothing"
    proof = ours["proof"]
    assert proof.max_logit_difference < 1e-5
    assert proof.median_without_adapter > 0.1, "the adapter must matter"
    return ours


@pytest.mark.parametrize(("model_type", "which", "stage", "world", "ep", "accumulation"), [
    ("mixtral", "both", 1, 2, 2, 1)])
def test_adapters_equal_peft(
    model_type: str, which: str, stage: int, world: int, ep: int | None, accumulation: int,
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    config = parity.ds_config(stage, ep)
    ours = check_case(clusters(world), tiny_checkpoints(model_type), tmp_path, config, which, accumulation)
    print(ours["found"], ours["proof"])
