"""What a run is warned of, and goes on."""

from __future__ import annotations

from typing import Any

import pytest

from moe_models import versions
from moe_models.preflight import advice
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.run import check_run
from tests.preflight import test_preflight
from tests.preflight.test_preflight import MIXTRAL, one
from tests.support.tiny import TINY

ds = test_preflight.ds


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
    monkeypatch.setattr(versions, "installed_version", {"deepspeed": "0.20.0", "trl": "1.17.0"}.get)
    assert warnings_for_run(ds(None), MIXTRAL, 2) == [
        "deepspeed 0.20.0 is untested with these recipes; tested: 0.19.8",
        "trl 1.17.0 is untested with these recipes; tested: 1.16.0",
    ]
    monkeypatch.setattr(versions, "installed_version", {"accelerate": "1.16.0"}.get)
    line = one(warnings_for_run(ds({}), MIXTRAL, 2))
    assert line == "accelerate 1.16.0 is untested with these recipes; tested: 1.15.0"


def test_throughput_timer(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    for timer in ({}, {"throughput": {"enabled": True}}):
        line = one(warnings_for_run(ds(None, timers=timer), MIXTRAL, 2, on_gpu=True))
        assert line.startswith(
            "timers.throughput: on unless the JSON says otherwise, and then DeepSpeed waits for the GPU"
        )
    for timer in ({"enabled": False}, {"synchronized": False}):
        assert warnings_for_run(ds(None, timers={"throughput": timer}), MIXTRAL, 2, on_gpu=True) == []
    assert warnings_for_run(ds(None), MIXTRAL, 2) == []  # CPU processes have nothing to wait for


def test_no_cuda_compiler(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(advice.shutil, "which", lambda _: None)
    quiet = {"throughput": {"enabled": False}}
    line = one(warnings_for_run(ds(None, timers=quiet), MIXTRAL, 2, on_gpu=True))
    assert line.startswith(
        'optimizer.type = "AdamW": DeepSpeed compiles its fused kernel at the first start, and there is'
    )
    assert '"torch_adam": true, "fused": true' in line
    assert warnings_for_run(ds(None), MIXTRAL, 2) == []
    torch_adam = {"type": "AdamW", "params": {"torch_adam": True}}
    assert warnings_for_run(ds(None, optimizer=torch_adam, timers=quiet), MIXTRAL, 2, on_gpu=True) == []
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert warnings_for_run(ds(None, timers=quiet), MIXTRAL, 2, on_gpu=True) == []


def test_installed_version() -> None:
    assert versions.installed_version("pytest") == pytest.__version__
    assert versions.installed_version("no-such-package-here") is None
