"""Every name of another library that our code overrides, replaces, sets or reads behind its public interface.

A renamed method is no error in Python. The override is never called again, and the run goes on without what it did:
without the auxiliary loss, for one. So each row of :data:`SEAMS` says what must be there and what would be lost, and a
trainer checks the whole table before it trains.

A row is checked in up to four ways: the name exists, it takes the parameters that our code passes, the library still
calls it, and the class still uses the attributes that our code touches. A new override needs a new row
(``tests/engine/test_seams.py`` finds it), and a row goes with the code that needed it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from moe_models.errors import RunError
from moe_models.versions import installed_version


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One name of a library that our code depends on."""

    name: str
    """``module:attribute.path``."""
    ours: str
    """The file of ``moe_models/`` that depends on it."""
    lost: str
    """What a run would lose without a word if the name were gone."""
    parameters: tuple[str, ...] = ()
    """Parameters that our code passes, or expects to be passed."""
    called_in: str = ""
    """A module of the library that must call it by this name; empty where only our code does."""
    attributes: tuple[str, ...] = ()
    """Attributes of its instances that our code reads or sets."""


_TRAINER = "transformers.trainer"
_SFT = "trl.trainer.sft_trainer"
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2"
_ZERO3 = "deepspeed.runtime.zero.stage3"
_SP_GROUPS = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
_ULYSSES = "deepspeed.runtime.sequence_parallel.ulysses_sp"
_AUTOEP = "deepspeed.module_inject.auto_ep_layer"
_PRESETS = "deepspeed.module_inject.auto_ep_presets.registry"
_GROUPS = "deepspeed.utils.groups"
_EXPERTS = "deepspeed.moe.ep_experts"
_BF16 = "deepspeed.runtime.bf16_optimizer"

