"""Faults in a rank during an export: every rank raises, and nothing is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import roundtrip
from tests.support.cluster import Cluster
from tests.support.roundtrip import assert_same_tensors, files_of

Clusters = Callable[[int], Cluster]


def leftovers(folder: Path) -> list[str]:
    """Hidden names beside ``folder``: staging or previous folders that should be gone."""
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith("."))


# -------------------------------------------------------------------------------------------------- faults on the ranks

FAULTS = {
    "disk full": "cannot be written: [Errno 27] File too large",
    "disk full on another rank": "cannot be written: [Errno 27] File too large",
    "disk full in a companion": "File too large",
    "writer raises": "RuntimeError: planted",
    "other rank raises": "MemoryError: planted",
    "proof fails": "RuntimeError: planted",
    "foreign folder": "is not empty and is not an earlier export",
    "lost tensor": "model.norm.weight: config.json asks for this tensor",
    "unknown trained tensor": "1 trained tensors have no place in this model's checkpoint: ['model.layers.9.new",
}


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_raises_and_nothing_is_lost(stage: int, clusters: Clusters, tmp_path: Path) -> None:
    """No rank hangs, all say the same, the earlier export stays as it was, and nothing else is left."""
    source = roundtrip.save_source(tmp_path / "source", "mixtral")
    out = tmp_path / "run" / "model"
    shutil.copytree(source, out)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = files_of(tmp_path / "run")
    told = clusters(2).run(roundtrip.failing_exports, str(source), str(out), stage, list(FAULTS))
    for fault, words in FAULTS.items():
        for rank, by_fault in enumerate(told):
            assert by_fault[fault].startswith("ExportError: "), (rank, fault, by_fault[fault])
            assert words in by_fault[fault], (rank, fault, by_fault[fault])
    assert_same_tensors(f"{out}-after", source)
    shutil.rmtree(f"{out}-after")
    assert files_of(tmp_path / "run") == before
    assert leftovers(out) == []


def test_ranks_wait_for_a_slow_proof(clusters: Clusters, tmp_path: Path) -> None:
    source = roundtrip.save_source(tmp_path / "source", "mixtral")
    beats = clusters(2).run(slow_proof, str(source), str(tmp_path / "out"))
    assert beats[1] >= 4, "the waiting rank must have heard from the writer several times"
    assert_same_tensors(tmp_path / "out", source)


def slow_proof(source: str, out: str) -> int:
    """Runs on the ranks: a proof that takes many heartbeats; returns how many broadcasts the last step took."""
    import time

    import torch.distributed as dist

    from moe_models.checkpoint import export as checkpoint

    engine = roundtrip.make_engine(source, 1, 2, "float32")
    beats = 0
    original, before = dist.broadcast_object_list, checkpoint.HEARTBEAT_SECONDS

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal beats
        beats += 1
        return original(*args, **kwargs)

    checkpoint.HEARTBEAT_SECONDS, dist.broadcast_object_list = 0.05, counting
    try:
        roundtrip.export_engine(engine, source, out, before_rename=lambda folder: time.sleep(0.5))
    finally:
        checkpoint.HEARTBEAT_SECONDS, dist.broadcast_object_list = before, original
    engine.destroy()
    return beats


# ------------------------------------------------------------------------------------ every rank writes its own experts


def export_three_ways(source: str, out: str, stage: int) -> dict[str, Any]:
    """Runs on the ranks: each rank writes its own experts; rank 0 writes all; and with the runs of experts swapped."""
    from transformers import AutoConfig

    from moe_models.checkpoint import export as checkpoint
    from moe_models.checkpoint.from_engine import EngineSource
    from moe_models.checkpoint.hf_folder import ExportError
    from moe_models.checkpoint.proof import prove_folder, record_logits
    from tests.support.parity import planted

    engine = roundtrip.make_engine(source, stage, 2, "float32")
    told: dict[str, Any] = {}
    # 1. Together.
    tensors = roundtrip.export_engine(engine, source, f"{out}/together", max_shard_bytes=30_000)
    told["spread"] = tensors.spread
    # 2. Rank 0 alone, as where another rank is on another machine.
    other = {"gethostname": lambda: f"host{os.environ['RANK']}"}
    with planted(checkpoint, "socket", SimpleNamespace(**other)):
        tensors = roundtrip.export_engine(engine, source, f"{out}/alone", max_shard_bytes=30_000)
    told["spread on two machines"] = tensors.spread
    # 3. Each rank writes its experts to the places of the other's: the proof must tell.
    right = EngineSource.experts

    def swapped(self: Any, path: str, projection: str) -> Any:
        experts, which = right(self, path, projection)  # type: ignore[misc]
        half = len(which)
        first = 0 if which.start else half
        return experts, range(first, first + half)

    ids, logits = record_logits(engine, AutoConfig.from_pretrained(source).vocab_size)
    with planted(EngineSource, "experts", swapped):
        tensors = roundtrip.export_engine(engine, source, f"{out}/swapped")
    if os.environ["RANK"] == "0":
        try:
            prove_folder(Path(out) / "swapped", ids, logits, tensors.fingerprints)
            told["swapped"] = "not seen"
        except ExportError as error:
            told["swapped"] = str(error)
    engine.destroy()
    return told


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_write_their_own_experts(stage: int, clusters: Clusters, tmp_path: Path) -> None:
    """The same bytes as from rank 0 alone, which is the way where ranks are on several machines."""
    source = roundtrip.save_source(tmp_path / "source", "mixtral")
    told = clusters(2).run(export_three_ways, str(source), str(tmp_path), stage)
    assert [one["spread"] for one in told] == [True, True]
    assert [one["spread on two machines"] for one in told] == [False, False]
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    assert_same_tensors(tmp_path / "together", source)
    assert "holds other bits than the trained one in" in told[0]["swapped"]
    assert leftovers(tmp_path / "together") == []
