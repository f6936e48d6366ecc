"""``moe_models/engine/grad_norm.py``: the norm in one pass is DeepSpeed's own, which ``test_parity.py`` compares with
HF's.

DeepSpeed adds up in fp64 and rounds each group's sum to fp32: 1e-7 relative. Bound 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.engine.grad_norm import local_square, norm_in_one_pass
from tests.support import parity
from tests.support.cluster import Cluster
from tests.training.test_native import native_checkpoints, native_config  # noqa: F401

Clusters = Callable[[int], Cluster]
Tiny = Callable[[str], Path]


def norms_of_a_run(source: str, out: str, config: dict[str, Any], **options: Any) -> list[tuple[float, float]]:
    """Runs on the ranks: (norm in one pass, DeepSpeed's) of each step, of the same gradients."""
    from moe_models import trainer
    from moe_models.engine import grad_norm

    seen, taken = [], []

    def take_both(optimizer: Any) -> None:
        norm_in_one_pass(optimizer)
        ours = optimizer.scaled_global_norm

        def scaled_global_norm() -> torch.Tensor:
            norm = ours()
            assert len(taken) == len(seen) + 1  # it was not left to DeepSpeed
            seen.append((norm.item(), type(optimizer).scaled_global_norm(optimizer).item()))
            return norm

        optimizer.scaled_global_norm = scaled_global_norm

    def count(*args: Any) -> torch.Tensor:
        taken.append(1)
        return local_square(*args)

    with parity.planted(trainer, "norm_in_one_pass", take_both), parity.planted(grad_norm, "local_square", count):
        parity.build_trainer(source, out, config, **options).train()
    return seen


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (parity.ds_config(1, 2), {"accumulation": 2}),
        (parity.ds_config(2, 2), {}),
        (parity.ds_config(1, None), {}),
        (parity.ds_config(2, None), {"max_grad_norm": 1e-6}),
        (parity.ds_config(1, 1, sequence_parallel_size=2), {}),
        (native_config(1, 2), {"accumulation": 2}),
        (
            parity.ds_config(2, 2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
            {"bf16": True, "use_cpu": True, "accumulation": 2},
        ),
    ],
    ids=["ZeRO-1 EP", "ZeRO-2 EP", "ZeRO-1", "ZeRO-2", "SP", "native", "bf16, fp32 accumulation"],
)
def test_it_is_the_norm_that_deepspeed_takes(
    config: dict[str, Any], options: dict[str, Any], clusters: Clusters, tiny_checkpoints: Tiny,
    native_checkpoints: Tiny, tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    source = str(native_checkpoints("mixtral-k2") if "moe" in config else tiny_checkpoints("mixtral"))
    for seen in clusters(2).run(norms_of_a_run, source, str(tmp_path), config, **options):
        assert len(seen) == parity.STEPS
        for ours, theirs in seen:
            assert ours == pytest.approx(theirs, rel=1e-6)
            assert ours > 0.1


def optimizer_with(gradients: dict[int, Any], **attributes: Any) -> Any:
    """A ZeRO optimizer that was never built, with these gradients; its own norm is -7."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    settings = {
        "averaged_gradients": gradients, "cpu_offload": False, "model_parallel_group": None, "optimizer": object(),
        "dp_process_group": None, "device": "cpu",
        "scaled_global_norm": lambda norm_type=2: torch.tensor(-7.0),
    }  # fmt: skip
    optimizer.__dict__.update(settings | attributes)
    return optimizer


def norm_of(optimizer: Any) -> float:
    """Runs on one rank of a cluster: what the optimizer says after ``norm_in_one_pass``."""
    norm_in_one_pass(optimizer)
    return float(optimizer.scaled_global_norm())


class MuonWithAuxAdam:
    """As DeepSpeed calls it."""


def cases_on_a_rank() -> dict[str, float]:
    """Runs on two ranks that hold the same: each figure is of both."""
    padding = torch.full((3,), 100.0)
    padding._zero_padding = True
    two = {0: [torch.full((2, 2), 3.0), padding], 1: [torch.tensor([8.0])], 2: None}
    return {
        "sum": norm_of(optimizer_with(two)),
        "bf16": norm_of(optimizer_with({0: [torch.full((1000,), 1.0, dtype=torch.bfloat16)]})),
        "nothing": norm_of(optimizer_with({})),
        "nan": norm_of(optimizer_with({0: [torch.tensor([1.0, math.nan])]})),
        "inf": norm_of(optimizer_with({0: [torch.tensor([1.0, math.inf])]})),
        "offload": norm_of(optimizer_with(two, cpu_offload=True)),
        "tensor parallel": norm_of(optimizer_with(two, model_parallel_group=object())),
        "Muon": norm_of(optimizer_with(two, optimizer=MuonWithAuxAdam())),
    }


def test_what_it_adds_up_and_what_it_leaves_to_deepspeed(clusters: Clusters) -> None:
    expected = {
        "sum": math.sqrt(2 * (4 * 9 + 64)), "bf16": math.sqrt(2000), "nothing": 0.0, "nan": math.inf, "inf": math.inf,
        "offload": -7.0, "tensor parallel": -7.0, "Muon": -7.0,
    }  # fmt: skip
    for found in clusters(2).run(cases_on_a_rank):
        assert found == pytest.approx(expected, rel=1e-6)


def test_another_optimizer_is_left_alone() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    norm_in_one_pass(optimizer)
    assert not hasattr(optimizer, "scaled_global_norm")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp32_is_enough_on_the_gpu(dtype: torch.dtype) -> None:
    """300 million elements of very different sizes, against fp64."""
    torch.manual_seed(0)
    sizes = (3 * 10**8, 7, 10**6)
    gradients = [torch.randn(size, device="cuda", dtype=dtype) * 10.0**-i for i, size in enumerate(sizes)]
    expected = sum(g.double().square().sum() for g in gradients)
    assert local_square(gradients, "cuda").item() == pytest.approx(expected.item(), rel=2e-6)
