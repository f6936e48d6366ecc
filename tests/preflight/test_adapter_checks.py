"""What ``--use_peft`` refuses, one line each; and the table of what can be adapted agrees with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.families.adapters import adaptable_modules, attention_targets
from moe_models.families.table import FAMILIES
from moe_models.preflight.adapters import LAYOUT_FILE, adapter_problems, chosen_adapter, resume_problems
from tests.support import parity
from tests.support.tiny import TINY, make_model

MIXTRAL = {**TINY["mixtral"], "model_type": "mixtral"}
DEFAULTS: dict[str, Any] = {
    "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": None,
    "lora_target_parameters": None, "lora_modules_to_save": None, "lora_task_type": "CAUSAL_LM", "use_rslora": False,
    "use_dora": False, "export_merged": False, "adapter_layout": "fused", "adapter": None, "chat_template_path": None,
    "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None, "use_liger_kernel": False,
    "gradient_checkpointing": False, "model_name_or_path": "model", "router_aux_loss_coef": None,
}  # fmt: skip


def given(**flags: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **flags})


def loaded(folder: Path, config: dict[str, Any]) -> Any:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return load_ds_config(str(path))


@pytest.mark.parametrize("model_type", sorted(name for name in TINY if FAMILIES[name].no_adapters is None))
def test_what_can_be_adapted_are_the_linear_layers(model_type: str) -> None:
    import torch

    family, config = FAMILIES[model_type], {**TINY[model_type], "model_type": model_type}
    with torch.device("meta"):
        model = make_model(model_type)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left_out = {name for name in linear if name == "lm_head" or name.endswith(("shared_expert_gate", "mlp.gate"))}
    if not family.mlp_adapters:
        left_out |= {name for name in linear if ".mlp." in name}
    assert set(adaptable_modules(family, config)) == linear - left_out


def test_defaults_are_attention_and_both_expert_tensors() -> None:
    family = FAMILIES["deepseek_v3"]
    adapter = chosen_adapter(given(), family, TINY["deepseek_v3"])
    assert adapter.modules == ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert adapter.parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert attention_targets(FAMILIES["deepseek_v2"], TINY["deepseek_v2"])[0] == "q_proj"
    assert chosen_adapter(given(lora_target_modules="q_proj"), family, {}).parameters == []


PLAIN_3 = parity.ds_config(3, None)
# flags, ds_config, changes of config.json, words of the line
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "all-linear": ({"lora_target_modules": ["all-linear"]}, {}, {}, "adapts the experts of some families"),
    "the router": ({"lora_target_modules": ["gate"]}, {}, {}, "the router stays frozen"),
    "a typo": (
        {"lora_target_modules": ["q_proj", "qproj"]}, {}, {},
        "--lora_target_modules qproj: matches nothing in this mixtral; allowed: q_proj, k_proj, v_proj, o_proj",
    ),
    "a pattern": ({"lora_target_modules": [".*q_proj"]}, {}, {}, "matches nothing"),
    "a family without": (
        {}, {}, {"model_type": "lfm2_moe", **TINY["lfm2_moe"]},
        "--use_peft with model_type = lfm2_moe: its adapters were not compared with PEFT's own training there",
    ),
    "MLPs of a family whose names PEFT takes for the experts'": (
        {"lora_target_modules": ["gate_proj"]}, {}, {"model_type": "qwen3_moe", **TINY["qwen3_moe"]}, "matches nothing",
    ),
    "names of experts": ({"lora_target_modules": ["w1"]}, {}, {}, "matches nothing"),
    "another parameter": ({"lora_target_parameters": ["gate.weight"]}, {}, {}, "allowed: mlp.experts.gate_up_proj and"),
    "dropout with experts": ({"lora_dropout": 0.05}, {}, {}, "PEFT has no dropout for experts"),
    "dropout of 1": ({"lora_dropout": 1.0, "lora_target_modules": ["q_proj"]}, {}, {}, "less than 1"),
    "DoRA": ({"use_dora": True}, {}, {}, "--use_dora"),
    "modules to save": ({"lora_modules_to_save": ["lm_head"]}, {}, {}, "--lora_modules_to_save lm_head"),
    "another task": ({"lora_task_type": "SEQ_CLS"}, {}, {}, "must be CAUSAL_LM"),
    "alpha of 0": ({"lora_alpha": 0}, {}, {}, "--lora_alpha 0"),
    "a template with tokens": ({"chat_template_path": "some/model"}, {}, {}, "give a .jinja file"),
    "a compiler": ({"torch_compile": True}, {}, {}, "--torch_compile with --use_peft"),
    "Liger": ({"use_liger_kernel": True}, {}, {}, "--use_liger_kernel with --use_peft"),
    "a new model": ({"model_name_or_path": None}, {}, {}, "a model that exists"),
    "quantised weights": ({}, {}, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "native layers": ({}, parity.ds_config(1, None, moe={"layer": {"ep_size": 2}}), {}, "--use_peft with moe.layer"),
    "tensor parallelism": (
        {}, parity.ds_config(1, 2, tensor_parallel={"autotp_size": 2}), {}, "AutoTP would not split adapters",
    ),
    "sequence parallelism": ({}, parity.ds_config(1, 2, sequence_parallel_size=2), {}, "sequence_parallel_size = 2"),
    "plain ZeRO-3 with experts": ({}, PLAIN_3, {}, "PEFT would read weights that are not gathered"),
    "recomputation at ZeRO-3": ({"gradient_checkpointing": True}, parity.ds_config(3, 2), {}, "reentrant"),
    "a selection bias": (
        {}, parity.ds_config(1, 2, moe={"balance": {"bias_update_rate": 0.01}}), {}, "no place for a selection bias",
    ),
    "fused kernels": ({}, parity.ds_config(1, 2, moe={"kernels": "fused"}), {}, "the fused experts know no adapters"),
    "parameters on the host": (
        {}, parity.ds_config(3, 2, zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}}), {},
        "offload_param.device = cpu with --use_peft",
    ),
    "per expert, a family that PEFT drops": (
        {"adapter_layout": "per_expert"}, {}, {"model_type": "qwen2_moe", **TINY["qwen2_moe"]}, "PEFT 0.21 drops",
    ),
    "per expert, gate and up alone": (
        {"adapter_layout": "per_expert", "lora_target_parameters": ["mlp.experts.gate_up_proj"]}, {}, {},
        "without mlp.experts.down_proj",
    ),
    "per expert, attention alone": (
        {"adapter_layout": "per_expert", "lora_target_modules": ["q_proj"]}, {}, {}, "no experts are adapted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_a_weight_is_read(what: str, tmp_path: Path) -> None:
    flags, config, changes, words = REFUSED[what]
    model = {**MIXTRAL, **changes}
    lines = list(adapter_problems(given(**flags), model, loaded(tmp_path, config or parity.ds_config(1, 2))))
    assert [line for line in lines if words in line], lines
    assert len(lines) == 1, lines


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_built_is_not_refused(stage: int, tmp_path: Path) -> None:
    for model_type in TINY:
        if FAMILIES[model_type].no_adapters is not None:
            continue
        model = {**TINY[model_type], "model_type": model_type}
        assert list(adapter_problems(given(), model, loaded(tmp_path, parity.ds_config(stage, 2)))) == []
    attention = given(lora_target_modules=["q_proj"], lora_dropout=0.1)
    assert list(adapter_problems(attention, MIXTRAL, loaded(tmp_path, parity.ds_config(stage, None)))) == []


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The same adapter, in whatever layout; all else is named."""
    facts = chosen_adapter(given(), FAMILIES["mixtral"], MIXTRAL).facts()
    layout = {"world_size": 2, "zero_stage": 1, "experts": "autoep", "ep_size": 2, "adapters": facts}

    def lines(flags: dict[str, Any], saved: dict[str, Any]) -> list[str]:
        (tmp_path / LAYOUT_FILE).write_text(json.dumps(saved))
        return list(resume_problems(given(**flags), MIXTRAL, tmp_path))

    assert lines({}, layout) == []
    whole = {key: value for key, value in layout.items() if key != "adapters"}
    assert lines({"use_peft": False}, whole) == []
    (line,) = lines({"use_peft": False}, layout)
    assert "it trained an adapter; add --use_peft" in line
    (line,) = lines({}, whole)
    assert "it trained all weights, no adapter; drop --use_peft" in line
    attention = chosen_adapter(given(lora_target_modules=["q_proj"]), FAMILIES["mixtral"], MIXTRAL).facts()
    for nothing in (None, []):  # as PEFT may write it
        saved = {**layout, "adapters": {**attention, "target_parameters": nothing}}
        assert lines({"lora_target_modules": ["q_proj"]}, saved) == []
    (line,) = lines({"lora_r": 8}, layout)
    assert "it trained another adapter: r 16 there, 8 here" in line
    assert lines({}, {**layout, "world_size": 4, "zero_stage": 3, "ep_size": 4}) == []


def test_an_adapter_to_go_on_from(tmp_path: Path) -> None:
    ds = loaded(tmp_path, parity.ds_config(1, 2))
    folder = tmp_path / "adapter"
    (line,) = adapter_problems(given(adapter=str(folder)), MIXTRAL, ds)
    assert line == f"{folder}/adapter_config.json: no such file"

    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.0,
        "target_parameters": ["mlp.experts.down_proj"], "use_dora": False, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    flags = given(adapter=str(folder))
    assert list(adapter_problems(flags, MIXTRAL, ds)) == []
    assert chosen_adapter(flags, FAMILIES["mixtral"], MIXTRAL).facts()["r"] == 8

    wrong = {**config, "use_dora": True, "rank_pattern": {"q_proj": 4}, "target_modules": "q_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(wrong))
    lines = list(adapter_problems(given(adapter=str(folder), lora_r=4), MIXTRAL, ds))
    words = ("use_dora = true", "rank_pattern", "a pattern; give one with a list", "--lora_r with --adapter")
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True)), lines
