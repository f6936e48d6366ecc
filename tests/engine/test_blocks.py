"""``engine/blocks.py``: the three kinds of block give back the same experts, under names that the model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.config.moe_section import MoeLayer
from moe_models.engine import blocks
from moe_models.engine.blocks import Block, find_blocks, own_bias, parameter_names
from moe_models.engine.native import register_deepspeed_moe
from moe_models.engine.plain_transformers import without_zero3
from moe_models.families.table import FAMILIES
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.tiny import make_model

Clusters = Callable[[int], Cluster]
PROJECTIONS = ("gate", "up", "down")


def plain(model_type: str = "mixtral", **changes: Any) -> Any:
    return make_model(model_type, **changes)


def native(model_type: str = "mixtral", **changes: Any) -> Any:
    return register_deepspeed_moe(make_model(model_type, **changes), MoeLayer(), FAMILIES[model_type])


MODELS = {"plain": plain, "native": native}


def experts_of(source: Any, path: str) -> dict[str, Any]:
    """Projection -> [E, F, D] or [E, D, F] of the Hugging Face model, taken apart by hand."""
    experts = source.get_submodule(path).experts
    F = experts.down_proj.shape[-1]
    return {
        "gate": experts.gate_up_proj[:, :F],
        "up": experts.gate_up_proj[:, F:],
        "down": experts.down_proj,
    }


def differences(model: Any, source: Any) -> list[str]:
    """Where the blocks of ``model`` and the experts of ``source``, the same model in Hugging Face's classes, differ."""
    found = []
    parameters = dict(model.named_parameters())
    owned = []
    for block in find_blocks(model):
        expected = experts_of(source, block.path)
        for projection in PROJECTIONS:
            mine = expected[projection][list(block.local)]
            if not torch.equal(block.experts(projection), mine):
                found.append(f"{block.path} {projection}")
        for parameter in block.parameters():
            built = parameter.build(lambda projection, expert, of=expected: of[projection][expert])
            if not torch.equal(built, parameters[parameter.name]):
                found.append(parameter.name)
            owned.append(parameter.name)
    experts = [name for name in parameters if "experts" in name and "shared" not in name]
    if sorted(owned) != sorted(experts):
        found.append(f"owned {sorted(owned)}, the model has {sorted(experts)}")
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("model_type", "changes"), [("mixtral", {}), ("qwen2_moe", {"norm_topk_prob": True})], ids=["mixtral", "qwen2_moe"]
)
def test_one_process(kind: str, model_type: str, changes: dict[str, Any]) -> None:
    model = MODELS[kind](model_type, **changes)
    source = make_model(model_type, **changes)
    found = find_blocks(model)
    assert [block.path for block in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for block in found:
        assert block.kind == kind
        assert block.num_experts == 4
        assert block.local == range(4)
        assert block.ep_size == 1
        assert block.ep_group is None
        assert torch.equal(block.router.weight, source.get_submodule(block.path).gate.weight)
    assert differences(model, source) == []


def test_a_dense_layer_is_no_block() -> None:
    """In Qwen3 layer 0 and in DeepSeek the first layer are dense, and DeepSeek's shared expert is no expert."""
    assert [block.path for block in find_blocks(plain("qwen3_moe"))] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    deepseek = plain("deepseek_v3")
    assert [block.path for block in find_blocks(deepseek)] == ["model.layers.1.mlp"]
    assert differences(deepseek, make_model("deepseek_v3")) == []


def test_names_of_a_projection() -> None:
    (first, _) = find_blocks(plain())
    assert parameter_names(first, "gate") == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert parameter_names(first, "up") == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert parameter_names(first, "down") == ["model.layers.0.mlp.experts.down_proj"]
    (first, _) = find_blocks(native())
    assert parameter_names(first, "up") == [
        f"model.layers.0.mlp.moe.deepspeed_moe.experts.deepspeed_experts.{e}.up_proj.weight" for e in range(4)
    ]


def swapped(gate_up_2FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    up_FD, gate_FD = gate_up_2FD.chunk(2, dim=-2)
    return gate_FD, up_FD


def test_a_swapped_pair_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    source = make_model("mixtral")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "split_gate_up", swapped)
        wrong = differences(model, source)
    assert wrong == [f"model.layers.{layer}.mlp {projection}" for layer in (0, 1) for projection in ("gate", "up")]
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "fuse_gate_up", lambda gate, up: torch.cat([up, gate], dim=-2))
        wrong = differences(model, source)
    assert wrong == [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)]


