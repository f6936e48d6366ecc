"""preflight.py: every refusal of a layout with its words, and that DeepSpeed's own checks refuse the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_models import versions
from moe_models.config.ds_config import DsConfig, load_ds_config
from moe_models.errors import UserError
from moe_models.families.sizes import known_family
from moe_models.families.table import FAMILIES
from moe_models.families.unsupported import UNSUPPORTED
from moe_models.preflight.pipeline import pipeline_flags
from moe_models.preflight.run import check_run
from tests.support.tiny import TINY

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 1}
TP = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero1_ep2_tp2.json").read_text())["tensor_parallel"]
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
    assert line.startswith('model_type = "llama": known are deepseek_v2, deepseek_v3, dots1, ')


def test_unknown_family(ds: Any) -> None:
    line = one(check_run(ds({}), {"model_type": "jetmoe", "num_local_experts": 32}, 2))
    assert line.startswith(
        'model_type = "jetmoe": expert_parallel knows deepseek_v2, deepseek_v3, dots1, exaone_moe, glm4_moe, '
    )


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_families_that_would_be_wrong_are_refused_by_name(ds: Any, model_type: str) -> None:
    """One line with the reason, whatever the layout; and so say the planner and the trainer's table."""
    config = {"model_type": model_type, "num_local_experts": 32}
    assert model_type not in FAMILIES
    native_layers = ds(None, moe={"layer": {}})
    for layout in (ds({}), ds(None), native_layers):
        line = one(check_run(layout, config, 2))
        assert line.startswith(f'model_type = "{model_type}": cannot be trained here: {UNSUPPORTED[model_type]}; use ')
    with pytest.raises(UserError, match="cannot be trained here"):
        known_family(config)


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


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        ("trl", "1.6.2", "trl 1.6.2: --router_aux_loss_coef came with 1.7; install 1.16.0"),
        ("trl", "0.29.1", "trl 0.29.1: --router_aux_loss_coef came with 1.7; install 1.16.0"),
        ("trl", "1.7.0", None),
        ("accelerate", "1.9.0", "accelerate 1.9.0: trl 1.16.0 needs 1.10.1 or later; install 1.15.0"),
        ("accelerate", "1.15.0", None),
    ],
)
def test_versions_that_no_layout_works_with(
    ds: Any, monkeypatch: pytest.MonkeyPatch, package: str, version: str, line: str | None
) -> None:
    installed = {"transformers": "5.20.2", package: version}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    native = {"moe": {"layer": {"ep_size": 2}}}
    for config in (ds({}), ds(None), ds(None, **native)):
        assert check_run(config, MIXTRAL, 2) == ([] if line is None else [line])


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


def test_pipeline_flags_and_section(tmp_path: Path) -> None:
    """Each flag that does not go with stages has a line; without stages none has, and an empty section is off."""
    given = SimpleNamespace(
        use_peft=True, use_liger_kernel=True, torch_compile=True, torch_compile_backend=None, torch_compile_mode=None,
        dataset_streaming=True, neftune_noise_alpha=5.0, activation_offloading=True, chat_template_path="some/model",
        include_num_input_tokens_seen="all", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    path = tmp_path / "ds.json"
    for section, count in (({"stages": 2}, 9), ({}, 0), ({"stages": 1}, 0)):
        path.write_text(json.dumps({"pipeline": section, "zero_optimization": {"stage": 1}}))
        lines = list(pipeline_flags(given, load_ds_config(path)))
        assert len(lines) == count
        assert all("pipeline.stages = 2" in line for line in lines)
    for wrong, words in (({"stages": 0}, "pipeline.stages = 0"), ({"partition": "best"}, "pipeline.partition")):
        path.write_text(json.dumps({"pipeline": wrong}))
        with pytest.raises(UserError, match=words):
            load_ds_config(path)
