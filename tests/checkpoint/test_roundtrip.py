"""Hugging Face -> DeepSpeed -> Hugging Face gives back every bit, whatever the layout.

- Unchanged: an engine that took no step exports the tensors it was built from, bit by bit.
- Trained: the live export and the export of the checkpoint folder that the Trainer wrote are the same files.

The default run covers every family at every ZeRO stage, in both dtypes, and every layout; ``-m conformance`` runs the
rest of the full product.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_models.families.table import FAMILIES
from recipes.export import export_checkpoint
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.roundtrip import apart_from_measured, assert_same_tensors, files_of, load_tensors
from tests.support.tiny import TINY

Clusters = Callable[[int], Cluster]
Sources = Callable[..., Path]

FAMILY_NAMES = sorted(TINY)
LIKE_DEEPSEEK = ("dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite")
"""Families with DeepSeek-V3's block: the default run takes one layout of each."""
DTYPES = ("float32", "bfloat16")
# (world size, EP); None is the plain HF model.
LAYOUTS: list[tuple[int, int | None]] = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (2, None), (4, None)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """``sources(model_type, dtype, **overrides)``: a checkpoint to start from, made once."""

    @cache
    def get(model_type: str, dtype: str = "float32", **overrides: Any) -> Path:
        return roundtrip.save_source(tmp_path_factory.mktemp(model_type), model_type, dtype, **overrides)

    return get


# -------------------------------------------------------------------------------------------------------- no step taken


