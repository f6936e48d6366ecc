"""The stage of this rank as DeepSpeed's pipeline engine wants it.

DeepSpeed's ``PipelineModule`` is a list of layers that are cut into stages. Here each of its "layers" is a whole stage,
and a plain function: it calls what :func:`~moe_models.engine.pipeline.cut.keep_stage` left of the Hugging Face model.
Parameters are not in a list of layers but where Hugging Face has them.

What travels from stage to stage is the hidden states [B, T, D], and beside them, where a balancing loss acts, one fp32
tensor of router statistics (:meth:`moe_models.routing.losses.AuxLoss.carried`). Masks and positions do not travel:
every stage reads the same rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from deepspeed.pipe import PipelineModule

from moe_models.engine.pipeline.cut import keep_stage, tied_names
from moe_models.families.stages import EMBEDDING, HEAD, Stage

Batch = Mapping[str, Any]
"""A micro-batch as the data loader gives it."""

NOT_FOR_THE_BODY = ("input_ids", "labels", "shift_labels")
"""Of a micro-batch: what only the first or the last stage uses."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What goes through the pipeline in one call of the engine."""

    batches: Sequence[Batch]
    """The micro-batches, in order; equal on all stages of a lane."""
    finish: Callable[[Batch, torch.Tensor, torch.Tensor | None], torch.Tensor]
    """``finish(batch, hidden, arrived)`` on the last stage: the rest of the forward pass, and the loss."""
    carry: Callable[[Batch], torch.Tensor] | None = None
    """``carry(batch)``: this stage's statistics of the forward pass that just ended. None: hidden states only.

    DeepSpeed wants a gradient for every floating tensor that was sent, so it is None where no loss uses them.
    """


class Stages(PipelineModule):
    """This rank's stage of a Hugging Face causal LM; parameters keep Hugging Face's names.

    Every rank must build it: process groups are made.

    Args:
        model: the Hugging Face model; what other stages hold is taken out of it.
        stage: which part of it this rank holds.
    """

    def __init__(self, model: Any, stage: Stage) -> None:
        keep_stage(model, stage)
        with redirect_stdout(io.StringIO()):  # it prints its list of layers, which are functions here
            super().__init__(
                [self._run] * stage.count,
                num_stages=stage.count,
                loss_fn=self._finish,
                partition_method="uniform",
                dynamic_shape=True,  # batches are ragged
            )
        # 1. Hugging Face's names. The model itself is not a module of this one: its children are.
        self.stage = stage
        self.config = model.config
        self._model = (model,)
        self.model = model.model
        self.lm_head = model.lm_head
        self.saved_as = tied_names(model, model.config.to_dict())
        # 2. What is going on.
        self._passage = Passage(batches=(), finish=_not_now)
        self._turn = 0
        # 3. A tied weight is on two stages. Its gradients are summed, and one of the two counts in the norm.
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        self._tied: list[tuple[torch.Tensor, Any]] = []
        if model.config.tie_word_embeddings:
            self._tie()

    def _tie(self) -> None:
        """Make the groups of the first and the last stage; collective."""
        weights = dict(self.named_parameters())
        for lane in self._grid.pipe_groups:
            ends = [lane[0], lane[-1]]
            group = comm.new_group(ends)
            if self.global_rank not in ends:
                continue
            weight = weights[EMBEDDING if self.stage.first else HEAD]
            weight.ds_pipe_replicated = not self.stage.first
            self._tied.append((weight, group))

    def get_tied_weights_and_groups(self) -> list[tuple[torch.Tensor, Any]]:
        """What DeepSpeed sums the gradients of before it reduces them over the data-parallel ranks."""
        return self._tied

    def train(self, mode: bool = True) -> Stages:
        """As in torch; the Hugging Face model goes along."""
        self._model[0].train(mode)
        super().train(mode)
        return self

    def begin(self, passage: Passage) -> None:
        """What the coming passes through the pipeline are for."""
        self._passage = passage
        self._turn = 0

    def _next(self) -> Batch:
        """The micro-batch whose turn it is on this stage: each stage gets them in order."""
        batch = self._passage.batches[self._turn]
        self._turn += 1
        return batch

    def _run(self, arrived: Any) -> Any:
        """One micro-batch through this stage: what the next one gets."""
        if self.stage.last:
            return arrived  # all that is left is in _finish, which has the loss too
        batch = self._next()
        # 1. The layers, from token ids or from the hidden states of the stage before.
        hidden, statistics = _parts(arrived)
        options = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_BODY}
        if self.stage.first:
            options["input_ids"] = batch["input_ids"]
        else:
            options["inputs_embeds"] = hidden
        hidden_BTD = self.model(**options, use_cache=False).last_hidden_state
        # 2. What the routers did, added to that of the stages before.
        if self._passage.carry is None:
            return hidden_BTD
        own = self._passage.carry(batch)
        if self.stage.first:
            return hidden_BTD, own
        return hidden_BTD, statistics + own

    def _finish(self, arrived: Any, labels: Any) -> torch.Tensor:
        """The last stage's layers, the head and the loss."""
        hidden, statistics = _parts(arrived)
        return self._passage.finish(self._next(), hidden, statistics)


def _parts(arrived: Any) -> tuple[Any, Any]:
    """(hidden states, statistics or None)."""
    if isinstance(arrived, tuple):
        return arrived
    return arrived, None


def _not_now(batch: Batch, hidden: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
    raise RuntimeError("nothing was sent through the pipeline")
