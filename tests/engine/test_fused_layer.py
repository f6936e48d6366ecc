"""A fused AutoEP layer computes what an obvious loop over tokens' experts computes, in fp32: output and gradients.

On CPU processes, so this is the autograd node with the torch versions of its kernels, which ``test_fused_kernels.py``
compares. Only the order of sums differs, of at most 48 terms: 1e-5. The faults below move it by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch import nn

from moe_models.engine.fused import rows
from moe_models.engine.fused.layer import FusedLayer, fuse, why_not
from tests.support import moe_layer, parity
from tests.support.cluster import Cluster

TOLERANCE = 1e-5
D, F = 32, 48


def autoep_layer(E: int, K: int, ep_size: int = 1, ep_rank: int = 0, **options: Any) -> Any:
    layer = moe_layer.autoep_layer(D=D, F=F, E=E, K=K, ep_size=ep_size, ep_rank=ep_rank, **options)
    nn.init.normal_(layer.router.gate.weight)
    return layer


def fused_layer(E: int, K: int) -> Any:
    layer = autoep_layer(E, K)
    assert fuse(nn.ModuleList([layer])) == []
    assert isinstance(layer, FusedLayer)
    return layer


def gradients(layer: Any, compute: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor) -> dict[str, Any]:
    """Output, and the gradients of input and weights."""
    layer.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    y_TD = compute(x_TD)
    y_TD.backward(torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(3)))
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y_TD.detach(), "input": x_TD.grad, **found}


def deviation(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest, relative to the tensor's largest value."""
    assert set(ours) == set(theirs)
    worst = 0.0
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        if expected.numel():
            scale = expected.abs().max().clamp_min(1e-3)
            worst = max(worst, float((ours[name] - expected).abs().max() / scale))
    return worst


def compare(layer: Any, x_TD: torch.Tensor) -> float:
    ours = gradients(layer, lambda x: layer(x[None])[0], x_TD)
    expected = gradients(layer, lambda x: moe_layer.loop(layer, x), x_TD)
    for name, value in expected.items():
        assert value.abs().max() > 1e-4, f"{name}: a reference near zero proves nothing"
    return deviation(ours, expected)


def tokens(T: int = 40) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("E", "K"), [(8, 2), (8, 1), (4, 4), (16, 8)])
def test_layer_equals_a_loop(E: int, K: int) -> None:
    layer = fused_layer(E, K)
    assert compare(layer, tokens()) < TOLERANCE
    counts_E = layer.tokens_per_expert
    assert counts_E.sum() == 40 * K


def test_an_expert_without_tokens_and_all_tokens_on_one() -> None:
    layer = fused_layer(4, 1)
    x_TD = tokens().abs()
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[2] = 0.05
    assert compare(layer, x_TD) < TOLERANCE
    assert layer.tokens_per_expert.tolist() == [0, 0, 40, 0]
    assert layer.experts.w1.grad[2].abs().max() > 0
    assert layer.experts.w1.grad[[0, 1, 3]].abs().max() == 0


