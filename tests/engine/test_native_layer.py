"""Native blocks against the HF blocks they replace, and against counts done by hand; one process, no engine."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe_models.config.moe_section import MoeLayer
from moe_models.engine.native import (
    NativeMoEBlock,
    exact_routing,
    mean_aux_loss,
    native_blocks,
    record_aux_losses,
    register_deepspeed_moe,
    take_drop_rates,
)
from moe_models.errors import UserError
from moe_models.families.table import FAMILIES
from tests.support.tiny import make_model
from tests.training.test_native import EXPRESSIBLE

IDS = torch.arange(3, 63).view(3, 20)


def pair(name: str, **layer: Any) -> tuple[Any, Any]:
    """(the HF model, the same with native layers)."""
    model_type, changes = EXPRESSIBLE[name]
    native = register_deepspeed_moe(make_model(model_type, **changes), MoeLayer(**layer), FAMILIES[model_type])
    return make_model(model_type, **changes), native


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_same_outputs_router_logits_and_gradients(name: str) -> None:
    hf, native = pair(name)
    assert len(native_blocks(native)) == sum(type(m).__name__.endswith("MoeBlock") for m in hf.modules())
    ours, theirs = (m.train()(IDS, labels=IDS, output_router_logits=True, use_cache=False) for m in (native, hf))
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert len(ours.router_logits) == len(theirs.router_logits) > 0
    for a, b in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.allclose(a, b.view_as(a), atol=1e-6)
    assert torch.allclose(ours.aux_loss, theirs.aux_loss)
    ours.loss.backward()
    theirs.loss.backward()
    for block_name, block in native_blocks(native).items():
        block_hf = hf.get_submodule(block_name)
        routers = block.moe.deepspeed_moe.gate.wg.weight.grad, block_hf.gate.weight.grad
        assert routers[1].abs().max() > 1e-4
        assert torch.allclose(*routers, atol=1e-6)
        first = block.moe.deepspeed_moe.experts.deepspeed_experts[1].down_proj.weight.grad
        assert torch.allclose(first, block_hf.experts.down_proj.grad[1], atol=1e-6)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_generate(name: str) -> None:
    """One token at a time, with the cache, from a prompt of one and from prompts padded on the left."""
    for prompt, mask in ((IDS[:1, :1], None), (IDS[:2, :6], torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))):
        hf, native = pair(name)
        ours, theirs = (
            m.eval().generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (native, hf)
        )
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", EXPRESSIBLE)
@pytest.mark.parametrize("source", ["model", "layer"])
def test_gradient_checkpointing_changes_nothing(name: str, source: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        _, native = pair(name, aux_loss=source)
        if checkpointing:
            native.gradient_checkpointing_enable({"use_reentrant": False})
        blocks = native_blocks(native)
        with record_aux_losses(blocks) as recorded:
            output = native.train()(IDS, labels=IDS, output_router_logits=source == "model", use_cache=False)
        loss = output.loss + (0.02 * mean_aux_loss(recorded, blocks) if source == "layer" else 0.0)
        loss.backward()
        gradients.append([p.grad for p in native.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_reentrant_checkpointing_cannot_lose_the_aux_loss_silently() -> None:
    _, native = pair("mixtral-k2", aux_loss="layer")
    native.gradient_checkpointing_enable({"use_reentrant": True})
    native.enable_input_require_grads()
    with record_aux_losses(native_blocks(native)) as recorded:
        native.train()(IDS, use_cache=False)
    with pytest.raises(RuntimeError, match=r"2 of 2 MoE layers .*use_reentrant"):
        mean_aux_loss(recorded, native_blocks(native))


def test_what_is_recomputed_is_given_back() -> None:
    """Under gradient checkpointing no layer's activations outlive the backward pass."""
    from torch.multiprocessing.reductions import StorageWeakRef

    _, native = pair("mixtral-k2", aux_loss="layer")
    native.gradient_checkpointing_enable({"use_reentrant": False})
    blocks, inputs = native_blocks(native), []
    for block in blocks.values():
        block.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    with record_aux_losses(blocks) as recorded:
        output = native.train()(IDS, labels=IDS, use_cache=False)
    (output.loss + mean_aux_loss(recorded, blocks)).backward()
    del output, recorded
    gc.collect()
    assert len(inputs) == 2 * len(blocks), "each layer runs twice"
    assert all(reference.expired() for reference in inputs)


