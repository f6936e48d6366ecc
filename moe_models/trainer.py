"""``MoETrainer``: TRL's ``SFTTrainer`` with checkpoints that are whole, and a model folder that holds every expert.

Everything a Trainer does well (data, packing, loss scaling, logging, schedules, resume) stays with TRL, transformers
and accelerate. :class:`ExpertParallelTraining` adds what they lack for experts that are spread over ranks. Each part is
an object with one task; the methods below are the places where a Trainer calls it:

- :class:`~moe_models.routing.callback.Routing` logs the load of the experts and keeps it even, as
  ``"moe": {"balance": ...}`` says; :func:`~moe_models.routing.choice.choose_balancing` chooses which loss acts;
- :func:`~moe_models.engine.fused.layer.fuse` gives AutoEP's layers the kernels that ``"moe": {"kernels": ...}`` asks
  for;
- :class:`~moe_models.engine.ulysses.Ulysses` gives each rank its part of a sequence;
- :class:`~moe_models.engine.finite.FiniteWatch` ends a run whose loss, gradient or weights are not finite, before that
  reaches a checkpoint;
- :class:`~moe_models.checkpoint.whole_checkpoints.WholeCheckpoints` gives a checkpoint its name when every rank has
  finished writing;
- :func:`~moe_models.checkpoint.resume.any_layout` resumes a checkpoint of another layout;
- :func:`~moe_models.checkpoint.export_engine.export_engine` exports the whole model with its proof, where HF's
  ``save_model`` keeps one rank's experts under AutoEP;
- with ``peft_config=`` (LoRA), :func:`~moe_models.engine.lora.adapters_join_autoep` brings the adapters of experts into
  AutoEP's blocks, and :func:`~moe_models.checkpoint.adapter.export_adapter` writes PEFT's own folder with its proof.

Another Trainer takes the same parts: ``class MoEDPOTrainer(ExpertParallelTraining, DPOTrainer)``.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DummyOptim
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from moe_models.checkpoint.adapter import AdapterProof, export_adapter, save_adapter_files
from moe_models.checkpoint.card import Kind, RunFacts, facts_of_base, measured, save_facts, versions, write_card
from moe_models.checkpoint.export import export_bytes
from moe_models.checkpoint.export_engine import export_engine
from moe_models.checkpoint.hf_folder import DEFAULT_MAX_SHARD_BYTES, save_companions
from moe_models.checkpoint.origin import Comparison, Origin, note_origin, shared_origin
from moe_models.checkpoint.per_expert import AdapterLayout
from moe_models.checkpoint.proof import ExportProof
from moe_models.checkpoint.reading import reading_bar, refuse_unread, report_reading
from moe_models.checkpoint.resume import any_layout
from moe_models.checkpoint.source import is_writer
from moe_models.checkpoint.space import adapter_bytes, checkpoint_bytes, room_warnings
from moe_models.checkpoint.whole_checkpoints import WholeCheckpoints, last_checkpoint
from moe_models.config.layout import Degrees, autoep_section
from moe_models.config.moe_section import Balance, Dispatch, Kernels
from moe_models.engine.autoep import check_replaced, register_presets, restore_rotary_buffers
from moe_models.engine.blocks import find_blocks, hf_model
from moe_models.engine.finite import FiniteWatch, TrainingStoppedError
from moe_models.engine.fused.layer import fuse
from moe_models.engine.grad_norm import count_every_expert_in_the_norm, norm_in_one_pass
from moe_models.engine.lora import (
    adapters_join_autoep,
    checkpoints_of_trained_tensors,
    is_adapted,
    see_through_peft,
)
from moe_models.engine.native import exact_routing, mean_aux_loss, native_blocks, record_aux_losses, take_drop_rates
from moe_models.engine.plain_transformers import remember_shipped
from moe_models.engine.same_function import How, Question, ask_before, require_same_function
from moe_models.engine.same_function import report as report_same_function
from moe_models.engine.seams import check_seams
from moe_models.engine.signals import ToldToStopError, Vote, saved_at_the_end_of_a_step
from moe_models.engine.step_log import StepLog
from moe_models.engine.ulysses import Ulysses
from moe_models.engine.weight_decay import decay_groups
from moe_models.errors import warn
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.families.table import FAMILIES, Family, moe_blocks
from moe_models.families.unsupported import UNSUPPORTED
from moe_models.preflight.flags import reentrant_problems
from moe_models.ranks import rank
from moe_models.routing.callback import Routing
from moe_models.routing.choice import Balancing, Source, choose_balancing

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the methods below are found before those of the Trainer that stands beside this class

__all__ = ["ADAPTER_FOLDER", "MODEL_FOLDER", "ExpertParallelTraining", "MoETrainer", "TrainingStoppedError"]

MODEL_FOLDER = "model"
"""Where ``save_model()`` without a folder puts the Hugging Face checkpoint, inside ``output_dir``."""

ADAPTER_FOLDER = "adapter"
"""Where it puts the adapter of a run that trains one (PEFT's own folder)."""


class ExpertParallelTraining(Trainer):
    """What a Hugging Face Trainer needs to train MoE models under DeepSpeed; name it before the Trainer.

    Args:
        model: a Hugging Face model whose ``model_type`` is in :data:`~moe_models.families.table.FAMILIES`.
        args: those of the Trainer.
        max_shard_bytes: largest file of the exported model.
        balance: ``"moe": {"balance": ...}`` of the JSON; None leaves the auxiliary loss to TRL and the model.
        kernels: ``"moe": {"kernels": ...}``: "fused" for AutoEP's layers in fewer kernels.
        dispatch: ``"moe": {"dispatch": ...}``: how tokens get to their experts' ranks then.
        check_conversion: which MoE blocks are compared before the first step with what they computed before AutoEP
            converted them: ``auto`` (all, or some of a large model), ``all`` or ``none``. For native layers
            ``register_deepspeed_moe`` takes it.
        kwargs: those of the Trainer.

    Raises:
        RunError: if an installed library lacks a name that the run depends on (``moe_models/engine/seams.py``).
        ValueError: if the model's family is unknown, or if flags of activation checkpointing, packing or attention
            cannot be honoured.
        RuntimeError: when training starts, if AutoEP did not replace exactly the model's MoE blocks.
        RunError: when training starts, if a tensor of the model cannot be read or was never read, or if a converted
            block computes another function than Hugging Face's (``moe_models/engine/same_function.py``).
        TrainingStoppedError: during training, when loss, gradient norm or weights are not finite.
        ToldToStopError: during training, at the end of a step, when a rank was told to stop; the step is saved. Only
            in a process that listens (``moe_models/engine/signals.py``), as those of the recipes do.
        ExportError: from :meth:`save_model`, if the folder would not hold the whole model.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
        balance: Balance | None = None,
        kernels: Kernels = "deepspeed",
        dispatch: Dispatch = "auto",
        check_conversion: How = "auto",
        **kwargs: Any,
    ) -> None:
        check_seams()
        if model.config.model_type not in FAMILIES:
            why = UNSUPPORTED.get(model.config.model_type)
            reason = f" ({why})" if why else ""
            raise ValueError(f"model_type {model.config.model_type!r} is not one of {sorted(FAMILIES)}{reason}")

        # 1. What the export will need. TRL switches router logits on in the config; the exported config.json is the
        #    one that came in.
        self.family: Family = FAMILIES[model.config.model_type]
        self.source_config = copy.deepcopy(model.config)
        self.max_shard_bytes = max_shard_bytes
        self._kernels = kernels
        self._dispatch = dispatch
        self.check_conversion = check_conversion
        self.last_proof: ExportProof | AdapterProof | None = None
        self.last_comparison: Comparison | None = None
        self._started_from: tuple[str, str | None] = (
            str(getattr(hf_model(model), "name_or_path", "") or ""),
            getattr(model.config, "_commit_hash", None),
        )
        self.export_progress: Callable[[int, int], None] | None = None
        """Called with (tensors done, tensors in all) on the writing rank; a recipe may set it."""
        self.adapter_layout: AdapterLayout = "fused"
        """Of the experts' factors in an exported adapter; a recipe may set it."""
        self.step_log: StepLog | None = None
        """Adds speed, memory and time left to the log; a recipe may set it."""
        self.run_facts: RunFacts | None = None
        """What model cards say of the run, on the writing rank; a recipe may set it."""

        # 2. What must happen before the engine is built.
        restore_rotary_buffers(model)
        remember_shipped(hf_model(model))
        register_presets()
        see_through_peft()
        self.ulysses: Ulysses | None = None
        self.checkpoints = WholeCheckpoints()
        super().__init__(model, *args, **kwargs)

        # 3. Parts that need the Trainer's arguments.
        self.finite = FiniteWatch(self.args.device)
        self.vote = Vote(self.args.device)
        self.args.logging_nan_inf_filter = False  # HF would log a running average instead of a NaN
        self.ulysses = self._start_ulysses(model)
        self.native = native_blocks(model)
        self._drops_tokens = any(block.layer.drop_tokens for block in self.native.values())

        # 4. Which loss keeps the experts even.
        self.balancing = self._choose_balancing(model, balance)
        config = self.source_config.to_dict()
        self.routing = Routing(self.family, config, self.balancing.balance, self.balancing.coefficient)
        self.add_callback(self.routing)
        self._sizes = model_sizes(config) if self.family.counts_flops else None
        if rank() == 0:
            print(self.balancing.describe(self._coefficient_from()), flush=True)

    @property
    def _deepspeed_json(self) -> dict[str, Any]:
        """What DeepSpeed gets; empty without it."""
        if not self.args.deepspeed:
            return {}
        json: dict[str, Any] = self.args.hf_deepspeed_config.config
        return json

    def _asked_degrees(self) -> Degrees:
        """The degrees of parallelism that the JSON asks for; without DeepSpeed all are 1."""
        return Degrees.from_json(self._deepspeed_json)

    def _start_ulysses(self, model: Any) -> Ulysses | None:
        size = self._asked_degrees().sp
        if size == 1:
            return None
        if getattr(self, "padding_free", False):
            raise ValueError("padding-free batches and packing by documents: not with sequence_parallel_size")
        return Ulysses(model, size, self.args.per_device_train_batch_size, self.accelerator)

    def _choose_balancing(self, model: Any, balance: Balance | None) -> Balancing:
        # TRL decides whether it adds the model's loss; a plain Trainer leaves that to the config.
        in_config = bool(getattr(model.config, "output_router_logits", False))
        model_has_loss = getattr(self, "aux_loss_enabled", in_config)
        coefficient = getattr(model.config, "router_aux_loss_coef", None) or 0.0
        if problems := reentrant_problems(self.args, model_has_loss):
            raise ValueError(problems[0])
        chosen = choose_balancing(
            balance=balance,
            coefficient=getattr(self, "router_aux_loss_coef", coefficient),
            model_has_loss=model_has_loss,
            native_layers_balance=any(block.layer.aux_loss == "layer" for block in self.native.values()),
            layers_differ=not self.family.pools_layers,
            sequence_parallel=self.ulysses is not None,
            trainer_weighs_it=hasattr(self, "aux_loss_enabled"),
        )
        if chosen.source is not Source.MODEL:
            self.aux_loss_enabled = False
            model.config.output_router_logits = False
        return chosen

    def _coefficient_from(self) -> str:
        """Who said the coefficient of the auxiliary loss."""
        if getattr(self.args, "router_aux_loss_coef", None) is not None:
            return "--router_aux_loss_coef"
        if hasattr(self.source_config, "router_aux_loss_coef"):
            return "router_aux_loss_coef of the model's config.json, or of its class"
        return "no router_aux_loss_coef anywhere"

    # --- before the first step

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.checkpoints.clear(self.args.output_dir)
        # 1. What the blocks compute before AutoEP converts them; native ones were asked already.
        question = self._ask_blocks()

        def converted(engine: Any) -> None:
            self._finish_layers()
            with exact_routing(engine.module):
                report_same_function(require_same_function(engine, question, self._conversion))

        # 2. Experts that are still on disk are read by the layers that take them, while the engine is built.
        resumes = resume_from_checkpoint is not None
        before_loading = converted if resumes else None
        reading = reading_bar(self.model, share=1 / self._asked_degrees().ep)
        with any_layout(self.family, before_loading), self._adapters(), reading:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        refuse_unread(self.model)
        report_reading()
        if not resumes:
            converted(self.model_wrapped)
        # 3. The parts of the trainer that need the engine.
        self._prepare_norm()
        self._attach_routing()
        self._warn_of_the_disk(max_steps)
        if resume_from_checkpoint is not None:
            self.routing.load(Path(resume_from_checkpoint))
        return prepared

    def _adapters(self) -> Any:
        """Inside, AutoEP's blocks get the adapters that PEFT put on their experts."""
        if is_adapted(self.model) and autoep_section(self._deepspeed_json) is not None:
            return adapters_join_autoep(self.model)
        return nullcontext()

    @property
    def _conversion(self) -> str:
        if self.native:
            return "native layers"
        return "AutoEP with fused kernels" if self._kernels == "fused" else "AutoEP"

    def _ask_blocks(self) -> Question:
        """The conversion's question; empty where nothing is converted."""
        paths: list[str] = []
        if autoep_section(self._deepspeed_json) is not None:
            paths = list(moe_blocks(self.family, self.source_config.to_dict()))
        how = self.check_conversion
        autocast = self._deepspeed_json.get("torch_autocast") or {}
        if paths and autocast.get("enabled"):
            warn(
                ["conversion: not compared under torch_autocast, whose rounding the blocks alone do not have"],
                rank=rank(),
            )
            how = "none"
        dtype = torch.float32
        if self.args.bf16:
            dtype = torch.bfloat16
        elif self.args.fp16:
            dtype = torch.float16
        return ask_before(self.model, paths, how, device=self.args.device, dtype=dtype)

    def _finish_layers(self) -> None:
        """Check that AutoEP built what the JSON asks for, and give it its kernels."""
        if autoep_section(self._deepspeed_json) is None:
            return
        check_replaced(self.model, self.family, self.source_config.to_dict(), self._asked_degrees().ep)
        if self._kernels == "fused":
            lines = fuse(self.model, self._dispatch)
            if is_writer():
                warn(lines)

    def _prepare_norm(self) -> None:
        """The gradient norm by which DeepSpeed clips: right under tensor parallelism, and fast elsewhere."""
        optimizer = self.model_wrapped.optimizer
        tensor_parallel = self.get_tp_size() > 1 and self.ulysses is None
        if tensor_parallel:
            count_every_expert_in_the_norm(optimizer)
            self._tp_size = self.get_tp_size()  # TRL counts the tokens that peers share once for each
        else:
            norm_in_one_pass(optimizer)

    def _warn_of_the_disk(self, max_steps: int) -> None:
        """Say at the start if the disk has not the room for what the run will write."""
        adapted = is_adapted(self.model)
        origin = None if adapted else self._origin  # collective, so before any rank returns
        if self.args.save_strategy == SaveStrategy.NO:
            return
        checkpoint = checkpoint_bytes(self.model_wrapped)
        if adapted:
            export = adapter_bytes(self.model_wrapped)
        if not is_writer():
            return
        if not adapted:
            export = export_bytes(self.family, self.source_config, self.model.dtype, origin)
        planned = 1
        if self.args.save_strategy == SaveStrategy.STEPS:
            every = self.state.save_steps or max_steps
            planned = math.ceil((max_steps - self.state.global_step) / every)
        elif self.args.save_strategy == SaveStrategy.EPOCH:
            planned = math.ceil(self.args.num_train_epochs)
        folder = Path(self.args.output_dir)
        lines = room_warnings(
            folder,
            checkpoint=checkpoint,
            export=export,
            limit=self.args.save_total_limit,
            planned=planned,
            present=len(list(folder.glob("checkpoint-*"))),
        )
        warn(lines)

    def _attach_routing(self) -> None:
        """Watch the routers."""
        ep_size = max(block.ep_size for block in find_blocks(self.model))
        peers = self.ulysses.group if self.ulysses else None
        self.routing.attach(self.model, ep_size, self.args.device, peers)

    def create_optimizer(self, model: Any = None) -> Any:
        """As in HF; the optimizer of the ds_config JSON gets HF's two groups, where HF would decay every weight."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, DummyOptim):
            optimizer.params = decay_groups(self.model, set(self.get_decay_parameter_names(self.model)))
        return optimizer

    # --- batches

    def get_tp_size(self) -> int:
        """Ranks that read the same rows, which is what transformers and TRL ask for: sequence-parallel peers too."""
        sequence_parallel = self.ulysses.size if self.ulysses else 1
        return int(super().get_tp_size()) * sequence_parallel

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self.ulysses and self.model.training:
            return self.ulysses.shard(prepared)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # HF would train one more step of a run that was finished
            self.control.should_training_stop = True
            return
        if self.args.save_strategy == SaveStrategy.NO:
            super()._run_epoch(*args, **kwargs)
            return
        with saved_at_the_end_of_a_step():
            super()._run_epoch(*args, **kwargs)
            self._stop_if_told()

    # --- the loss, and the terms that join it

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; in training with the balance terms that :attr:`balancing` says."""
        if not self.model.training:
            with self._model_loss(self.balancing.model_loss_in_evaluation):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        recording: Any = nullcontext([])
        if self.balancing.source is Source.NATIVE:
            recording = record_aux_losses(self.native)
        with recording as recorded:
            computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        # Each term is a mean over one micro-batch. It is averaged over accumulation here, because Trainer leaves that
        # to the loss where it counts tokens itself, and over ranks by the gradients.
        micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        term = self._balance_term(inputs, recorded, micro_batches)
        if return_outputs:
            loss, outputs = computed
            return loss + term, outputs
        return computed + term

    def _balance_term(self, inputs: Any, recorded: list[torch.Tensor], micro_batches: int) -> torch.Tensor | float:
        """What joins the loss of one micro-batch, weighted."""
        match self.balancing.source:
            case Source.MODEL:
                return 0.0
            case Source.ROUTING:
                return self.routing.loss(inputs, micro_batches)
            case Source.NATIVE:
                aux_loss = mean_aux_loss(recorded, self.native)
                self._log_mean("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
                return self.balancing.coefficient * aux_loss / micro_batches

    @contextmanager
    def _model_loss(self, added: bool) -> Iterator[None]:
        """Inside, TRL adds the model's own auxiliary loss or does not."""
        before = getattr(self, "aux_loss_enabled", None)
        if before is None:  # a Trainer that never adds it itself
            yield
            return
        self.aux_loss_enabled = added
        try:
            yield
        finally:
            self.aux_loss_enabled = before

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; returns a loss whose mean over all ranks is the loss, for the log."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.finite.see(loss)
        if self.accelerator.sync_gradients:
            self.vote.cast()
        if self.ulysses:
            return loss * self.ulysses.size
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOP of a micro-batch by the experts that a token meets; HF counts them all, anew in each micro-batch."""
        if self._sizes is None:
            return int(super().floating_point_ops(inputs))
        ids_BT = inputs["input_ids"]
        per_token = sum(train_flops(self._sizes, ids_BT.shape[-1]))
        return int(ids_BT.numel() * per_token)

    # --- the log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add how evenly tokens were spread: see :data:`moe_models.routing.load.LOGGED`."""
        logs.update(self.routing.figures(logs, self.state.global_step, self.args.output_dir))
        if self.step_log is not None:
            logs.update(self.step_log.figures(logs, self.state))
        super().log(logs, *args, **kwargs)

    def _log_mean(self, name: str, value: float) -> None:
        """Let TRL log the mean of these values at the next logging step; a plain Trainer has no place for them."""
        metrics = getattr(self, "_metrics", None)
        if metrics is not None:
            metrics["train"][name].append(value)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # 1. A rank may have been told to stop. Then this step is saved. An evaluation could outlast the time that is
        #    left; only where it chooses the best checkpoint would a resumed run miss it.
        control = self.control
        stops = self.vote.stop()
        if stops:
            control.should_save = self.checkpoints.last_step != self.state.global_step
            control.should_evaluate = control.should_evaluate and self.args.load_best_model_at_end

        # 2. Log, evaluate and save, unless something is not finite.
        if control.should_log or control.should_save or control.should_evaluate:
            self._stop_if_not_finite(grad_norm)
        if self._drops_tokens and control.should_log:
            for name, rate in take_drop_rates(self.native).items():
                self._log_mean(name, rate)
        took_long = control.should_save or control.should_evaluate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

        # 3. Signals that came meanwhile count now, not after another step.
        if stops or took_long:
            self._stop_if_told()

    def _stop_if_told(self) -> None:
        """Raise ToldToStopError if a rank was told to stop; the step is saved first."""
        self.vote.cast()
        if not self.vote.stop():
            return
        if self.checkpoints.last_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # what reports elsewhere closes its log
        raise ToldToStopError(
            f"step {self.state.global_step} is saved in {last_checkpoint(self.args.output_dir)}; go on with "
            "--resume_from_checkpoint true"
        )

    def _stop_if_not_finite(self, grad_norm: Any) -> None:
        # fp16's dynamic loss scale leaves out a step whose gradient overflowed.
        scaled = getattr(self.model_wrapped.optimizer, "dynamic_loss_scale", False)
        if scaled and self.accelerator.optimizer_step_was_skipped:
            grad_norm = None
        weights_of = self.model if self.control.should_save else None
        if self.finite.is_finite(grad_norm, weights_of):
            return
        last = last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise TrainingStoppedError(
            f"the loss, the gradient norm or a weight became NaN or infinite by step {self.state.global_step}; nothing "
            f"was saved from it, {kept}. Lower --learning_rate or --max_grad_norm, or look for broken rows in the data"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in HF, but the random numbers of dropout go on afterwards as if there had been no evaluation."""
        cuda = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    # --- checkpoints and export

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.place(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        with self.checkpoints.growing(self.model_wrapped, run_dir), self._trained_only():
            super()._save_checkpoint(model, trial)
        self.checkpoints.finish(self, run_dir, add_files=self._add_to_checkpoint)

    def _add_to_checkpoint(self, staged: Path) -> None:
        """What neither HF nor DeepSpeed writes; on the writing rank."""
        self.routing.save(staged)
        save_facts(staged, self._facts())

    def _facts(self) -> RunFacts:
        """Those that a recipe set, or what the model and the libraries tell."""
        if self.run_facts is None:
            self.run_facts = RunFacts(versions=versions(), **facts_of_base(self.source_config.name_or_path))
        return self.run_facts

    def _card(self, kind: Kind) -> Callable[[Path, Any], None]:
        """Writes the card of a folder that was proven."""

        def write(staged: Path, proof: Any) -> None:
            write_card(staged, kind, self._facts(), measured(self.state.log_history, self.state.global_step, proof))

        return write

    def _trained_only(self) -> Any:
        """Inside, a checkpoint of a run that trains an adapter leaves out what is frozen."""
        if is_adapted(self.model):
            return checkpoints_of_trained_tensors(self.model_wrapped)
        return nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the whole model as a Hugging Face folder (default ``output_dir/model``); every rank must call it.

        A run that trains an adapter exports that instead, as PEFT's folder (default ``output_dir/adapter``).

        The folder is reloaded with plain transformers and its logits compared with the engine's before it gets its
        name; :attr:`last_proof` holds the figures. A checkpoint written during training (``_internal_call``) gets
        config and tokenizer but no weights: DeepSpeed's states beside them hold those, and ``recipes/export.py`` turns
        them into the same folder at any time.
        """
        companions = {"tokenizer": self.processing_class, "generation_config": self.model.generation_config}
        if _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            if is_writer():
                with self.checkpoints.noting():
                    folder.mkdir(parents=True, exist_ok=True)
                    save_companions(folder, self.source_config, self.model.dtype, **companions)
                    if not is_adapted(self.model):  # an adapter names its base model itself
                        note_origin(folder, *self._started_from)
            if is_adapted(self.model):
                save_adapter_files(self.model_wrapped, self.family, self.source_config, folder, self.checkpoints.noting)
            self.accelerator.wait_for_everyone()
            return
        self.last_proof = None
        self.last_comparison = None
        if is_adapted(self.model):
            self.last_proof = export_adapter(
                self.model_wrapped,
                self.family,
                self.source_config,
                Path(output_dir or os.path.join(self.args.output_dir, ADAPTER_FOLDER)),
                self.routing,
                add_files=self._card("adapter"),
                tokenizer=self.processing_class,
                layout=self.adapter_layout,
            )
            return
        self.last_proof = self._export_model(output_dir)

    def save_merged(self, output_dir: str | None = None) -> ExportProof | None:
        """Export the whole model with the adapter added to its weights, as :meth:`save_model` does without one.

        Returns what was compared, on the writing rank. Every rank must call it.
        """
        return self._export_model(output_dir)

    def _export_model(self, output_dir: str | None) -> ExportProof | None:
        compared = export_engine(
            self.model_wrapped,
            self.family,
            self.source_config,
            Path(output_dir or os.path.join(self.args.output_dir, MODEL_FOLDER)),
            self.routing,
            add_files=self._card("merged" if is_adapted(self.model) else "model"),
            max_shard_bytes=self.max_shard_bytes,
            progress=self.export_progress,
            origin=self._origin,
            trained_steps=self._steps_that_train(),
            tokenizer=self.processing_class,
            generation_config=self.model.generation_config,
        )
        if compared is None:
            return None
        proof, self.last_comparison = compared
        return proof

    @cached_property
    def _origin(self) -> Origin | None:
        """The checkpoint that the run started from; collective when it is first asked for."""
        return shared_origin(*self._started_from, self.family, self.source_config)

    def _steps_that_train(self) -> int:
        """Steps that must have changed a weight: those after the warm-up, which starts at 0."""
        if self.args.learning_rate <= 0:
            return 0
        return int(self.state.global_step - self.args.get_warmup_steps(max(1, self.state.max_steps)))

    def _load_best_model(self) -> None:
        with any_layout(self.family):
            super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the folder it came from, which is no hub id, as ``None``, for every checkpoint."""


class MoETrainer(ExpertParallelTraining, SFTTrainer):
    """SFTTrainer for HF MoE models under DeepSpeed; takes the same arguments.

    See :class:`ExpertParallelTraining` for what it adds and raises.
    """
