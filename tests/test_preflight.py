"""preflight.py and inputs.py: every refusal with its words, and that DeepSpeed's own checks refuse the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_models import advice, versions
from moe_models.config import DsConfig, load_ds_config
from moe_models.errors import UserError
from moe_models.preflight import check_dataset_path, check_output_dir, check_run, read_model_config, warnings_for_run
from tests.tiny import TINY

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 1}
TP = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero1_ep2_tp2.json").read_text())["tensor_parallel"]
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    def build(ep: dict[str, Any] | None = None, zero: dict[str, Any] | None = None, **other: Any) -> DsConfig:
        config: dict[str, Any] = {"optimizer": ADAMW, "zero_optimization": {"stage": 1, **(zero or {})}, **other}
        if ep is not None:
            config["expert_parallel"] = {"enabled": True, "autoep_size": 2, **ep}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return load_ds_config(path)

    return build


def one(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


# ---------------------------------------------------------------------- check_run


@pytest.mark.parametrize("model_type", sorted(TINY))
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_good_runs(ds: Any, model_type: str, stage: int) -> None:
    config = {"model_type": model_type, **TINY[model_type]}
    for world_size in (2, 4):
        assert check_run(ds({}, {"stage": stage}), config, world_size) == []
        assert check_run(ds(None, {"stage": stage}), config, world_size) == []


def test_ep_does_not_divide_the_experts(ds: Any) -> None:
    line = one(check_run(ds({"autoep_size": 3}), MIXTRAL, 6))
    assert line == (
        "expert_parallel.autoep_size = 3 does not divide the model's 8 experts; with 6 ranks use one of [1, 2]"
    )


def test_more_ranks_than_experts(ds: Any) -> None:
    line = one(check_run(ds({"autoep_size": 16}), MIXTRAL, 16))
    assert line.endswith("does not divide the model's 8 experts; with 16 ranks use one of [1, 2, 4, 8]")


def test_ep_does_not_divide_the_ranks(ds: Any) -> None:
    line = one(check_run(ds({"autoep_size": 4}), MIXTRAL, 6))
    assert line == (
        "expert_parallel.autoep_size = 4 does not divide the world size 6; use one of [1, 2, 3, 6], or start a "
        "multiple of 4 ranks"
    )


def test_zero_stage_0(ds: Any) -> None:
    for zero in ({"stage": 0}, {}):
        config = ds({}, zero) if zero else ds({}, zero_optimization=None)
        assert one(check_run(config, MIXTRAL, 2)).startswith("expert_parallel with zero_optimization.stage = 0: ")
    assert check_run(ds(None, {"stage": 0}), MIXTRAL, 2) == []


def test_dense_model(ds: Any) -> None:
    line = one(check_run(ds({}), {"model_type": "llama", "num_hidden_layers": 2}, 2))
    assert line.startswith(
        'expert_parallel with a dense model (model_type = "llama"): there are no experts to spread; '
    )
    assert "recipes/upcycle.py" in line
    line = one(check_run(ds(None), {"model_type": "llama"}, 2))
    assert line.startswith('model_type = "llama": known are deepseek_v2, deepseek_v3, mixtral, ')


def test_unknown_family(ds: Any) -> None:
    line = one(check_run(ds({}), {"model_type": "gpt_oss", "num_local_experts": 32}, 2))
    assert line.startswith('model_type = "gpt_oss": expert_parallel knows deepseek_v2, deepseek_v3, mixtral, olmoe, ')


def test_broken_model_config(ds: Any) -> None:
    line = one(check_run(ds({}), {"model_type": "mixtral", "num_local_experts": "many"}, 2))
    assert line == 'config.json: num_local_experts = "many": must be the number of experts, at least 1'
    config = {"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 2, "mlp_only_layers": [0, 1]}
    assert "no layer is an MoE layer" in one(check_run(ds({}), config, 2))


def test_preset_that_contradicts_the_family(ds: Any) -> None:
    line = one(check_run(ds({"preset_model": "qwen3_moe"}), MIXTRAL, 2))
    assert line == (
        'expert_parallel.preset_model = "qwen3_moe": model_type "mixtral" takes "mixtral"; remove the key, it is '
        "found from the model"
    )
    assert check_run(ds({"preset_model": "mixtral"}), MIXTRAL, 2) == []
    olmoe = {"model_type": "olmoe", **TINY["olmoe"]}
    assert 'takes "olmoe"; remove the key' in one(check_run(ds({"preset_model": "mixtral"}), olmoe, 2))


@pytest.mark.parametrize(
    ("ep", "config", "words"),
    [
        ({"top_k": 9}, MIXTRAL, "expert_parallel.top_k = 9: must be 1 to 8 (the experts), or"),
        ({"num_expert_groups": 2}, MIXTRAL, "expert_parallel.num_expert_groups needs num_limited_groups beside it"),
        ({"num_limited_groups": 2}, MIXTRAL, "expert_parallel.num_limited_groups needs num_expert_groups beside it"),
        (
            {"num_expert_groups": 3, "num_limited_groups": 1},
            MIXTRAL,
            "expert_parallel.num_expert_groups = 3 does not divide the model's 8 experts; use one of [1, 2, 4, 8]",
        ),
        (
            {"num_limited_groups": 5},
            {**DEEPSEEK, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
            "expert_parallel.num_limited_groups = 5: must be 1 to 4 (num_expert_groups)",
        ),
    ],
)
def test_routing(ds: Any, ep: dict[str, Any], config: dict[str, Any], words: str) -> None:
    assert one(check_run(ds(ep), config, 2)).startswith(words)


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


def test_client_optimizer_is_fine_at_stage_3(ds: Any) -> None:
    assert check_run(ds({}, {"stage": 3}, optimizer=None), MIXTRAL, 2) == []


def test_all_at_once(ds: Any) -> None:
    problems = check_run(ds({"autoep_size": 3, "top_k": 9}, {"stage": 0}), MIXTRAL, 4)
    assert len(problems) == 4


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "transformers is not installed: expert_parallel needs it; install 5.17.0 or 5.20.2"),
        ("4.57.1", "transformers 4.57.1: expert_parallel needs the fused experts of 5.0 and later; install 5.17.0 or"),
        ("5.23.0", "transformers 5.23.0: AutoEP of deepspeed 0.19.8 fails there (_CanRecordRegistry.get() takes 2"),
        ("6.0.0.dev0", "transformers 6.0.0.dev0: AutoEP of deepspeed 0.19.8 fails there"),
    ],
)
def test_transformers_version(ds: Any, monkeypatch: pytest.MonkeyPatch, version: str | None, words: str) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: version)
    assert one(check_run(ds({}), MIXTRAL, 2)).startswith(words)
    assert check_run(ds(None), MIXTRAL, 2) == []  # the baseline does not use AutoEP


@pytest.mark.parametrize("version", ["5.0.0", "5.17.0", "5.20.2", "5.22.1"])
def test_transformers_versions_that_are_not_refused(ds: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: version)
    assert check_run(ds({}), MIXTRAL, 2) == []


# --------------------------------------------------------- the same no as DeepSpeed's


@pytest.mark.parametrize(
    ("ep", "world_size", "tp", "other"),
    [
        ({"autoep_size": 4}, 6, 1, {}),
        ({"autoep_size": 1}, 4, 2, {}),
        ({"async_split_plan": True}, 4, 2, {}),
        ({"combine_impl": "fused_weighted_sum"}, 4, 2, {}),
        ({}, 4, 2, {"deepcompile_enabled": True}),
        ({}, 4, 2, {"zero_offload_optimizer": True}),
        ({}, 4, 2, {"use_data_before_expert_parallel": True}),
        ({"preset_model": "mixtral"}, 4, 2, {"tp_preset_model": "llama"}),
    ],
)
def test_deepspeed_refuses_it_too(ds: Any, ep: dict[str, Any], world_size: int, tp: int, other: dict[str, Any]) -> None:
    auto_ep = pytest.importorskip("deepspeed.module_inject.auto_ep_config")
    sections: dict[str, Any] = {"tensor_parallel": {"autotp_size": tp}}
    zero: dict[str, Any] = {}
    for key in other:
        if key == "deepcompile_enabled":
            sections["compile"] = {"deepcompile": True}
        elif key == "zero_offload_optimizer":
            zero["offload_optimizer"] = {"device": "cpu"}
        elif key == "use_data_before_expert_parallel":
            sections["use_data_before_expert_parallelism"] = True
        else:
            sections["tensor_parallel"]["preset_model"] = other[key]
    config = ds(ep, zero, **sections)
    assert check_run(config, MIXTRAL, world_size)
    parsed = auto_ep.parse_autoep_config(config.deepspeed["expert_parallel"])
    with pytest.raises(ValueError):
        auto_ep.validate_autoep_config(parsed, world_size, 1, tp, 1, **other)


# ----------------------------------------------------------------- warnings_for_run


def test_no_warnings(ds: Any) -> None:
    assert warnings_for_run(ds({}), MIXTRAL, 8, gpus_per_node=8) == []
    assert warnings_for_run(ds(None), MIXTRAL, 8, gpus_per_node=4) == []


def test_ep_1(ds: Any) -> None:
    line = one(warnings_for_run(ds({"autoep_size": 1}), MIXTRAL, 2))
    assert line.startswith("expert_parallel.autoep_size = 1: every rank holds all experts and no token is exchanged;")


def test_ep_across_nodes(ds: Any) -> None:
    line = one(warnings_for_run(ds({"autoep_size": 8}), MIXTRAL, 16, gpus_per_node=4))
    assert line.startswith("expert_parallel.autoep_size = 8: EP groups cross nodes of 4 GPUs, so every MoE layer's ")
    assert line.endswith("inside a node: [1, 2, 4]")
    assert warnings_for_run(ds({"autoep_size": 4}), MIXTRAL, 16, gpus_per_node=8) == []
    assert warnings_for_run(ds({"autoep_size": 8}), MIXTRAL, 16) == []


@pytest.mark.parametrize(
    ("ep", "config", "words"),
    [
        ({"top_k": 2}, MIXTRAL, None),
        ({"num_expert_groups": 2, "num_limited_groups": 1}, {"model_type": "deepseek_v3", **TINY["deepseek_v3"]}, None),
        ({"route_scale": 1.0, "score_func": "auto"}, MIXTRAL, None),
        (
            {"top_k": 1},
            MIXTRAL,
            "expert_parallel.top_k = 1: config.json has num_experts_per_tok = 2, and the exported model routes by "
            "that; change it there before training, or remove the key",
        ),
        (
            {"num_expert_groups": 2, "num_limited_groups": 2},
            {"model_type": "deepseek_v3", **TINY["deepseek_v3"]},
            "expert_parallel.num_limited_groups = 2: config.json has topk_group = 1, and the exported model routes by",
        ),
        ({"route_norm": False}, MIXTRAL, "expert_parallel.route_norm = false: the exported model would not know of it"),
        ({"route_scale": 2.0}, MIXTRAL, "expert_parallel.route_scale = 2.0: the exported model would not know of it"),
        ({"score_func": "sigmoid"}, MIXTRAL, 'expert_parallel.score_func = "sigmoid": the exported model would not'),
    ],
)
def test_routing_that_the_exported_model_would_not_do(
    ds: Any, ep: dict[str, Any], config: dict[str, Any], words: str | None
) -> None:
    problems = check_run(ds(ep), config, 2)
    assert problems == [] if words is None else one(problems).startswith(words)


def test_group_limits_of_a_model_without_groups(ds: Any) -> None:
    problems = check_run(ds({"num_expert_groups": 2, "num_limited_groups": 1}), MIXTRAL, 2)
    assert len(problems) == 2
    assert problems[0].startswith("expert_parallel.num_expert_groups = 2: config.json has no n_group, and the exported")


def test_untested_versions(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", {"deepspeed": "0.20.0", "transformers": "5.22.0"}.get)
    assert warnings_for_run(ds({}), MIXTRAL, 2) == [
        "deepspeed 0.20.0 is untested with expert_parallel; tested: 0.19.8",
        "transformers 5.22.0 is untested with expert_parallel; tested: 5.17.0, 5.20.2",
    ]


def test_no_cuda_compiler(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(advice.shutil, "which", lambda _: None)
    line = one(warnings_for_run(ds(None), MIXTRAL, 2, on_gpu=True))
    assert line.startswith(
        'optimizer.type = "AdamW": DeepSpeed compiles its fused kernel at the first start, and there is'
    )
    assert '"torch_adam": true, "fused": true' in line
    assert warnings_for_run(ds(None), MIXTRAL, 2) == []
    torch_adam = {"type": "AdamW", "params": {"torch_adam": True}}
    assert warnings_for_run(ds(None, optimizer=torch_adam), MIXTRAL, 2, on_gpu=True) == []
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert warnings_for_run(ds(None), MIXTRAL, 2, on_gpu=True) == []


def test_installed_version() -> None:
    assert versions.installed_version("pytest") == pytest.__version__
    assert versions.installed_version("no-such-package-here") is None


# -------------------------------------------------------------------------- inputs


def test_read_model_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in it; give the folder that save_pretrained wrote"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert read_model_config(str(tmp_path)) == MIXTRAL
    with pytest.raises(UserError, match="is a file; give the model folder"):
        read_model_config(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"/no/such: no such folder; give a model folder or a hub id"):
        read_model_config("/no/such")


def test_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def gone(name: str, file: str) -> str:
        raise OSError(f"{name} is gone. And more.\nAnd a second line")

    monkeypatch.setattr(hub, "hf_hub_download", gone)
    with pytest.raises(UserError) as caught:
        read_model_config("some-org/some-model")
    assert caught.value.problems == [
        "some-org/some-model: no such folder here, and the hub did not give its config.json (OSError: "
        "some-org/some-model is gone); check the name, log in, or give a folder"
    ]
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert read_model_config("some-org/some-model") == {"model_type": "mixtral"}


def test_output_dir(tmp_path: Path) -> None:
    assert check_output_dir(tmp_path / "new") == []
    assert check_output_dir(tmp_path) == []
    assert "nothing to resume from" in one(check_output_dir(tmp_path, True))
    (tmp_path / "checkpoint-5").mkdir()  # by hand, or left by something else
    assert "not empty, and no checkpoint to go on from; give another folder, or" in one(check_output_dir(tmp_path))
    assert one(check_output_dir(tmp_path, True)).endswith("drop --resume_from_checkpoint and remove that folder")
    assert "no trainer_state.json in it" in one(check_output_dir(tmp_path, str(tmp_path / "checkpoint-5")))
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert "not empty; give another folder, or go on from it with" in one(check_output_dir(tmp_path))
    assert check_output_dir(tmp_path, True) == []
    assert check_output_dir(tmp_path, str(tmp_path / "checkpoint-5")) == []
    assert "no such checkpoint folder" in one(check_output_dir(tmp_path, str(tmp_path / "checkpoint-6")))
    (tmp_path / "file").write_text("")
    assert one(check_output_dir(tmp_path / "file")).endswith("is a file; give a folder")


def test_dataset_path(tmp_path: Path) -> None:
    allowed = "allowed: a hub id, a folder, or a file ending in .txt, .jsonl, .json, .parquet"
    (tmp_path / "empty").mkdir()
    for name, text in (("a.jsonl", "{}"), ("a.csv", "1,2"), ("b.txt", "")):
        (tmp_path / name).write_text(text)
    assert check_dataset_path("trl-lib/Capybara") == check_dataset_path("wikitext") == []
    assert check_dataset_path(tmp_path / "a.jsonl") == check_dataset_path(tmp_path) == []
    for name, words in (
        ("a.csv", f'unknown ending ".csv"; {allowed}'),
        ("b.txt", f"the file is empty; {allowed}"),
        ("empty", f"the folder is empty; {allowed}"),
        ("none.jsonl", f"no such file or folder; {allowed}"),
        ("none", f"no such file or folder; {allowed}"),
    ):
        assert one(check_dataset_path(tmp_path / name)) == f"data set {tmp_path / name}: {words}"
    assert "no such file" in one(check_dataset_path("train.parquet"))
    assert "no such file" in one(check_dataset_path("~/data/x"))


def test_torch_free() -> None:
    code = "import sys; import moe_models.preflight; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