SEAMS = (
    # --- transformers: methods of Trainer that are overridden, and have to be called
    Seam(
        name=f"{_TRAINER}:Trainer._prepare_for_training",
        ours="trainer.py",
        lost="routing is not watched, no auxiliary loss of moe.balance, no check that AutoEP replaced the blocks, "
        "no resume in another layout",
        parameters=("max_steps", "train_dataloader", "resume_from_checkpoint"),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._run_epoch",
        ours="trainer.py",
        lost="a finished run that is resumed trains one more step",
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._maybe_log_save_evaluate",
        ours="trainer.py",
        lost="a loss that is NaN reaches the checkpoints",
        parameters=("tr_loss", "grad_norm"),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._get_output_dir",
        ours="trainer.py",
        lost="a checkpoint has its final name while it is written",
        parameters=("trial",),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._save_checkpoint",
        ours="trainer.py",
        lost="checkpoints without layout.json and selection bias, half ones after a crash",
        parameters=("model", "trial"),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._prepare_inputs",
        ours="trainer.py",
        lost="each rank of a sequence-parallel group trains on the whole sequence",
        parameters=("inputs",),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.get_tp_size",
        ours="trainer.py",
        lost="ranks of a sequence-parallel group read different rows, and the loss is scaled wrongly",
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.training_step",
        ours="trainer.py",
        lost="a loss that is NaN goes unnoticed, and the logged loss is wrong with sequence parallelism",
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.compute_loss",
        ours="trainer.py",
        lost="no auxiliary loss of moe.balance or of native layers",
        parameters=("model", "inputs", "return_outputs", "num_items_in_batch"),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.create_optimizer",
        ours="trainer.py",
        lost="weight decay also acts on norms and biases",
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.get_decay_parameter_names",
        ours="trainer.py",
        lost="weight decay also acts on norms and biases",
        parameters=("model",),
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.log",
        ours="trainer.py",
        lost="the load of the experts is not logged",
        parameters=("logs",),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.evaluate",
        ours="trainer.py",
        lost="evaluation changes the random numbers of the training after it",
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.floating_point_ops",
        ours="trainer.py",
        lost="total_flos counts all experts for every token",
        parameters=("inputs",),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer.save_model",
        ours="trainer.py",
        lost="an exported model keeps the experts of one rank",
        parameters=("output_dir", "_internal_call"),
        called_in=_TRAINER,
    ),
    Seam(
        name=f"{_TRAINER}:Trainer._load_best_model",
        ours="trainer.py",
        lost="--load_best_model_at_end reads a checkpoint with pickles that may run code",
        called_in=_TRAINER,
    ),
    # --- transformers: names that are replaced or read
    Seam(
        name=f"{_TRAINER}:deepspeed_load_checkpoint",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed",
        called_in=_TRAINER,
    ),
    Seam(
        name="transformers.trainer_utils:sort_checkpoints",
        ours="checkpoint/whole_checkpoints.py",
        lost="--save_total_limit",
        parameters=("output_dir", "use_mtime"),
    ),
    Seam(
        name="transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
        ours="engine/ulysses.py",
        lost="attention sees this rank's part of a sequence only",
    ),
    Seam(
        name="transformers.modeling_utils:safe_open",
        ours="checkpoint/unread.py",
        lost="the proof of an export holds the whole model in host memory",
        called_in="transformers.modeling_utils",
    ),
    Seam(
        name="transformers.modeling_utils:PreTrainedModel",
        ours="checkpoint/expected.py",
        lost="tied weights, and weights that stay in fp32, are not known to the export",
        attributes=("all_tied_weights_keys", "_keep_in_fp32_modules_strict", "_can_set_experts_implementation"),
    ),
    Seam(
        name="transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
        ours="engine/plain_transformers.py",
        lost="the proof of an export loads partitions instead of a whole model",
    ),
    Seam(
        name="transformers.modeling_utils:safe_open",
        ours="checkpoint/reading.py",
        lost="every rank reads the whole model into host memory",
        called_in="transformers.modeling_utils",
    ),
    Seam(
        name="transformers.modeling_utils:_load_state_dict_into_zero3_model",
        ours="checkpoint/reading.py",
        lost="under ZeRO-3 every rank reads the whole model into host memory",
        parameters=("model_to_load", "state_dict", "load_config"),
        called_in="transformers.modeling_utils",
    ),
    Seam(
        name="transformers.integrations.deepspeed:_apply_weight_conversions_to_state_dict",
        ours="checkpoint/reading.py",
        lost="under ZeRO-3 experts that are stored one by one are not joined",
        parameters=("model", "state_dict", "weight_mapping"),
    ),
    Seam(
        name="transformers.modeling_utils:PreTrainedModel",
        ours="checkpoint/reading.py",
        lost="transformers draws weights anew that were read",
        attributes=("_is_hf_initialized",),
    ),
    Seam(
        name="transformers.utils.output_capturing:_CAN_RECORD_REGISTRY",
        ours="engine/autoep.py",
        lost="AutoEP cannot point the recorder of router logits at its router, and the auxiliary loss has none",
    ),
    Seam(
        name="transformers.configuration_utils:PreTrainedConfig",
        ours="trainer.py",
        lost="an export of a model from the hub is compared with another revision of it, or with none",
        attributes=("_commit_hash",),
    ),
    Seam(
        name="transformers.conversion_mapping:register_checkpoint_conversion_mapping",
        ours="prmoe.py",
        lost="experts of PR-MoE have other names on disk",
        parameters=("mapping", "overwrite"),
    ),
    Seam(
        name="transformers.conversion_mapping:get_checkpoint_conversion_mapping",
        ours="prmoe.py",
        lost="experts of PR-MoE have other names on disk",
    ),
    # --- TRL
    Seam(
        name=f"{_SFT}:SFTTrainer",
        ours="trainer.py",
        lost="the model's own auxiliary loss is added beside that of moe.balance, or the loss figures are not logged",
        attributes=(
            "aux_loss_enabled", "router_aux_loss_coef", "padding_free", "_metrics", "_tp_size", "_total_train_tokens",
        ),
    ),
    Seam(
        name=f"{_SFT}:SFTTrainer.compute_loss",
        ours="trainer.py",
        lost="the balance terms do not join TRL's loss",
        parameters=("model", "inputs", "return_outputs", "num_items_in_batch"),
        called_in=_SFT,
    ),
    Seam(
        name="trl.trainer.base_trainer:_BaseTrainer.create_model_card",
        ours="trainer.py",
        lost="every checkpoint gets a model card that names no base model",
        called_in=_SFT,
    ),
    # --- accelerate
    Seam(
        name="accelerate.state:AcceleratorState._reset_state",
        ours="engine/library_globals.py",
        lost="a second engine of the process inherits settings of the first",
    ),
    Seam(
        name="accelerate.state:GradientState._reset_state",
        ours="engine/library_globals.py",
        lost="a second engine of the process inherits settings of the first",
    ),
    Seam(
        name="accelerate.state:PartialState._reset_state",
        ours="engine/library_globals.py",
        lost="a second engine of the process inherits settings of the first",
    ),
    Seam(
        name="accelerate.accelerator:Accelerator",
        ours="engine/ulysses.py",
        lost="ranks of a sequence-parallel group read different rows",
        attributes=("ds_device_mesh",),
    ),
    Seam(
        name="accelerate.utils:DummyOptim",
        ours="trainer.py",
        lost="weight decay also acts on norms and biases",
        parameters=("params",),
    ),
    # --- DeepSpeed: the optimizers
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer.scaled_global_norm",
        ours="engine/grad_norm.py",
        lost="the norm in one pass",
        parameters=("norm_type",),
        called_in=_ZERO12,
    ),
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer.get_grad_norm_direct",
        ours="engine/grad_norm.py",
        lost="gradients are clipped by a norm without the experts of all tensor-parallel peers but the first",
        parameters=("gradients", "params"),
        called_in=_ZERO12,
    ),
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer",
        ours="engine/grad_norm.py",
        lost="the norm of the gradients, or the resume in another layout, is wrong",
        attributes=(
            "averaged_gradients", "dp_process_group", "model_parallel_group", "model_parallel_rank", "cpu_offload",
            "single_partition_of_fp32_groups", "_zero_padding",
        ),
    ),
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO 1 and 2",
    ),
    Seam(
        name="deepspeed.utils.tensor_fragment:set_full_hp_param",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO 1 and 2",
        parameters=("value", "optim_state_key"),
    ),
    Seam(
        name=f"{_ZERO3}:DeepSpeedZeroOptimizer_Stage3._optimizer_step",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO-3",
        parameters=("sub_group_id",),
    ),
    Seam(
        name=f"{_ZERO3}:DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO-3",
        parameters=("param", "release_swap_buffers", "optim_state_key"),
    ),
    Seam(
        name=f"{_ZERO3}:DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO-3",
    ),
    Seam(
        name=f"{_ZERO3}:DeepSpeedZeroOptimizer_Stage3",
        ours="checkpoint/resume.py",
        lost="a checkpoint of another layout cannot be resumed under ZeRO-3",
        attributes=("fp32_partitioned_groups_flat", "swap_optimizer"),
    ),
    Seam(
        name="deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator._invalidate_trace",
        ours="engine/same_function.py",
        lost="under ZeRO-3 the first step after the conversion's check fails in its backward pass",
    ),
    # --- DeepSpeed: reading checkpoints
    Seam(
        name="deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.load",
        ours="engine/plain_checkpoints.py",
        lost="a resumed run executes the pickles of its checkpoint, and holds the states of all ranks in host memory",
        parameters=("path", "map_location"),
        called_in="deepspeed.runtime.engine",
    ),
    Seam(
        name="deepspeed.runtime.engine:DeepSpeedEngine",
        ours="engine/plain_checkpoints.py",
        lost="a resumed run executes the pickles of its checkpoint, and holds the states of all ranks in host memory",
        attributes=("checkpoint_engine",),
    ),
    Seam(
        name="deepspeed.runtime.zero.partition_parameters:Init",
        ours="checkpoint/reading.py",
        lost="under ZeRO-3 ranks read the wrong range of each tensor",
        attributes=("ds_tensor", "ds_numel", "ds_shape", "ds_process_group"),
    ),
    # --- DeepSpeed: its checkpoints, and its launcher
    Seam(
        name="deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint",
        ours="checkpoint/whole_checkpoints.py",
        lost="the ranks wait for each other for ever when one cannot write its part of a checkpoint",
        parameters=("save_dir", "save_latest"),
    ),
    Seam(
        name="deepspeed.runtime.engine:DeepSpeedEngine._copy_recovery_script",
        ours="checkpoint/whole_checkpoints.py",
        lost="the ranks wait for each other for ever when one cannot write its part of a checkpoint",
        parameters=("save_path",),
        called_in="deepspeed.runtime.engine",
    ),
    Seam(
        name="deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.save",
        ours="checkpoint/whole_checkpoints.py",
        lost="the ranks wait for each other for ever when one cannot write its part of a checkpoint",
        parameters=("state_dict", "path"),
    ),
    Seam(
        name="deepspeed.runtime.engine:DeepSpeedEngine",
        ours="checkpoint/whole_checkpoints.py",
        lost="the pointer to the states in a checkpoint, or its size before it is written",
        attributes=("checkpoint_engine", "global_steps", "zero_optimization_partition_weights"),
    ),
    Seam(
        name="deepspeed.launcher.runner:signal",
        ours="nodes/launcher.py",
        lost="over pdsh, ranks that are told to stop are killed while they save",
    ),
    Seam(
        name="deepspeed.launcher.runner:subprocess",
        ours="nodes/launcher.py",
        lost="./run.sh ends with 0 when its child was killed",
    ),
    # --- DeepSpeed: groups of ranks
    Seam(
        name=f"{_GROUPS}:_get_sequence_data_parallel_group",
        ours="routing/callback.py",
        lost="load figures and balance losses are summed over the wrong ranks",
    ),
    Seam(
        name=f"{_GROUPS}:mpu",
        ours="engine/ulysses.py",
        lost="sequence parallelism: gradients are averaged over the wrong ranks",
    ),
    *(
        Seam(
            name=f"{_GROUPS}:{name}",
            ours="engine/library_globals.py",
            lost="a second engine of the process inherits the tensor parallelism of the first",
        )
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device")
    ),
    Seam(
        name=f"{_SP_GROUPS}:_SEQUENCE_PARALLEL_GROUP",
        ours="engine/ulysses.py",
        lost="sequence parallelism cannot be set up a second time",
    ),
    Seam(
        name=f"{_SP_GROUPS}:_release_sequence_parallel_groups",
        ours="engine/library_globals.py",
        lost="a second engine of the process inherits the sequence parallelism of the first",
    ),
    Seam(
        name=f"{_ULYSSES}:UlyssesSPAttentionHF.__init__",
        ours="engine/ulysses.py",
        lost="sequence parallelism",
        parameters=(
            "attn", "batch_size", "attn_head_count", "attn_head_size", "kv_head_count", "num_hidden_layers",
            "process_group", "seq_length_is_variable",
        ),
    ),
    Seam(
        name="deepspeed.runtime.tensor_parallel.init_utils:_TP_MODEL_INIT_ARGS",
        ours="engine/library_globals.py",
        lost="a second engine of the process inherits the tensor parallelism of the first",
    ),
    # --- DeepSpeed: AutoEP, native layers, and its operations
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer",
        ours="engine/blocks.py",
        lost="experts, router or selection bias of a block are not found",
        attributes=("ep_size", "ep_group", "experts", "router", "expert_bias", "_is_autoep_layer"),
    ),
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer._forward",
        ours="engine/fused/layer.py",
        lost="fused kernels: the layers run DeepSpeed's own",
        called_in=_AUTOEP,
    ),
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer._finalize_output",
        ours="engine/fused/layer.py",
        lost="fused kernels: shared experts and router logits",
        parameters=("output", "x", "hidden_states", "hdim"),
    ),
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer",
        ours="engine/fused/layer.py",
        lost="fused kernels, or the load counters and the selection bias under them",
        attributes=(
            "ep_size", "ep_rank", "ep_group", "num_experts", "num_local_experts", "top_k", "score_apply",
            "comm_backend", "folding_group_handles", "tokens_per_expert", "expert_bias",
        ),
    ),
    Seam(
        name=f"{_AUTOEP}:compute_split_plan",
        ours="engine/fused/layer.py",
        lost="fused kernels over an all-to-all",
        parameters=(
            "selected_experts", "num_experts", "ep_size", "num_local_experts", "ep_group", "num_tokens_per_expert",
        ),
    ),
    Seam(
        name="deepspeed.moe.ep_experts:GroupedExperts",
        ours="engine/fused/experts.py",
        lost="fused kernels",
        attributes=("w1", "w2", "w3", "activation", "use_triton_grouped_mm"),
    ),
    Seam(
        name="deepspeed.moe.ep_router:TokenChoiceTopKRouter",
        ours="engine/fused/router.py",
        lost="fused kernels: the router in one kernel",
        attributes=(
            "gate", "top_k", "num_experts", "num_expert_groups", "score_func", "route_norm", "route_scale",
            "e_score_correction_bias",
        ),
    ),
    Seam(
        name=f"{_PRESETS}:_PRESET_ADAPTERS",
        ours="engine/autoep.py",
        lost="the auxiliary loss of OLMoE under AutoEP",
        called_in="",
    ),
    Seam(
        name=f"{_PRESETS}:PRESET_MODELS",
        ours="engine/autoep.py",
        lost="OLMoE under AutoEP",
    ),
    Seam(
        name="deepspeed.moe.sharded_moe:TopKGate",
        ours="engine/native.py",
        lost="native layers: ranks exchange buffers of unequal size, or an export is compared with random routing",
        attributes=("wg", "ep_group", "drop_tokens", "use_rts", "top2_2nd_expert_sampling"),
    ),
    Seam(
        name="deepspeed.moe.sharded_moe:MOELayer",
        ours="engine/native.py",
        lost="native layers: activations of recomputed layers stay in memory",
        attributes=("l_aux", "gate", "experts"),
    ),
    Seam(
        name="deepspeed.ops:__compatible_ops__",
        ours="engine/cpu.py",
        lost="CPU processes compile an all-reduce at their first start",
    ),
    # --- datasets
    Seam(
        name="datasets.arrow_dataset:Dataset",
        ours="data.py",
        lost="columns of filtered rows are read whole before their nulls are found",
        attributes=("_indices",),
    ),
    # --- torch
    Seam(
        name="torch.optim.lr_scheduler:LRScheduler",
        ours="checkpoint/resume.py",
        lost="a run that is resumed in another layout starts with the wrong learning rate",
        attributes=("_last_lr", "last_epoch", "base_lrs"),
    ),
    Seam(
        name="torch:_C._current_graph_task_id",
        ours="routing/tap.py",
        lost="tokens of recomputed layers are counted twice",
    ),
    Seam(
        name="torch._C:TensorBase._make_wrapper_subclass",
        ours="checkpoint/on_disk.py",
        lost="every rank reads the whole model into host memory",
    ),
    Seam(
        name="torch._C:_disabled_torch_function_impl",
        ours="checkpoint/on_disk.py",
        lost="every rank reads the whole model into host memory",
    ),
    Seam(
        name="torch:ops.aten._to_copy",
        ours="checkpoint/on_disk.py",
        lost="a cast reads the whole tensor",
    ),
    Seam(
        name="torch._ops:OpOverload",
        ours="checkpoint/on_disk.py",
        lost="values are written into a tensor that is still on disk, and nowhere else",
        attributes=("_schema",),
    ),
    Seam(
        name="torch:_foreach_norm",
        ours="engine/grad_norm.py",
        lost="the norm in one pass",
    ),
    Seam(
        name="torch:_C.TensorBase._make_wrapper_subclass",
        ours="checkpoint/unread.py",
        lost="the proof of an export",
    ),
    Seam(
        name="torch:_C._disabled_torch_function_impl",
        ours="checkpoint/unread.py",
        lost="the proof of an export",
    ),
    Seam(
        name="torch._ops:OpOverload",
        ours="checkpoint/unread.py",
        lost="the proof of an export sees values that were changed while they were loaded",
        attributes=("_schema",),
    ),
    Seam(
        name="torch.utils:_pytree.tree_map_only",
        ours="checkpoint/unread.py",
        lost="the proof of an export",
    ),
    Seam(
        name="torch.nn:Module",
        ours="checkpoint/unread.py",
        lost="the proof of an export holds the whole model in host memory",
        attributes=("_parameters", "_buffers"),
    ),
    Seam(
        name="torch.nn:Module",
        ours="engine/native.py",
        lost="router logits of native layers are not recorded",
        attributes=("_forward_hooks", "_buffers"),
    ),
    Seam(
        name="torch.nn:Module",
        ours="checkpoint/reading.py",
        lost="dense tensors stay on disk",
        attributes=("_parameters", "_buffers"),
    ),
    # --- adapters: PEFT's wrappers, AutoEP's blocks, and what DeepSpeed does with frozen experts
    Seam(
        name="peft.tuners.lora.layer:ParamWrapper",
        ours="engine/lora.py",
        lost="experts under AutoEP stay frozen with --use_peft",
        attributes=("parameter_name", "num_experts", "scaling", "base_layer", "lora_A", "lora_B"),
    ),
    Seam(
        name="peft.tuners.lora.layer:ParamWrapper.get_delta_factors",
        ours="checkpoint/adapter.py",
        lost="the factors of experts in an adapter's folder are not compared with the trained ones",
        parameters=("adapter_name",),
    ),
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer.__init__",
        ours="engine/lora.py",
        lost="adapters on experts are not trained",
        parameters=("spec", "source_module", "ep_size", "ep_rank"),
    ),
    Seam(
        name=f"{_AUTOEP}:AutoEPMoELayer",
        ours="engine/lora.py",
        lost="adapters on experts are not trained",
        called_in="deepspeed.module_inject.auto_ep",
        attributes=("num_local_experts",),
    ),
    Seam(
        name=f"{_AUTOEP}:collect_replacement_sources",
        ours="engine/lora.py",
        lost="adapters on experts are not trained",
        parameters=("source_module", "replacement"),
        called_in="deepspeed.module_inject.auto_ep",
    ),
    Seam(
        name=f"{_EXPERTS}:GroupedExperts",
        ours="engine/lora_experts.py",
        lost="adapters on experts are not applied",
        attributes=("w1", "w2", "w3", "use_grouped_mm", "use_triton_grouped_mm", "gate_up_impl", "activation"),
    ),
    Seam(
        name=f"{_EXPERTS}:apply_expert_activation",
        ours="engine/lora_experts.py",
        lost="adapted experts compute another activation",
        parameters=("gate", "up", "activation", "alpha", "limit", "fused"),
    ),
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer._configure_moe_settings",
        ours="engine/lora.py",
        lost="adapters on attention alone do not start with AutoEP",
        called_in=_ZERO12,
    ),
    Seam(
        name=f"{_BF16}:BF16_Optimizer._configure_moe_settings",
        ours="engine/lora.py",
        lost="adapters on attention alone do not start with AutoEP",
        called_in=_BF16,
    ),
    Seam(
        name=f"{_ZERO12}:DeepSpeedZeroOptimizer.update_lp_params",
        ours="engine/lora.py",
        lost="a resumed run computes its first step with the adapters of rank 0's experts on every rank",
    ),
    Seam(
        name="deepspeed.runtime.engine:DeepSpeedEngine",
        ours="engine/lora.py",
        lost="every checkpoint of an adapter holds all frozen experts",
        attributes=("has_moe_layers",),
    ),
)  # fmt: skip


