"""traffic.py and layout.py against live runs: the groups that DeepSpeed made and the bytes that it sent over them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.families.model import Model
from moe_models.planner.case import Case
from moe_models.planner.traffic import spans_nodes, traffic
from tests.support import parity, trace
from tests.support.cluster import Cluster
from tests.support.tiny import TINY

WORLD = 4
GATHER_ALWAYS = {
    "stage3_param_persistence_threshold": 100,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
}


def write_config(folder: Path, stage: int, ep_size: int | None, **extra: Any) -> Path:
    config = parity.ds_config(stage, ep_size, **extra)
    if stage == 3:
        config["zero_optimization"] |= GATHER_ALWAYS
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("model_type", "stage", "ep_size", "accumulation", "recompute"),
    [
        ("mixtral", 1, 2, 2, True),
        ("mixtral", 2, 2, 2, False),
        ("mixtral", 3, 2, 2, True),
        ("mixtral", 3, None, 1, False),
        ("deepseek_v3", 2, 4, 1, True),
    ],
)
def test_live_run(
    model_type: str,
    stage: int,
    ep_size: int | None,
    accumulation: int,
    recompute: bool,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = tiny_checkpoints(model_type)
    path = write_config(tmp_path, stage, ep_size)
    check_live_run(clusters(WORLD), source, path, tmp_path, accumulation, recompute)


def check_live_run(
    cluster: Cluster, source: Path, path: Path, out: Path, accumulation: int, recompute: bool, padding: float = 0.01
) -> None:
    """Same groups; same bytes but for padding. Rows arrive unevenly, so bytes are averaged over the ranks."""
    ds = load_ds_config(path)
    world = cluster.world_size
    config = {**ds.deepspeed, "moe": ds.raw.get("moe", {})}
    results = cluster.run(trace.traced_step, str(source), str(out), config, accumulation, recompute)
    layout = ds.layout(world)
    made = {
        "DP": layout.zero_groups(), "EP": layout.ep_groups(), "EDP": layout.edp_groups(), "TP": layout.tp_groups(),
        "SP": layout.sp_groups(),
    }  # fmt: skip
    for rank, result in enumerate(results):
        for name, group in result["groups"].items():
            assert group == next(ranks for ranks in made[name] if rank in ranks), name

    work = Work(
        micro_batch=trace.MICRO_BATCH,
        length=trace.LENGTH,
        accumulation=accumulation,
        element_bytes=4,
        recompute=recompute,
    )
    model = Model.of(json.loads((source / "config.json").read_text()))
    expected: Counter[tuple[str, tuple[int, ...]]] = Counter()
    live: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for rank, result in enumerate(results):
        for flow in traffic(Case.of(ds, model, world, work, gpus_per_node=world)):
            ranks = next(ranks for ranks in made[flow.group] if rank in ranks)
            expected[flow.collective, ranks] += flow.payload
        live.update(result["flows"])
    assert set(live) == set(expected)
    for key, payload in expected.items():
        assert live[key] == pytest.approx(payload, rel=padding), key


def test_a_thousand_ranks_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(parity.ds_config(1, 64, sequence_parallel_size=4)))
    ds = load_ds_config(path)
    model = Model.of({"model_type": "qwen3_moe", **TINY["qwen3_moe"], "num_experts": 128})
    start = time.process_time()
    layout = Layout(1024, 64, sp_size=4)
    rows = traffic(Case.of(ds, model, 1024, Work(micro_batch=1, length=4096), 8))
    places = [(layout.coordinates(rank), layout.experts_of(rank, 128)) for rank in range(1024)]
    assert time.process_time() - start < 0.1
    assert {row.group for row in rows} == {"EP", "EDP", "DP", "SP"}
    assert len(places) == 1024


def test_bytes_by_hand(tmp_path: Path) -> None:
    """8 ranks as EP 4 x EDP 2, one sequence of 4096 tokens, top-2 of width 32, bf16, 2 MoE layers."""
    ds = load_ds_config(write_config(tmp_path, 1, 4))
    model = Model.of({"model_type": "mixtral", **TINY["mixtral"]})
    rows = traffic(Case.of(ds, model, 8, Work(micro_batch=1, length=4096, recompute=False), 4))
    by_name = {row.what: row for row in rows}
    forward = by_name["dispatch, combine: forward"]
    assert forward.payload == 2 * 2 * 4096 * 2 * 32 * 2  # there and back, layers, tokens, top-k, width, bytes
    assert (forward.sent, forward.across) == (forward.payload * 3 // 4, False)
    experts = by_name["gradients, experts"]
    assert experts.payload == 2 * (2 * 3 * 32 * 48)  # bytes; layers, matrices, of the one expert of a rank
    assert (experts.group, experts.size, experts.sent, experts.across) == ("EDP", 2, experts.payload, True)


def test_spans_nodes() -> None:
    assert not spans_nodes(((0, 1), (2, 3)), 2)
    assert spans_nodes(((0, 1), (1, 2)), 2)
    assert not spans_nodes(((0, 7),), None)
