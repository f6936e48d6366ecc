"""Each Triton kernel of a fused layer computes what the plain torch version beside it computes.

On a machine without a GPU they run in Triton's interpreter. Where Triton is not installed (it is no part of torch's CPU
builds) this file is not collected (tests/conftest.py). Inputs are fp32, so that only the order of sums differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter

from moe_models.engine.fused import kernels, rows
from moe_models.engine.fused.router import _Route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
"""fp32; sums of up to 128 terms."""

CASES = {
    # T, K, E, the range of expert numbers
    "many": (40, 4, 16, (0, 16)),
    "some of other ranks": (40, 4, 16, (-8, 24)),
    "all of other ranks": (5, 2, 3, (3, 6)),
    "one expert": (40, 1, 1, (0, 1)),
    "more than one tile": (140, 8, 7, (0, 9)),
    "one token": (1, 1, 5, (2, 3)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter sorts 1024 numbers for seconds; on a GPU they stay."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "TILE", 64)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool(torch.allclose(ours.cpu(), theirs.cpu(), rtol=TOLERANCE, atol=TOLERANCE))


def on_device(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[torch.Tensor, rows.Order, int]:
    T, K, E, (low, high) = CASES[request.param]
    ids_TK = torch.randint(low, high, (T, K), generator=torch.Generator().manual_seed(1))
    return ids_TK, rows.order(ids_TK, E), E


def moved(order: rows.Order) -> rows.Order:
    return rows.Order(*(tensor.to(DEVICE) for tensor in order))


def used(order: rows.Order) -> int:
    return int(order.ends_E[-1])


def test_order(case: tuple[torch.Tensor, rows.Order, int]) -> None:
    ids_TK, expected, E = case
    found = rows.Order(*(tensor.cpu() for tensor in kernels.order(ids_TK.to(DEVICE), E)))
    n = used(expected)
    assert torch.equal(found.ends_E, expected.ends_E)
    assert torch.equal(found.row_TK, expected.row_TK)
    assert torch.equal(found.choice_R[:n], expected.choice_R[:n])
    assert torch.equal(found.token_R[:n], expected.token_R[:n])


def test_gather_and_combine(case: tuple[torch.Tensor, rows.Order, int]) -> None:
    ids_TK, order, _ = case
    T, K = ids_TK.shape
    n = used(order)
    x_TD = on_device(T, 24)
    found = kernels.gather(x_TD, order.token_R.to(DEVICE), order.ends_E.to(DEVICE))
    assert close(found[:n], rows.gather(x_TD.cpu(), order)[:n])
    # Empty rows may hold anything.
    rows_RD = on_device(T * K, 24, seed=2)
    more_RD = on_device(T * K, 24, seed=3)
    rows_RD[n:] = float("nan")
    scores_TK = on_device(T, K, seed=4)
    for scores, more in ((scores_TK, None), (None, more_RD), (None, None), (scores_TK, more_RD)):
        found = kernels.combine(rows_RD, order.row_TK.to(DEVICE), scores, more)
        expected = rows.combine(
            rows_RD.cpu(), order, None if scores is None else scores.cpu(), None if more is None else more.cpu()
        )
        assert close(found, expected)


def test_swiglu(case: tuple[torch.Tensor, rows.Order, int]) -> None:
    ids_TK, order, _ = case
    T, K = ids_TK.shape
    n = used(order)
    gate, up, dh = (on_device(T * K, 40, seed=seed) for seed in (5, 6, 7))
    scores_TK = on_device(T, K, seed=8)
    there = moved(order)
    assert close(kernels.swiglu(gate, up, there.ends_E)[:n], rows.swiglu(gate.cpu(), up.cpu(), order)[:n])
    found = kernels.swiglu_backward(dh, gate, up, scores_TK, there.choice_R, there.ends_E)
    expected = rows.swiglu_backward(dh.cpu(), gate.cpu(), up.cpu(), scores_TK.cpu(), order)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert close(ours[:n], theirs[:n])
    assert close(found[3], expected[3])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("E", "K"), [(8, 2), (6, 6), (33, 1), (128, 8)])
def test_router(E: int, K: int, normalise: bool, biased: bool) -> None:
    """Against DeepSpeed's router, on logits without equal scores."""
    T = 12
    router = TokenChoiceTopKRouter(
        dim=16, num_experts=E, num_expert_groups=None, num_limited_groups=None, top_k=K, score_func="softmax",
        route_norm=normalise, route_scale=1.5, gate_bias=False,
    )  # fmt: skip
    torch.nn.init.normal_(router.gate.weight)
    bias_E = on_device(E, seed=10).cpu() / 10 if biased else None
    weight_TK = on_device(T, K, seed=11).cpu()
    logits_TE = on_device(T, E, seed=12)
    theirs_TE = logits_TE.cpu().clone().requires_grad_()
    ours_TE = logits_TE.clone().requires_grad_()

    router.gate = torch.nn.Identity()
    scores, ids, counts = router(theirs_TE, bias_E)
    found, found_ids, found_counts = _Route.apply(
        ours_TE, None if bias_E is None else bias_E.to(DEVICE), K, normalise, 1.5
    )
    # The kernel's order is that of the scores; torch's is any.
    places = ids.argsort(1)
    ours = found_ids.cpu().argsort(1)
    assert torch.equal(found_ids.cpu().gather(1, ours), ids.gather(1, places))
    assert torch.equal(found_counts.cpu(), counts)
    assert close(found.cpu().gather(1, ours), scores.gather(1, places))
    # Each expert's score has the same weight in both.
    expert_weight = torch.zeros(T, E).scatter(1, ids, weight_TK)
    (scores * expert_weight.gather(1, ids)).sum().backward()
    (found * expert_weight.to(DEVICE).gather(1, found_ids)).sum().backward()
    assert close(ours_TE.grad, theirs_TE.grad)


def test_equal_scores_take_the_first_experts() -> None:
    scores, ids, counts = _Route.apply(torch.zeros(3, 5, device=DEVICE), None, 2, True, 1.0)
    assert ids.tolist() == [[0, 1]] * 3
    assert counts.tolist() == [3, 3, 0, 0, 0]
    assert close(scores, torch.full((3, 2), 0.5))
