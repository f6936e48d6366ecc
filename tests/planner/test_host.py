"""host.py against what was measured (benchmarks/loading.md), and against checkpoint folders that runs wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.moe_section import Moe, MoeLayer
from moe_models.config.work import Work
from moe_models.families.model import Model
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB
from moe_models.planner.host import (
    PROCESS,
    SHARD,
    checkpoint_bytes,
    export_bytes,
    from_disk,
    has_safetensors,
    host_needs,
    model_bytes,
    offloaded_bytes,
    proof_bytes,
    share_bytes,
)
from tests.support.cluster import Cluster
from tests.support.layouts import MIXTRAL_8X7B, from_raw, layout_of, work

MEASURED: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096,
}  # fmt: skip
"""The checkpoint of the table in benchmarks/loading.md: 1.484 GB in bf16."""
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
    "intermediate_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 108, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
}  # fmt: skip
"""About the shape of the run on one H100 there: 2.7 billion parameters."""


def planned(
    stage: int, ep: int | None, world: int, model: dict[str, Any] = MEASURED, per_node: int = 8, **zero: Any
) -> Case:
    """A case; ``ep`` None is the model without AutoEP, ``zero`` goes into zero_optimization."""
    ds = layout_of(stage, max(2, ep or 1))
    if ep is None:
        ds = layout_of(stage, 1)
    elif ep == 1:
        assert ds.expert_parallel is not None
        ds = replace(ds, expert_parallel=ds.expert_parallel.model_copy(update={"autoep_size": 1}))
    ds.raw["zero_optimization"].update(zero)
    return Case.of(ds, Model.of(model), world, work(1), per_node)


def native(world: int, ep: int) -> Case:
    ds = replace(layout_of(1, 1), moe=Moe(layer=MoeLayer(ep_size=ep)))
    return Case.of(ds, Model.of(MEASURED), world, work(1), 8)


# ------------------------------------------------------------------------------------------------- against the figures


def test_the_measured_checkpoint_has_this_size() -> None:
    assert model_bytes(planned(1, 2, 2)) / 1e9 == pytest.approx(1.484, abs=0.001)


@pytest.mark.parametrize(
    ("case", "multiple"),
    [
        (planned(1, 2, 2), 1.12),
        (planned(1, 4, 4), 1.16),
        (planned(1, 2, 4), 2.12),
        (planned(3, 2, 2), 1.03),
        (planned(3, None, 2), 1.07),
        (native(2, 2), 1.06),
    ],
)
def test_each_rank_reads_its_share(case: Case, multiple: float) -> None:
    """CPU ranks keep in host memory what they read: peaks of all together, over their own, in checkpoints."""
    together = case.layout.world_size * share_bytes(case)
    assert together / model_bytes(case) == pytest.approx(multiple, rel=0.15)


@pytest.mark.parametrize(
    ("case", "multiple"),
    [
        (planned(1, 2, 2), 2.66),
        (planned(1, 4, 4), 4.37),
        (planned(3, 2, 2), 3.22),
        (planned(3, None, 2), 3.26),
        (native(2, 2), 1.95),
    ],
)
def test_every_rank_reads_the_whole_model(case: Case, multiple: float) -> None:
    """As it was everywhere, and is for .bin files."""
    world = case.layout.world_size
    case = replace(case, safetensors=False)
    needs = host_needs(case)
    assert needs.whole == "it has no safetensors files"
    assert (needs.read - world * PROCESS) / model_bytes(case) == pytest.approx(multiple, rel=0.15)


def test_one_rank_on_an_h100() -> None:
    """Peaks of the whole process while reading: about 2 GiB; 15.5 to 15.9 with the files' mapped pages, read whole."""
    case = planned(1, 1, 1, QWEN3_MOE)
    size = model_bytes(case) / GIB
    assert size == pytest.approx(5.1, rel=0.05)
    assert host_needs(case).read / GIB == pytest.approx(2.0, rel=0.15)
    whole = host_needs(replace(case, safetensors=False)).read / GIB
    assert whole + size == pytest.approx(15.7, rel=0.15)


def test_the_streamed_proof() -> None:
    """0.29 and 0.30 GB of 1.58, and no more with more layers."""
    case = planned(1, 2, 2, {**MEASURED, "vocab_size": 32000})
    assert model_bytes(case) / 1e9 == pytest.approx(1.58, abs=0.01)
    assert proof_bytes(case) / 1e9 == pytest.approx(0.295, rel=0.15)
    deep = planned(1, 2, 2, {**MEASURED, "num_hidden_layers": 80})
    assert proof_bytes(deep) == pytest.approx(proof_bytes(case), rel=1e-4)


def test_the_time_to_read() -> None:
    """Cold files, read and initialize: 3.0 s, on a machine whose `cat` of them takes 2.8 s."""
    needs = host_needs(planned(1, 2, 2))
    assert needs.seconds_to_read(1.484 / 2.8) == pytest.approx(3.0, rel=0.15)


# -------------------------------------------------------------------------------------------- checkpoints of real runs