# -------------------------------------------------------------------------------------------------- the selection bias


def test_a_bias_that_is_part_of_the_model() -> None:
    model = plain("deepseek_v3")
    (block,) = find_blocks(model)
    before = own_bias(block)
    assert before is not None
    assert before.abs().max() > 0
    bias_E = torch.arange(8.0)
    block.set_bias(bias_E)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias is bias_E


@pytest.mark.parametrize(
    ("model_type", "place"),
    [("minimax_m2", "mlp.e_score_correction_bias"), ("lfm2_moe", "feed_forward.expert_bias")],
)
def test_a_bias_of_the_block(model_type: str, place: str) -> None:
    model = plain(model_type)
    block = find_blocks(model)[0]
    before = own_bias(block)
    assert before is not None
    assert before.abs().max() > 0
    bias_E = torch.arange(8.0)
    block.set_bias(bias_E)
    layer = block.path.split(".")[2]
    assert dict(model.named_buffers())[f"model.layers.{layer}.{place}"] is bias_E


@pytest.mark.parametrize("kind", MODELS)
def test_no_place_for_a_bias(kind: str) -> None:
    block: Block = find_blocks(MODELS[kind]())[0]
    assert own_bias(block) is None
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: its router has no place for a selection bias"):
        block.set_bias(torch.zeros(4))


# --------------------------------------------------------------------------------------- AutoEP, and more than one rank


def swapped_names() -> Any:
    return {"gate": "w3", "down": "w2", "up": "w1"}


def look(source: str, stage: int, fault: bool) -> dict[str, Any]:
    """On the ranks: what the blocks of an AutoEP engine say, compared with the model in Hugging Face's classes."""
    import deepspeed

    with without_zero3():  # which would cut this one into shares, too
        hf = make_model("mixtral")
    engine = roundtrip.make_engine(source, stage, 2, "float32")
    module = engine.module
    names = blocks.AUTOEP_EXPERT_NAMES
    with parity.planted(blocks, "AUTOEP_EXPERT_NAMES", swapped_names() if fault else names):
        found = find_blocks(module)
        everything = list(module.parameters())
        with deepspeed.zero.GatheredParameters(everything, enabled=stage == 3):
            wrong = differences(module, hf)
    first = found[0]
    said = {
        "wrong": wrong,
        "kinds": [block.kind for block in found],
        "paths": [block.path for block in found],
        "experts": (first.num_experts, list(first.local), first.ep_size),
        "group": torch.distributed.get_process_group_ranks(first.ep_group),
        "own bias": own_bias(first),
    }
    bias_E = torch.ones(4)
    first.set_bias(bias_E)
    said["bias"] = first.module.expert_bias is bias_E
    first.set_bias(None)
    said["no bias"] = first.module.expert_bias is None
    engine.destroy()
    return said


@pytest.mark.parametrize("stage", [1, 3])
def test_autoep_on_two_ranks(stage: int, clusters: Clusters, tiny_checkpoints: Callable[[str], Path]) -> None:
    said = clusters(2).run(look, str(tiny_checkpoints("mixtral")), stage, False)
    for rank, one in enumerate(said):
        assert one == {
            "wrong": [],
            "kinds": ["autoep", "autoep"],
            "paths": ["model.layers.0.mlp", "model.layers.1.mlp"],
            "experts": (4, [2 * rank, 2 * rank + 1], 2),
            "group": [0, 1],
            "own bias": None,
            "bias": True,
            "no bias": True,
        }


def test_autoep_names_swapped_are_seen(clusters: Clusters, tiny_checkpoints: Callable[[str], Path]) -> None:
    for one in clusters(2).run(look, str(tiny_checkpoints("mixtral")), 1, True):
        assert "model.layers.0.mlp gate" in one["wrong"]
        assert "model.layers.1.mlp.experts.w1" in one["wrong"]
