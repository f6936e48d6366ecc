"""``engine/plain_transformers.py``. Liger itself runs on GPUs only; here are kernels that act as it does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_models.engine import plain_transformers as liger
from moe_models.errors import UserError
from moe_models.preflight import liger as refusals
from tests.support import parity
from tests.support.cluster import Cluster


def train_with_kernels(source: str, out: str, wrong_rope: bool) -> tuple[dict[str, Any], int, bool]:
    """Runs on the ranks: (what `train_case` says, calls of the kernels, whether they are still in place).

    As Liger's, the kernels replace names in the modeling module when training starts, and cannot make a new model.
    """
    import torch
    import transformers.trainer
    from transformers.models.mixtral import modeling_mixtral

    rope, calls = modeling_mixtral.apply_rotary_pos_emb, []

    class NormOfKernels(torch.nn.Module):
        def __init__(self, *args: Any) -> None:
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    def rope_of_kernels(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return rope(q, k, cos, -sin if wrong_rope else sin, *args, **kwargs)

    def apply_kernels(model: Any, config: Any) -> None:
        modeling_mixtral.MixtralRMSNorm = NormOfKernels
        modeling_mixtral.apply_rotary_pos_emb = rope_of_kernels

    norm = modeling_mixtral.MixtralRMSNorm
    try:
        with parity.planted(transformers.trainer, "apply_liger_kernel", apply_kernels):
            result = parity.train_case(source, out, parity.ds_config(1, 2), use_liger_kernel=True)
        return result, len(calls), modeling_mixtral.MixtralRMSNorm is NormOfKernels
    finally:
        modeling_mixtral.MixtralRMSNorm, modeling_mixtral.apply_rotary_pos_emb = norm, rope


def test_an_export_is_proven_by_plain_transformers(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The reloaded model meets none of the kernels; afterwards they are back for the training that goes on."""
    source = str(tiny_checkpoints("mixtral"))
    results = clusters(2).run(train_with_kernels, source, str(tmp_path), False)
    for _, calls, in_place in results:
        assert in_place
        # Two layers; five steps, the check of the conversion before them and the probe of the export after them.
        assert calls == 2 * (parity.STEPS + 2)
    assert results[0][0]["proof"].same_top1 == 1.0


def test_kernels_that_are_another_function_are_seen(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """They would pass if the reloaded model used them too."""
    with pytest.raises(AssertionError, match="the reloaded model differs from the trained one"):
        clusters(2).run(train_with_kernels, str(tiny_checkpoints("mixtral")), str(tmp_path), True)


def a_model(name: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's own subclass of a model whose modeling module holds these names."""
    module = ModuleType(f"transformers.models.{name}")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "_SHIPPED", {})
    theirs = type("Model", (), {"__module__": module.__name__})
    return type("Mine", (theirs,), {})()


def test_the_module_of_a_subclassed_model_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model("invented", {"norm": "shipped"}, monkeypatch)
    module = sys.modules["transformers.models.invented"]
    liger.remember_shipped(model)
    module.norm = "kernel"
    liger.remember_shipped(model)  # of a second trainer
    with liger.as_shipped():
        assert module.norm == "shipped"
        with liger.as_shipped():
            assert module.norm == "shipped"
    assert module.norm == "kernel"


def test_kernels_that_were_there_before_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type("LigerRMSNorm", (), {"__module__": "liger_kernel.transformers.rms_norm"})
    model = a_model("invented", {"Norm": kernel, "other": 1}, monkeypatch)
    with pytest.raises(ValueError, match=r"already stand in transformers\.models\.invented \(Norm\)"):
        liger.remember_shipped(model)


def test_what_is_missing_is_said_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(refusals.cannot_run("+liger", on_gpu=False)) == ["+liger: Liger's kernels need a GPU; drop it"]
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    (line,) = refusals.cannot_run("+liger", on_gpu=True)
    assert line.startswith("+liger: liger-kernel is not installed; pip install liger-kernel==")
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    assert list(refusals.cannot_run("+liger", on_gpu=True)) == []


NO_KERNELS = "Liger has no kernels for olmoe, only for deepseek_v2, deepseek_v3, mixtral, qwen3_moe; drop it"


@pytest.mark.parametrize(
    ("config", "lines"),
    [({"model_type": "olmoe"}, [f"--flag: {NO_KERNELS}"]), ({"model_type": "mixtral"}, []),
     ({"model_type": "gpt2"}, []), ({}, [])],  # the last two are refused elsewhere
)  # fmt: skip
def test_families_without_kernels(config: dict[str, Any], lines: list[str]) -> None:
    assert list(refusals.no_kernels(config, "--flag")) == lines


def test_planner_and_bench_refuse_what_would_do_nothing(tmp_path: Path) -> None:
    from tests.bench.test_bench import recipe

    config = {"model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
              "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = recipe("plan")
    words = ["--model_name_or_path", str(tmp_path), "--gpus", "2", "--device", "h200", "--seq_length", "64"]
    with pytest.raises(UserError) as refused:
        plan.read(plan.parse([*words, "--use_liger_kernel"]))
    assert refused.value.problems == [f"--use_liger_kernel: {NO_KERNELS}"]
    json_file = tmp_path / "ep.json"
    json_file.write_text(json.dumps(parity.ds_config(1, 2, bf16={"enabled": True})))
    with pytest.raises(UserError) as refused:
        importlib.import_module("moe_models.bench.layouts").read_layouts([f"{json_file}+liger"], config, 2, tmp_path)
    assert refused.value.problems == [f"{json_file}+liger: +liger: {NO_KERNELS}"]
    with pytest.raises(UserError, match=r"\+liger: Liger's kernels need a GPU; drop it"):
        recipe("bench").check_liger()
