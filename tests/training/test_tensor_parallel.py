"""AutoTP beside AutoEP: the function, the gradient norm and the exported weights of single-process Hugging Face.

The peers of a TP group read the same data, so the reference sees the batches of one of them. Layouts: TP 2 on 4 ranks
with EP 2 (EP group = TP group) and EP 4 (over both pairs); tests/training/test_grids.py has 8 ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from recipes.export import export_checkpoint
from tests.checkpoint.test_resume import LOGGED, flags
from tests.planner.test_traffic import check_live_run
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.recipe import ROOT, curve, largest_difference, save_model, text_rows, train_in_cluster, write_jsonl
from tests.training import test_parity
from tests.training.test_parity import check_case

Clusters = Callable[[int], Cluster]
Tiny = Callable[[str], Path]
PLAN = json.loads((ROOT / "ds_configs" / "zero1_ep2_tp2.json").read_text())["tensor_parallel"]
references = test_parity.references


def tp_config(stage: int, ep_size: int, **extra: Any) -> dict[str, Any]:
    config = parity.ds_config(stage, ep_size, tensor_parallel=PLAN, **extra)
    config["zero_optimization"]["overlap_comm"] = True  # as ds_configs/ have it; gradients take another path then
    return config


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
CASES = [(f, stage, ep, acc) for f in FAMILIES for stage in (1, 2) for ep in (2, 4) for acc in (1, 2)]
DAILY = [("mixtral", 1, 2, 2), ("mixtral", 2, 4, 1), ("qwen3_moe", 2, 2, 2)]


@pytest.mark.parametrize(
    ("model_type", "stage", "ep_size", "accumulation"), parity.daily(CASES, {CASES.index(case) for case in DAILY})
)
def test_training_equals_hugging_face(
    model_type: str,
    stage: int,
    ep_size: int,
    accumulation: int,
    clusters: Clusters,
    tiny_checkpoints: Tiny,
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = tp_config(stage, ep_size)
    check_case(clusters(4), references, tiny_checkpoints(model_type), tmp_path, config, accumulation)


FAULTS = ("aux loss doubled", "experts of the second peer left out of the norm")


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank where one thing is wrong; the second fault is DeepSpeed's own."""
    from moe_models import trainer

    if fault == FAULTS[0]:
        return test_parity.train_with_fault(test_parity.FAULTS[0], *args, **kwargs)
    with parity.planted(trainer, "count_every_expert_in_the_norm", lambda optimizer: None):
        return parity.train_case(*args, **kwargs)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"assert .* < "):
        check_case(
            clusters(4), references, tiny_checkpoints("mixtral"), tmp_path, tp_config(1, 2), 1,
            run=partial(train_with_fault, fault),
        )  # fmt: skip


def export_without_joining(*args: Any) -> str:
    """Runs on the ranks: what the export says if shards are taken for whole tensors."""
    from moe_models.checkpoint import from_engine as checkpoint_engine
    from moe_models.checkpoint.hf_folder import ExportError

    with parity.planted(checkpoint_engine, "split_dimension", lambda parameter: None):
        try:
            roundtrip.export_unchanged(*args)
        except ExportError as error:
            return str(error)
    return ""


def test_a_shard_is_not_exported_as_a_whole(clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    source, out = tiny_checkpoints("mixtral"), tmp_path / "out"
    told = clusters(4).run(export_without_joining, str(source), str(out), 1, 2, "float32", PLAN)
    assert all("q_proj.weight: has shape [16, 32], expected [32, 32]" in text for text in told)
    assert not out.exists()


@pytest.mark.parametrize(
    ("model_type", "stage", "ep_size", "dtype"),
    [("qwen2_moe", 2, 4, "bfloat16"), pytest.param("mixtral", 1, 2, "float32", marks=pytest.mark.conformance)],
)
def test_unchanged_model_comes_back_bit_by_bit(
    model_type: str, stage: int, ep_size: int, dtype: str, clusters: Clusters, tmp_path: Path
) -> None:
    source = roundtrip.save_source(tmp_path / "source", model_type, dtype)
    result = clusters(4).run(
        roundtrip.export_unchanged, str(source), str(tmp_path / "out"), stage, ep_size, dtype, PLAN
    )[0]
    roundtrip.assert_same_tensors(tmp_path / "out", source)
    assert result["proof"].equal_tensors == len(roundtrip.load_tensors(source))


def test_resumed_equals_uninterrupted_and_any_checkpoint_is_the_model(clusters: Clusters, tmp_path: Path) -> None:
    """With the recipe and its JSON: checkpoint, resume, and the same bytes out of the last checkpoint's folder."""
    check_resume(clusters(4), tmp_path, "zero1_ep2_tp2", replicas=2)
    (tmp_path / "straight" / "checkpoint-6" / "global_step6" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files are missing \(mp_rank_01_model_states\.pt\)"):
        export_checkpoint(tmp_path / "straight" / "checkpoint-6", tmp_path / "again", "5GB")


def check_resume(cluster: Cluster, folder: Path, preset: str, replicas: int, **overrides: Any) -> None:
    """Six steps, and three after a resume, are the same; so is an export from the checkpoint's folder."""
    model = save_model(folder / "tiny", "qwen3_moe", **overrides)
    data = write_jsonl(folder / "train.jsonl", text_rows(16))

    def arguments(out: Path, **more: Any) -> list[str]:
        return flags(model, data, preset, out, replicas, **more)

    straight = cluster.run(train_in_cluster, arguments(folder / "straight"))[0]
    export_checkpoint(folder / "straight" / "checkpoint-6", folder / "offline", "5GB")
    assert largest_difference(straight["folder"], folder / "offline") == 0.0
    shutil.copytree(folder / "straight" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    resumed = cluster.run(train_in_cluster, arguments(folder / "resumed", resume_from_checkpoint="true"))[0]
    expected, got = curve(straight, *LOGGED), curve(resumed, *LOGGED)
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert len({values[0] for values in expected.values()}) == 6, "losses that do not move prove nothing"
    assert got == expected
    assert largest_difference(resumed["folder"], straight["folder"]) == 0.0


def test_bytes_of_a_live_run(clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tp_config(2, 2)))
    # Peers keep unequal numbers of rows, and all gather as many as the one with most.
    check_live_run(clusters(4), tiny_checkpoints("qwen3_moe"), path, tmp_path, 2, True, padding=0.03)