@cache
def _source(of: Any) -> str:
    """Source text of a module or class; empty where it has none (built in)."""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""


@cache
def _body(of: type) -> str:
    """Source text of a class up to its first line that is not indented; empty where that is not the one class.

    Never more than ``_source(of)``, most often all of it, and found a hundred times sooner: ``inspect`` parses the
    file and reads the class token by token, which for all rows took two seconds of every start.
    """
    text = _source(inspect.getmodule(of))
    found = re.findall(rf"^class {re.escape(of.__qualname__)}\b.*\n(?:[ \t)].*\n|\n)*", text, re.MULTILINE)
    return found[0] if len(found) == 1 else ""


@cache
def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@cache
def _calls(text: str) -> set[str]:
    """Names that are called in ``text``, as functions or as methods."""
    return set(re.findall(r"(?<!def )\b(\w+)\(", text))


def _uses(parents: list[type], attribute: str) -> bool:
    """Whether the source of one of the classes names ``attribute``."""
    if any(attribute in _words(_body(parent)) for parent in parents):
        return True
    # It may be below an odd line, so the exact look decides.
    return any(attribute in _words(_source(parent)) for parent in parents)


def problem_of(seam: Seam) -> str | None:
    """What is missing of one seam, in one line, or None."""
    module_name, _, path = seam.name.partition(":")
    library = module_name.partition(".")[0]
    version = f"{library} {installed_version(library)}"
    line = f"{version}: {{}}; moe_models/{seam.ours} needs it, and a run would go on without: {seam.lost}"

    # 1. The name exists.
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            owner = found
            found = getattr(owner, part)
            if inspect.isclass(owner) and part not in vars(owner):  # a base class has another of that name
                raise AttributeError(part)
    except (ImportError, AttributeError):
        return line.format(f"{module_name}.{path} is gone")

    # 2. It takes the parameters that our code passes.
    if seam.parameters:
        taken = inspect.signature(found).parameters
        missing = [name for name in seam.parameters if name not in taken]
        if missing:
            return line.format(f"{module_name}.{path} takes no {', '.join(missing)} any more")

    # 3. The library still calls it by this name: an override or a replacement that is not called does nothing.
    if seam.called_in:
        caller = _source(importlib.import_module(seam.called_in))
        name = path.rpartition(".")[2]
        if name not in _calls(caller):
            return line.format(f"{seam.called_in} does not call {name} any more")

    # 4. Instances still use the attributes that our code reads or sets.
    if seam.attributes:
        parents = [parent for parent in found.__mro__ if parent.__module__.startswith(library)]
        absent = [name for name in seam.attributes if not _uses(parents, name)]
        if absent:
            return line.format(f"{module_name}.{path} has no {', '.join(absent)} any more")
    return None


def missing_seams() -> list[str]:
    """One line for each seam that the installed libraries no longer have."""
    found = [problem_of(seam) for seam in SEAMS]
    return [line for line in found if line is not None]


def check_seams() -> None:
    """Raise RunError, one line for each missing seam, unless the installed libraries are what our code expects."""
    lines = missing_seams()
    if lines:
        raise RunError(lines)
