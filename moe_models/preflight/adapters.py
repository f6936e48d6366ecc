"""What ``--use_peft`` can be told: adapters (LoRA) on attention, dense MLPs and experts; the rest is refused. Torch-free.

``given`` is what TRL's parser understood. The flags are TRL's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.families.adapters import EXPERT_TARGETS, adaptable_modules, attention_targets, matches
from moe_models.families.table import Family, family_of

ONLY_WITH_PEFT = (
    "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip


def adapter_targets(given: Any, family: Family, model_config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(modules, expert tensors) that get an adapter; attention and both expert tensors where no flag says otherwise."""
    modules = _words(given.lora_target_modules)
    parameters = _words(given.lora_target_parameters)
    if modules or parameters:
        return modules, parameters
    return list(attention_targets(family, model_config)), list(EXPERT_TARGETS)


def _words(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    return list(value)


def adapter_problems(given: Any, model_config: Mapping[str, Any], ds: DsConfig | None) -> Iterator[str]:
    """One line for each thing about adapters that cannot be honoured."""
    if not given.use_peft:
        for name in ONLY_WITH_PEFT:
            if getattr(given, name):
                yield f"--{name}: does nothing without --use_peft; add the flag, or drop this one"
        return
    yield from _shape_problems(given)
    family = family_of(model_config)
    if family is None:  # check_run says so
        return
    if given.model_name_or_path is None:
        yield "--use_peft: adapters are trained on a model that exists; train the new model whole, or use finetune.py"
    if model_config.get("quantization_config"):
        yield "--use_peft with quantization_config in config.json: not tested here; give the model in 16 bit"
    modules, parameters = adapter_targets(given, family, model_config)
    yield from _target_problems(modules, parameters, family, model_config)
    if given.lora_dropout and parameters:
        yield (
            f"--lora_dropout {given.lora_dropout}: PEFT has no dropout for experts; set it to 0, or name modules only "
            "(--lora_target_modules)"
        )
    if ds is not None:
        yield from _layout_problems(given, ds, parameters)


def _shape_problems(given: Any) -> Iterator[str]:
    """Numbers, and kinds of adapters that are not built."""
    if given.lora_r < 1:
        yield f"--lora_r {given.lora_r}: must be 1 or more"
    if given.lora_alpha <= 0:
        yield f"--lora_alpha {given.lora_alpha}: must be more than 0, or the adapter would do nothing"
    if not 0 <= given.lora_dropout < 1:
        yield f"--lora_dropout {given.lora_dropout}: must be 0 or more, and less than 1"
    if given.use_dora:
        yield "--use_dora: not built for spread experts; drop it"
    if given.lora_modules_to_save:
        yield (
            f"--lora_modules_to_save {' '.join(given.lora_modules_to_save)}: not built; train the whole model instead, "
            "or drop it"
        )
    if given.lora_task_type != "CAUSAL_LM":
        yield f"--lora_task_type {given.lora_task_type}: must be CAUSAL_LM"
    template = given.chat_template_path
    if template and not str(template).endswith((".jinja", ".j2")):
        yield (
            f"--chat_template_path {template} with --use_peft: a template out of a tokenizer may add tokens, and their "
            "embeddings are frozen; give a .jinja file"
        )
    if given.torch_compile or given.torch_compile_backend or given.torch_compile_mode:
        yield "--torch_compile with --use_peft: not tested here; drop one of them"
    if given.use_liger_kernel:
        yield "--use_liger_kernel with --use_peft: not tested here; drop one of them"


def _target_problems(
    modules: Sequence[str], parameters: Sequence[str], family: Family, model_config: Mapping[str, Any]
) -> Iterator[str]:
    """Targets that mean nothing, something else in each family, or what is not built."""
    try:
        paths = list(adaptable_modules(family, model_config))
    except (KeyError, TypeError, ValueError):  # a config.json that others have a line for
        return
    names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    for target in modules:
        key = f"--lora_target_modules {target}"
        if target == "all-linear":
            yield (
                f"{key}: adapts the experts of some families and leaves them frozen in others; name them: {names}, and "
                f"--lora_target_parameters {' '.join(EXPERT_TARGETS)}"
            )
        elif target.rpartition(".")[2] in ("gate", "router", "shared_expert_gate"):
            yield f"{key}: the router stays frozen under --use_peft; drop it"
        elif not any(matches(target, path) for path in paths):
            yield f"{key}: matches nothing in this {family.model_type}; allowed: {names}"
    for target in parameters:
        if target not in EXPERT_TARGETS:
            yield f"--lora_target_parameters {target}: allowed: {' and '.join(EXPERT_TARGETS)}"


def _layout_problems(given: Any, ds: DsConfig, parameters: Sequence[str]) -> Iterator[str]:
    """Layouts in which adapters are not built or not tested."""
    if ds.moe.layer is not None:
        yield "--use_peft with moe.layer: not built for native layers; use expert_parallel"
    if ds.tp_size > 1:
        yield f"--use_peft with tensor_parallel.autotp_size = {ds.tp_size}: AutoTP would not split adapters; remove it"
    if ds.sp_size > 1:
        yield f"--use_peft with sequence_parallel_size = {ds.sp_size}: not tested here; remove it"
    if ds.zero_stage == 0:
        yield "--use_peft with zero_optimization.stage = 0: not tested here; set it to 1, 2 or 3"
    if ds.zero_stage == 3 and ds.expert_parallel is None and parameters:
        yield (
            "--use_peft on experts with ZeRO stage 3 and without expert_parallel: PEFT would read weights that are not "
            'gathered; add "expert_parallel": {"enabled": true, "autoep_size": 1}, or use stage 1 or 2'
        )
    if ds.zero_stage == 3 and given.gradient_checkpointing:
        yield (
            "--gradient_checkpointing with --use_peft and ZeRO stage 3: TRL would make it reentrant, which deprives the "
            "auxiliary loss of its gradient; set it to false, or use stage 1 or 2"
        )
    if ds.moe.balance is not None and ds.moe.balance.bias_update_rate:
        yield (
            "moe.balance.bias_update_rate with --use_peft: an adapter has no place for a selection bias; remove it"
        )
    for section in ("offload_param", "offload_optimizer"):
        device = (ds.zero(section) or {}).get("device")
        if device == "nvme" or (section == "offload_param" and device not in (None, "none")):
            yield f"zero_optimization.{section}.device = {device} with --use_peft: not tested here; remove it"


def adapter_warnings(given: Any, model_config: Mapping[str, Any]) -> Iterator[str]:
    """What is unwise about adapters, or not what it seems."""
    coefficient = given.router_aux_loss_coef
    if coefficient is None:
        coefficient = model_config.get("router_aux_loss_coef")
    if given.use_peft and coefficient:
        yield (
            "--use_peft: the router is frozen; the auxiliary loss acts through the hidden states only "
            "(--router_aux_loss_coef 0 turns it off)"
        )