def test_no_token_at_all() -> None:
    layer = fused_layer(4, 2)
    x_TD = torch.zeros(0, D).requires_grad_()
    y_TD = layer.experts(x_TD, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y_TD.shape == (0, D)
    y_TD.sum().backward()
    assert x_TD.grad.shape == (0, D)
    for weight in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        assert weight.grad.abs().max() == 0


def test_choices_of_other_ranks_are_left_out_and_rows_can_be_gathered_again() -> None:
    """As after an all-gather: the parts of two ranks with half of the experts each sum to the whole."""
    layer = fused_layer(8, 4)
    x_TD = tokens()
    scores_TK, ids_TK, _ = layer.router(x_TD, None)
    whole = layer.experts(x_TD, ids_TK, scores_TK)
    parts = []
    for first in (0, 4):
        half = autoep_layer(8, 4)
        fuse(nn.ModuleList([half]))
        for name in ("w1", "w2", "w3"):
            weight = getattr(layer.experts, name)[first : first + 4].detach().clone()
            setattr(half.experts, name, nn.Parameter(weight))
        for keep_rows in (True, False):
            y_TD = half.experts(x_TD, ids_TK - first, scores_TK, keep_rows=keep_rows)
            half.zero_grad()
            y_TD.sum().backward(retain_graph=True)
            if keep_rows:
                kept = half.experts.w1.grad.clone()
        assert torch.equal(half.experts.w1.grad, kept)
        parts.append(y_TD)
    assert torch.allclose(parts[0] + parts[1], whole, rtol=TOLERANCE, atol=TOLERANCE)


def test_frozen_weights_get_no_gradient() -> None:
    layer = fused_layer(4, 2)
    layer.experts.w1.requires_grad_(False)
    layer.experts.w2.requires_grad_(False)
    x_TD = tokens().requires_grad_()
    layer(x_TD[None]).sum().backward()
    assert layer.experts.w1.grad is None
    assert layer.experts.w2.grad is None
    assert layer.experts.w3.grad.abs().max() > 0
    assert x_TD.grad.abs().max() > 0


def test_it_keeps_less_than_deepspeeds_layer() -> None:
    """Neither the product of gate and up nor the output of the down projection is kept for the backward pass."""

    def kept(layer: Any) -> int:
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(tokens(400)[None].requires_grad_())
        return sum(seen.values())

    assert kept(fused_layer(8, 4)) < 0.6 * kept(autoep_layer(8, 4))


def wrong_scores(*args: Any) -> Any:
    *others, dscores_TK = RIGHT["swiglu_backward"](*args)
    return *others, 1.01 * dscores_TK


def one_row_off(ids_TK: torch.Tensor, E: int) -> rows.Order:
    order = RIGHT["order"](ids_TK, E)
    return order._replace(token_R=order.token_R.roll(1))


def without_an_expert(ids_TK: torch.Tensor, E: int) -> rows.Order:
    return RIGHT["order"](torch.where(ids_TK == 1, -1, ids_TK), E)  # type: ignore[no-any-return]


RIGHT: dict[str, Any] = {name: getattr(rows, name) for name in ("order", "swiglu_backward")}
FAULTS = {
    "scores' gradient wrong by 1%": ("swiglu_backward", wrong_scores),
    "rows off by one": ("order", one_row_off),
    "an expert dropped": ("order", without_an_expert),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    with parity.planted(rows, *FAULTS[fault]):
        assert compare(fused_layer(8, 2), tokens()) > 100 * TOLERANCE


def test_what_it_cannot_compute_stays_as_it_is() -> None:
    layers = nn.ModuleList([autoep_layer(4, 2), autoep_layer(4, 2), autoep_layer(4, 2, score_apply="pre")])
    layers[0].experts.activation = "geglu_tanh"
    lines = fuse(layers)
    assert [type(layer).__name__ for layer in layers] == ["AutoEPMoELayer", "FusedLayer", "AutoEPMoELayer"]
    for line, reason in zip(
        lines, ("its experts' activation is geglu_tanh", "scores weigh its tokens before the experts"), strict=True
    ):
        assert line == f'moe.kernels = "fused": 1 of 3 layers stay DeepSpeed\'s own, because {reason}'
    layers[1].comm_backend = "deepep"
    assert why_not(layers[1]) == "its tokens travel by deepep"

    class AdaptedExperts(GroupedExperts):
        """Experts with a forward pass of their own, as those of adapters are."""

    adapted = autoep_layer(4, 2)
    adapted.experts.__class__ = AdaptedExperts
    assert why_not(adapted) == "its experts are AdaptedExperts"


# ------------------------------------------------------------------------------------------------ several ranks


FORBIDDEN = ("item", "tolist", "cpu")
"""Methods of a tensor for which the host waits for the device."""


def join() -> None:
    """Let DeepSpeed see the ranks of the cluster."""
    import deepspeed

    from moe_models.engine.cpu import join_cpu_ranks

    join_cpu_ranks()
    deepspeed.init_distributed("gloo")


def run_layers(ep_size: int, dispatch: str, E: int, K: int, lengths: list[int]) -> dict[str, Any]:
    """Runs on every rank: DeepSpeed's layer and the fused one on this rank's tokens, forward and backward."""
    import torch.distributed as dist

    join()
    world = dist.get_world_size()
    rank = dist.get_rank()
    groups = [dist.new_group([*range(first, first + ep_size)]) for first in range(0, world, ep_size)]
    x_TD = torch.randn(lengths[rank], D, generator=torch.Generator().manual_seed(rank))
    results = []
    for fused in (False, True):
        layer = autoep_layer(E, K, ep_size, rank % ep_size)
        layer.ep_group = groups[rank // ep_size]
        model = nn.ModuleList([layer])
        if fused:
            assert fuse(model, dispatch) == []  # type: ignore[arg-type]
        gathers = fused and layer.lengths is not None
        x = x_TD.clone().requires_grad_()
        y = guarded(gathers, lambda layer=layer, x=x: layer(x[None])[0])
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(100 + rank))
        guarded(gathers, lambda y=y, dy=dy: y.backward(dy))
        found = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"output": y.detach(), "input": x.grad, **found, "counts": layer.tokens_per_expert.clone()})
    return {
        "gathers": gathers,
        "worst": deviation(results[1], results[0]),
        "counts": torch.equal(results[1]["counts"], results[0]["counts"]),
    }


