"""The routing of a training run, watched and kept in balance: what :class:`~moe_models.trainer.MoETrainer` calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from moe_models.config.moe_section import Balance
from moe_models.engine.blocks import find_blocks
from moe_models.families.stages import Stage
from moe_models.families.table import Family, moe_blocks
from moe_models.files import RunLog
from moe_models.routing.bias import SelectionBias
from moe_models.routing.load import LoadStats, overall
from moe_models.routing.losses import AuxLoss
from moe_models.routing.tap import Observer, RouterTap

LOAD_FILE = "expert_load.jsonl"
"""In the output folder: one line for each logged step or evaluation, with tokens per expert of every layer."""


BIAS_FILE = "selection_bias.json"
"""In a checkpoint, and beside an exported model that has no place for it: MoE block -> selection bias of each expert.

Not a .safetensors: loaders take every such file of a folder for weights of the model.
"""


class Routing(TrainerCallback):
    """Counts one optimizer step at a time, logs what it counted, and balances as the JSON says.

    ``balance`` None leaves the auxiliary loss to TRL and the model.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], balance: Balance | None, aux_coef: float) -> None:
        self._family = family
        self._config = config
        self._balance = balance
        self._coefficients: dict[str, float] = {}
        if balance is not None:
            self._coefficients = {"aux_loss": aux_coef, "z_loss": balance.z_loss_coef}
        self._tap: RouterTap | None = None
        self._group: Any = None
        self._peers: Any = None
        self._logged: dict[str, torch.Tensor] = {}
        self._micro_batches = 0
        self._file = RunLog("the load of the experts is not logged")
        self._counted_by: Any = None
        self.stats: LoadStats | None = None
        self.aux: AuxLoss | None = None
        self.aux_in_evaluation: AuxLoss | None = None
        """Of a pipeline whose evaluation adds the auxiliary loss: no stage could compute the model's own."""
        self.bias: SelectionBias | None = None

    def attach(
        self,
        model: nn.Module,
        ep_size: int,
        device: Any,
        peers: Any = None,
        stage: Stage | None = None,
        loss_in_evaluation: bool = False,
    ) -> None:
        """Put the hooks into a model as it will be trained, that is after ``deepspeed.initialize``.

        Args:
            model: the model inside the engine.
            ep_size: ranks of one expert-parallel group, for the load of the ranks.
            device: where the counters are kept.
            peers: the process group of the ranks that share a sequence (sequence parallelism), or None.
            stage: the pipeline stage that ``model`` is; None where it is whole.
            loss_in_evaluation: whether the stages of a pipeline compute the auxiliary loss in evaluation, too.
        """
        from deepspeed.utils import groups

        if self._tap is not None:
            self._tap.close()
        # 1. Where to listen, and over which ranks to sum: tensor-parallel peers route the same tokens, every other
        #    rank its own.
        blocks = find_blocks(model)
        self._group = groups._get_sequence_data_parallel_group() if dist.is_initialized() else None
        self._counted_by = self._group
        self._peers = peers
        experts = self._family.expert_counts(self._config)
        score_func = self._family.router.score
        paths = [block.path for block in blocks]
        here: range | None = None
        entry = model
        if stage is not None:
            # Each stage counts its own layers of all. Only the model's body is called on every stage.
            self._counted_by = dist.group.WORLD
            paths = list(moe_blocks(self._family, self._config))
            first = paths.index(blocks[0].path)
            here = range(first, first + len(blocks))
            entry = model.get_submodule("model")

        # 2. The counters, always.
        self.stats = LoadStats(paths, experts, ep_size, score_func, device)
        observers: list[Observer] = [self.stats]

        # 3. What the JSON asks for.
        balance = self._balance
        if balance is not None and any(self._coefficients.values()):
            self.aux = AuxLoss(experts, score_func, balance.scope, balance.per_layer, self._group, peers, here)
            observers.append(self.aux)
        if loss_in_evaluation:
            self.aux_in_evaluation = AuxLoss(experts, score_func, "micro_batch", False, here=here, training=False)
            observers.append(self.aux_in_evaluation)
        if balance is not None and balance.bias_update_rate:
            self.bias = SelectionBias(blocks, experts[0], balance.bias_update_rate, device)
        self._tap = RouterTap(entry, blocks, *observers, first=here.start if here else 0)

    def loss(
        self, inputs: Mapping[str, Any], micro_batches: int, arrived: torch.Tensor | None = None
    ) -> torch.Tensor | float:
        """The weighted balance terms of the training forward pass that just ended.

        Args:
            inputs: the micro-batch, for its padding.
            micro_batches: how many of them make one optimizer step; each gives its share.
            arrived: on the last stage of a pipeline, the other stages' statistics.
        """
        if self.aux is None:
            return 0.0
        total: torch.Tensor | float = 0.0
        terms = self.aux.terms(inputs) if arrived is None else self.aux.terms_of_stages(inputs, arrived)
        for name, term in terms.items():
            if self._coefficients[name]:
                total = total + self._coefficients[name] * term / micro_batches
                self._logged[name] = self._logged.get(name, 0.0) + term.detach()
        self._micro_batches += 1
        return total

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Count the coming optimizer step alone."""
        if self.stats is not None:
            self.stats.reset(training=True)
        if self.aux is not None:
            self.aux.new_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the selection bias after an optimizer step that was made; collective."""
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)  # fp16: a gradient overflowed
        if self.bias is not None and self.stats is not None and not skipped:
            self.bias.update(self.stats.counts(True, self._group))

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The evaluation is over and logged."""
        if self.stats is not None:
            self.stats.reset(training=False)

    def figures(self, logs: Mapping[str, Any], step: int, output_dir: str) -> dict[str, float]:
        """What to add to the Trainer's ``logs``; collective. Rank 0 appends the layers to ``expert_load.jsonl``."""
        training = "loss" in logs
        evaluated = None
        for key in logs:
            if key.startswith("eval") and key.endswith("_loss"):
                evaluated = key
                break
        if self.stats is None or not (training or evaluated):
            return {}

        # 1. Sum the counts over the ranks. In evaluation sequence-parallel peers do not share a sequence: each routes
        #    all of it, and is counted once.
        copies = 1
        if self._peers is not None and not training:
            copies = dist.get_world_size(self._peers)
        layers = self.stats.read(training, self._counted_by, copies)
        if not layers:
            return {}

        # 2. Every layer goes to the file.
        if not dist.is_initialized() or dist.get_rank() == 0:
            row = {"step": step, "split": "train" if training else "eval", "layers": [asdict(x) for x in layers]}
            self._file.add(Path(output_dir) / LOAD_FILE, json.dumps(row) + "\n")

        # 3. Their summary goes to the log, in evaluation under its prefix.
        if training:
            return {**overall(layers), **self._terms()}
        prefix = evaluated.removesuffix("loss") if evaluated else ""
        return {prefix + name: value for name, value in overall(layers).items()}

    def _terms(self) -> dict[str, float]:
        """The unweighted balance terms, averaged over ranks and over the micro-batches since the last call."""
        figures = {}
        for name, total in self._logged.items():
            mean = total / self._micro_batches
            if dist.is_initialized():
                dist.all_reduce(mean, group=self._group)
                mean /= dist.get_world_size(self._group)
            if self._peers is not None:  # which hold shares of a term
                mean *= dist.get_world_size(self._peers)
            figures[name] = mean.item()
        self._logged = {}
        self._micro_batches = 0
        if self.bias is not None:
            figures["selection_bias_max"] = self.bias.bias_LE.abs().max().item()
        return figures

    # --- checkpoints and export

    def save(self, folder: Path) -> None:
        """Write the selection bias into a checkpoint or a model folder; one process calls it."""
        if self.bias is not None:
            (folder / BIAS_FILE).write_text(json.dumps(self.bias.state(), indent=1) + "\n")

    def load(self, folder: Path) -> None:
        """Go on with the selection bias of a checkpoint; it starts anew where the checkpoint has none."""
        if self.bias is not None and (folder / BIAS_FILE).exists():
            self.bias.load(json.loads((folder / BIAS_FILE).read_text()))

    @property
    def left_out(self) -> str | None:
        """What an exported folder cannot hold, in one line, or None."""
        if self.bias is None or self.bias.exportable:
            return None
        return (
            f"{self._config['model_type']} has no place for the selection bias (up to "
            f"{self.bias.bias_LE.abs().max().item():.4f} here): the exported model routes without it; the bias of each "
            f"layer is in {BIAS_FILE} beside it"
        )

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Route as the exported model will, and count nothing."""
        if self._tap is not None:
            self._tap.paused = True
        if self.bias is not None:
            self.bias.disconnect()
        try:
            yield
        finally:
            if self._tap is not None:
                self._tap.paused = False
            if self.bias is not None:
                self.bias.connect()
