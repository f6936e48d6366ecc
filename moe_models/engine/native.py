"""Native layers: the MoE blocks of a stock HF model, replaced by ``deepspeed.moe.layer.MoE``.

:func:`register_deepspeed_moe` takes a model and gives it back; each rank keeps its own experts of the checkpoint. The
model stays an HF model: ``generate``, gradient checkpointing and ``output_router_logits`` work as before.

The code below relies on two facts about DeepSpeed 0.19.8 (``moe/sharded_moe.py``):

- The gate uses nothing of its linear layer ``wg`` but the weight. So ``wg`` can be the HF router itself: HF's recorder
  of router logits goes on finding it, and its weight exists once.
- Both all-to-alls exchange buffers of [experts, capacity, hidden], so all ranks of an EP group need the same capacity.
  DeepSpeed agrees on it only where it drops nothing at top-2 and above; with dropping, or at top-1, ranks with unequal
  token counts would exchange buffers of unequal size and hang. :func:`_agree_on_capacity` closes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from moe_models.config.layout import Layout
from moe_models.config.moe_section import MoeLayer
from moe_models.engine.blocks import split_gate_up
from moe_models.engine.same_function import How, answer_of_one_rank, block_bytes, chosen, main_dtype
from moe_models.errors import UserError
from moe_models.families.table import Family, moe_blocks
from moe_models.preflight.native import inexpressible


class SwiGLU(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, expert_size: int, activation: str, like: torch.Tensor) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": like.dtype}  # filled by the caller
        self.gate_proj = nn.Linear(hidden_size, expert_size, **options)
        self.up_proj = nn.Linear(hidden_size, expert_size, **options)
        self.down_proj = nn.Linear(expert_size, hidden_size, **options)
        self.act_fn = ACT2FN[activation]
        self.to_empty(device=like.device)

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        return cast(torch.Tensor, self.down_proj(self.act_fn(self.gate_proj(x_D)) * self.up_proj(x_D)))


class NativeMoEBlock(nn.Module):
    """What replaces an HF MoE block: DeepSpeed's layer, and the block's shared expert beside it.

    The shared expert and its gate are the HF modules (qwen2_moe has them); a residual MLP (prmoe) is inside the layer.
    """

    is_native_layer = True
    """The mark by which :mod:`moe_models.engine.blocks` knows it without importing DeepSpeed."""

    def __init__(self, moe: MoE, layer: MoeLayer, shared: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.moe = moe
        self.layer = layer
        for name, module in shared.items():
            self.add_module(name, module)
        self.recorder: list[torch.Tensor] | None = None
        self.was_asked = False
        """Whether the block that this one replaced was asked (``engine/same_function.py``)."""
        self.answer_before: torch.Tensor | None = None
        """What it answered, on the rank that asked it: [B, T, D]."""
        self.asked_in: torch.dtype | None = None
        """In which dtype."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; hands the layer's balancing loss to the recorder, if there is one."""
        router = self.moe.deepspeed_moe.gate.wg
        # 1. DeepSpeed's gate uses only the router's weight. HF's recorder of router logits and our RouterTap hook the
        # router itself, so it is called for them, and only then.
        if router._forward_hooks:
            router(x_BTD)
        # 2. Gate, dispatch, experts, combine.
        try:
            y_BTD, l_aux, _ = self.moe(x_BTD)
        finally:
            # DeepSpeed's layer keeps l_aux, and with it the graph of everything before: the activations of every
            # decoder layer that gradient checkpointing recomputed (it leaves by an exception), until the next forward
            # pass.
            self.moe.deepspeed_moe.l_aux = None
        if self.recorder is not None and l_aux.requires_grad:
            self.recorder.append(l_aux)
        # 3. The shared expert, which every token visits.
        if "shared_expert" in self._modules:
            weight_BT1 = torch.sigmoid(self.get_submodule("shared_expert_gate")(x_BTD))
            y_BTD = y_BTD + weight_BT1 * self.get_submodule("shared_expert")(x_BTD)
        return cast(torch.Tensor, y_BTD)