def forbid(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the host would wait for the device")


def guarded(forbidden: bool, act: Callable[[], Any]) -> Any:
    """What ``act`` returns; with :data:`FORBIDDEN` raising meanwhile, if they are to."""
    with ExitStack() as stack:
        if forbidden:
            for name in FORBIDDEN:
                stack.enter_context(parity.planted(torch.Tensor, name, forbid))
        return act()


CASES = [
    # ranks, EP, dispatch, E, K, tokens of each rank, whether it gathers
    (2, 2, "auto", 8, 4, [30, 30], True),
    (2, 2, "auto", 8, 2, [30, 11], False),
    (2, 2, "all_gather", 8, 1, [30, 11], True),
    (4, 4, "auto", 16, 8, [30, 7, 1, 22], True),
    (4, 2, "all_gather", 4, 4, [5, 30, 9, 9], True),
    (4, 4, "all_to_all", 16, 8, [30, 7, 1, 22], False),
    (2, 2, "all_gather", 8, 2, [0, 9], True),
    (2, 2, "all_to_all", 8, 2, [0, 9], False),
]


@pytest.mark.parametrize(("world", "ep_size", "dispatch", "E", "K", "lengths", "gathers"), CASES)
def test_ranks_compute_what_deepspeeds_layer_computes(
    world: int, ep_size: int, dispatch: str, E: int, K: int, lengths: list[int], gathers: bool,
    clusters: Callable[[int], Cluster],
) -> None:  # fmt: skip
    """Output, gradients and load counters on each rank. By all-gather the host never asks a tensor for its value."""
    for result in clusters(world).run(run_layers, ep_size, dispatch, E, K, lengths):
        assert result["gathers"] == gathers
        assert result["worst"] < TOLERANCE
        assert result["counts"]


def empty_rank(dispatch: str) -> list[float]:
    """Runs on two ranks: all tokens go to the experts of rank 0."""
    import torch.distributed as dist

    join()
    layer = autoep_layer(4, 1, 2, dist.get_rank())
    layer.ep_group = dist.new_group([0, 1])
    fuse(nn.ModuleList([layer]), dispatch)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[1] = 0.05
    x = tokens().abs().requires_grad_()
    layer(x[None]).sum().backward()
    return [float(x.grad.abs().max()), float(layer.experts.w2.grad.abs().max())]


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_a_rank_whose_experts_get_no_token(dispatch: str, clusters: Callable[[int], Cluster]) -> None:
    first, second = clusters(2).run(empty_rank, dispatch)
    assert first[0] > 0
    assert second[0] > 0
    assert first[1] > 0
    assert second[1] == 0


def lost_part(*args: Any, **kwargs: Any) -> Any:
    """:func:`run_layers` on a rank whose reduce-scatter leaves the other ranks' parts out."""
    from moe_models.engine.fused import exchange

    def own_part(parts: torch.Tensor, longest: int, own: int, group: Any) -> torch.Tensor:
        right(parts, longest, own, group)
        first = torch.distributed.get_rank(group) * longest
        return parts[first : first + own]

    right = exchange._summed
    with parity.planted(exchange, "_summed", own_part):
        return run_layers(*args, **kwargs)


def test_a_lost_part_is_seen(clusters: Callable[[int], Cluster]) -> None:
    results = clusters(2).run(lost_part, 2, "all_gather", 8, 4, [30, 30])
    assert min(result["worst"] for result in results) > 100 * TOLERANCE


def test_the_host_that_asks_is_seen(clusters: Callable[[int], Cluster]) -> None:
    """Lengths that are read out of a tensor are caught."""
    from tests.support.cluster import ChildError

    with pytest.raises(ChildError, match="the host would wait for the device"):
        clusters(2).run(asks)


def asks() -> None:
    from moe_models.engine.fused import exchange

    with parity.planted(
        exchange.Lengths, "exchange", lambda self, tokens: setattr(self, "longest", torch.tensor(tokens).item())
    ):
        run_layers(2, "all_gather", 8, 4, [30, 30])