def unchanged_cases() -> list[Any]:
    cases = []
    for i, model_type in enumerate(FAMILY_NAMES):
        for stage in (1, 2, 3):
            for j, (world_size, ep_size) in enumerate(LAYOUTS):
                if ep_size is None and stage != 3:
                    continue  # the plain model under ZeRO 1 and 2 has whole tensors on every rank
                for k, dtype in enumerate(DTYPES):
                    # Engines take seconds to build, so the default run takes one layout per family and stage.
                    daily = (i + j + k + stage) % 5 == 0 if stage < 3 else (i + j + 3 * k) % 7 == 0
                    daily = daily and (i + stage + k) % 2 == 0
                    if model_type in LIKE_DEEPSEEK:
                        daily = (stage, world_size, ep_size, dtype) == (1 + i % 3, 2, 2, "bfloat16")
                    marks = [] if daily else [pytest.mark.conformance]
                    name = f"{model_type}-zero{stage}-world{world_size}-ep{ep_size or 'none'}-{dtype}"
                    cases.append(pytest.param(model_type, stage, world_size, ep_size, dtype, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("model_type", "stage", "world_size", "ep_size", "dtype"), unchanged_cases())
def test_unchanged_model_comes_back_bit_by_bit(
    model_type: str,
    stage: int,
    world_size: int,
    ep_size: int | None,
    dtype: str,
    clusters: Clusters,
    sources: Sources,
    tmp_path: Path,
) -> None:
    source, out = sources(model_type, dtype), tmp_path / "out"
    results = clusters(world_size).run(roundtrip.export_unchanged, str(source), str(out), stage, ep_size, dtype)
    assert_same_tensors(out, source)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert all(result["rotary_fp32"] for result in results)
    proof = results[0]["proof"]
    assert proof.equal_tensors == len(load_tensors(source))
    assert (proof.missing_keys, proof.unexpected_keys) == (0, 0)
    assert dtype == "bfloat16" or proof.max_logit_difference <= 1e-5


def test_routing_bias_of_the_source_tells_bf16_from_fp32(sources: Sources) -> None:
    """Guards the test above: its DeepSeek-V3 source holds a bias that bf16 would destroy, in a bf16 checkpoint."""
    import torch

    tensors = load_tensors(sources("deepseek_v3", "bfloat16"))
    biases = {name: t for name, t in tensors.items() if name.endswith("e_score_correction_bias")}
    assert biases
    for bias in biases.values():
        assert bias.dtype == torch.float32
        assert len(bias.bfloat16().unique()) == 1 < len(bias.unique())
    assert {t.dtype for name, t in tensors.items() if name not in biases} == {torch.bfloat16}


# --------------------------------------------------------------------------------------- after training, live = offline

TRAINED = [
    ("mixtral", 1, 2, 2, "float32"),
    ("mixtral", 3, 2, None, "bfloat16"),
    ("qwen2_moe", 2, 2, 1, "bfloat16"),
    ("qwen2_moe", 3, 2, 2, "float32"),
    ("qwen3_moe", 3, 4, 2, "bfloat16"),
    ("olmoe", 2, 2, 2, "float32"),
    ("deepseek_v2", 1, 4, 4, "bfloat16"),
    ("deepseek_v3", 3, 2, 2, "bfloat16"),
    ("deepseek_v3", 2, 4, 2, "float32"),
    ("glm4_moe", 1, 2, 2, "bfloat16"),
    ("glm4_moe_lite", 3, 2, 2, "float32"),
    ("dots1", 2, 4, 4, "bfloat16"),
    ("exaone_moe", 1, 2, 2, "float32"),
]


def trained_cases() -> list[Any]:
    layouts = [(m, s, w, ep, d) for m in FAMILY_NAMES for s in (1, 2, 3) for w, ep in LAYOUTS for d in DTYPES]
    return parity.daily([*TRAINED, *(case for case in layouts if case not in TRAINED)], {0, 3, 4, 5, 6, 8, 12})


def train(
    cluster: Cluster, source: Path, out: Path, stage: int, ep_size: int | None, dtype: str, *,
    zero: dict[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Train two steps; returns the proof of the live export in ``out/model``."""
    config = roundtrip.ds_config(stage, ep_size, dtype, **(zero or {}))
    options = {"bf16": dtype == "bfloat16", "use_cpu": True, **options}
    return cluster.run(roundtrip.train_and_export, str(source), str(out), config, **options)[0]


def assert_offline_equals_live(out: Path, max_shard_size: str = "5GB") -> None:
    export_checkpoint(out / "checkpoint-2", out / "offline", max_shard_size)
    live, offline = (apart_from_measured(files_of(out / name)) for name in ("model", "offline"))
    assert sorted(live) == sorted(offline)
    assert [name for name in live if live[name] != offline[name]] == []
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < set(live)


@pytest.mark.parametrize(("model_type", "stage", "world_size", "ep_size", "dtype"), trained_cases())
def test_offline_export_equals_live_export(
    model_type: str,
    stage: int,
    world_size: int,
    ep_size: int | None,
    dtype: str,
    clusters: Clusters,
    sources: Sources,
    tmp_path: Path,
) -> None:
    import torch

    source = sources(model_type, dtype)
    proof = train(clusters(world_size), source, tmp_path, stage, ep_size, dtype)
    before, after = load_tensors(source), load_tensors(tmp_path / "model")
    assert sorted(before) == sorted(after)
    assert proof.equal_tensors == len(after)
    assert dtype == "bfloat16" or proof.max_logit_difference <= 1e-5
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".experts." in name} & moved, "training must have changed experts"
    assert_offline_equals_live(tmp_path)


def test_plain_transformers_reloads_and_agrees(clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    """The proof, done once more by hand from outside: no key missing, no key left, and another token set."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = sources("qwen3_moe")
    logits = clusters(2).run(train_and_say, str(source), str(tmp_path), roundtrip.ds_config(3, 2))[0]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours = model(input_ids=torch.arange(3, 63)[None]).logits
    reference = torch.tensor(logits)
    assert reference.abs().max() > 0.1, "logits near zero prove nothing"
    assert ((ours - reference).abs().max() / reference.abs().max()).item() <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "model").vocab_size == 64


def train_and_say(source: str, out: str, config: dict[str, Any]) -> list[Any]:
    """Runs on the ranks: train, export, and return the engine's logits for tokens 3 to 62."""
    import torch

    from tests.support import parity

    trainer = parity.build_trainer(source, out, config, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return trainer.model_wrapped(input_ids=torch.arange(3, 63)[None]).logits.tolist()


# ------------------------------------------------------------------------------------------------------ special cases


@pytest.mark.parametrize("stage", [2, 3])
def test_shards(stage: int, clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    source = sources("olmoe")
    train(clusters(2), source, tmp_path, stage, 2, "float32", max_shard_bytes=40_000)
    assert_offline_equals_live(tmp_path, "40KB")
    shards = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert all((tmp_path / "model" / name).stat().st_size < 40_000 + 10_000 for name in shards)  # and the header
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    tensors = load_tensors(tmp_path / "model")
    assert sorted(index["weight_map"]) == sorted(tensors) == sorted(load_tensors(source))
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize(("stage", "ep_size"), [(1, 2), (3, 2), (3, None)])
def test_tied_embeddings(stage: int, ep_size: int | None, clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    source = sources("qwen3_moe", "float32", tie_word_embeddings=True)
    train(clusters(2), source, tmp_path, stage, ep_size, "float32")
    assert "lm_head.weight" not in load_tensors(tmp_path / "model")
    assert_offline_equals_live(tmp_path)


@pytest.mark.parametrize("frozen", ["embed_tokens", ".mlp.gate.weight"])
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.conformance), 2, 3])
def test_frozen_parameters(stage: int, frozen: str, clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    import torch

    source = sources("mixtral", "bfloat16")
    train(clusters(2), source, tmp_path, stage, 2, "bfloat16", frozen=frozen)
    before, after = load_tensors(source), load_tensors(tmp_path / "model")
    name = next(name for name in before if frozen.rpartition(".mlp")[2] in name)
    assert torch.equal(before[name], after[name])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert_offline_equals_live(tmp_path)


@pytest.mark.parametrize(("world_size", "ep_size"), parity.daily([(2, None), (4, 2)], {1}))
def test_zero3_sub_groups(
    world_size: int, ep_size: int | None, clusters: Clusters, sources: Sources, tmp_path: Path
) -> None:
    import torch

    train(clusters(world_size), sources("qwen2_moe"), tmp_path, 3, ep_size, "float32", zero={"sub_group_size": 1500})
    states = next((tmp_path / "checkpoint-2").glob("global_step*/*zero_pp_rank_0*_optim_states.pt"))
    saved = torch.load(states, weights_only=False)["optimizer_state_dict"]
    assert len(saved["fp32_flat_groups"]) > 4, "the case must have several sub-groups"
    assert_offline_equals_live(tmp_path)


@pytest.mark.parametrize("ep_size", [pytest.param(None, marks=pytest.mark.conformance), 2])
def test_zero3_padding(ep_size: int | None, clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    """The query norm has 6 values: four equal partitions of it need padding, and all that follows is shifted by it."""
    source = sources("qwen3_moe", "float32", head_dim=6)
    assert any(t.numel() % 4 for t in load_tensors(source).values())
    train(clusters(4), source, tmp_path, 3, ep_size, "float32")
    assert_offline_equals_live(tmp_path)


def test_offloaded_optimizer(clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    train(clusters(2), sources("olmoe"), tmp_path, 3, 2, "float32", zero=zero)
    assert_offline_equals_live(tmp_path)


def test_export_replaces_an_earlier_one(clusters: Clusters, sources: Sources, tmp_path: Path) -> None:
    """Of another family and with other shards: nothing of it may stay."""
    old = tmp_path / "model"
    clusters(2).run(roundtrip.export_unchanged, str(sources("qwen3_moe")), str(old), 1, 2, "float32")
    train(clusters(2), sources("mixtral"), tmp_path, 1, 2, "float32")
    assert sorted(load_tensors(old)) == sorted(load_tensors(sources("mixtral")))
    assert_offline_equals_live(tmp_path)


def test_every_family_is_tested() -> None:
    assert {case[0] for case in TRAINED} == set(FAMILIES) - {"prmoe"}, "that one is in tests/test_prmoe.py"
