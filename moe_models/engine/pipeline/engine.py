"""DeepSpeed's pipeline engine for :class:`~moe_models.engine.pipeline.stages.Stages`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from moe_models.engine.pipeline.stages import Batch, Passage


class StagesEngine(PipelineEngine):
    """A ``PipelineEngine`` whose stages send more than one tensor, and whose weights are saved as those of any engine.

    :func:`built_in_stages` makes ``deepspeed.initialize`` build it.
    """

    def train_passage(self, passage: Passage) -> torch.Tensor:
        """One optimizer step. Returns the mean loss over micro-batches and lanes, a scalar, on every rank.

        The last step of an epoch may have fewer micro-batches than the others.
        """
        count = len(passage.batches)
        if self.micro_batches != count:
            self.set_train_batch_size(count * self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        self.module.begin(passage)
        loss: torch.Tensor = self.train_batch(_rows(passage))
        return loss.detach().reshape(())

    def evaluate_passage(self, passage: Passage) -> torch.Tensor:
        """The loss of one micro-batch without gradients: each lane's own, on all of its stages."""
        own: list[torch.Tensor] = []

        def finish(batch: Batch, hidden: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
            own.append(passage.finish(batch, hidden, arrived).detach().reshape(()))
            return own[0]

        self.module.begin(Passage(batches=passage.batches, finish=finish, carry=passage.carry))
        self.eval_batch(_rows(passage), num_micro_batches=1)
        mine = own[0] if own else torch.zeros((), device=self.device)
        return self._from_last(mine)

    def forward(self, *, input_ids: torch.Tensor, logits_to_keep: int = 0, use_cache: bool = False) -> Any:
        """Logits [B, T, V] as attribute ``logits``, without gradients: each lane's own, on all of its stages.

        Every rank calls it. ``logits_to_keep``: of the last positions only; 0 is all. Nothing is cached.
        """
        logits: list[torch.Tensor] = []

        def finish(batch: Batch, hidden: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
            (model,) = self.module._model
            output = model(inputs_embeds=hidden, use_cache=False, logits_to_keep=logits_to_keep)
            logits.append(output.logits.float())
            return logits[0].mean()

        self.module.begin(Passage(batches=[{"input_ids": input_ids}], finish=finish))
        self.eval_batch(iter([(input_ids, input_ids)]), num_micro_batches=1)
        B, T = input_ids.shape
        shape = (B, logits_to_keep or T, self.module.config.vocab_size)
        mine = logits[0].contiguous() if logits else torch.zeros(shape, device=self.device)
        return SimpleNamespace(logits=self._from_last(mine))

    def _from_last(self, value: torch.Tensor) -> torch.Tensor:
        """The last stage's tensor on all stages of the lane; others give one of its shape and dtype."""
        dist.broadcast(value, src=self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        return value

    def objects_from_last(self, value: Any) -> Any:
        """What the last stage gives, on all stages of the lane; pickled, so for small things."""
        box = [value]
        dist.broadcast_object_list(box, src=self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        return box[0]

    # upstream: deepspeed 0.19.8: for each floating tensor that a stage has sent it runs one whole backward pass, the
    # graph retained. Remove when: it calls torch.autograd.backward once with all of them.
    def _exec_backward_pass(self, buffer_id: int) -> None:
        """One backward pass from all tensors that this stage has sent."""
        if self.is_last_stage():
            super()._exec_backward_pass(buffer_id)
            return
        # 1. What was sent, and the gradients that came back.
        outputs = self.pipe_buffers["outputs"][buffer_id]
        gradients = self.grad_layer
        if torch.is_tensor(outputs):
            outputs = (outputs,)
            gradients = (gradients,)
        # 2. The pass. DeepSpeed asks for the mark around it, and for the two calls where gradients are kept in fp32.
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads()
        self._running_engine_backward = True
        try:
            torch.autograd.backward(list(outputs), list(gradients))
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer and not self._config.bfloat16_config.immediate_grad_update:
            self.optimizer.update_hp_grads(clear_lp_grads=False)
        # 3. The graph is not needed any more.
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.BackwardPass: _exec_backward_pass,
    }

    # upstream: deepspeed 0.19.8: a pipeline saves one file for each layer that is a module, and here none is: it would
    # write no weights, without a word. Remove when: it saves what is not in a layer, too.
    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """As of an engine without stages: this stage's tensors, in its file of model states."""
        return DeepSpeedEngine.module_state_dict(self, exclude_frozen_parameters=exclude_frozen_parameters)

    def load_module_state_dict(self, checkpoint: Any, **options: Any) -> None:
        """As of an engine without stages."""
        DeepSpeedEngine.load_module_state_dict(self, checkpoint, **options)


def _rows(passage: Passage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What DeepSpeed pulls on the first and the last stage, one pair for each micro-batch; the stages have the rest."""
    return iter([(batch["input_ids"], batch["input_ids"]) for batch in passage.batches])


# upstream: deepspeed 0.19.8: initialize builds the class that its module calls PipelineEngine, and takes no other.
# Remove when: it takes a class, or the two patches of StagesEngine are not needed.
@contextmanager
def built_in_stages() -> Iterator[None]:
    """Inside, ``deepspeed.initialize`` builds a :class:`StagesEngine` around a pipeline module."""
    before = deepspeed.PipelineEngine
    deepspeed.PipelineEngine = StagesEngine
    try:
        yield
    finally:
        deepspeed.PipelineEngine = before