def by_hand(logits_SE: torch.Tensor, k: int) -> torch.Tensor:
    """``l_aux`` in loops: E x sum over experts of (share of tokens that chose it) x (mean probability)."""
    tokens, experts = logits_SE.shape
    probabilities = torch.softmax(logits_SE.float(), -1)
    counted = k if k > 2 else 1  # top-2 counts first choices only
    shares = [0.0] * experts
    for row in probabilities:
        for expert in sorted(range(experts), key=lambda e, row=row: -row[e].item())[:counted]:
            shares[expert] += 1 / (tokens * counted)
    return experts * sum(shares[e] * probabilities[:, e].mean() for e in range(experts))


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_aux_loss_equals_a_count_by_hand_and_reaches_the_router(name: str) -> None:
    _, native = pair(name, aux_loss="layer")
    blocks = native_blocks(native)
    with record_aux_losses(blocks) as recorded:
        output = native.train()(IDS, output_router_logits=True, use_cache=False)
    k = next(iter(blocks.values())).moe.deepspeed_moe.gate.k
    expected = torch.stack([by_hand(logits, k) for logits in output.router_logits]).mean()
    aux_loss = mean_aux_loss(recorded, blocks)
    assert abs(aux_loss.item() - expected.item()) < 1e-6
    assert abs(expected.item() - 1.0) > 1e-3, "perfect balance would prove nothing"
    weights = [block.moe.deepspeed_moe.gate.wg.weight for block in blocks.values()]
    ours = torch.autograd.grad(aux_loss, weights, retain_graph=True)
    theirs = torch.autograd.grad(expected, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 1e-4
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.fixture
def gate_inputs() -> Callable[[Any], Any]:
    """``gate_inputs(model)``: a context that collects what each gate was given."""
    from contextlib import contextmanager

    @contextmanager
    def collect(model: Any) -> Iterator[dict[str, torch.Tensor]]:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            block.moe.deepspeed_moe.gate.register_forward_pre_hook(lambda gate, args, n=name: seen.update({n: args[0]}))
            for name, block in native_blocks(model).items()
        ]
        yield seen
        for hook in hooks:
            hook.remove()

    return collect


def dropped_by_hand(x_SD: torch.Tensor, block: NativeMoEBlock, factor: float) -> tuple[int, int]:
    """(routes, routes beyond capacity) of one pass, counted in plain Python."""
    gate = block.moe.deepspeed_moe.gate
    rows = (x_SD @ gate.wg.weight.T).tolist()
    experts = len(rows[0])
    taken = [0] * experts
    for row in rows:
        for expert in sorted(range(experts), key=lambda e, row=row: -row[e])[: gate.k]:
            taken[expert] += 1
    capacity = math.ceil(len(rows) / experts * gate.k * factor)
    return sum(taken), sum(max(0, count - capacity) for count in taken)


DROPPING = [(name, False) for name in EXPRESSIBLE] + [("olmoe-k1", True)]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, "E/k"])
@pytest.mark.parametrize(("name", "use_rts"), DROPPING)
def test_drop_rate_equals_a_count_by_hand(name: str, factor: Any, use_rts: bool, gate_inputs: Any) -> None:
    k = int(name.split("-k")[1][0])
    whole = factor == "E/k"
    experts = 8 if k in (4, 1) else 4
    factor = experts / k if whole else factor
    hf, native = pair(name, drop_tokens=True, capacity_factor=factor, use_rts=use_rts)
    native.train()
    with gate_inputs(native) as seen:
        logits = native(IDS, use_cache=False).logits
    rates = take_drop_rates(native_blocks(native))
    for (block_name, block), (key, rate) in zip(native_blocks(native).items(), rates.items(), strict=True):
        assert key == f"drop_rate/layer_{block_name.split('.')[2]}"
        made, dropped = dropped_by_hand(seen[block_name].detach(), block, factor)
        assert made == IDS.numel() * k
        assert rate == dropped / made
        assert (rate == 0) == (dropped == 0)
        assert rate > 0 or factor > 0.5
    assert take_drop_rates(native_blocks(native)) == dict.fromkeys(rates, 0.0), "counts start again"
    same = torch.allclose(logits, hf.train()(IDS, use_cache=False).logits, atol=1e-6)
    assert same == (max(rates.values()) == 0)
    if whole:
        assert same, "with E/k times the even share every token has its place"