def register_deepspeed_moe(model: Any, layer: MoeLayer, family: Family, check_conversion: How = "auto") -> Any:
    """Replace every MoE block of ``model`` by a native one with the same weights; call it before the engine is built.

    Needs the process group (without one: a single rank). A ``layer.k`` is written into the model's config.
    ``check_conversion`` says which blocks are asked for what they compute (``engine/same_function.py``); the trainer
    compares.

    Raises:
        UserError: if the layer cannot compute what the model's blocks compute, or the sizes do not fit.
    """
    # 1. Refuse what the layer cannot compute.
    config = model.config.to_dict()
    problems = inexpressible(layer, family, config)
    if problems:
        raise UserError(problems)
    # 2. Which experts this rank holds.
    rank = 0
    world_size = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world_size = dist.get_world_size()
    layout = Layout(world_size, layer.ep_size)
    # 3. A top-k of its own is part of the model from here on.
    if layer.k is not None:
        model.config.num_experts_per_tok = layer.k
        model.num_experts_per_tok = layer.k
    # 4. Block after block, so that no more than one is in memory twice.
    paths = list(moe_blocks(family, config))
    asked = chosen(paths, [block_bytes(model.get_submodule(path)) for path in paths], check_conversion)
    for path, E in zip(paths, family.expert_counts(config), strict=True):
        block = model.get_submodule(path)
        block.gate.top_k = layer.k or model.config.num_experts_per_tok
        answer = None
        if path in asked:
            answer = answer_of_one_rank(block, model.config.hidden_size, asked.index(path), dtype=main_dtype(block))
        native = _native_block(block, model.config, layer, layout.experts_of(rank, E))
        native.was_asked = path in asked
        native.answer_before = answer
        native.asked_in = main_dtype(native)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, native)
    return model


def _native_block(block: nn.Module, config: Any, layer: MoeLayer, mine: range) -> NativeMoEBlock:
    """A native block with the weights of Hugging Face's ``block``; ``mine`` are the experts that this rank holds."""
    # 1. Sizes, from the weights.
    router: Any = block.get_submodule("gate")
    gate_up_E2FD = block.get_parameter("experts.gate_up_proj")
    down_EDF = block.get_parameter("experts.down_proj")
    E, D, F = down_EDF.shape
    k = layer.k or config.num_experts_per_tok
    # 2. DeepSpeed's layer; it makes one copy of the expert module for each local expert.
    moe = MoE(
        hidden_size=D,
        expert=SwiGLU(D, F, config.hidden_act, down_EDF),
        num_experts=E,
        ep_size=layer.ep_size,
        k=k,
        capacity_factor=layer.capacity_factor,
        eval_capacity_factor=layer.eval_capacity_factor,
        min_capacity=layer.min_capacity,
        use_residual=hasattr(block, "residual_mlp"),
        noisy_gate_policy=layer.noisy_gate_policy,
        drop_tokens=layer.drop_tokens,
        use_rts=layer.use_rts,
        top2_2nd_expert_sampling=layer.top2_2nd_expert_sampling,
    )
    # 3. Its experts get this rank's share of the weights.
    with torch.no_grad():
        for expert, e in zip(moe.deepspeed_moe.experts.deepspeed_experts, mine, strict=True):
            gate_FD, up_FD = split_gate_up(gate_up_E2FD[e])  # of this expert only: the others may be still on disk
            expert.gate_proj.weight.copy_(gate_FD)
            expert.up_proj.weight.copy_(up_FD)
            expert.down_proj.weight.copy_(down_EDF[e])
    # 4. Everything that is not spread stays the HF module: residual MLP, router, shared expert.
    if moe.use_residual:
        moe.mlp = block.residual_mlp
        moe.coefficient = block.coefficient
    gate = moe.deepspeed_moe.gate
    gate.wg = router
    # Choices made and choices dropped, in training, since take_drop_rates last read them.
    gate.routes = torch.zeros(2, dtype=torch.long, device=down_EDF.device)
    gate.register_forward_hook(_agree_on_capacity)
    shared = {name: module for name, module in block.named_children() if name.startswith("shared_expert")}
    return NativeMoEBlock(moe, layer, shared).train(block.training)


