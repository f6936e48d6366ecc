"""What the routers decide, as they decide it: forward hooks on the router of AutoEP, native layers or Hugging Face.

An observer is called once for each MoE layer of each forward pass that counts, with the raw router logits (part of the
autograd graph) and the chosen experts. Left out are forward passes of activation recomputation, which happen inside the
backward pass, and extra passes without gradients while the model is in training mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moe_models.families.table import Family, moe_blocks


class Observer(Protocol):
    """Who listens to a :class:`RouterTap`."""

    def observe(
        self,
        layer: int,
        training: bool,
        logits_TE: torch.Tensor,
        choices_TK: torch.Tensor,
        counted_2E: torch.Tensor | None = None,
    ) -> None:
        """One layer of one forward pass: raw logits, and the experts that each token was sent to.

        A native layer may choose with noise and drop: there ``choices_TK`` are those without noise, and ``counted_2E``
        says how often each expert was chosen, and how many of these choices were dropped.
        """


@dataclass(frozen=True)
class Router:
    """One MoE block's router."""

    block: str
    """Module path of the block."""
    layer: Any
    """The block."""
    module: Any
    """``layer.router`` of AutoEP, ``layer.gate`` of Hugging Face (in a native layer inside of DeepSpeed's gate)."""

    @property
    def is_autoep(self) -> bool:
        """Whether DeepSpeed's AutoEP built the block."""
        return bool(getattr(self.layer, "_is_autoep_layer", False))

    @property
    def native_gate(self) -> Any:
        """DeepSpeed's gate around the router of a native layer, or None."""
        return self.layer.moe.deepspeed_moe.gate if hasattr(self.layer, "moe") else None

    @property
    def score_func(self) -> str:
        """``softmax``, or ``sigmoid`` (DeepSeek-V3, whose Hugging Face router has the correction bias)."""
        default = "sigmoid" if hasattr(self.module, "e_score_correction_bias") else "softmax"
        return str(getattr(self.module, "score_func", default))


def find_routers(model: nn.Module, family: Family, config: Mapping[str, Any]) -> list[Router]:
    """The routers of the model, in layer order."""
    found = []
    for block in moe_blocks(family, config):
        layer: Any = model.get_submodule(block)
        if getattr(layer, "_is_autoep_layer", False):
            found.append(Router(block, layer, layer.router))
        else:
            found.append(Router(block, layer, layer.moe.deepspeed_moe.gate.wg if hasattr(layer, "moe") else layer.gate))
    return found


def scores(logits_TE: torch.Tensor, score_func: str) -> torch.Tensor:
    """Router probabilities in fp32; sigmoid scores are scaled to sum 1, as DeepSeek-V3's balance loss takes them."""
    if score_func == "softmax":
        return logits_TE.float().softmax(-1)
    sigmoid_TE = logits_TE.float().sigmoid()
    return sigmoid_TE / sigmoid_TE.sum(-1, keepdim=True)


class RouterTap:
    """The hooks of one model; :meth:`close` takes them out."""

    def __init__(self, model: nn.Module, routers: list[Router], *observers: Observer) -> None:
        self.paused = False
        self._observers = observers
        self._training: bool | None = None
        self._logits: dict[int, torch.Tensor] = {}
        self._routed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [model.register_forward_pre_hook(self._start)]
        for index, router in enumerate(routers):
            if router.is_autoep:  # its output has no logits; the linear inside has, and runs first
                self._handles.append(router.module.gate.register_forward_hook(self._gate_hook(index)))
            if router.native_gate is not None:  # runs after the router, which its block shows to hooks first
                self._handles.append(router.native_gate.register_forward_hook(self._native_hook(index)))
                self._handles.append(router.module.register_forward_hook(self._native_router_hook(index)))
                continue
            self._handles.append(router.module.register_forward_hook(self._router_hook(index, router.is_autoep)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _start(self, model: nn.Module, inputs: Any) -> None:
        # Asked here, not in the layers: reentrant checkpointing switches gradients off in its first pass.
        counts = not self.paused and (torch.is_grad_enabled() or not model.training)
        self._training = model.training if counts else None

    def _counts(self) -> bool:
        # Inside a backward pass only activation recomputation runs a router. torch.utils.checkpoint asks the same way.
        return self._training is not None and torch._C._current_graph_task_id() == -1

    def _gate_hook(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, logits_TE: torch.Tensor) -> None:
            if self._counts():
                self._logits[index] = logits_TE

        return hook

    def _native_router_hook(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self._counts():
                self._routed[index] = output[0], output[2]

        return hook

    def _native_hook(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, routing: tuple[Any, ...]) -> None:
            if not self._counts():
                return
            indices_KT, chosen_E = routing[3], routing[-1]
            kept_E = torch.zeros_like(chosen_E)
            kept_E.scatter_add_(0, indices_KT.clamp_min(0).flatten().long(), (indices_KT >= 0).flatten().to(kept_E))
            logits_TE, choices_TK = self._routed.pop(index)
            for observer in self._observers:
                observer.observe(
                    index, bool(self._training), logits_TE, choices_TK, torch.stack([chosen_E, chosen_E - kept_E])
                )

        return hook

    def _router_hook(self, index: int, is_autoep: bool) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if not self._counts():
                return
            # AutoEP: (weights, choices, counts); Hugging Face: (logits, weights, choices).
            logits_TE, choices_TK = (self._logits.pop(index), output[1]) if is_autoep else (output[0], output[2])
            for observer in self._observers:
                observer.observe(index, bool(self._training), logits_TE, choices_TK)

        return hook
