"""The offload files of ds_configs/, as their twins for two CPU processes: EP 2 in the place of EP 8, all else the same.

Processes without a GPU have no other memory to move things to, but DeepSpeed takes its offload path all the same:
gradients, their norm and the optimizer's states are kept elsewhere, saved otherwise, and loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.files import read_json
from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.recipe import ROOT
from tests.training import test_parity
from tests.training.test_parity import check_case
from tests.training.test_tensor_parallel import check_resume

references = test_parity.references
PRESETS = ("zero1_ep8_offload", "zero3_ep8_offload")


def twin(preset: str, folder: Path) -> Path:
    """The same file with EP 2."""
    raw = read_json(ROOT / "ds_configs" / f"{preset}.json")
    raw["expert_parallel"]["autoep_size"] = 2
    path = folder / f"{preset.replace('ep8', 'ep2')}.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_training_equals_hugging_face(
    preset: str,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = parity.ds_config(1, 2)
    config["zero_optimization"] = read_json(ROOT / "ds_configs" / f"{preset}.json")["zero_optimization"]
    check_case(clusters(2), references, tiny_checkpoints("mixtral"), tmp_path / "out", config, 2)


@pytest.mark.parametrize(
    "preset", ["zero1_ep8_offload", pytest.param("zero3_ep8_offload", marks=pytest.mark.conformance)]
)
def test_resumed_equals_uninterrupted(preset: str, clusters: Callable[[int], Cluster], tmp_path: Path) -> None:
    check_resume(clusters(2), tmp_path, str(twin(preset, tmp_path).with_suffix("")), replicas=2)
