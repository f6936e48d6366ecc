"""What the routers decide, as they decide it: forward hooks on the router of AutoEP, native layers or Hugging Face.

An observer is called once for each MoE layer of each forward pass that counts, with the raw router logits (part of the
autograd graph) and the chosen experts. Left out are forward passes of activation recomputation, which happen inside the
backward pass, and extra passes without gradients while the model is in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from moe_models.engine.blocks import Block


class Observer(Protocol):
    """What a :class:`RouterTap` reports to."""

    def observe(
        self,
        layer: int,
        training: bool,
        logits_TE: torch.Tensor,
        choices_TK: torch.Tensor,
        counted_2E: torch.Tensor | None = None,
    ) -> None:
        """One layer of one forward pass; see :class:`~moe_models.engine.blocks.RoutingObserver`."""


def scores(logits_TE: torch.Tensor, score_func: str) -> torch.Tensor:
    """Router probabilities in fp32; sigmoid scores are scaled to sum 1, as DeepSeek-V3's balance loss takes them."""
    if score_func == "softmax":
        return logits_TE.float().softmax(-1)
    sigmoid_TE = logits_TE.float().sigmoid()
    return sigmoid_TE / sigmoid_TE.sum(-1, keepdim=True)


class RouterTap:
    """The hooks of one model; :meth:`close` takes them out."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], *observers: Observer, first: int = 0) -> None:
        """Hook ``blocks``; the first of them is MoE layer ``first`` of the whole model (of a pipeline, above 0)."""
        self.paused = False
        self._observers = observers
        self._training: bool | None = None
        self._handles: list[Any] = [model.register_forward_pre_hook(self._start)]
        for layer, block in enumerate(blocks, first):
            self._handles += block.watch(self._counts, partial(self._report, layer))

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

    def _report(
        self,
        layer: int,
        logits_TE: torch.Tensor,
        choices_TK: torch.Tensor,
        counted_2E: torch.Tensor | None = None,
    ) -> None:
        for observer in self._observers:
            observer.observe(layer, bool(self._training), logits_TE, choices_TK, counted_2E)