def test_drops_are_counted_in_training_only_and_the_proof_sees_none() -> None:
    hf, native = pair("mixtral-k2", drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=0.5)
    native.eval()
    assert not torch.allclose(native(IDS, use_cache=False).logits, hf.eval()(IDS, use_cache=False).logits, atol=1e-3)
    with exact_routing(native):
        assert torch.allclose(native(IDS, use_cache=False).logits, hf(IDS, use_cache=False).logits, atol=1e-6)
    assert not torch.allclose(native(IDS, use_cache=False).logits, hf(IDS, use_cache=False).logits, atol=1e-3)
    assert set(take_drop_rates(native_blocks(native)).values()) == {0.0}


OPTIONS: list[tuple[str, dict[str, Any], tuple[bool, bool]]] = [
    ("mixtral-k2", {"noisy_gate_policy": "Jitter"}, (True, False)),
    ("olmoe-k1", {"noisy_gate_policy": "RSample"}, (True, False)),
    ("mixtral-k2", {"top2_2nd_expert_sampling": True}, (True, True)),
    ("mixtral-k2", {"drop_tokens": True, "capacity_factor": 4.0, "eval_capacity_factor": 0.5}, (False, True)),
    ("mixtral-k2", {"drop_tokens": True, "capacity_factor": 0.25, "eval_capacity_factor": 4.0}, (True, False)),
    ("mixtral-k2", {"k": 3}, (True, True)),
]


@pytest.mark.parametrize(("name", "layer", "changes"), OPTIONS, ids=[str(layer) for _, layer, _ in OPTIONS])
def test_every_option_changes_training_or_evaluation(
    name: str, layer: dict[str, Any], changes: tuple[bool, bool]
) -> None:
    torch.manual_seed(0)
    hf, native = pair(name, **layer)
    for training, change in zip((True, False), changes, strict=True):
        ours, theirs = (m.train(training)(IDS, use_cache=False).logits for m in (native, hf))
        assert torch.allclose(ours, theirs, atol=1e-5) != change, training


def test_min_capacity() -> None:
    for least, drops in ((0, True), (IDS.numel(), False)):
        _, native = pair("mixtral-k2", drop_tokens=True, capacity_factor=0.1, min_capacity=least)
        native.train()(IDS, use_cache=False)
        assert (max(take_drop_rates(native_blocks(native)).values()) > 0) == drops


def test_k_is_written_into_the_config_and_is_what_hf_computes_with_it() -> None:
    _, native = pair("mixtral-k2", k=3)
    hf = make_model("mixtral", num_experts_per_tok=3)
    assert native.config.num_experts_per_tok == 3
    ours, theirs = (m.eval()(IDS, labels=IDS, output_router_logits=True, use_cache=False) for m in (native, hf))
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert torch.allclose(ours.aux_loss, theirs.aux_loss)


def test_what_the_layer_cannot_compute_is_refused_here_too() -> None:
    with pytest.raises(UserError, match="use expert_parallel"):
        register_deepspeed_moe(make_model("deepseek_v3"), MoeLayer(), FAMILIES["deepseek_v3"])
    with pytest.raises(UserError, match="ep_size"):
        register_deepspeed_moe(make_model("mixtral"), MoeLayer(ep_size=2), FAMILIES["mixtral"])
