"""recipes/bench.py on CPU: every kind of row trains the same function, and the report says what was measured."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.bench import collectives
from moe_models.errors import UserError
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from tests.support.cluster import Cluster
from tests.support.parity import ds_config, planted
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {**TINY["mixtral"], "model_type": "mixtral", "tie_word_embeddings": False}


def recipe(name: str) -> Any:
    """`recipes/` is no package: its files find each other as started scripts do."""
    if str(ROOT / "recipes") not in sys.path:
        sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module(name)


# -------------------------------------------------------------------------------------------------- rows, on 2 ranks

KINDS: list[tuple[str, str, int, int | None]] = [
    ("trainer", "trainer", 1, 2),
    ("trainer zero3", "trainer", 3, None),
    ("bare", "bare", 2, 2),
    ("transformers_ep", "transformers_ep", 0, 2),
]


def measure_rows(folder: str) -> list[dict[str, Any]]:
    """One row of each kind in the same processes, as the worker does; reports too how much each left behind."""
    from moe_models.trainer import MoETrainer

    worker, train, epochs = importlib.import_module("moe_models.bench.worker"), MoETrainer.train, []

    def remember_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        epochs.append(self.state.epoch)
        return result

    rows: list[dict[str, Any]] = []
    for name, kind, stage, ep_size in KINDS:
        path = Path(folder) / f"{kind}{stage}-{os.environ['RANK']}.json"
        path.write_text(json.dumps(ds_config(stage, ep_size)))
        job = {
            "row": len(rows), "name": name, "kind": kind, "json_path": str(path), "ep_size": ep_size or 1,
            "liger": False, "checkpointing": False, "compile": False, "lora": False, "lora_attention": False,
            "micro_batch": 2, "accumulation": 2, "model_config": CONFIG, "seq_length": 32,
            "steps": 2, "warmup": 1, "profile_steps": 1,
            "attn_implementation": "sdpa", "tokens": "uniform", "seed": 0,
        }  # fmt: skip
        before = live_bytes()
        with planted(MoETrainer, "train", remember_epoch):
            rows.append(worker.run_job(job, torch.device("cpu")))
        rows[-1] |= {"name": name, "left_over": live_bytes() - before, "epochs": [*epochs]}
        epochs.clear()
    return rows


def live_bytes() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated properties of strangers
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"]
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if type(x).__name__ != "DTensor"
    }
    return sum(held.values())


@pytest.fixture(scope="module")
def rows(clusters: Callable[[int], Cluster], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return clusters(2).run(measure_rows, str(tmp_path_factory.mktemp("bench")))[0]


def test_every_kind_of_row_trains_the_same_function_on_the_same_tokens(rows: list[dict[str, Any]]) -> None:
    # fp32, four steps at a learning rate of 1e-5: what is left is the order of sums.
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * len(rows), rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(4.5, abs=0.6)  # about ln 64: with these weights nothing is known yet


def test_the_loader_has_rows_left_at_the_end(rows: list[dict[str, Any]]) -> None:
    """Where it runs dry it stops its workers, within the last step."""
    epochs = [epoch for row in rows for epoch in row["epochs"]]
    assert len(epochs) == 2
    assert max(epochs) < 1


def test_times_and_shares_are_those_of_steps(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert len(row["step_seconds_all"]) == 2
        assert 0 < min(row["step_seconds_all"]) <= row["step_seconds"] * 1.0001
        assert 0 < row["optimizer_share"] < 1
        assert 0 < row["communication_share"] < 1, row
        assert 1 <= row["expert_load_max"] <= row["expert_load_worst"] <= 4
        assert "peak_allocated_gib" not in row  # rows share a process, whose resident memory says nothing of one


def test_a_row_leaves_no_model_behind(rows: list[dict[str, Any]]) -> None:
    model = model_sizes(CONFIG)
    weights = 4 * (model.dense_params + model.expert_params)
    assert {row["name"]: row["left_over"] for row in rows if row["left_over"] > weights / 10} == {}


# -------------------------------------------------------------------------------------------------------- the parts


def clip_on_two_ranks() -> tuple[float, float]:
    rank = torch.distributed.get_rank()
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 0.0]) if rank == 0 else torch.tensor([0.0, 4.0, 0.0])
    norm = importlib.import_module("moe_models.bench.baselines").clip_shards([parameter], 1.0)
    return float(norm), float(parameter.grad.norm())


def test_clipping_takes_the_norm_of_all_shards(clusters: Callable[[int], Cluster]) -> None:
    (norm, first), (same, second) = clusters(2).run(clip_on_two_ranks)
    assert norm == same == 5.0
    assert (first, second) == pytest.approx((0.6, 0.8), rel=1e-5)


def test_overlapping_spans_count_once() -> None:
    covered = importlib.import_module("moe_models.bench.clock").covered
    assert covered([(0, 2), (1, 3), (5, 6), (5, 6)]) == 4
    assert covered([]) == 0


def test_waits_go_to_what_ran_next() -> None:
    waits = importlib.import_module("moe_models.bench.clock").waits
    spans = [(0.0, 2.0, "a"), (1.0, 5.0, "b"), (3.0, 4.0, "c"), (6.0, 7.0, "a"), (9.0, 9.5, "b"), (10.0, 11.0, "a")]
    assert waits(spans) == {"a": 1.5, "b": 2.0}
    assert waits([]) == {}


def test_layouts_are_read_with_their_changes(tmp_path: Path) -> None:
    read = importlib.import_module("moe_models.bench.layouts").read_layouts
    file = str(ROOT / "ds_configs" / "zero1_ep2.json")
    words = [f"{file}+liger+expert_parallel.gate_up_impl=fused", f"bare:{file}", "hf_zero3", "autoep_stock",
             "transformers_ep", f"{file}+zero_optimization.stage=2+checkpointing", f"{file}+compile"]  # fmt: skip
    layouts = read(words, CONFIG, 4, tmp_path)
    kinds = ["trainer", "bare", "bare", "bare", "transformers_ep", "trainer", "trainer"]
    assert [layout.kind for layout in layouts] == kinds
    assert layouts[0].liger
    assert layouts[0].json["expert_parallel"] == {
        "enabled": True, "autoep_size": 2, "combine_impl": "fused_weighted_sum", "gate_up_impl": "fused"
    }  # fmt: skip
    assert [layout.ep_size for layout in layouts] == [2, 2, 1, 4, 4, 2, 2]
    assert layouts[5].json["zero_optimization"]["stage"] == 2
    assert layouts[5].checkpointing
    assert layouts[6].compile
    assert layouts[6].json["compile"] == {"autoep_non_moe": True}  # what the flag asks for beside AutoEP
    for baseline in layouts[2:4]:  # as users have them
        assert "timers" not in baseline.json
    assert layouts[1].json["timers"] == {"throughput": {"enabled": False}}


def test_what_cannot_run_is_refused_all_at_once(tmp_path: Path) -> None:
    file = str(ROOT / "ds_configs" / "zero1_ep2.json")
    words = ["nosuch", f"{file}+fast", f"{file}+expert_parallel.autoep_size=3", "transformers_ep+liger", "hf_zero3",
             "hf_zero3", f"{file}+liger+compile", "autoep_stock+compile",
             f"bare:{ROOT}/ds_configs/zero1_ep2_native.json"]  # fmt: skip
    with pytest.raises(UserError) as refused:
        importlib.import_module("moe_models.bench.layouts").read_layouts(words, CONFIG, 4, tmp_path)
    told = "\n".join(refused.value.problems)
    for part in (
        "nosuch", "+fast", "autoep_size = 3", "transformers_ep+liger", "named twice", "moe: the section",
        "--torch_compile with --use_liger_kernel", "autoep_stock+compile: +compile: is a flag",
    ):  # fmt: skip
        assert part in told, told


def test_table_and_json_say_the_same(tmp_path: Path) -> None:
    report = importlib.import_module("moe_models.bench.table")
    base = {"kind": "bare", "accumulation": 2, "seq_length": 100, "micro_batch": 1, "status": "ok", "device": "x",
            "matmul_tflops": 2e-3, "torch": "t", "usable_gib": 10.0, "reserved_gib": 1.0}  # fmt: skip
    made = [
        {**base, "row": 0, "name": "ours", "step_seconds": 0.1, "peak_allocated_gib": 3.0, "peak_reserved_gib": 4.0},
        {**base, "row": 1, "name": "hf_zero3", "step_seconds": 0.2},
        {**base, "row": 2, "name": "autoep_stock", "step_seconds": 0.125},
        {**base, "row": 3, "name": "transformers_ep", "status": "out of memory", "error": "no more"},
    ]
    asked = {"num_gpus": 2, "seq_length": 100, "config_name": "c", "tokens": "uniform", "steps": 1, "warmup": 1}
    done = report.finish_rows(made, CONFIG, 2)
    report.write_report(tmp_path, done, asked, CONFIG)
    kept = json.loads((tmp_path / "bench.json").read_text())["rows"]
    lines = [line.split(" | ") for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("| ")]
    shown = {line[0].strip("| "): line for line in lines[2:]}
    for row in kept:
        line = shown[row["name"]]
        if row["status"] == "ok":
            assert line[2] == f"{row['tokens_per_second_per_gpu']:,.0f}"
            assert float(line[4]) == pytest.approx(row["step_seconds"] * 1e3)
        else:
            assert line[2] == "out of memory"
    ours = kept[0]
    assert ours["tokens_per_second_per_gpu"] == pytest.approx(2000)
    assert ours["tokens_per_step"] == 400
    assert ours["vs_baselines"] == pytest.approx(1.25)  # over the faster baseline
    assert ours["mfu"] == pytest.approx(2000 * sum(train_flops(model_sizes(CONFIG), 100)) / 2e9)
    assert shown["ours"][6] == "3.0 / 4.0"
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_a_layout_without_memory_is_told_and_the_others_stand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bad = "ds_configs/zero2_ep2.json+zero_optimization.reduce_bucket_size=10000000000000"
    command = [sys.executable, "recipes/bench.py", "--config_name", str(tmp_path / "config.json"), "--num_gpus", "2",
               "--seq_length", "32", "--micro_batch", "2", "--steps", "1", "--warmup", "1", "--profile_steps", "0",
               "--output_dir", str(tmp_path / "out"),
               "--deepspeed", "autoep_stock", bad]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "out of memory"], rows
    assert "40000000000000 bytes" in rows[1]["error"]
    assert "| out of memory |" in (tmp_path / "out" / "bench.md").read_text()
    assert "| out of memory |" in done.stdout


# ------------------------------------------------------------------------------------------------------- all-to-all


def test_splits_follow_the_shares_and_lose_no_row() -> None:
    assert collectives.splits([0.25] * 4, 10, 2) == [5, 5]
    for shares in (collectives.skewed(8, 4, 2.0), [0.4, 0.3, 0.2, 0.05, 0.05, 0, 0, 0]):
        sent = collectives.splits(shares, 1001, 4)
        assert sum(shares) == pytest.approx(1)
        assert sum(sent) == 1001
        for rank in range(4):
            assert abs(sent[rank] - 1001 * sum(shares[2 * rank : 2 * rank + 2])) < 1
    assert max(collectives.splits(collectives.skewed(8, 4, 2.0), 1000, 4)) == 500


def test_a_recorded_routing_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "expert_load.jsonl"
    layers = [{"layer": "model.layers.0.mlp", "tokens": [3, 1, 0, 0]}]
    lines = [
        {"step": step, "split": split, "layers": layers} for step, split in ((1, "train"), (2, "train"), (2, "eval"))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collectives.recorded(str(file), 4) == {"step 2, model.layers.0.mlp": [0.75, 0.25, 0, 0]}
    for experts, path in ((8, file), (4, tmp_path / "none")):
        with pytest.raises(UserError):
            collectives.recorded(str(path), experts)


def exchange_and_sweep() -> tuple[dict[str, Any], list[list[float]]]:
    shares, device = collectives.skewed(4, 2, 1.5), torch.device("cpu")
    return (
        collectives.exchange(shares, 64, 16, torch.float32, None, device, 2),
        collectives.sweep("all_reduce", 0.5, None, device, 2),
    )


def test_rows_come_back_and_rates_are_of_bytes_on_the_wire(clusters: Callable[[int], Cluster]) -> None:
    swap, pairs = clusters(2).run(exchange_and_sweep)[0]
    assert swap["came_back"]
    assert swap["max_mean"] == 1.5
    # Of 64 rows rank 0 sends its 16 for rank 1 away, rank 1 its 48 for rank 0.
    assert swap["mean_sent_mib"] * 2**20 == pytest.approx((16 + 48) / 2 * 16 * 4)
    assert swap["busiest_gb_per_s"] == pytest.approx(1.5 * swap["gb_per_s"])
    assert [pair[0] for pair in pairs] == [2**16, 2**19]  # 2 x payload x (g - 1) / g
    assert all(pair[1] > 0 for pair in pairs)
