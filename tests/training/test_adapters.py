"""Adapters (LoRA) under expert parallelism are the same function as single-process PEFT.

Every case trains five AdamW steps with active clipping and weight decay, and compares each step's loss, auxiliary loss
and gradient norm, and every tensor of PEFT's file at the end. Everything is fp32, so what differs is the order of
summation. Largest differences seen: 1e-7 (losses), 1e-6 (norms), 3e-5 (factors, of 0.1 to 1).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import adapters, parity
from tests.support.cluster import Cluster
from tests.support.recipe import ROOT, command, curve, save_model, start_in_cluster, text_rows, write_jsonl
from tests.training.test_parity import relative

LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-5
FACTOR_TOLERANCE = 1e-4
"""Absolute. AdamW moves a factor by up to 5 x 2e-2, and divides by the gradient's own size: see adapters.ADAM_EPS."""


def check_case(
    cluster: Cluster, source: Path, out: Path, config: dict[str, Any], which: str, accumulation: int = 1,
    run: Callable[..., Any] = adapters.train_case, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train on the ranks and in one process, compare, and return what rank 0 saw."""
    results = cluster.run(run, str(source), str(out), config, which, accumulation, **options)
    batches = [result["batches"] for result in results]
    assert len(batches) == 1 or batches[0] != batches[1], "the ranks must train on different data"
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    expected = adapters.reference(source, model_type, which, batches, accumulation, out / "reference")
    ours = results[0]
    assert relative(ours["loss"], expected["loss"]) < LOSS_TOLERANCE
    assert relative(ours["grad_norm"], expected["grad_norm"]) < NORM_TOLERANCE
    assert min(expected["grad_norm"]) > adapters.CLIP, "clipping must be active"
    if expected["aux_loss"][0] is not None:
        assert relative(ours["aux_loss"], expected["aux_loss"]) < LOSS_TOLERANCE
    mine, theirs = adapters.file_of(ours["folder"]), adapters.file_of(expected["folder"])
    assert set(mine) == set(theirs), "the two files hold different tensors"
    worst = max((float((mine[name] - theirs[name]).abs().max()), name) for name in theirs)
    assert worst[0] < FACTOR_TOLERANCE, worst
    ours["found"] = worst
    assert all(theirs[name].abs().max() > 1e-2 for name in theirs), "an untrained factor proves nothing"
    proof = ours["proof"]
    assert proof.max_logit_difference < 1e-5
    assert proof.median_without_adapter > 0.1, "the adapter must matter"
    return ours


# (family, which adapters, ZeRO stage, ranks, EP, accumulation). EP None: nothing spreads the experts.
CASES = [
    ("mixtral", "both", 1, 2, 2, 1),
    ("mixtral", "both", 3, 2, 2, 1),
    ("qwen2_moe", "shared", 2, 2, 2, 1),
    ("mixtral", "attention", 1, 2, 2, 1),
    ("mixtral", "both", 1, 2, None, 1),
    ("mixtral", "both", 2, 2, 2, 1),
    ("mixtral", "both", 1, 4, 2, 2),
    ("mixtral", "both", 3, 4, 2, 2),
    ("mixtral", "both", 2, 4, 4, 1),
    ("mixtral", "both", 1, 2, 1, 2),
    ("mixtral", "both", 2, 2, None, 2),
    ("mixtral", "attention", 2, 2, 2, 1),
    ("mixtral", "attention", 3, 2, 2, 1),
    ("mixtral", "attention", 3, 2, None, 1),
    ("mixtral", "experts", 1, 2, 2, 1),
    ("mixtral", "gate_up", 2, 2, 2, 1),
    ("mixtral", "down", 3, 2, 2, 1),
    ("mixtral", "down", 1, 2, None, 1),
    ("qwen2_moe", "both", 1, 2, 2, 1),
    ("qwen2_moe", "shared", 3, 2, 2, 1),
    ("qwen2_moe", "shared", 1, 2, None, 1),
    ("qwen3_moe", "both", 2, 2, 2, 1),
    ("qwen3_moe", "both", 1, 4, 4, 1),
    ("olmoe", "both", 1, 4, 4, 1),
    ("olmoe", "both", 3, 2, 2, 1),
    ("deepseek_v2", "both", 1, 2, 2, 1),
    ("deepseek_v2", "both", 3, 2, 2, 1),
    ("deepseek_v3", "both", 1, 2, 2, 1),
    ("deepseek_v3", "both", 3, 4, 2, 1),
]


@pytest.mark.parametrize(
    ("model_type", "which", "stage", "world", "ep", "accumulation"), parity.daily(CASES, chosen={0, 1, 2, 3})
)
def test_adapters_equal_peft(
    model_type: str, which: str, stage: int, world: int, ep: int | None, accumulation: int,
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    config = parity.ds_config(stage, ep)
    check_case(clusters(world), tiny_checkpoints(model_type), tmp_path, config, which, accumulation)


FAULTS = ("factors in no optimizer", "scaling forgotten", "not averaged over replicas", "experts' adapters not applied")


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`adapters.train_case` on a rank where one thing is wrong."""
    from deepspeed.module_inject import auto_ep_layer

    from moe_models.engine import lora
    from moe_models.engine.lora_experts import AdaptedExperts

    add, delta = AdaptedExperts.add, AdaptedExperts._delta

    def unscaled(self: Any, name: str, A: Any, B: Any, scaling: float, key: str, **options: Any) -> None:
        add(self, name, A, B, 1.0, key, **options)

    def as_if_shared(self: Any, *a: Any, **k: Any) -> None:
        add(self, *a, **k)
        for name in self.scaling:
            for factor in self.factors(name):
                factor.requires_grad_(True)
                factor.register_hook(lambda gradient: gradient * 2)

    def nothing(self: Any, name: str, x: Any, product: Any) -> Any:
        return delta(self, name, x, product) * 0

    class NoSources(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: int, value: Any) -> None: ...

    @functools.wraps(auto_ep_layer.collect_replacement_sources)  # or the seams would see it
    def forgetful(*a: Any, **k: Any) -> Any:
        collected = collect(*a, **k)
        collected.sources = NoSources(collected.sources)
        return collected

    collect = auto_ep_layer.collect_replacement_sources
    owner, name, wrong = {
        FAULTS[0]: (auto_ep_layer, "collect_replacement_sources", forgetful),
        FAULTS[1]: (AdaptedExperts, "add", unscaled),
        FAULTS[2]: (AdaptedExperts, "add", as_if_shared),
        FAULTS[3]: (AdaptedExperts, "_delta", nothing),
    }[fault]
    assert lora
    with parity.planted(owner, name, wrong):
        return adapters.train_case(*args, **kwargs)


@pytest.mark.parametrize("fault", parity.daily([(fault,) for fault in FAULTS], chosen={0}))
def test_planted_faults_are_seen(
    fault: str, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bounds above are worth something: each of these faults breaks them."""
    source, config = tiny_checkpoints("mixtral"), parity.ds_config(1, 2)
    with pytest.raises(
        AssertionError, match=r"assert .* < |differs from the trained one|requires_grad|no gradient|proves"
    ):
        check_case(
            clusters(2), source, tmp_path, config, "both", run=functools.partial(train_with_fault, fault), timeout=60
        )


# ----------------------------------------------------------------------------------------------------- beside features


@pytest.mark.conformance
@pytest.mark.parametrize("feature", ["offload", "recomputation", "bf16", "balance"])
def test_beside_other_features(
    feature: str, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The optimizer on the host and activation recomputation change nothing; in bf16 and with ``moe.balance`` (whose
    loss single-process PEFT does not have) the proof of the folder must hold."""
    config, options = parity.ds_config(2, 2), {}
    if feature == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    elif feature == "recomputation":
        options = {"gradient_checkpointing": True}
    elif feature == "bf16":
        config["bf16"] = {"enabled": "auto"}
        options = {"bf16": True, "use_cpu": True}
    else:
        options = {"balance": {"scope": "sequence"}}
    source = tiny_checkpoints("mixtral")
    if feature in ("offload", "recomputation"):
        check_case(clusters(2), source, tmp_path, config, "both", **options)
        return
    result = clusters(2).run(adapters.train_case, str(source), str(tmp_path), config, "both", **options)[0]
    assert result["proof"].median_without_adapter > 0.1
    assert result["proof"].same_top1 > 0.8


# ----------------------------------------------------------------------------------------------------- the whole recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of an epoch on two ranks, so that six steps cross into the second."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(16))


def flags(model: Path, data: Path, preset: str, out: Path, world: int = 2, **more: Any) -> list[str]:
    return command(
        model, data, ROOT / "ds_configs" / f"{preset}.json", out,
        **{
            "per_device_train_batch_size": 4 // world, "learning_rate": 2e-2, "lr_scheduler_type": "cosine",
            "max_steps": 6, "save_steps": 3, "logging_steps": 1, "report_to": "none", "use_peft": True, "lora_r": 4,
            "gradient_checkpointing": not preset.startswith("zero3"), **more,
        },
    )  # fmt: skip


LOGGED = ("loss", "aux_loss", "grad_norm", "learning_rate", "epoch")


def train_and_look(arguments: list[str]) -> dict[str, Any]:
    """On a rank: train as the recipe does, and say what was on disk when PEFT had wrapped the model, and was read."""
    from moe_models import trainer as trainer_module
    from moe_models.checkpoint.on_disk import TALLY
    from moe_models.checkpoint.reading import unread_tensors

    trainer, _, _, script = start_in_cluster(arguments)
    unread = {name: tensor.stored_bytes for name, tensor in unread_tensors(trainer.model).items()}
    before, told = TALLY.bytes, []
    with parity.planted(trainer_module, "report_reading", lambda: told.append(TALLY.bytes)):
        trainer.train(resume_from_checkpoint=script["resume_value"](trainer.args.resume_from_checkpoint))
    trainer.save_model()
    merged = trainer.save_merged()
    return {
        "history": trainer.state.log_history, "unread": unread, "read": told[0] - before, "proof": trainer.last_proof,
        "folder": str(Path(trainer.args.output_dir) / "adapter"), "merged": merged,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "world"), parity.daily([("zero1_ep2", 2), ("zero2_ep2", 4), ("zero3_ep2", 2)], chosen={0})
)
def test_resumed_equals_uninterrupted(
    preset: str, world: int, clusters: Callable[[int], Cluster], model: Path, data: Path, tmp_path: Path
) -> None:
    """Bit for bit; from a checkpoint that holds no frozen weight and that PEFT can read; experts are read by rank.

    The check of the conversion reads each block once more, so the run that does not stop goes without it."""
    cluster = clusters(world)
    unasked = flags(model, data, preset, tmp_path / "straight", world, check_conversion="none")
    straight = cluster.run(train_and_look, unasked)[0]

    # 1. When PEFT wrapped the model, all experts were on disk; then each rank read its half of them.
    experts = sum(straight["unread"].values())
    assert len(straight["unread"]) == 2 * 2
    assert all(".experts." in name for name in straight["unread"])
    assert straight["read"] == experts // 2

    # 2. The checkpoint.
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    found = {path.name: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "trainer_state.json"} <= set(found)
    assert not [name for name in found if "_expert_" in name]
    trained = found["adapter_model.safetensors"]
    states = sum(size for name, size in found.items() if name.endswith(".pt"))
    assert states < 6 * trained, "weights of rank 0, master weights and two moments of all"

    # 3. Going on from it.
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-3")
    again = flags(model, data, preset, tmp_path / "resumed", world, resume_from_checkpoint="true")
    resumed = cluster.run(train_and_look, again)[0]
    assert curve(resumed, *LOGGED) == curve(straight, *LOGGED)
    mine, theirs = adapters.file_of(resumed["folder"]), adapters.file_of(straight["folder"])
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    last = adapters.file_of(tmp_path / "straight" / "checkpoint-6")
    assert all(torch.equal(last[name], theirs[name]) for name in theirs)

    # 4. The merged model has a proof of its own.
    assert straight["merged"].max_logit_difference < 1e-5
