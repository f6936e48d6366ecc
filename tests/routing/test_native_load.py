"""Native layers are watched and balanced like the others: counts against plain Python, losses against one process.

The learning rate of the counting tests is 0, so that every step routes with the weights of the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.config.ds_config import load_ds_config
from moe_models.preflight.run import check_run
from moe_models.routing.losses import load_balancing_loss
from tests.routing import test_balance, test_load_stats
from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.tiny import TINY
from tests.test_prmoe import write_ds
from tests.training.test_native import native_checkpoints, native_config  # noqa: F401

Clusters = Callable[[int], Cluster]
Checkpoints = Callable[[str], Path]


def check_counters(
    cluster: Cluster, source: Path, out: Path, checkpointing: dict[str, bool] | None,
    run: Callable[..., Any] = test_load_stats.train,
) -> None:  # fmt: skip
    results = cluster.run(run, str(source), str(out), native_config(1, 2), 2, checkpointing)
    rows = [json.loads(line) for line in (out / "expert_load.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "eval"] * 3
    for step in range(3):
        micro = [batch for r in results for batch in r["trained"][2 * step : 2 * step + 2]]
        per_rank = len(results[0]["evaluated"]) // 3
        held = [b for r in results for bs in r["evaluated"][step * per_rank : (step + 1) * per_rank] for b in bs]
        for batches, row in ((micro, rows[2 * step]), (held, rows[2 * step + 1])):
            counts, entropies = test_load_stats.recount(source, "mixtral", batches)
            assert [layer["tokens"] for layer in row["layers"]] == counts, step
            assert [layer["entropy"] for layer in row["layers"]] == pytest.approx(entropies, rel=1e-5)
            assert [layer["dropped"] for layer in row["layers"]] == [[0] * 4] * 2


@pytest.mark.parametrize("checkpointing", [None, test_load_stats.PLAIN, test_load_stats.REENTRANT], ids=str)
def test_counters_equal_a_recount(
    checkpointing: dict[str, bool] | None, clusters: Clusters, tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Of each optimizer step by itself, whatever is recomputed, and of each evaluation; nothing is dropped."""
    check_counters(clusters(2), tiny_checkpoints("mixtral"), tmp_path, checkpointing)


MORE = [pytest.param(fault, marks=pytest.mark.conformance) for fault in ("no reset", "not reduced")]


@pytest.mark.parametrize("fault", ["recomputation counted", *MORE])
def test_planted_faults_are_seen(fault: str, clusters: Clusters, tiny_checkpoints: Checkpoints, tmp_path: Path) -> None:
    run = partial(test_load_stats.train_with_fault, fault)
    with pytest.raises(AssertionError, match=r"tokens|entropy|layers|assert \[\["):
        check_counters(clusters(2), tiny_checkpoints("mixtral"), tmp_path, test_load_stats.PLAIN, run)


def train_and_count(source: str, out: str, config: dict[str, Any]) -> list[dict[str, list[list[int]]]]:
    """Two steps of two micro-batches; per step and layer [chosen, dropped] of each expert on this rank, in Python."""
    from moe_models.engine.native import native_blocks

    # By hand every forward pass counts, that of the check too.
    trainer = parity.build_trainer(
        source, out, config, accumulation=2, max_steps=2, learning_rate=0.0, check_conversion="none"
    )
    counts: list[dict[str, list[list[int]]]] = [{}, {}]
    blocks = native_blocks(trainer.model)

    def count(name: str, gate: Any, args: Any) -> None:
        rows = (args[0].detach().float() @ gate.wg.weight.T.float()).tolist()
        E = len(rows[0])
        chosen = [0] * E
        for row in rows:
            for e in sorted(range(E), key=lambda e: -row[e])[: gate.k]:
                chosen[e] += 1
        capacity = math.ceil(len(rows) / E * gate.k * gate.capacity_factor)
        total = counts[trainer.state.global_step].setdefault(name, [[0] * E, [0] * E])
        for e in range(E):
            total[0][e] += chosen[e]
            total[1][e] += max(0, chosen[e] - capacity)

    for name, block in blocks.items():
        block.moe.deepspeed_moe.gate.register_forward_pre_hook(partial(count, name))
    trainer.train()
    return counts


@pytest.mark.parametrize("name", ["mixtral-k2", "olmoe-k1", "qwen3_moe-k4"])
def test_dropped_routes_are_counted_for_each_expert(
    name: str,
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = native_config(2, 2, drop_tokens=True, capacity_factor=0.75)
    per_rank = clusters(2).run(train_and_count, str(native_checkpoints(name)), str(tmp_path), config)
    rows = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for step, row in enumerate(rows):
        assert {layer["layer"] for layer in row["layers"]} == set(per_rank[0][step])
        for layer in row["layers"]:
            for index, key in enumerate(("tokens", "dropped")):
                by_hand = [counts[step][layer["layer"]][index] for counts in per_rank]
                assert layer[key] == [sum(of_ranks) for of_ranks in zip(*by_hand, strict=True)]
            assert 0 < sum(layer["dropped"]) < sum(layer["tokens"])


CASES = [
    # scope, per_layer, EP, ZeRO, accumulation, gradient checkpointing
    ("micro_batch", False, 2, 1, 2, True),
    ("global_batch", False, 2, 2, 1, False),
    ("sequence", True, 1, 1, 1, True),
]


@pytest.mark.parametrize(("scope", "per_layer", "ep_size", "stage", "accumulation", "checkpointing"), CASES)
def test_balance_equals_one_process(
    scope: str, per_layer: bool, ep_size: int, stage: int, accumulation: int, checkpointing: bool,
    clusters: Clusters, tiny_checkpoints: Checkpoints, tmp_path: Path,
) -> None:  # fmt: skip
    """Loss, auxiliary loss, z-loss, gradient norm and weights, as tests/routing/test_balance.py asks of AutoEP."""
    source = tiny_checkpoints("mixtral")
    results = clusters(2).run(
        parity.train_case, str(source), str(tmp_path), native_config(stage, ep_size), accumulation,
        balance={**test_balance.COEFFICIENTS, "scope": scope, "per_layer": per_layer},
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    batches = [result["batches"] for result in results]
    expected = test_balance.reference(source, batches, accumulation, tmp_path / "reference", scope, per_layer)
    found = test_balance.deviations(results[0], expected)
    assert all(found[name] < bound for name, bound in test_balance.BOUNDS.items()), found


def test_layers_of_different_size_are_balanced_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, tokens_S = [2, 4], torch.tensor([5.0, 3.0])
    counts, sums = (torch.rand(2, 2, 4, generator=generator) for _ in range(2))
    for tensor in (counts, sums):
        tensor[:, 0, 2:] = 0
    together = load_balancing_loss(counts, sums, tokens_S, True, experts)
    alone = [
        load_balancing_loss(counts[:, layer, None, :E], sums[:, layer, None, :E], tokens_S, False)
        for layer, E in enumerate(experts)
    ]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item())


def test_a_selection_bias_is_refused(tmp_path: Path) -> None:
    path = write_ds(tmp_path, moe={"layer": {"ep_size": 2}, "balance": {"bias_update_rate": 0.001}})
    (line,) = check_run(load_ds_config(path), {**TINY["mixtral"], "model_type": "mixtral"}, 2)
    assert line.startswith(
        "moe.balance.bias_update_rate = 0.001: the gate of native layers chooses by its scores alone"
    )
