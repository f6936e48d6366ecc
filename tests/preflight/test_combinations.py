"""Which sections of a ds_config go together: every pair that does not, with its mend."""

from __future__ import annotations

from typing import Any

import pytest

from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.run import check_run
from tests.preflight import test_preflight
from tests.preflight.test_preflight import DEEPSEEK, MIXTRAL, TP, one
from tests.support.tiny import TINY

ds = test_preflight.ds


@pytest.mark.parametrize(
    ("ep", "zero", "other", "words"),
    [
        ({}, {}, {"optimizer": None}, "expert_parallel without an optimizer section: "),
        (
            {},
            {"reduce_scatter": False},
            {},
            "zero_optimization.reduce_scatter = false: must be true with expert_parallel",
        ),
        (
            {},
            {"stage": 2, "contiguous_gradients": False},
            {},
            "zero_optimization.contiguous_gradients = false: must be",
        ),
        (
            {},
            {"stage": 3},
            {"sequence_parallel_size": 2},
            "sequence_parallel_size = 2: not supported with expert_parallel",
        ),
        (
            {},
            {"stage": 3, "zero_quantized_gradients": True},
            {},
            "zero_optimization.zero_quantized_gradients = true: not",
        ),
        (
            {},
            {"stage": 3, "zero_hpz_partition_size": 2},
            {},
            "zero_optimization.zero_hpz_partition_size = 2: hpZeRO is",
        ),
        (
            {},
            {},
            {"use_data_before_expert_parallelism": True},
            "use_data_before_expert_parallelism = true: spreads each",
        ),
        (
            {"autoep_size": 1},
            {},
            {"tensor_parallel": TP},
            "tensor_parallel.autotp_size = 2 and expert_parallel.autoep_size = 1: DeepSpeed would count token",
        ),
        (
            {"async_split_plan": True},
            {},
            {"tensor_parallel": TP},
            "tensor_parallel.autotp_size = 2 and expert_parallel.async_split_plan = true: not supported together;",
        ),
        (
            {"combine_impl": "fused_weighted_sum"},
            {},
            {"tensor_parallel": TP},
            'tensor_parallel.autotp_size = 2 and expert_parallel.combine_impl = "fused_weighted_sum": not supported',
        ),
        (
            {"comm_backend": "deepep", "comm_max_tokens_per_rank": 4096},
            {},
            {"tensor_parallel": TP},
            'tensor_parallel.autotp_size = 2 and expert_parallel.comm_backend = "deepep": not supported together;',
        ),
        (
            {},
            {},
            {"tensor_parallel": TP, "compile": {"deepcompile": True}},
            "tensor_parallel.autotp_size = 2 and expert_parallel with compile.deepcompile = true: not supported",
        ),
        (
            {},
            {"offload_optimizer": {"device": "cpu"}},
            {"tensor_parallel": TP},
            "tensor_parallel.autotp_size = 2 and expert_parallel with zero_optimization.offload_optimizer: not",
        ),
        (
            {},
            {},
            {"tensor_parallel": TP, "sequence_parallel_size": 2},
            "tensor_parallel.autotp_size = 2 and sequence_parallel_size = 2: DeepSpeed takes tensor or sequence",
        ),
        (
            None,
            {"stage": 3},
            {"sequence_parallel_size": 2},
            "sequence_parallel_size = 2 without expert_parallel: not tested here",
        ),
        (
            {},
            {},
            {"sequence_parallel_size": 2, "data_parallel_size": 1},
            "data_parallel_size with sequence_parallel_size = 2: it follows from the number of ranks",
        ),
        (
            {},
            {},
            {"sequence_parallel_size": 2, "train_batch_size": 8},
            "train_batch_size = 8 with sequence_parallel_size = 2: transformers compares it with a number",
        ),
        (
            {},
            {},
            {"sequence_parallel_size": 2, "compile": {"autoep_non_moe": True}},
            "compile.autoep_non_moe = true with sequence parallelism: refused by DeepSpeed",
        ),
        (
            {},
            {"stage": 3, "offload_param": {"device": "cpu"}},
            {"compile": {"autoep_non_moe": True}},
            "compile.autoep_non_moe = true with ZeRO stage 3, offload: refused by DeepSpeed; remove",
        ),
        (None, {"legacy_stage1": True}, {}, "zero_optimization.legacy_stage1 = true: DeepSpeed no longer has it"),
        (
            None,
            {"stage": 3, "elastic_checkpoint": True},
            {},
            "zero_optimization.elastic_checkpoint = true: not supported",
        ),
        (
            None,
            {"stage": 3},
            {"prescale_gradients": True},
            "prescale_gradients = true: must be false with ZeRO stage 3",
        ),
        (
            None,
            {"stage": 3},
            {"gradient_predivide_factor": 2.0},
            "gradient_predivide_factor = 2.0: must be 1.0 with ZeRO",
        ),
        (
            None,
            {"stage": 3},
            {"gradient_allreduce_op": "sum"},
            'gradient_allreduce_op = "sum": not supported with ZeRO',
        ),
        (
            None,
            {},
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            "train_batch_size = 8: must be micro batch 2 x accumulation 2 x 4 data-parallel ranks = 16; write",
        ),
    ],
)
def test_combinations(ds: Any, ep: Any, zero: dict[str, Any], other: dict[str, Any], words: str) -> None:
    assert one(check_run(ds(ep, zero, **other), MIXTRAL, 4)).startswith(words)


