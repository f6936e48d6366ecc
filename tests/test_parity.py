"""Expert-parallel training is the same function as single-process Hugging Face training.

Every case trains five AdamW steps with active clipping and compares each step's loss, auxiliary loss and gradient norm,
and the exported weights at the end. Everything is fp32, so what differs is the order of summation: 1e-7 relative per
sum. Measured deviations are 1e-7 (losses), 1e-6 (norms) and 1e-5 (weights after five steps); the bounds below leave a
factor of ten. A planted fault moves them by orders of magnitude (test_planted_faults_are_seen).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.cluster import Cluster
from tests.tiny import TINY

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
"""Relative to the tensor's largest value, or to the farthest AdamW can move a weight, whichever is larger."""
FARTHEST_MOVE = parity.STEPS * parity.LEARNING_RATE

# (world size, EP); None is the plain HF model under the same ZeRO stage.
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]


def weight_deviations(ours: str, reference: str) -> dict[str, float]:
    from safetensors.torch import load_file

    a, b = load_file(f"{ours}/model.safetensors"), load_file(f"{reference}/model.safetensors")
    assert list(a) == list(b), "the two folders hold different tensors"
    return {k: float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(FARTHEST_MOVE)) for k in a}


def relative(ours: list[float], reference: list[float]) -> float:
    assert all(abs(value) > 1e-3 for value in reference), "a reference near zero proves nothing"
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Single-process results, computed once per (checkpoint, batches, accumulation)."""
    made: dict[str, dict[str, Any]] = {}

    def get(source: Path, batches: list[list[dict]], accumulation: int) -> dict[str, Any]:
        key = f"{source}{accumulation}{batches}"
        if key not in made:
            made[key] = parity.reference(source, batches, accumulation, tmp_path_factory.mktemp("reference"))
        return made[key]

    return get


def check_case(
    cluster: Cluster, references: Callable[..., Any], source: Path, out: Path, config: dict, accumulation: int, **options: Any
) -> dict[str, Any]:  # fmt: skip
    results = cluster.run(parity.train_case, str(source), str(out), config, accumulation, **options)
    batches = [result["batches"] for result in results]
    assert all(len(per_rank) == parity.STEPS * accumulation for per_rank in batches)
    assert batches[0] != batches[1], "the ranks must train on different data"
    expected = references(source, batches, accumulation)
    ours = results[0]
    assert relative(ours["loss"], expected["loss"]) < LOSS_TOLERANCE
    assert relative(ours["grad_norm"], expected["grad_norm"]) < NORM_TOLERANCE
    if expected["aux_loss"][0] is not None:
        assert relative(ours["aux_loss"], expected["aux_loss"]) < LOSS_TOLERANCE
    assert min(expected["grad_norm"]) > parity.CLIP, "clipping must be active"
    deviations = weight_deviations(ours["folder"], expected["folder"])
    # The bias of the keys shifts all scores of a query alike, so softmax cancels it: its gradient is rounding noise.
    worst = max((value, name) for name, value in deviations.items() if not name.endswith("k_proj.bias"))
    assert worst[0] < WEIGHT_TOLERANCE, worst
    return ours


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("world_size", "ep_size"), LAYOUTS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_training_equals_hugging_face(
    model_type: str,
    stage: int,
    world_size: int,
    ep_size: int,
    accumulation: int,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = tiny_checkpoints(model_type)
    config = parity.ds_config(stage, ep_size)
    check_case(clusters(world_size), references, source, tmp_path, config, accumulation)
