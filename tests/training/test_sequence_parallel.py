"""Ulysses beside AutoEP: the function, the gradient norm and the exported weights of single-process Hugging Face.

The ranks of an SP group read the same rows, so the reference sees the batches of one of them. Rows are of unequal
length: padding lies mostly on the last rank, and the ranks hold unequal numbers of targets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_models.engine.ulysses import Ulysses
from moe_models.routing.callback import Routing
from moe_models.trainer import MoETrainer
from tests.checkpoint.test_resume import flags
from tests.planner.test_traffic import check_live_run
from tests.routing.test_balance import BOUNDS, COEFFICIENTS, deviations
from tests.routing.test_balance import reference as balance_reference
from tests.routing.test_load_stats import PLAIN
from tests.routing.test_load_stats import check as check_counters
from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.recipe import curve, train_in_cluster
from tests.training import test_parity
from tests.training.test_parity import check_case
from tests.training.test_tensor_parallel import check_resume

Clusters = Callable[[int], Cluster]
Tiny = Callable[[str], Path]
references = test_parity.references


def sp_config(stage: int, ep_size: int, sp_size: int = 2, **extra: Any) -> dict[str, Any]:
    config = parity.ds_config(stage, ep_size, sequence_parallel_size=sp_size, **extra)
    config["zero_optimization"]["overlap_comm"] = True  # as ds_configs/ have it; gradients take another path then
    return config


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
LAYOUTS = [(2, 1, 2), (2, 2, 2), (4, 2, 2), (4, 4, 2), (4, 2, 4)]  # (ranks, EP, SP)
CASES = [(f, stage, *layout, acc) for f in FAMILIES for stage in (1, 2) for layout in LAYOUTS for acc in (1, 2)]
DAILY = [("mixtral", 1, 4, 2, 2, 2), ("mixtral", 2, 2, 2, 2, 1), ("qwen3_moe", 2, 4, 2, 4, 1)]


@pytest.mark.parametrize(
    ("model_type", "stage", "ranks", "ep_size", "sp_size", "accumulation"),
    parity.daily(CASES, {CASES.index(case) for case in DAILY}),
)
def test_training_equals_hugging_face(
    model_type: str,
    stage: int,
    ranks: int,
    ep_size: int,
    sp_size: int,
    accumulation: int,
    clusters: Clusters,
    tiny_checkpoints: Tiny,
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = sp_config(stage, ep_size, sp_size)
    check_case(clusters(ranks), references, tiny_checkpoints(model_type), tmp_path, config, accumulation)


@pytest.mark.conformance
@pytest.mark.parametrize("stage", [1, 2])
def test_with_the_optimizer_in_host_memory(
    stage: int, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    config, offload = sp_config(stage, 2), {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    config["zero_optimization"] |= offload
    check_case(clusters(2), references, tiny_checkpoints("mixtral"), tmp_path, config, 2)


def cut_before_shifting(self: Any, inputs: Any) -> Any:
    shard = SHARD(self, inputs)
    shard["shift_labels"][:, -1] = -100
    return shard


def positions_from_zero(self: Any, inputs: Any) -> Any:
    shard = SHARD(self, inputs)
    return {**shard, "position_ids": shard["position_ids"] - shard["position_ids"][:, :1]}


def balance_alone(self: Any, model: Any, ep_size: int, device: Any, peers: Any) -> None:
    ATTACH(self, model, ep_size, device)


def whole_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * COMPUTE_LOSS(self, *args, **kwargs)


SHARD, ATTACH, COMPUTE_LOSS = Ulysses.shard, Routing.attach, MoETrainer.compute_loss
FAULTS = {
    "labels cut before they are shifted": (Ulysses, "shard", cut_before_shifting),
    "positions from 0 on each rank": (Ulysses, "shard", positions_from_zero),
    "each rank balances its tokens alone": (Routing, "attach", balance_alone),
    "gradients SP times too large, as transformers makes them": (MoETrainer, "compute_loss", whole_loss),
}


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    with parity.planted(*FAULTS[fault]):
        return parity.train_case(*args, **kwargs)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"assert .* < "):
        check_case(
            clusters(2), references, tiny_checkpoints("mixtral"), tmp_path, sp_config(1, 2), 1,
            run=partial(train_with_fault, fault),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "per_layer", "accumulation", "checkpointing"),
    parity.daily(
        [("micro_batch", True, 1, True), ("global_batch", False, 2, False), ("sequence", True, 2, True)], {1, 2}
    ),
)
def test_balance_equals_one_process(
    scope: str, per_layer: bool, accumulation: int, checkpointing: bool,
    clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path,
) -> None:  # fmt: skip
    """Every scope of the auxiliary loss, and the z-loss, over the tokens of all ranks that share a sequence."""
    source, balance = tiny_checkpoints("mixtral"), {**COEFFICIENTS, "scope": scope, "per_layer": per_layer}
    results = clusters(4).run(
        parity.train_case, str(source), str(tmp_path), sp_config(1, 2), accumulation, balance=balance,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    batches = [result["batches"] for result in results[::2]]
    expected = balance_reference(source, batches, accumulation, tmp_path / "reference", scope, per_layer)
    found = deviations(results[0], expected)
    assert all(found[name] < bound for name, bound in BOUNDS.items()), found


def test_counters_equal_a_recount(clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    """Tokens per expert of training, each counted once, and of evaluation, where the ranks of a group do the same."""
    rows = [{"input_ids": [3 + (7 * i * j + j) % 60 for j in range(20)]} for i in range(1, 65)]
    check_counters(
        clusters(4), tiny_checkpoints("mixtral"), "mixtral", tmp_path, 1, 2, 2, PLAIN, peers=2, train_rows=rows,
        sequence_parallel_size=2,
    )  # fmt: skip


def train_and_evaluate(source: str, out: str, config: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss before and after two steps; runs on every rank."""
    trainer = parity.build_trainer(
        source, out, config, eval_rows=parity.rows(16, seed=3), max_steps=2, per_device_eval_batch_size=4,
        eval_on_start=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    held_out = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"held out": held_out, "tokens": trainer._total_train_tokens}