def _agree_on_capacity(gate: Any, args: Any, routing: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of the gate: the largest capacity of the EP group for all of it; counts routes made and dropped."""
    l_aux, capacity, num_experts, indices_KT, *rest = routing
    # 1. Count: a dropped choice has the index -1.
    if gate.training and gate.drop_tokens:
        made = torch.tensor(indices_KT.numel()).to(indices_KT.device)
        dropped = (indices_KT < 0).sum()
        gate.routes = gate.routes.to(indices_KT.device)
        gate.routes += torch.stack([made, dropped])
    # 2. Agree, where the ranks of the group could come to different capacities.
    spread = gate.ep_group is not None and dist.get_world_size(gate.ep_group) > 1
    # upstream: deepspeed 0.19.8: it agrees on the capacity only where it drops nothing at top-2 and above; otherwise
    # the all-to-all can hang. Remove when: its gates agree on the capacity in all modes.
    if spread and (gate.drop_tokens or gate.k == 1):
        capacity = capacity.to(indices_KT.device, copy=True)
        dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=gate.ep_group)
    return (l_aux, capacity, num_experts, indices_KT, *rest)


def native_blocks(model: nn.Module) -> dict[str, NativeMoEBlock]:
    """The native blocks of a model by module path, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NativeMoEBlock)}


@contextmanager
def record_aux_losses(blocks: Mapping[str, NativeMoEBlock]) -> Iterator[list[torch.Tensor]]:
    """Inside, a forward pass with gradients adds each block's ``l_aux`` to the list; recomputations later do not."""
    recorded: list[torch.Tensor] = []
    for block in blocks.values():
        block.recorder = recorded
    try:
        yield recorded
    finally:
        for block in blocks.values():
            block.recorder = None


def mean_aux_loss(recorded: list[torch.Tensor], blocks: Mapping[str, NativeMoEBlock]) -> torch.Tensor:
    """Mean over the blocks of the ``l_aux`` that one forward pass recorded.

    For one layer with expert shares f (of first choices at top-1 and top-2, of all k choices divided by k above) and
    mean probabilities p over all E experts, padding included, ``l_aux`` is E x sum(f x p): 1 if perfectly balanced.
    HF's loss is E x sum(f x p) once over the tokens of all layers together, without padding, with all k choices not
    divided by k: top-k if perfectly balanced.

    Raises RuntimeError if some are missing: reentrant gradient checkpointing cuts them off, and nothing would balance.
    """
    if len(recorded) != len(blocks):
        raise RuntimeError(
            f"the balancing loss of {len(blocks) - len(recorded)} of {len(blocks)} MoE layers has no gradient; with "
            '"aux_loss": "layer" gradient checkpointing needs --gradient_checkpointing_kwargs '
            "'{\"use_reentrant\": false}'"
        )
    return torch.stack(recorded).mean()


def take_drop_rates(blocks: Mapping[str, NativeMoEBlock]) -> dict[str, float]:
    """Share of routes dropped in training since the last call, by decoder layer, over all ranks (collective)."""
    # 1. [L, 2]: choices made and choices dropped of each layer; the counters start again.
    routes_L2 = torch.stack([block.moe.deepspeed_moe.gate.routes for block in blocks.values()])
    for block in blocks.values():
        block.moe.deepspeed_moe.gate.routes = torch.zeros_like(routes_L2[0])
    if dist.is_initialized():
        dist.all_reduce(routes_L2)
    # 2. Their ratio, under the number of the decoder layer.
    rates = {}
    for path, (made, dropped) in zip(blocks, routes_L2.tolist(), strict=True):
        layer = path.split(".")[-2]  # model.layers.<l>.mlp
        rates[f"drop_rate/layer_{layer}"] = dropped / max(1, made)
    return rates


@contextmanager
def exact_routing(model: nn.Module) -> Iterator[None]:
    """Inside, native layers compute what the exported HF model will: nothing is dropped or drawn at random."""
    switches = ("drop_tokens", "use_rts", "top2_2nd_expert_sampling")
    gates = [block.moe.deepspeed_moe.gate for block in native_blocks(model).values()]
    before = [[getattr(gate, switch) for switch in switches] for gate in gates]
    for gate in gates:
        for switch in switches:
            setattr(gate, switch, False)
    try:
        yield
    finally:
        for gate, values in zip(gates, before, strict=True):
            for switch, value in zip(switches, values, strict=True):
                setattr(gate, switch, value)