@pytest.mark.parametrize(
    ("config", "ep", "balance", "words"),
    [
        (DEEPSEEK, None, {"scope": "sequence"}, 'moe.balance.scope = "sequence": does nothing'),
        (DEEPSEEK, None, {"scope": "sequence", "aux_loss_coef": 0.1, "bias_update_rate": 0.001}, None),
        (MIXTRAL, None, {"per_layer": True, "aux_loss_coef": 0}, "moe.balance.per_layer = true: does nothing"),
        (MIXTRAL, None, {"per_layer": True, "scope": "global_batch"}, None),
        (MIXTRAL, None, {"bias_update_rate": 0.01}, "has no selection bias without expert_parallel"),
        (MIXTRAL, {}, {"bias_update_rate": 0.01}, None),
    ],
)
def test_balance(ds: Any, config: dict[str, Any], ep: Any, balance: dict[str, Any], words: str | None) -> None:
    problems = check_run(ds(ep, moe={"balance": balance}), {**config, "n_routed_experts": 8}, 2)
    assert problems == [] if words is None else words in one(problems)


def test_bias_that_export_cannot_hold_is_said_before_training(ds: Any) -> None:
    line = one(warnings_for_run(ds({}, moe={"balance": {"bias_update_rate": 0.01}}), MIXTRAL, 2))
    assert "mixtral has no place for the bias" in line
    assert warnings_for_run(ds({}, moe={"balance": {"bias_update_rate": 0.01}}), DEEPSEEK, 2) == []


@pytest.mark.parametrize(
    ("model_type", "tensor", "other", "words"),
    [
        ("mixtral", TP, {}, None),
        ("qwen3_moe", TP, {}, None),
        ("qwen2_moe", TP, {}, None),
        ("olmoe", TP, {}, "autotp_size = 2 with model_type = olmoe: it normalises queries and keys over all heads"),
        ("deepseek_v2", TP, {}, "its latent attention shares one rotary key"),
        ("deepseek_v3", TP, {}, "its latent attention shares one rotary key"),
        ("mixtral", {**TP, "autotp_size": 4}, {}, "autotp_size = 4 does not divide the model's 2 key-value heads; use"),
        ("mixtral", {"autotp_size": 2}, {}, "autotp_size = 2 needs partition_config.layer_specs and no preset_model"),
        ("mixtral", {**TP, "preset_model": "mixtral"}, {}, "needs partition_config.layer_specs and no preset_model"),
        ("mixtral", TP, {"zero_optimization": {"stage": 3}}, "with ZeRO stage 3: transformers cannot load MoE weights"),
        ("mixtral", TP, {"moe": {"balance": {}}}, "autotp_size = 2 with moe.balance: not tested together; remove one"),
        ("mixtral", TP, {"expert_parallel": None}, "autotp_size = 2 without expert_parallel: not tested here; add"),
        ("mixtral", [".*lm_head.*"], {}, "layer_specs split lm_head.weight, but each rank needs the whole"),
        ("mixtral", [".*nothing"], {}, "layer_specs split no attention, so that tensor parallelism would do nothing"),
        ("mixtral", [r".*q_proj\.weight"], {}, "must make q_proj column, k_proj column, v_proj column, o_proj row;"),
        ("qwen3_moe", [r".*\.mlp\.up_proj\.weight"], {}, "must make gate_proj column, up_proj column, down_proj row;"),
        ("qwen3_moe", [".*nothing"], {}, 'must have "grad_allreduce": true for q_norm and k_norm, which see one'),
    ],
)
def test_tensor_parallel(ds: Any, model_type: str, tensor: Any, other: dict[str, Any], words: str | None) -> None:
    if isinstance(tensor, list):
        specs = [{"patterns": tensor, "partition_type": "column"}]
        tensor = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    zero = other.pop("zero_optimization", {})
    ep = other.pop("expert_parallel", {})
    problems = check_run(
        ds(ep, zero, tensor_parallel=tensor, **other), {"model_type": model_type, **TINY[model_type]}, 4
    )
    if words is None:
        assert problems == []
    else:
        assert any(words in line for line in problems), problems


