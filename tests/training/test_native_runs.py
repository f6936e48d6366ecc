"""Whole runs with native layers: their own balancing loss, dropping, nothing hangs, and the ways in and out.

Everything here runs MoETrainer on the ranks of a cluster, with a time limit: a hang is a failure after a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_roundtrip import assert_offline_equals_live
from tests.engine.test_native_layer import by_hand, dropped_by_hand
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.recipe import ROOT, ForkedRecipe, command, launch, save_model, text_rows, write_jsonl
from tests.training.test_native import native_checkpoints, native_config  # noqa: F401
from tests.training.test_parity import LOSS_TOLERANCE, NORM_TOLERANCE, check_case, references, relative  # noqa: F401

Clusters = Callable[[int], Cluster]
Checkpoints = Callable[[str], Path]
SECONDS = 90

# ------------------------------------------------------------------------------------------- the layers' balancing loss


def layer_aux_loss(k: int, output: Any) -> Any:
    import torch

    return torch.stack([by_hand(logits, k) for logits in output.router_logits]).mean()


AUX_CASES = [
    (*case, gradient_checkpointing)
    for gradient_checkpointing in (False, True)
    for case in [
        ("mixtral-k2", 1, 2, 2, 1),
        ("mixtral-k2", 2, 2, 2, 2),
        ("qwen3_moe-k4", 2, 2, 1, 1),
        ("olmoe-k1", 1, 4, 2, 2),
    ]
]


@pytest.mark.parametrize(
    ("name", "stage", "world_size", "ep_size", "accumulation", "gradient_checkpointing"),
    parity.daily(AUX_CASES, {1, 4, 6, 7}),
)
def test_layer_aux_loss_joins_the_loss_once(
    name: str,
    stage: int,
    world_size: int,
    ep_size: int,
    accumulation: int,
    gradient_checkpointing: bool,
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Loss, norms and weights equal plain Hugging Face plus coefficient x ``l_aux`` computed by hand."""
    aux_loss_of = partial(layer_aux_loss, int(name[-1]))

    def with_l_aux(source: Path, batches: Any, accumulation: int) -> dict[str, Any]:
        return parity.reference(source, batches, accumulation, tmp_path / "reference", aux_loss_of)

    config = native_config(stage, ep_size, aux_loss="layer")
    check_case(
        clusters(world_size), with_l_aux, native_checkpoints(name), tmp_path, config, accumulation,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


FAULTS = ("aux loss left out", "aux loss not divided by accumulation", "every rank keeps the first experts")


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    from moe_models import trainer
    from moe_models.config.layout import Layout
    from moe_models.engine import native

    mean = native.mean_aux_loss
    owner, name, wrong = {
        FAULTS[0]: (trainer, "mean_aux_loss", lambda *a: mean(*a).detach()),
        FAULTS[1]: (trainer, "mean_aux_loss", lambda *a: mean(*a) * 2),
        FAULTS[2]: (Layout, "experts_of", lambda self, rank, count: range(count // self.ep_size)),
    }[fault]
    with parity.planted(owner, name, wrong):
        return parity.train_case(*args, check_conversion="none", **kwargs)  # which sees the last before the first step


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str,
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    def with_l_aux(source: Path, batches: Any, accumulation: int) -> dict[str, Any]:
        return parity.reference(source, batches, accumulation, tmp_path / "reference", partial(layer_aux_loss, 2))

    with pytest.raises(AssertionError, match=r"assert .* < "):
        check_case(
            clusters(2), with_l_aux, native_checkpoints("mixtral-k2"), tmp_path,
            native_config(1, 2, aux_loss="layer"), 2, run=partial(train_with_fault, fault), timeout=SECONDS,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- dropping


def train_and_count(source: str, out: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train two steps of two micro-batches, counting each layer's drops on this rank in plain Python."""
    from moe_models.engine.native import native_blocks

    trainer = parity.build_trainer(source, out, config, accumulation=2, max_steps=2, eval_strategy="no")
    counts: list[dict[str, list[int]]] = [{}, {}]
    factor = config["moe"]["layer"]["capacity_factor"]

    def count(name: str, gate: Any, args: Any) -> None:
        if gate.training:
            block = native_blocks(trainer.model)[name]
            kept = counts[trainer.state.global_step].setdefault(name.split(".")[2], [0, 0])
            for index, value in enumerate(dropped_by_hand(args[0].detach(), block, factor)):
                kept[index] += value

    for name, block in native_blocks(trainer.model).items():
        block.moe.deepspeed_moe.gate.register_forward_pre_hook(partial(count, name))
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"counts": counts, "logged": logged, "proof": trainer.last_proof}


@pytest.mark.parametrize(
    ("name", "factor"), parity.daily([("mixtral-k2", 0.5), ("mixtral-k2", 2.0), ("olmoe-k1", 1.0)], {0, 2})
)
def test_drop_rate_is_logged_for_each_layer(
    name: str,
    factor: float,
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Over both ranks and micro-batches; and the exported model is the trained one although evaluation drops too."""
    config = native_config(1, 2, drop_tokens=True, capacity_factor=factor, eval_capacity_factor=0.5)
    results = clusters(2).run(
        train_and_count, str(native_checkpoints(name)), str(tmp_path / "out"), config, timeout=SECONDS
    )
    for step, entry in enumerate(results[0]["logged"]):
        rates = {key: value for key, value in entry.items() if key.startswith("drop_rate/")}
        per_rank = [result["counts"][step] for result in results]
        assert set(rates) == {f"drop_rate/layer_{layer}" for layer in per_rank[0]}
        for layer in per_rank[0]:
            made, dropped = (sum(counts[layer][i] for counts in per_rank) for i in (0, 1))
            assert rates[f"drop_rate/layer_{layer}"] == pytest.approx(dropped / made, abs=1e-9)
            assert dropped > 0 or factor > 0.5
            assert dropped == 0 or factor < 2.0, "with E/k times the even share every token has its place"
    assert results[0]["proof"].max_logit_difference < 1e-5


# ------------------------------------------------------------------------------------------------- the ways in and out


@pytest.mark.parametrize(
    ("name", "stage", "world_size", "ep_size", "dtype"),
    [
        ("mixtral-k2", 1, 2, 2, "float32"),
        ("qwen3_moe-k4", 2, 4, 2, "bfloat16"),
        ("qwen2_moe-k2-shared", 1, 2, 1, "bfloat16"),
        ("olmoe-k1", 2, 4, 4, "float32"),
    ],
)
def test_live_and_offline_exports_are_the_same_files(
    name: str,
    stage: int,
    world_size: int,
    ep_size: int,
    dtype: str,
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = {**native_config(stage, ep_size), "bf16": {"enabled": dtype == "bfloat16"}}
    out, options = tmp_path / "out", {"bf16": dtype == "bfloat16", "use_cpu": True, "timeout": SECONDS}
    source = native_checkpoints(name)
    proof = clusters(world_size).run(roundtrip.train_and_export, str(source), str(out), config, **options)[0]
    assert proof.equal_tensors == len(roundtrip.load_tensors(source)) == len(roundtrip.load_tensors(out / "model"))
    assert_offline_equals_live(out)


def test_native_and_autoep_continue_each_other(
    clusters: Clusters,
    native_checkpoints: Checkpoints,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Through the Hugging Face folder, with the same next losses whichever of the two goes on."""
    configs = {"native": native_config(1, 2), "autoep": parity.ds_config(2, 2)}
    for first, config in configs.items():
        source = native_checkpoints("mixtral-k2")
        begun = clusters(2).run(parity.train_case, str(source), str(tmp_path / first), config, timeout=SECONDS)[0]
        curves = {
            then: clusters(2).run(
                parity.train_case, begun["folder"], str(tmp_path / first / then), other, timeout=SECONDS
            )[0]
            for then, other in configs.items()
        }
        assert curves["native"]["batches"] == curves["autoep"]["batches"]
        assert curves["native"]["loss"][0] != begun["loss"][0]
        for key, bound in (("loss", LOSS_TOLERANCE), ("aux_loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
            assert relative(curves["native"][key], curves["autoep"][key]) < bound


# ------------------------------------------------------------------------------------------------------ the recipe


def write_capacity_json(folder: Path, **layer: Any) -> Path:
    """The capacity preset for two ranks."""
    config = json.loads((ROOT / "ds_configs" / "zero2_ep8_native_capacity.json").read_text())
    config["moe"]["layer"].update(ep_size=2, **layer)
    (folder / "ds.json").write_text(json.dumps(config))
    return folder / "ds.json"


@pytest.mark.conformance
def test_finetune_says_what_departs_from_the_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    data, out = write_jsonl(tmp_path / "train.jsonl", text_rows(16)), tmp_path / "out"
    path = write_capacity_json(tmp_path, capacity_factor=0.5)
    ended = launch(command(model, data, path, out, max_steps=2, logging_steps=1, report_to="none"), tmp_path)
    assert ended.code == 0, ended
    assert f"layout: 2 ranks: EP 2 x EDP 1, ZeRO-2  ({path})" in ended.stdout
    assert "moe.layer: drop_tokens = true: an expert takes 0.5 times its even share (2 in evaluation" in ended.stdout
    assert "drop_rate/layer_0" in ended.stdout
    assert json.loads((out / "summary.json").read_text())["verified"]["missing_keys"] == 0


def test_finetune_refuses_zero3_before_it_reads_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"not weights")
    config = json.loads((ROOT / "ds_configs" / "zero1_ep2_native.json").read_text())
    config["zero_optimization"] = {"stage": 3}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "train.jsonl", text_rows(4))
    ended = ForkedRecipe()(command(model, data, tmp_path / "ds.json", tmp_path / "out"), RANK="0", WORLD_SIZE="2")
    assert ended.code == 2, ended
    (line,) = ended.errors
    assert line.startswith("moe.layer with zero_optimization.stage = 3: DeepSpeed refuses native layers there; set")
