"""``moe_models/liger.py``. Liger itself runs on GPUs only (``test_gpu.py``); here are kernels that act as it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_models.liger import liger_problems
from tests import parity
from tests.cluster import Cluster


def train_with_kernels(source: str, out: str, wrong_rope: bool) -> tuple[dict[str, Any], list[str], bool]:
    """Runs on the ranks: (what `train_case` says, devices whose tensors the kernels met, kernels still in place).

    As Liger's, the kernels replace names in the modeling module when training starts, and cannot make a new model.
    """
    import torch
    import transformers.trainer
    from transformers.models.mixtral import modeling_mixtral

    rope, met = modeling_mixtral.apply_rotary_pos_emb, []

    class NormOfKernels(torch.nn.Module):
        def __init__(self, *args: Any) -> None:
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    def rope_of_kernels(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        met.append(q.device.type)
        return rope(q, k, cos, -sin if wrong_rope else sin, *args, **kwargs)

    def apply_kernels(model: Any, config: Any) -> None:
        modeling_mixtral.MixtralRMSNorm = NormOfKernels
        modeling_mixtral.apply_rotary_pos_emb = rope_of_kernels

    norm = modeling_mixtral.MixtralRMSNorm
    try:
        with parity.planted(transformers.trainer, "apply_liger_kernel", apply_kernels):
            result = parity.train_case(source, out, parity.ds_config(1, 2), use_liger_kernel=True)
        return result, met, modeling_mixtral.MixtralRMSNorm is NormOfKernels
    finally:
        modeling_mixtral.MixtralRMSNorm, modeling_mixtral.apply_rotary_pos_emb = norm, rope


def test_an_export_is_proven_by_plain_transformers(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The reloaded model meets none of the kernels; afterwards they are back for the training that goes on."""
    source = str(tiny_checkpoints("mixtral"))
    results = clusters(2).run(train_with_kernels, source, str(tmp_path), False)
    for _, met, in_place in results:
        assert in_place
        assert len(met) == 2 * (parity.STEPS + 1)  # two layers; five steps and the probe of the export
    assert results[0][0]["proof"].same_top1 == 1.0


def test_kernels_that_are_another_function_are_seen(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """They would pass if the reloaded model used them too."""
    with pytest.raises(AssertionError, match="the reloaded model differs from the trained one"):
        clusters(2).run(train_with_kernels, str(tiny_checkpoints("mixtral")), str(tmp_path), True)


def test_what_is_missing_is_said_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(liger_problems("mixtral", on_gpu=False)) == [
        "--use_liger_kernel: Liger's kernels need a GPU; drop the flag"
    ]
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    (line,) = liger_problems("mixtral", on_gpu=True)
    assert line.startswith("--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel==")
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"mixtral": None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    assert list(liger_problems("mixtral", on_gpu=True)) == []
    assert list(liger_problems("olmoe", on_gpu=True)) == [
        "--use_liger_kernel: Liger has no kernels for olmoe; drop the flag"
    ]
