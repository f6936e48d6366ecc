"""The grids of two and three dimensions: trained, saved, resumed, exported. Minutes each on 2 cores: conformance only.

- 8 ranks as TP pairs x expert groups x replicas: TP 2 x DP 4 for the dense part, and for the experts EP 2 x EDP 4 or
  EP 4 x EDP 2;
- 4 ranks that share 64 experts, 16 each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.tiny import save_tiny
from tests.training import test_parity
from tests.training.test_parity import check_case
from tests.training.test_tensor_parallel import check_resume, tp_config

pytestmark = pytest.mark.conformance
references = test_parity.references


def test_eight_ranks(tiny_checkpoints: Callable[[str], Path], references: Callable[..., Any], tmp_path: Path) -> None:
    cluster = Cluster(8)
    try:
        for ep_size in (2, 4):
            out = tmp_path / f"ep{ep_size}"
            config = tp_config(ep_size // 2, ep_size)  # ZeRO 1 and 2
            check_case(cluster, references, tiny_checkpoints("mixtral"), out, config, 1, timeout=500)
        check_resume(cluster, tmp_path, "zero1_ep2_tp2", replicas=4)
    finally:
        cluster.stop()


@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_share_64_experts(
    stage: int, clusters: Callable[[int], Cluster], references: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", "qwen3_moe", num_experts=64)
    check_case(clusters(4), references, source, tmp_path / "out", parity.ds_config(stage, 4), 1)
    check_resume(clusters(4), tmp_path / "resume", f"zero{stage}_ep4", replicas=4, num_experts=64)
