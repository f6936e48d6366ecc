"""ds_config.py and deepspeed_keys.py: the words of every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe_models.config import deepspeed_keys
from moe_models.config.ds_config import load_ds_config
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.layout import Layout
from moe_models.errors import UserError
from moe_models.files import read_json

GOOD: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}


def problems_of(tmp_path: Path, config: dict[str, Any] | str) -> list[str]:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in caught.value.problems)
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


# ---------------------------------------------------------------- read_json


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.json: no such file"):
        read_json(tmp_path / "nope.json")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file; give the path of one JSON file"):
        read_json(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        read_json(tmp_path / "x.json")


def test_malformed_json_shows_the_line(tmp_path: Path) -> None:
    text = '{\n  "bf16": {"enabled": true},\n  "zero_optimization": {"stage": 1,},\n}\n'
    (line,) = problems_of(tmp_path, text)
    assert line.startswith("not valid JSON: ")
    assert "at line 3, column" in line
    assert line.endswith(""": '"zero_optimization": {"stage": 1,},'""")


def test_empty_file(tmp_path: Path) -> None:
    (line,) = problems_of(tmp_path, "")
    assert line == "not valid JSON: Expecting value at line 1, column 1: ''"


def test_duplicate_keys(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 1, "stage": 3}, "bf16": {}, "bf16": {}}'
    assert problems_of(tmp_path, text) == [
        'key "stage" stands twice in one object; keep one',
        'key "bf16" stands twice in one object; keep one',
    ]


def test_top_level_not_an_object(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "[1, 2]") == ["the top level is [1, 2]; it must be an object {...}"]


# ------------------------------------------------------------ load_ds_config


def test_typed(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = {**GOOD, "moe": {}, "tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 4}
    path.write_text(json.dumps(config))
    ds = load_ds_config(str(path))
    assert ds.path == path
    assert ds.raw == config
    assert ds.deepspeed == {key: value for key, value in config.items() if key != "moe"}
    assert ds.expert_parallel == ExpertParallel(enabled=True, autoep_size=2)
    assert (ds.zero_stage, ds.ep_size, ds.tp_size, ds.sp_size, ds.precision) == (1, 2, 2, 4, "bf16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ds.zero_stage = 2  # type: ignore[misc]


def test_it_answers_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    config = {**GOOD, "zero_optimization": {"stage": 3, "reduce_scatter": False, **offload}, "compile": {}}
    config["tensor_parallel"] = {"autotp_size": 2}
    path.write_text(json.dumps({**config, "moe": {}}))
    ds = load_ds_config(path)
    assert ds.layout(8) == Layout(8, 2, tp_size=2)
    assert ds.spreads_experts
    assert ds.offloaded == {"optimizer"}
    assert (ds.zero("reduce_scatter", True), ds.zero("contiguous_gradients", True)) == (False, True)
    assert (ds.has_optimizer, ds.deepcompile, ds.compiles_around_experts) == (False, False, False)
    path.write_text(json.dumps({"moe": {"layer": {"ep_size": 2}}, "optimizer": {"type": "AdamW"}}))
    native = load_ds_config(path)
    assert native.layout(4) == Layout(4, 2)
    assert native.spreads_experts
    assert native.has_optimizer
    path.write_text("{}")
    plain = load_ds_config(path)
    assert not plain.spreads_experts
    assert plain.offloaded == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (0, 1, "fp32")),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, (0, 1, "fp16")),
        ({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}, (3, 1, "auto")),
        ({"expert_parallel": {"enabled": False, "autoep_size": 8}}, (0, 1, "fp32")),
    ],
)
def test_defaults(tmp_path: Path, config: dict[str, Any], expected: tuple[int, int, str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    ds = load_ds_config(path)
    assert (ds.zero_stage, ds.ep_size, ds.precision) == expected
    assert ds.expert_parallel is None


def test_all_problems_at_once(tmp_path: Path) -> None:
    lines = problems_of(
        tmp_path,
        {
            "expert_paralel": {"enabled": True},
            "expert_parallel": {"enabled": True, "autoep_sizes": 8, "score_func": "sofmax"},
            "zero_optimization": {"stage": 4, "overlapcomm": True},
            "bf16": {"enable": True},
            "train_batch_size": 0,
            "moe": {"layer": {"capacity": 1}},
        },
    )
    assert len(lines) == 8


WORDS: list[tuple[dict[str, Any], str]] = [
    ({"timers": {"throughput": 3}}, "timers.throughput = 3: must be an object"),
    ({"timers": {"throughput": {"enable": False}}}, "timers.throughput.enable"),
    ({"timers": {"thruput": {}}}, "timers.thruput"),
    ({"expert_paralel": {}}, 'expert_paralel = {}: unknown key; did you mean "expert_parallel"?'),
    ({"zzz": 1}, "zzz = 1: unknown key; remove it; allowed: activation_checkpointing, aio, "),
    ({"bfloat16": {"enabled": True}}, 'bfloat16 = {"enabled": true}: unknown key; did you mean "bf16"?'),
    ({"elasticity": {}}, "elasticity = {}: DeepSpeed no longer has this section; remove it"),
    ({"zero_optimization": True}, "zero_optimization = true: must be an object {...}; remove the key to leave"),
    ({"moe": 8}, "moe = 8: must be an object {...}"),
    ({"moe": {"layers": {}}}, 'moe.layers = {}: unknown key; did you mean "layer"?'),
    (
        {"moe": {"layer": {"capacity_facto": 2}}},
        'moe.layer.capacity_facto = 2: unknown key; did you mean "capacity_fact',
    ),
    (
        {"moe": {"layer": {"k": "auto"}}},
        'moe.layer.k = "auto": must be a whole number; remove the key for the default nul',
    ),
    ({"moe": {"layer": {"ep_size": 0}}}, "moe.layer.ep_size = 0: must be at least 1; remove the key for the default 1"),
    ({"moe": {"layer": {"capacity_factor": 0}}}, "moe.layer.capacity_factor = 0: must be more than 0"),
    (
        {"moe": {"layer": {"noisy_gate_policy": "x"}}},
        "moe.layer.noisy_gate_policy = \"x\": must be 'Jitter' or 'RSample'",
    ),
    (
        {"moe": {"layer": {"capacity_factor": 2.0}}},
        'moe.layer.capacity_factor = 2.0 does nothing without "drop_tokens": true; add that, or remove the key',
    ),
    (
        {"moe": {"layer": {}}, "expert_parallel": {"enabled": True}},
        "moe.layer and expert_parallel both replace the model's MoE blocks; remove one of the two sections",
    ),
    (
        {"moe": {"layer": {"aux_loss": "layer"}, "balance": {}}},
        'moe.layer.aux_loss = "layer" and moe.balance are two ways to balance the experts; remove one of them',
    ),
    ({"moe": {"balance": {"scop": "sequence"}}}, 'moe.balance.scop = "sequence": unknown key; did you mean "scope"?'),
    (
        {"moe": {"balance": {"scope": "global"}}},
        "moe.balance.scope = \"global\": must be 'micro_batch', 'global_batch' or 'sequence'; remove the key",
    ),
    (
        {"moe": {"balance": {"bias_update_rate": -1}}},
        "moe.balance.bias_update_rate = -1: must be at least 0",
    ),
    ({"moe": {"balance": {"z_loss_coef": "auto"}}}, 'moe.balance.z_loss_coef = "auto": must be a number'),
    ({"optimizer": {"typ": "AdamW"}}, 'optimizer.typ = "AdamW": unknown key; did you mean "type"?'),
    ({"optimizer": {"params": 3}}, "optimizer.params = 3: must be an object {...}"),
    (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm = 1.0: DeepSpeed refuses it here; write it as the top-level key",
    ),
    (
        {"data_types": {"grad_acum_dtype": "fp32"}},
        'data_types.grad_acum_dtype = "fp32": unknown key; did you mean "grad_',
    ),
    ({"train_batch_size": 1.5}, 'train_batch_size = 1.5: must be a whole number of at least 1, or "auto"'),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps = true: must be a whole number of at least 1"),
    ({"sequence_parallel_size": 0}, "sequence_parallel_size = 0: must be a whole number of at least 1; remove the key"),
    ({"gradient_clipping": "1"}, 'gradient_clipping = "1": must be a number of at least 0 (0 is off), or "auto"'),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled are both true; set one"),
    # zero_optimization, through DeepSpeed's own model
    (
        {"zero_optimization": {"stage": 4}},
        "zero_optimization.stage = 4: must be 0, 1, 2 or 3; remove the key for the default 0",
    ),
    (
        {"zero_optimization": {"overlapcomm": True}},
        'zero_optimization.overlapcomm = true: unknown key; did you mean "over',
    ),
    (
        {"zero_optimization": {"reduce_bucket_size": 0}},
        "zero_optimization.reduce_bucket_size = 0: must be more than 0; remove the key for the default 500000000",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        'zero_optimization.offload_optimizer.devise = "cpu": unknown key; did you mean "device"?',
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "gpu"}}},
        "zero_optimization.offload_param.device = \"gpu\": must be 'none', 'cpu' or 'nvme'; remove the key",
    ),
    (
        {"zero_optimization": {"mics_shard_size": 8}},
        "zero_optimization.mics_shard_size = 8: DeepSpeed no longer has it",
    ),
    (
        {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
        "zero_optimization: compute_grad_norm=false is supported only with ZeRO Stage 1 or 2",
    ),
    (
        {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization: Cannot provide deprecated parameter 'cpu_offload' and replacing parameter",
    ),
    ({"bf16": {"enable": True}}, 'bf16.enable = true: unknown key; did you mean "enabled"?'),
    ({"tensor_parallel": {"autotp": 2}}, 'tensor_parallel.autotp = 2: unknown key; did you mean "autotp_size"?'),
    # "auto"
    (
        {"optimizer": {"params": {"betas": [0.9, "auto"]}}},
        'optimizer.params.betas[1] = "auto": nobody fills it in here',
    ),
    (
        {"zero_optimization": {"stage": "auto"}},
        'zero_optimization.stage = "auto": nobody fills it in here; write a value; "auto" may stand at '
        "zero_optimization.reduce_bucket_size, zero_optimization.stage3_prefetch_bucket_size, ",
    ),
    (
        {"steps_per_print": "auto"},
        'steps_per_print = "auto": nobody fills it in here; write a value; "auto" may stand at train',
    ),
    (
        {"optimizer": {"params": {"momentum": "auto"}}},
        'optimizer.params.momentum = "auto": nobody fills it in here; write a value; "auto" may stand at opt',
    ),
    (
        {"tensor_parallel": {"autotp_size": "auto"}},
        'tensor_parallel.autotp_size = "auto": nobody fills it in here; write a value; "auto" may stand at train',
    ),
]


@pytest.mark.parametrize(("config", "words"), WORDS)
def test_words(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    lines = problems_of(tmp_path, config)
    assert len(lines) == 1
    assert lines[0].startswith(words)


EP_WORDS: list[tuple[dict[str, Any], str]] = [
    ({"autoep_sizes": 8}, 'autoep_sizes = 8: unknown key; did you mean "autoep_size"?'),
    ({"autoep_size": "8"}, 'autoep_size = "8": must be a whole number; remove the key for the default 1'),
    ({"autoep_size": "auto"}, 'autoep_size = "auto": must be a whole number'),
    ({"autoep_size": True}, "autoep_size = true: must be a whole number"),
    ({"autoep_size": 0}, "autoep_size = 0: must be at least 1"),
    ({"enabled": "yes"}, 'enabled = "yes": must be true or false'),
    (
        {"expert_tensor_parallel_size": 2},
        "expert_tensor_parallel_size = 2: must be 1; remove the key for the default 1",
    ),
    ({"preset_model": "mixtrall"}, "preset_model = \"mixtrall\": must be 'mixtral', 'qwen3_moe', 'qwen3_5_moe', "),
    ({"moe_layer_pattern": "("}, 'moe_layer_pattern = "(": must be a regular expression (missing )'),
    ({"router_pattern": "a.b"}, 'router_pattern = "a.b": must be one attribute name, without dots'),
    ({"expert_w1": ""}, 'expert_w1 = "": must be one attribute name, without dots'),
    ({"expert_w3": 3}, "expert_w3 = 3: must be a string"),
    (
        {"expert_activation": "relu"},
        "expert_activation = \"relu\": must be 'swiglu', 'geglu_tanh', 'swiglu_clamped' or ",
    ),
    ({"top_k": "all"}, "top_k = \"all\": must be a whole number or 'auto'"),
    ({"route_scale": "2"}, 'route_scale = "2": must be a number; remove the key for the default 1.0'),
    ({"score_func": "sofmax"}, "score_func = \"sofmax\": must be 'auto', 'softmax' or 'sigmoid'; remove the key for"),
    ({"num_expert_groups": 0}, "num_expert_groups = 0: must be at least 1"),
    ({"load_balance_coeff": 0.001}, "load_balance_coeff = 0.001: must be null"),
    ({"comm_num_sm": 0}, "comm_num_sm = 0: must be at least 1; remove the key for the default 12"),
    ({"gate_up_impl": "fused", "use_grouped_mm": False}, 'gate_up_impl = "fused" needs use_grouped_mm true'),
    (
        {"row_weighting_impl": "fused"},
        'row_weighting_impl = "fused" needs comm_backend "deepep" and autoep_size above 1',
    ),
    ({"comm_backend": "deepep"}, 'comm_backend = "deepep" needs comm_max_tokens_per_rank above 0'),
    (
        {
            "comm_backend": "deepep",
            "comm_max_tokens_per_rank": 1,
            "autoep_size": 2,
            "combine_impl": "fused_weighted_sum",
        },
        'combine_impl = "fused_weighted_sum" does nothing under comm_backend "deepep"',
    ),
    (
        {"combine_impl": "fused_weighted_sum", "score_apply": "pre"},
        'combine_impl = "fused_weighted_sum" needs score_apply',
    ),
    ({"num_expert_groups": 2, "num_limited_groups": 3}, "num_limited_groups = 3 is more than num_expert_groups = 2"),
]


@pytest.mark.parametrize(("keys", "words"), EP_WORDS)
def test_expert_parallel_words(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    lines = problems_of(tmp_path, {"expert_parallel": {"enabled": True, **keys}})
    assert len(lines) == 1
    assert lines[0].startswith(f"expert_parallel.{words}")


def test_forgotten_enabled(tmp_path: Path) -> None:
    lines = problems_of(tmp_path, {"expert_parallel": {"autoep_size": 8}})
    assert lines == ['expert_parallel.enabled: missing; DeepSpeed takes it as false; write "enabled": true']


def test_autos_that_hf_or_deepspeed_fill(tmp_path: Path) -> None:
    config: dict[str, Any] = {"expert_parallel": {"enabled": True, "top_k": "auto", "score_func": "auto"}}
    for place in (*deepspeed_keys.AUTO_FILLED, "data_types.keep_in_fp32_modules"):
        *path, key = place.split(".")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[key] = "auto"
    config["zero_optimization"]["stage"] = 3
    config["fp16"]["enabled"] = False
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert load_ds_config(tmp_path / "ds.json").precision == "auto"
