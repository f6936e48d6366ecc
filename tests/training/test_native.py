"""Training with native DeepSpeed layers is the same function as single-process Hugging Face training.

Same harness and bounds as tests/training/test_parity.py: five AdamW steps with active clipping, every step's loss,
auxiliary loss and gradient norm, and the exported weights. In the default configuration the reference is untouched
Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import parity
from tests.support.cluster import Cluster
from tests.training.test_parity import check_case, references  # noqa: F401

EXPRESSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-k2": ("mixtral", {}),
    "qwen3_moe-k4": ("qwen3_moe", {}),
    "qwen2_moe-k2-shared": ("qwen2_moe", {"norm_topk_prob": True}),
    "olmoe-k1": ("olmoe", {"num_experts_per_tok": 1}),
}
"""(family, config changes) of one checkpoint for each number of experts per token that the layer can express."""

SAME_BLOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next-k4-shared": ("qwen3_next", {}),
    "qwen3_5_moe-k4-shared": ("qwen3_5_moe_text", {}),
}
"""Families with the block of qwen2_moe: the conformance run only."""


def native_config(stage: int, ep_size: int, **layer: Any) -> dict[str, Any]:
    return parity.ds_config(stage, None, moe={"layer": {"ep_size": ep_size, **layer}})


@pytest.fixture(scope="session")
def native_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from tests.support.tiny import save_tiny

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model_type, changes = {**EXPRESSIBLE, **SAME_BLOCK}[name]
            made[name] = save_tiny(tmp_path_factory.mktemp(name), model_type, **changes)
        return made[name]

    return get


def matrix() -> list[Any]:
    """Checkpoint x ZeRO stage x layout x accumulation: half of them for Mixtral, a changing quarter for each other."""
    cases = []
    for number, name in enumerate((*EXPRESSIBLE, *SAME_BLOCK)):
        for stage in (1, 2):
            for index, (world_size, ep_size) in enumerate([(2, 1), (2, 2), (4, 2), (4, 4)]):
                for accumulation in (1, 2):
                    turn = number + stage + index + 2 * accumulation
                    default = (turn // 2) % 2 == 0 if name.startswith("mixtral") else turn % 4 == 0
                    default = default and name in EXPRESSIBLE
                    marks = [pytest.mark.conformance] + [pytest.mark.daily] * default
                    case = f"{name}-zero{stage}-{world_size}ranks-ep{ep_size}-acc{accumulation}"
                    values = (name, stage, world_size, ep_size, accumulation)
                    cases.append(pytest.param(*values, id=case, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "stage", "world_size", "ep_size", "accumulation"), matrix())
def test_native_training_equals_hugging_face(
    name: str,
    stage: int,
    world_size: int,
    ep_size: int,
    accumulation: int,
    clusters: Callable[[int], Cluster],
    native_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = native_config(stage, ep_size)
    check_case(clusters(world_size), references, native_checkpoints(name), tmp_path, config, accumulation)
