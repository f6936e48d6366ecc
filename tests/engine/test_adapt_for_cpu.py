"""A ds_config for processes without a GPU: what changes, line by line, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.engine.cpu import adapt_for_cpu
from moe_models.errors import UserError


def test_adapt_changes_only_what_is_needed() -> None:
    plain = {"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {}}
    adapted, lines = adapt_for_cpu(plain)
    assert (adapted, lines) == (plain, [])
    assert adapted["zero_optimization"] is not plain["zero_optimization"]


def test_adapt_says_each_change() -> None:
    config = {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
        "fp16": {"enabled": "auto"},
        "torch_autocast": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16", "param_dtype": "fp32"},
        "communication_data_type": "bf16",
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
        "expert_parallel": {
            "comm_backend": "deepep",
            "row_weighting_impl": "fused",
            "combine_impl": "fused_weighted_sum",
            "async_split_plan": True,
        },
        "compile": {"deepcompile": True},
    }
    before = json.dumps(config)
    adapted, lines = adapt_for_cpu(config)
    assert json.dumps(config) == before
    assert [line.split(" (")[0] for line in lines] == [
        "cpu: bf16.enabled true -> false",
        "cpu: bf16.bf16_master_weights_and_grads true -> false",
        'cpu: fp16.enabled "auto" -> false',
        "cpu: torch_autocast.enabled true -> false",
        'cpu: data_types.grad_accum_dtype "bf16" -> "fp32"',
        'cpu: communication_data_type "bf16" -> "fp32"',
        "cpu: optimizer.params.torch_adam absent -> true",
        'cpu: expert_parallel.comm_backend "deepep" -> "comm"',
        'cpu: expert_parallel.row_weighting_impl "fused" -> "auto"',
        'cpu: expert_parallel.combine_impl "fused_weighted_sum" -> "auto"',
        "cpu: expert_parallel.async_split_plan true -> false",
        "cpu: compile.deepcompile true -> false",
    ]
    assert all(line.endswith(")") for line in lines)
    assert adapted["expert_parallel"] == {"comm_backend": "comm", "async_split_plan": False}
    assert adapt_for_cpu(adapted) == (adapted, [])


def test_autoep_s_own_auto_does_not_reach_accelerate(tmp_path: Path) -> None:
    """accelerate fails on an "auto" that nobody fills; every field of AutoEP that takes it has it as its default."""
    takes = {name: f.default for name, f in ExpertParallel.model_fields.items() if "auto" in str(f.annotation)}
    assert set(takes.values()) == {"auto"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": 2, **takes}}))
    assert load_ds_config(path).deepspeed["expert_parallel"] == {"enabled": True, "autoep_size": 2}


def test_adapt_refuses_an_optimizer_without_cpu_version() -> None:
    with pytest.raises(UserError, match=r'optimizer\.type = "Lamb": .* nothing for CPU processes; use AdamW'):
        adapt_for_cpu({"optimizer": {"type": "Lamb"}})