more = pytest.mark.conformance
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Large enough for weights to be more than the pickle around them: 3.6 million parameters."""
OTHERS_OF_A_FILE = 32_000
"""Bytes of one .pt file beside its tensors: names, settings, alignment."""


@pytest.mark.parametrize(
    ("stage", "ep"),
    [
        (1, 2),
        (3, 2),
        pytest.param(2, 1, marks=more),
        pytest.param(2, 2, marks=more),
        pytest.param(3, None, marks=more),
        pytest.param(1, None, marks=more),
    ],
)
def test_a_checkpoint_takes_the_disk_that_is_said(
    stage: int, ep: int | None, clusters: Callable[[int], Cluster], tmp_path: Path
) -> None:
    from tests.support import roundtrip

    source = roundtrip.save_source(tmp_path / "source", "mixtral", **WIDE)
    raw = roundtrip.ds_config(stage, ep)
    clusters(2).run(roundtrip.train_and_export, str(source), str(tmp_path), raw, steps=1)
    work_in_fp32 = Work(micro_batch=1, length=8, element_bytes=4)
    config = json.loads((source / "config.json").read_text())
    case = Case.of(from_raw(raw), Model.of(config), 2, work_in_fp32, 2)
    files = list((tmp_path / "checkpoint-1").rglob("*.pt"))
    assert sum(file.stat().st_size for file in files) == pytest.approx(
        checkpoint_bytes(case), rel=0.03, abs=OTHERS_OF_A_FILE * len(files)
    )
    exported = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert exported == pytest.approx(export_bytes(case), rel=0.01)


# --------------------------------------------------------------------------------------------------------- each choice


def test_offload() -> None:
    """Mixtral on 8 GPUs: 20 bytes for each parameter, once over all ranks; it is there while the model is exported."""
    parameters = model_bytes(planned(1, 8, 8, MIXTRAL_8X7B)) / 2
    plain = host_needs(planned(1, 8, 8, MIXTRAL_8X7B))
    cpu = {"device": "cpu", "pin_memory": True}
    offloaded = host_needs(planned(1, 8, 8, MIXTRAL_8X7B, offload_optimizer=cpu))
    assert plain.train == 8 * PROCESS
    assert offloaded.train - plain.train == pytest.approx(18 * parameters, rel=0.001)
    assert offloaded.export - offloaded.train == plain.export - plain.train > SHARD
    assert offloaded.read == plain.read
    assert (plain.fullest, offloaded.fullest) == ("export", "export")

    both = host_needs(planned(3, 8, 8, MIXTRAL_8X7B, offload_optimizer=cpu, offload_param=cpu))
    assert both.train - plain.train == pytest.approx(20 * parameters, rel=0.001)
    assert both.read - plain.read == pytest.approx(2 * parameters, rel=0.001), "weights that are read and stay"


def test_nvme_leaves_buffers_and_reads_the_whole_model() -> None:
    nvme = {"device": "nvme", "nvme_path": "/x", "buffer_count": 5, "buffer_size": 10**8}
    case = planned(3, None, 8, MIXTRAL_8X7B, offload_param=nvme)
    assert offloaded_bytes(case) == 5 * 10**8 * 2
    needs = host_needs(case)
    assert needs.whole == 'zero_optimization.offload_param.device = "nvme"'
    assert needs.fullest == "read"
    assert needs.read > 8 * model_bytes(case)
    optimizer = planned(3, None, 8, MIXTRAL_8X7B, offload_optimizer={"device": "nvme"})
    assert offloaded_bytes(optimizer) == 4 * 10**9 * 4
    assert host_needs(optimizer).whole is None


def test_why_the_whole_model() -> None:
    assert host_needs(planned(3, 2, 2)).whole is None
    hpz = host_needs(planned(3, None, 4, zero_hpz_partition_size=2))
    assert hpz.whole == "zero_optimization.zero_hpz_partition_size = 2"
    assert host_needs(planned(1, 2, 4, zero_hpz_partition_size=2)).whole is None
    quantized = {**MEASURED, "quantization_config": {"quant_method": "fp8"}}
    assert "quantized" in str(host_needs(planned(1, 2, 2, quantized)).whole)


def test_what_a_node_gets_from_disk() -> None:
    """Every byte that one of its ranks keeps, once."""
    whole = model_bytes(planned(1, 8, 8, MIXTRAL_8X7B))
    dense = 2 * Model.of(MIXTRAL_8X7B).sizes.dense_params
    assert from_disk(planned(1, 8, 8, MIXTRAL_8X7B)) == whole
    assert from_disk(planned(1, 4, 8, MIXTRAL_8X7B)) == whole, "the second copy of the experts comes from memory"
    assert from_disk(planned(1, 8, 8, MIXTRAL_8X7B, per_node=4)) == dense + (whole - dense) // 2
    assert from_disk(planned(3, None, 8, MIXTRAL_8X7B, per_node=4)) == pytest.approx(whole / 2, rel=1e-6)
    assert from_disk(planned(1, None, 8, MIXTRAL_8X7B, per_node=4)) == whole


def test_dtypes() -> None:
    """Files in fp32 are read in fp32, and trained in bf16."""
    stored = {**MEASURED, "torch_dtype": "float32"}
    assert model_bytes(planned(1, 2, 2, stored)) == 2 * model_bytes(planned(1, 2, 2))
    assert export_bytes(planned(1, 2, 2, stored)) == export_bytes(planned(1, 2, 2))


def test_bin_files(tmp_path: Path) -> None:
    assert has_safetensors("org/name")
    assert has_safetensors(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    assert not has_safetensors(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert has_safetensors(str(tmp_path))
