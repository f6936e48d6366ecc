"""``MoETrainer``: TRL's ``SFTTrainer`` with checkpoints that are whole, and a model folder that holds every expert.

Everything a Trainer does well (data, packing, loss scaling, logging, schedules, resume) stays with TRL, transformers
and accelerate. What is added here, and why:

- ``save_model`` exports a complete Hugging Face folder. HF's own version keeps one rank's experts under AutoEP.
- Checkpoints during training hold DeepSpeed's states and no HF weights, and appear under their final name only when
  every rank has finished writing.
- A loss, gradient or weight that is not finite ends the run before it can reach a checkpoint.
- Weight decay spares norms and biases, as it does in a Trainer without DeepSpeed.
- After ``deepspeed.initialize`` the AutoEP blocks are counted.
- A checkpoint of another layout can be resumed (``moe_models/checkpoint/resume.py``).
- Native layers (``moe_models/engine/native.py``): their own balancing loss joins the loss, and their drop rate is
  logged.
- The load of the experts is logged with the loss, and balanced as ``"moe": {"balance": ...}`` says.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from moe_models.checkpoint.export import export
from moe_models.checkpoint.from_engine import EngineSource
from moe_models.checkpoint.hf_folder import DEFAULT_MAX_SHARD_BYTES, save_companions
from moe_models.checkpoint.proof import ExportProof, prove_folder, record_logits
from moe_models.checkpoint.resume import LAYOUT_FILE, any_layout, describe_engine
from moe_models.checkpoint.source import is_writer
from moe_models.config.moe_section import Balance
from moe_models.engine.autoep import check_replaced, register_presets, restore_rotary_buffers
from moe_models.engine.grad_norm import count_every_expert_in_the_norm, norm_in_one_pass
from moe_models.engine.native import exact_routing, mean_aux_loss, native_blocks, record_aux_losses, take_drop_rates
from moe_models.engine.plain_transformers import remember_shipped
from moe_models.engine.ulysses import UlyssesTrainer
from moe_models.engine.weight_decay import decay_groups
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.families.table import FAMILIES, Family
from moe_models.preflight.run import reentrant_problems
from moe_models.routing.callback import Routing

MODEL_FOLDER = "model"
"""Where ``save_model()`` without a folder puts the Hugging Face checkpoint, inside ``output_dir``."""

STAGING_FOLDER = ".writing"
"""Where a checkpoint grows, inside ``output_dir``, until it gets its name."""


class TrainingStoppedError(RuntimeError):
    """The run ended itself to protect what it had; the message says why and what to do."""


class MoETrainer(UlyssesTrainer):
    """SFTTrainer for HF MoE models under DeepSpeed; takes the same arguments.

    Raises:
        ValueError: if the model's ``model_type`` is not in :data:`~moe_models.families.table.FAMILIES`, or if flags of
            activation checkpointing, packing or attention cannot be honoured.
        RuntimeError: when training starts, if AutoEP did not replace exactly the model's MoE blocks.
        TrainingStoppedError: during training, when loss, gradient norm or weights are not finite.
        ExportError: from :meth:`save_model`, if the folder would not hold the whole model.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
        balance: Balance | None = None,
        **kwargs: Any,
    ) -> None:
        if model.config.model_type not in FAMILIES:
            raise ValueError(f"model_type {model.config.model_type!r} is not one of {sorted(FAMILIES)}")
        self.family: Family = FAMILIES[model.config.model_type]
        # TRL switches router logits on in the config; the exported config.json is the one that came in.
        self.source_config = copy.deepcopy(model.config)
        self.max_shard_bytes = max_shard_bytes
        self.last_proof: ExportProof | None = None
        restore_rotary_buffers(model)
        remember_shipped(model)
        register_presets()
        super().__init__(model, *args, **kwargs)
        if problems := reentrant_problems(self.args, self.aux_loss_enabled):
            raise ValueError(problems[0])
        self.native = native_blocks(model)
        layers = [block.layer for block in self.native.values()]
        self._drops_tokens = any(layer.drop_tokens for layer in layers)
        self._layer_aux_loss = any(layer.aux_loss == "layer" for layer in layers)
        if self._layer_aux_loss:  # in the place of the model's own
            self.aux_loss_enabled = model.config.output_router_logits = False
        elif balance is None and self.family.model_type == "prmoe":  # TRL's pools layers, which here differ in size
            balance = Balance(per_layer=True)  # type: ignore[call-arg]
        elif balance is None and self.ulysses is not None:  # TRL's would balance the tokens of each rank alone
            balance, self.aux_loss_in_evaluation = Balance(), self.aux_loss_enabled  # type: ignore[call-arg]
        coefficient = self.router_aux_loss_coef
        if balance is not None:  # ours instead of TRL's
            coefficient = coefficient if balance.aux_loss_coef is None else balance.aux_loss_coef
            self.aux_loss_enabled = model.config.output_router_logits = False
        if self.family.model_type != "prmoe":
            self._sizes = model_sizes(self.source_config.to_dict())
        self.routing = Routing(self.family, self.source_config.to_dict(), balance, coefficient)
        self.add_callback(self.routing)
        # HF would replace a NaN loss by the running average in its logs; here it must be seen.
        self.args.logging_nan_inf_filter = False
        self._all_finite = torch.ones((), dtype=torch.bool, device=self.args.device)

    # --- before the first step

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if is_writer():  # left by a run that was killed while it saved
            shutil.rmtree(Path(self.args.output_dir) / STAGING_FOLDER, ignore_errors=True)
        with any_layout(self.family):
            prepared = super()._prepare_for_training(*args, **kwargs)
        section = (self.accelerator.state.deepspeed_plugin.deepspeed_config or {}).get("expert_parallel") or {}
        if self.get_tp_size() > 1 and self.ulysses is None:
            count_every_expert_in_the_norm(self.model_wrapped.optimizer)
            self._tp_size = self.get_tp_size()  # TRL counts the tokens that peers share once for each
        else:
            norm_in_one_pass(self.model_wrapped.optimizer)
        if section.get("enabled"):
            check_replaced(self.model, self.family, self.source_config.to_dict(), section.get("autoep_size", 1))
        ep_size = section.get("autoep_size", 1) if section.get("enabled") else 1
        for block in self.native.values():
            ep_size = block.layer.ep_size
        self.routing.attach(self.model, ep_size, self.args.device, self.ulysses.group if self.ulysses else None)
        resumed = kwargs.get("resume_from_checkpoint", args[2] if len(args) > 2 else None)
        if resumed is not None:
            self.routing.load(Path(resumed))
        return prepared

    def create_optimizer(self, model: Any = None) -> Any:
        """As in HF; the optimizer of the ds_config JSON gets HF's two groups, where HF would decay every weight."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, DummyOptim):
            optimizer.params = decay_groups(self.model, set(self.get_decay_parameter_names(self.model)))
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add how evenly tokens were spread: see :data:`moe_models.routing.load.LOGGED`."""
        logs.update(self.routing.figures(logs, self.state.global_step, self.args.output_dir))
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # HF would train one more step of a run that was finished
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- the loss, and the terms that join it

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; in training with the terms of ``"moe": {"balance": ...}`` or the native layers' own."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Each term is a mean over one micro-batch: averaged over accumulation here (Trainer leaves that to us where it
        # counts tokens itself), and over ranks by the gradients.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        if not self._layer_aux_loss:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss + self.routing.loss(inputs, steps)
        with record_aux_losses(self.native) as recorded:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        aux_loss = mean_aux_loss(recorded, self.native)
        self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        return loss + self.router_aux_loss_coef * aux_loss / steps

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOP of a micro-batch by the experts that a token meets; HF counts them all, anew in each micro-batch."""
        if self.family.model_type == "prmoe":
            return int(super().floating_point_ops(inputs))
        length, tokens = inputs["input_ids"].shape[-1], inputs["input_ids"].numel()
        return int(tokens * sum(train_flops(self._sizes, length)))

    # --- finite or stop

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; remembers on the device, without waiting for it, whether the loss was finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._all_finite &= torch.isfinite(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._stop_if_not_finite(grad_norm)
        if self._drops_tokens and self.control.should_log:
            self._metrics["train"].update({name: [rate] for name, rate in take_drop_rates(self.native).items()})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _stop_if_not_finite(self, grad_norm: Any) -> None:
        finite = self._all_finite.float()
        scaled = getattr(self.model_wrapped.optimizer, "dynamic_loss_scale", False)  # fp16 leaves out what overflows
        if grad_norm is not None and not (scaled and self.accelerator.optimizer_step_was_skipped):
            finite *= torch.isfinite(torch.as_tensor(grad_norm, device=finite.device)).float().squeeze()
        if self.control.should_save:  # a finite gradient can still take a weight beyond what its dtype holds
            for parameter in self.model.parameters():
                held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this rank's partition
                finite *= torch.isfinite(held.detach()).all().to(finite.device)
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item() == 1.0:
            return
        checkpoints = [p for p in Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir()]
        last = max(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise TrainingStoppedError(
            f"the loss, the gradient norm or a weight became NaN or infinite by step {self.state.global_step}; nothing "
            f"was saved from it, {kept}. Lower --learning_rate or --max_grad_norm, or look for broken rows in the data"
        )

    # --- evaluation leaves no trace

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in HF, but the random numbers of dropout go on afterwards as if there had been no evaluation."""
        cuda = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    # --- checkpoints: whole or absent

    def _get_output_dir(self, trial: Any) -> str:
        run_dir: str = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._staging else run_dir

    _staging = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / STAGING_FOLDER
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.exists() or best.name == name:
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if is_writer():
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.routing.save(staging / name)
            (staging / name / LAYOUT_FILE).write_text(json.dumps(describe_engine(self.model_wrapped), indent=1) + "\n")
            if (run_dir / name).exists():  # a resumed run passes this step again
                os.replace(run_dir / name, staging / "replaced")
            os.replace(staging / name, run_dir / name)
            shutil.rmtree(staging)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the whole model as a Hugging Face folder (default ``output_dir/model``); every rank must call it.

        The folder is reloaded with plain transformers and its logits compared with the engine's before it gets its
        name; :attr:`last_proof` holds the figures. A checkpoint written during training (``_internal_call``) gets
        config and tokenizer but no weights: DeepSpeed's states beside them hold those, and ``recipes/export.py`` turns
        them into the same folder at any time.
        """
        engine = self.model_wrapped
        if _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            if is_writer():
                folder.mkdir(parents=True, exist_ok=True)
                save_companions(folder, self.source_config, self.model.dtype, **self._companions())
            self.accelerator.wait_for_everyone()
            return
        folder = Path(output_dir or os.path.join(self.args.output_dir, MODEL_FOLDER))
        with exact_routing(engine.module), self.routing.as_exported():
            ids_BT, logits_BTV = record_logits(engine, self.source_config.vocab_size)
        source = EngineSource(engine, self.family)
        self.last_proof = None

        def prove(staged: Path) -> None:
            self.last_proof = prove_folder(staged, ids_BT, logits_BTV, source.fingerprints)
            if self.routing.left_out:
                self.routing.save(staged)

        export(
            source,
            self.family,
            self.source_config,
            folder,
            max_shard_bytes=self.max_shard_bytes,
            progress=self.export_progress,
            before_rename=prove,
            **self._companions(),
        )

    export_progress: Any = None
    """Called with (tensors done, tensors in all) on the writing rank; a recipe may set it."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the folder it came from, which is no hub id, as ``None``, for every checkpoint."""

    def _companions(self) -> dict[str, Any]:
        return {"tokenizer": self.processing_class, "generation_config": self.model.generation_config}
