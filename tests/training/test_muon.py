"""Why Muon is refused with clipping: DeepSpeed then clips its updates instead of the gradients.

Muon's step is the learning rate times an orthogonal matrix, whatever the size of the gradient. Here that of ZeRO-0 is
the measure: fp32, one step, the same gradient on both ranks. Tolerance 1e-3: Newton-Schulz runs in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.cluster import Cluster


def step_sizes(cases: list[tuple[int, float]]) -> list[float]:
    """For each (ZeRO stage, clipping): the largest singular value of what one step changed."""
    import deepspeed

    from moe_models.engine.library_globals import forget_engines

    sizes = []
    for stage, clip in cases:
        forget_engines()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage, "reduce_scatter": False},
            "optimizer": {"type": "Muon", "params": {"lr": 0.1, "momentum": 0.95, "torch_adam": True}},
        }
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        weight = engine.module[0].weight
        with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
            before = weight.detach().clone()
        with torch.compiler.set_stance("force_eager"):
            engine.backward(engine(torch.randn(4, 16)).pow(2).mean() * 1e-3)
            engine.step()
        with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
            sizes.append(torch.linalg.svdvals(weight.detach() - before).max().item())
        engine.destroy()
    return sizes


@pytest.mark.conformance
def test_deepspeed_clips_the_updates_of_muon(clusters: Callable[[int], Cluster]) -> None:
    cases = [(0, 0.0), (0, 1.0), *((stage, clip) for stage in (1, 2, 3) for clip in (0.0, 1.0))]
    sizes = dict(zip(cases, clusters(2).run(step_sizes, cases)[0], strict=True))
    right = sizes[0, 0.0]
    assert right == pytest.approx(0.1, rel=0.1), "the learning rate times an orthogonal matrix"
    assert sizes[0, 1.0] == pytest.approx(right, rel=1e-3), "the gradient is far below 1"
    for stage in (1, 2, 3):
        assert sizes[stage, 0.0] == pytest.approx(right, rel=1e-3), stage
        assert sizes[stage, 1.0] < right / 2, "DeepSpeed clips gradients: stop refusing it (preflight/combinations.py)"
