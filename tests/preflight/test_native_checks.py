"""What native layers cannot do is refused from JSON, config.json and world size, in words that name the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import DsConfig, load_ds_config
from moe_models.config.moe_section import ELSEWHERE, MoeLayer
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.run import check_run
from tests.support.tiny import TINY

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    def build(zero: dict[str, Any] | None = None, optimizer: Any = ADAMW, layer: Any = None, **other: Any) -> DsConfig:
        config = {"zero_optimization": {"stage": 1, **(zero or {})}, "moe": {"layer": {"ep_size": 2, **(layer or {})}}}
        if optimizer is not None:
            config["optimizer"] = optimizer
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({**config, **other}))
        return load_ds_config(path)

    return build


@pytest.mark.parametrize(
    "config",
    [
        MIXTRAL,
        {**TINY["qwen3_moe"], "model_type": "qwen3_moe"},
        {**TINY["qwen2_moe"], "model_type": "qwen2_moe", "norm_topk_prob": True},
        {**TINY["olmoe"], "model_type": "olmoe", "num_experts_per_tok": 1},
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_good_runs(ds: Any, config: dict[str, Any], stage: int) -> None:
    good = ds({"stage": stage})
    assert (good.ep_size, "moe" in good.deepspeed) == (2, False)
    for world_size in (2, 4):
        assert check_run(good, config, world_size) == []
        assert warnings_for_run(good, config, world_size) == []
    assert good.moe.layer.departures() == []


LAYOUT: list[tuple[dict[str, Any], int, str]] = [
    (
        {},
        3,
        "moe.layer.ep_size = 2 does not divide the world size 3; use one of [1, 3], or start a multiple of 2 ranks",
    ),
    (
        {"layer": {"ep_size": 3}},
        6,
        "moe.layer.ep_size = 3 does not divide the model's 8 experts; with 6 ranks use one of [1, 2]",
    ),
    (
        {"zero": {"stage": 3}},
        2,
        "moe.layer with zero_optimization.stage = 3: DeepSpeed refuses native layers there; set stage to 1 or 2",
    ),
    (
        {"zero": {"stage": 0}},
        2,
        "moe.layer with zero_optimization.stage = 0: the gradient norm is untested there; set stage to 1 or 2",
    ),
    (
        {"zero": {"reduce_scatter": False}},
        2,
        "zero_optimization.reduce_scatter = false: must be true with moe.layer; remove the key",
    ),
    (
        {"zero": {"contiguous_gradients": False}},
        2,
        "zero_optimization.contiguous_gradients = false: must be true with moe.layer; remove the key",
    ),
    (
        {"optimizer": None},
        2,
        "moe.layer without an optimizer section: DeepSpeed has to build it, with the experts in groups of their own; "
        "copy the optimizer section of ds_configs/zero1_ep2_native.json",
    ),
    (
        {"tensor_parallel": {"autotp_size": 2}},
        2,
        "tensor_parallel.autotp_size = 2: not supported with moe.layer; set it to 1, or use expert_parallel",
    ),
    (
        {"sequence_parallel_size": 2},
        2,
        "sequence_parallel_size = 2: not supported with moe.layer; set it to 1, or use expert_parallel",
    ),
    (
        {"layer": {"k": 9}},
        2,
        "moe.layer.k = 9: must be 1 to 8 (the experts)",
    ),
    (
        {"layer": {"drop_tokens": True, "use_rts": True}},
        2,
        "moe.layer.use_rts = true does something at 1 expert per token only, and there are 2; remove the key",
    ),
    (
        {"layer": {"k": 3, "top2_2nd_expert_sampling": True}},
        2,
        "moe.layer.top2_2nd_expert_sampling = true does something at 2 experts per token only, and there are 3; remove "
        "the key",
    ),
    (
        {"layer": {"noisy_gate_policy": "RSample"}},
        2,
        'moe.layer.noisy_gate_policy = "RSample" does something at 1 expert per token only, and there are 2; remove '
        "the key",
    ),
]


@pytest.mark.parametrize(("config", "world_size", "line"), LAYOUT, ids=[line[:50] for _, _, line in LAYOUT])
def test_refused_layouts(ds: Any, config: dict[str, Any], world_size: int, line: str) -> None:
    assert check_run(ds(**config), MIXTRAL, world_size) == [line]


MODELS: list[tuple[dict[str, Any], str]] = [
    (
        {**TINY["deepseek_v3"], "model_type": "deepseek_v3"},
        'model_type = "deepseek_v3": the layer has no sigmoid scores and expert groups; use expert_parallel instead',
    ),
    (
        {**TINY["deepseek_v2"], "model_type": "deepseek_v2"},
        'model_type = "deepseek_v2": the layer has no un-normalised, scaled weights; use expert_parallel instead',
    ),
    (
        {**TINY["olmoe"], "model_type": "olmoe"},
        "norm_topk_prob = false with 2 experts per token: the layer divides their weights by their sum; use expert_par",
    ),
    (
        {**MIXTRAL, "num_experts_per_tok": 1},
        "1 expert per token with normalised weights (always 1): the layer weighs a single expert by its probability; ",
    ),
    ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: the layer's noise is another one; set it to"),
    (
        {"model_type": "llama"},
        'model_type = "llama": moe.layer knows deepseek_v2, deepseek_v3, dots1, exaone_moe, glm4_moe, ',
    ),
    ({**MIXTRAL, "num_local_experts": None}, "num_local_experts and num_experts_per_tok must be whole numbers"),
]


@pytest.mark.parametrize(("config", "words"), MODELS, ids=[words[:30] for _, words in MODELS])
def test_refused_models(ds: Any, config: dict[str, Any], words: str) -> None:
    (line,) = check_run(ds(), config, 2)
    assert words in line


def test_layer_aux_loss_without_a_coefficient(ds: Any) -> None:
    (line,) = check_run(ds(layer={"aux_loss": "layer"}), {**MIXTRAL, "router_aux_loss_coef": 0.0}, 2)
    assert line.startswith('moe.layer.aux_loss = "layer" does nothing with router_aux_loss_coef = 0')


def test_every_key_but_ep_size_is_a_departure() -> None:
    values: dict[str, Any] = {
        "k": 3,
        "drop_tokens": True,
        "noisy_gate_policy": "Jitter",
        "top2_2nd_expert_sampling": True,
        "aux_loss": "layer",
    }
    for key, value in values.items():
        (line,) = MoeLayer(**{key: value}).departures()
        assert line.startswith(f"{key} = ")
    of_drop_tokens = {"capacity_factor", "eval_capacity_factor", "min_capacity", "use_rts"}
    assert {*values, *of_drop_tokens, *ELSEWHERE, "ep_size"} == set(MoeLayer.model_fields)
    all_of_it = MoeLayer(drop_tokens=True, capacity_factor=1.5, eval_capacity_factor=2, min_capacity=7, use_rts=True)
    for shown in ("1.5", "2 in evaluation", "at least 7", "at random"):
        assert shown in all_of_it.departures()[0]


def test_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, moe_models.preflight.native; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