def test_evaluation_is_that_of_other_layouts(clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    """4 ranks as SP 2 x DP 2 against 2 ranks as DP 2: the same rows are held out, and the same tokens are counted."""
    source = str(tiny_checkpoints("mixtral"))
    plain = clusters(2).run(train_and_evaluate, source, str(tmp_path / "dp"), parity.ds_config(1, 2))[0]
    split = clusters(4).run(train_and_evaluate, source, str(tmp_path / "sp"), sp_config(1, 2))[0]
    for there, here in zip(plain["held out"], split["held out"], strict=True):
        for key in ("eval_loss", "eval_aux_loss"):
            assert here[key] == pytest.approx(there[key], rel=1e-6)
    before, after = split["held out"]
    assert after["eval_loss"] < before["eval_loss"]
    assert split["tokens"] == plain["tokens"]


def test_resumed_here_and_elsewhere(clusters: Clusters, tmp_path: Path) -> None:
    """With the recipe and its JSON; then without sequence parallelism, on ranks that read the same rows in a step."""
    check_resume(clusters(4), tmp_path, "zero1_ep2_sp2", replicas=2)
    straight = curve_of(tmp_path / "straight" / "checkpoint-6")
    # On 4 ranks a micro-batch is half as large, which the auxiliary loss is a function of.
    for preset, ranks, tolerance in (("zero2_ep2", 2, 1e-5), ("zero1_ep2", 4, 2e-2)):
        out = tmp_path / preset
        shutil.copytree(tmp_path / "straight" / "checkpoint-3", out / "checkpoint-3")
        arguments = flags(tmp_path / "tiny", tmp_path / "train.jsonl", preset, out, ranks)
        resumed = clusters(ranks).run(train_in_cluster, [*arguments, "--resume_from_checkpoint", "true"])[0]
        got = curve(resumed, "loss", "grad_norm")
        for step in (4, 5, 6):
            assert got[step] == pytest.approx(straight[step], rel=tolerance)


def curve_of(checkpoint: Path) -> dict[int, tuple[float, ...]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.conformance)])
def test_bytes_of_a_live_run(recompute: bool, clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(sp_config(1, 4)))
    check_live_run(clusters(4), tiny_checkpoints("qwen3_moe"), path, tmp_path, 2, recompute, padding=0.03)


def test_other_attention_and_packed_rows_are_refused(
    clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path
) -> None:
    """By the trainer itself, for who does not come through the recipe."""
    told = clusters(2).run(refusals, str(tiny_checkpoints("mixtral")), str(tmp_path))[0]
    assert "attn_implementation = eager: not with sequence parallelism" in told[0]
    assert "padding-free" in told[1]


def refusals(source: str, out: str) -> list[str]:
    from tests.support.tiny import make_model

    told = []
    model = make_model("mixtral")
    model.set_attn_implementation("eager")
    for options in ({"model": model}, {"packing": True}):
        try:
            parity.build_trainer(source, out, sp_config(1, 2), **options)
        except ValueError as error:
            told.append(str(error))
    return told
