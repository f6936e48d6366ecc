"""The routing of a training run, watched and kept in balance: what :class:`~moe_models.trainer.MoETrainer` calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from moe_models.families import Family
from moe_models.load_stats import LoadStats, overall
from moe_models.router_tap import RouterTap, find_routers

LOAD_FILE = "expert_load.jsonl"
"""In the output folder: one line for each logged step or evaluation, with tokens per expert of every layer."""


class Routing(TrainerCallback):
    """Counts one optimizer step at a time, and logs what it counted."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._family, self._config = family, config
        self._tap: RouterTap | None = None
        self._group: Any = None
        self.stats: LoadStats | None = None

    def attach(self, model: nn.Module, ep_size: int, device: Any) -> None:
        """Put the hooks into a model as it will be trained, that is after ``deepspeed.initialize``."""
        from deepspeed.utils import groups

        if self._tap is not None:
            self._tap.close()
        routers = find_routers(model, self._family, self._config)
        # Tensor-parallel peers route the same tokens; every other rank its own.
        self._group = groups._get_sequence_data_parallel_group() if dist.is_initialized() else None
        self.stats = LoadStats(
            [router.block for router in routers],
            self._family.num_experts(self._config),
            ep_size,
            routers[0].score_func,
            device,
        )
        self._tap = RouterTap(model, routers, self.stats)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Count the coming optimizer step alone."""
        if self.stats is not None:
            self.stats.reset(training=True)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The evaluation is over and logged."""
        if self.stats is not None:
            self.stats.reset(training=False)

    def figures(self, logs: Mapping[str, Any], step: int, output_dir: str) -> dict[str, float]:
        """What to add to the Trainer's ``logs``; collective. Rank 0 appends the layers to ``expert_load.jsonl``."""
        training = "loss" in logs
        evaluated = next((key for key in logs if key.startswith("eval") and key.endswith("_loss")), None)
        if self.stats is None or not (training or evaluated):
            return {}
        layers = self.stats.read(training, self._group)
        if not layers:
            return {}
        if not dist.is_initialized() or dist.get_rank() == 0:
            row = {"step": step, "split": "train" if training else "eval", "layers": [asdict(x) for x in layers]}
            with (Path(output_dir) / LOAD_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        prefix = "" if training or evaluated is None else evaluated.removesuffix("loss")
        return {prefix + name: value for name, value in overall(layers).items()}