@pytest.mark.parametrize(
    ("model_type", "changes", "sp", "words"),
    [
        ("mixtral", {}, 8, " does not divide the model's 4 attention heads; use one of [1, 2, 4]"),
        ("mixtral", {"num_key_value_heads": 1}, 4, None),  # one head of keys, repeated
        (
            "qwen3_moe",
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            ": 4 key-value heads can be neither dealt out nor repeated evenly; use one of [1, 2, 4, 12]",
        ),
        ("mixtral", {"sliding_window": 32}, 2, " with sliding_window = 32 in config.json: Ulysses drops the mask"),
        ("qwen2_moe", {"sliding_window": 32, "use_sliding_window": False}, 2, None),
        ("deepseek_v3", {}, 2, " with model_type = deepseek_v3: Ulysses exchanges heads of one width"),
        ("deepseek_v2", {}, 2, " with model_type = deepseek_v2: Ulysses exchanges heads of one width"),
    ],
)
def test_sequence_parallel(ds: Any, model_type: str, changes: dict[str, Any], sp: int, words: str | None) -> None:
    problems = check_run(
        ds({}, sequence_parallel_size=sp), {"model_type": model_type, **TINY[model_type], **changes}, 24
    )
    assert problems == [] if words is None else one(problems).startswith(f"sequence_parallel_size = {sp}{words}")


def test_presets_of_the_two_kinds_of_parallelism_must_agree(ds: Any) -> None:
    problems = check_run(ds({"preset_model": "mixtral"}, tensor_parallel={**TP, "preset_model": "llama"}), MIXTRAL, 4)
    words = 'tensor_parallel.preset_model = "llama" and expert_parallel.preset_model = "mixtral" must be the same'
    assert any(line.startswith(words) for line in problems)


def test_batch_size_counts_tensor_parallel_peers_once(ds: Any) -> None:
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert check_run(ds({}, tensor_parallel=TP, **batch), MIXTRAL, 4) == []


@pytest.mark.parametrize(
    ("optimizer", "zero", "other", "words"),
    [
        ("Muon", {"stage": 1}, {}, 'optimizer.type = "Muon" with gradient_clipping = 1.0: at ZeRO stage 1 to 3 Deep'),
        ("muon", {"stage": 2}, {"gradient_clipping": 0.5}, 'optimizer.type = "Muon" with gradient_clipping = 0.5: at'),
        (
            "muon",
            {"stage": 3},
            {"gradient_clipping": 0},
            'optimizer.type = "muon" with zero_optimization.stage = 3: DeepSpeed needs zero_',
        ),
        (
            "Muon",
            {"stage": 1},
            {"gradient_clipping": 0, "tensor_parallel": {"autotp_size": 2}},
            'optimizer.type = "Muon" with tensor_parallel',
        ),
        ("MuAdamW", {"stage": 1}, {}, 'optimizer.type = "MuAdamW": needs the base shapes of the package mup'),
    ],
)
def test_optimizers_that_deepspeed_runs_as_something_else(
    ds: Any, optimizer: str, zero: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    config = ds(None, zero, optimizer={"type": optimizer, "params": {"lr": 1e-3}}, **other)
    lines = [line for line in check_run(config, MIXTRAL, 2) if line.startswith("optimizer.type")]
    assert one(lines).startswith(words)


def test_muon_where_deepspeed_runs_muon(ds: Any) -> None:
    muon = {"type": "Muon", "params": {"lr": 1e-3}}
    for zero in ({"stage": 1}, {"stage": 2}, {"stage": 3, "reduce_scatter": False}):
        for clip in (0, "auto"):
            assert check_run(ds(None, zero, optimizer=muon, gradient_clipping=clip), MIXTRAL, 2) == []
    assert check_run(ds(None, {"stage": 0}, optimizer=muon), MIXTRAL, 2) == []


def test_the_flag_that_clips_muon(ds: Any) -> None:
    """``"auto"`` takes --max_grad_norm, which is 1.0 by default."""
    from types import SimpleNamespace

    from moe_models.preflight.flags import muon_flag_problems

    muon = {"type": "Muon", "params": {"lr": 1e-3}}
    config = ds({}, {"stage": 1}, optimizer=muon, gradient_clipping="auto")
    line = one(list(muon_flag_problems(SimpleNamespace(max_grad_norm=1.0), config)))
    assert line.startswith('optimizer.type = "Muon" with --max_grad_norm 1: at ZeRO stage 1 to 3 DeepSpeed clips the ')
    assert not list(muon_flag_problems(SimpleNamespace(max_grad_norm=0.0), config))
    assert not list(muon_flag_problems(SimpleNamespace(max_grad_norm=1.0), ds({}, gradient_clipping="auto")))
