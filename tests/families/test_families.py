"""The family table against transformers: what ``save_pretrained`` writes and what the built model contains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_models.checkpoint.export import hub_plan
from moe_models.families.table import FAMILIES, is_moe_layer, moe_blocks
from tests.support.tiny import SELECTION_BIASES, TINY, make_model, save_tiny

# Beyond the tiny configs: where dense and MoE layers are mixed, every rule that the families have for it.
MIXES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in sorted(TINY)),
    *((model_type, {"tie_word_embeddings": True}) for model_type in sorted(TINY)),
    ("qwen2_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2}),
    ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]}),
    ("qwen3_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 3, "mlp_only_layers": [2]}),
    ("qwen3_moe", {"num_hidden_layers": 2, "mlp_only_layers": []}),
    ("deepseek_v2", {"num_hidden_layers": 4, "first_k_dense_replace": 3, "q_lora_rank": 24}),
    ("deepseek_v3", {"num_hidden_layers": 4, "first_k_dense_replace": 2, "q_lora_rank": None}),
    ("deepseek_v3", {"num_hidden_layers": 2, "first_k_dense_replace": 0}),
    ("qwen3_next", {"num_hidden_layers": 5, "layer_types": None, "mlp_only_layers": [1]}),
    ("qwen3_5_moe_text", {"num_hidden_layers": 5, "layer_types": None}),
]
IDS = [" ".join([model_type, *(f"{k}={v}" for k, v in mix.items())]) for model_type, mix in MIXES]


def written(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_every_family_is_covered() -> None:
    assert {*TINY, "prmoe"} == set(FAMILIES), "prmoe has a page of its own, tests/test_prmoe.py"


@pytest.mark.parametrize(("model_type", "mix"), MIXES, ids=IDS)
def test_plan_is_what_save_pretrained_writes(model_type: str, mix: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    save_tiny(tmp_path, model_type, **mix)
    plan = hub_plan(FAMILIES[model_type], AutoConfig.from_pretrained(tmp_path))
    names = [name for entry in plan for name in entry.hub]
    assert len(names) == len(set(names)), "a hub tensor is planned twice"
    planned = {name: shape for entry in plan for name, shape in entry.hub.items()}
    assert planned == written(tmp_path)


@pytest.mark.parametrize(("model_type", "mix"), MIXES, ids=IDS)
def test_moe_blocks_are_those_of_the_built_model(model_type: str, mix: dict[str, Any], tmp_path: Path) -> None:
    import json

    model = make_model(model_type, **mix)
    built = [name.removesuffix(".experts") for name, _ in model.named_modules() if name.endswith(".experts")]
    assert built, "a family without a block proves nothing"
    family = FAMILIES[model_type]
    model.config.save_pretrained(tmp_path)  # transformers may write other keys than the class has
    as_written = json.loads((tmp_path / "config.json").read_text())
    for config in (model.config.to_dict(), as_written):
        assert list(moe_blocks(family, config)) == built
        assert family.num_experts(config) == model.get_submodule(built[0]).experts.gate_up_proj.shape[0]
        layers = range(config["num_hidden_layers"])
        assert [i for i in layers if is_moe_layer(family, config, i)] == [int(name.split(".")[2]) for name in built]


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_expert_values_go_where_the_table_says(model_type: str, tmp_path: Path) -> None:
    """Names and shapes alone would not see gate and up exchanged: both are [F, D]."""
    import torch
    from safetensors.torch import load_file

    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    hub, family = load_file(tmp_path / "model.safetensors"), FAMILIES[model_type]
    for block in moe_blocks(family, model.config.to_dict()):
        experts = model.get_submodule(block).experts
        if family.hub_stacked is not None:
            assert torch.equal(hub[family.hub_all_experts(block, "gate_up")], experts.gate_up_proj)
            assert torch.equal(hub[family.hub_all_experts(block, "down")], experts.down_proj)
            continue
        gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
        stacked = dict(zip(("gate", "up", "down"), (gate_EFD, up_EFD, experts.down_proj), strict=True))
        for projection, values in stacked.items():
            for e, value in enumerate(values):
                assert torch.equal(hub[family.hub_expert(block, e, projection)], value)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_other_names_map_to_the_hub(model_type: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    hub, family = load_file(tmp_path / "model.safetensors"), FAMILIES[model_type]
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(hub[family.module_to_hub(name)], tensor), name


def test_expert_count_under_either_spelling() -> None:
    family = FAMILIES["qwen3_moe"]
    assert family.num_experts({"num_experts": 8}) == family.num_experts({"num_local_experts": 8}) == 8
    with pytest.raises(KeyError, match="num_experts"):
        family.num_experts({"hidden_size": 8})


def test_either_a_preset_of_autoep_or_a_reason() -> None:
    for family in FAMILIES.values():
        assert (family.autoep_preset is None) == (family.no_autoep is not None), family.model_type


@pytest.mark.parametrize("model_type", sorted(TINY))
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_sum_to_1_where_the_table_says(model_type: str, normalise: bool) -> None:
    """What the HF router makes of random logits; a family that scales its weights is told apart by no_native_layers."""
    import torch

    family = FAMILIES[model_type]
    if not isinstance(family.router.normalise, str) and family.router.normalise != normalise:
        return  # the class has no key for it
    changes = {"norm_topk_prob": normalise} if isinstance(family.router.normalise, str) else {}
    model = make_model(model_type, **changes)
    config = model.config.to_dict()
    _, weights_TK, _ = router_output(model_type, model)
    sums_T = weights_TK.float().sum(-1) / config.get("routed_scaling_factor", 1.0)
    one_T = torch.ones_like(sums_T)
    assert torch.allclose(sums_T, one_T, atol=1e-3) == family.router.normalises(config, config["num_experts_per_tok"])


def router_output(model_type: str, model: Any) -> tuple[Any, Any, Any]:
    """(logits [T, E], weights [T, K], choices [T, K]) of the first MoE block for eight tokens."""
    import torch

    family = FAMILIES[model_type]
    outputs: list[Any] = []
    block = model.get_submodule(next(iter(moe_blocks(family, model.config.to_dict()))))
    router = block.get_submodule(family.router_module)
    router.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(torch.arange(8)[None])
    ((first, weights_TK, last),) = outputs
    if first.is_floating_point():
        return first, weights_TK, last
    return last, weights_TK, first


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_scores_are_those_of_the_class(model_type: str) -> None:
    """The weights of a token's experts are to each other as the row's scores are."""
    import torch

    logits_TE, weights_TK, choices_TK = router_output(model_type, make_model(model_type))
    logits_TE = logits_TE.reshape(8, -1).float()
    scores_TE = logits_TE.sigmoid() if FAMILIES[model_type].router.score == "sigmoid" else logits_TE.softmax(-1)
    scores_TK = scores_TE.gather(1, choices_TK.reshape(8, -1))
    weights_TK = weights_TK.reshape(8, -1)
    assert weights_TK.shape[1] > 1
    share_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    assert torch.allclose(share_TK, scores_TK / scores_TK.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_selection_bias_and_scores_are_those_of_the_class(model_type: str) -> None:
    family, model = FAMILIES[model_type], make_model(model_type)
    names = [name for name in model.state_dict() if name.endswith(SELECTION_BIASES)]
    assert bool(names) == family.selection_bias
    assert names == [f"{block}.{family.bias}" for block in moe_blocks(family, model.config.to_dict()) if names]


def test_the_row_follows_the_names_that_a_checkpoint_has() -> None:
    family = FAMILIES["qwen3_5_moe_text"]
    stacked = ["model.language_model.embed_tokens.weight", "model.language_model.layers.0.mlp.experts.down_proj"]
    on_the_hub = family.with_columns(family.stored_as(stacked))
    assert on_the_hub.module_to_hub("model.norm.weight") == "model.language_model.norm.weight"
    assert on_the_hub.hub_all_experts("model.layers.3.mlp", "gate_up") == (
        "model.language_model.layers.3.mlp.experts.gate_up_proj"
    )
    alone = ["model.embed_tokens.weight", "model.layers.0.mlp.experts.0.down_proj.weight"]
    assert family.stored_as(alone) == {}
    each = [stacked[0], "model.language_model.layers.0.mlp.experts.7.down_proj.weight"]
    assert family.with_columns(family.stored_as(each)).hub_expert("model.layers.0.mlp", 7, "down") == each[1]
    assert family.stored_as(["something.else"]) == {}
