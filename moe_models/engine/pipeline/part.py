"""The pipeline of one training run: what :class:`~moe_models.trainer.MoETrainer` asks for its stages.

Hugging Face's loop stays as it is: it hands over one micro-batch after the other. They are held back until the last one
of the optimizer step is there; then all of them go through the stages at once, in DeepSpeed's 1F1B order. The last
stage's loss is the Trainer's own ``compute_loss``, on the model called with hidden states instead of token ids.

The ranks of a *lane* hold the stages of one replica and read the same rows: rank, rank + D, rank + 2 D and so on, where
D is the ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from moe_models.engine.pipeline.cut import keep_stage
from moe_models.engine.same_function import Askers, askers_of
from moe_models.families.stages import Stage, stage_of


class Pipeline:
    """Stages of ``model`` over the ranks of this run; the process group must exist.

    Args:
        model: the Hugging Face model. What other stages hold is taken out of it here, unless it never was in.
        stages: how many there are.
        accelerator: the Trainer's.
    """

    def __init__(self, model: Any, stages: int, accelerator: Any) -> None:
        rank = dist.get_rank()
        world_size = dist.get_world_size()
        self.stages = stages
        self.lanes = world_size // stages
        self.stage: Stage = stage_of(model.config.to_dict(), stages, rank, world_size)
        self.engine: Any = None
        """Of the run, once it is built: a :class:`~moe_models.engine.pipeline.engine.StagesEngine`."""
        self.arrived: torch.Tensor | None = None
        """On the last stage: the other stages' router statistics of the micro-batch in progress."""
        self._held: list[dict[str, Any]] = []
        self._accelerator = accelerator
        keep_stage(model, self.stage)
        self.askers: Askers = self._askers(model)
        """The ranks of this stage, which ask its blocks what they compute."""

        # upstream: transformers 5.20.2: fills in a train_batch_size that counts stages as if they read different rows.
        # DeepSpeed computes the right one. Remove when: transformers divides by the number of stages.
        accelerator.state.deepspeed_plugin.deepspeed_config.pop("train_batch_size", None)

    def _askers(self, model: Any) -> Askers:
        """Make the groups of all stages; collective."""
        mine = askers_of(model)
        for stage in range(self.stages):
            group = dist.new_group(list(range(stage * self.lanes, (stage + 1) * self.lanes)))
            if stage == self.stage.index:
                mine = replace(mine, group=group)
        return mine

    @contextmanager
    def building(self, trainer: Any) -> Iterator[None]:
        """Inside, the Trainer builds its engine around the stages; outside, its model is Hugging Face's."""
        from moe_models.engine.pipeline.engine import built_in_stages
        from moe_models.engine.pipeline.stages import Stages

        model = trainer.model
        stages = Stages(model, self.stage)
        trainer.model = stages
        trainer.model_wrapped = stages
        try:
            with built_in_stages():
                yield
        finally:
            trainer.model = model
        trainer.callback_handler.model = model
        self.engine = trainer.model_wrapped

    # --- batches

    def deal(self, loader: Any) -> Any:
        """Let a data loader that accelerate has prepared give the ranks of a lane the same rows."""
        # upstream: accelerate 1.15.0: its one axis for ranks with the same rows, "tp", makes them neighbours.
        # Remove when: a mesh may say which ranks read the same rows.
        shard = loader.batch_sampler
        assert hasattr(shard, "num_processes"), f"rows cannot be dealt to lanes by a {type(shard).__name__}"
        shard.num_processes = self.lanes
        shard.process_index = dist.get_rank() % self.lanes
        return loader

    def hold(self, inputs: dict[str, Any]) -> None:
        """Keep one micro-batch for the coming step."""
        self._held.append(inputs)

    def take(self) -> list[dict[str, Any]]:
        """The micro-batches of the step, in order; forgets them."""
        held = self._held
        self._held = []
        return held

    # --- what the Trainer's own code sums and gathers

    @contextmanager
    def gathers_in_stage(self) -> Iterator[None]:
        """Inside, ``accelerator.gather`` gathers over the ranks of this stage: one of each lane."""
        group = self.engine.grid.get_data_parallel_group()

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            mine = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.lanes)]
            dist.all_gather(parts, mine, group=group)
            return torch.cat(parts)

        inside = "gather" in vars(self._accelerator)
        if not inside:
            self._accelerator.gather = gather
        try:
            yield
        finally:
            if not inside:
                del self._accelerator.gather

    def from_last_stage(self, value: Any) -> Any:
        """What the last stage gives, on every stage; for small things."""
        return self.engine.objects_from_last(value)
