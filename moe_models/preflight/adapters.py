"""What ``--use_peft`` can be told: adapters (LoRA) on attention, MLPs and experts; all else is refused. Torch-free.

``given`` is what TRL's parser understood. The flags are TRL's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.errors import UserError, show
from moe_models.families.adapters import EXPERT_TARGETS, adaptable_modules, attention_targets, matches
from moe_models.families.table import Family, family_of
from moe_models.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

LAYOUT_FILE = "layout.json"
"""In a checkpoint folder: the layout that wrote it."""

ADAPTERS = "adapters"
"""Its key for what adapters the run trained; absent where all weights were."""

ONLY_WITH_PEFT = (
    "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora", "export_merged",
    "adapter_layout", "adapter",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a run's flags, or the folder of ``--adapter``, say of its adapter."""

    r: int
    lora_alpha: float
    use_rslora: bool
    dropout: float
    modules: list[str]
    """Ends of paths of linear layers."""
    parameters: list[str]
    """Of :data:`EXPERT_TARGETS`."""

    def facts(self) -> dict[str, Any]:
        """What two adapters must have in common for one to go on from the other's checkpoint."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "target_modules": sorted(self.modules),
            "target_parameters": sorted(self.parameters) or None,
        }


def chosen_adapter(given: Any, family: Family, model_config: Mapping[str, Any]) -> Adapter:
    """The adapter of this run; on attention and both expert tensors where no flag says otherwise.

    Raises UserError if ``--adapter`` cannot be read.
    """
    if given.adapter is not None:
        config = read_json(Path(given.adapter) / ADAPTER_CONFIG)
        return Adapter(
            r=config.get("r", 0),
            lora_alpha=config.get("lora_alpha", 0),
            use_rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout") or 0.0,
            modules=_words(config.get("target_modules")),
            parameters=_words(config.get("target_parameters")),
        )
    modules = _words(given.lora_target_modules)
    parameters = _words(given.lora_target_parameters)
    if not modules and not parameters:
        modules = list(attention_targets(family, model_config))
        parameters = list(EXPERT_TARGETS)
    return Adapter(
        r=given.lora_r,
        lora_alpha=given.lora_alpha,
        use_rslora=given.use_rslora,
        dropout=given.lora_dropout,
        modules=modules,
        parameters=parameters,
    )


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
            if getattr(given, name) not in (None, False, "fused"):
                yield f"--{name}: does nothing without --use_peft; add the flag, or drop this one"
        return
    yield from _shape_problems(given)
    family = family_of(model_config)
    if family is None:  # check_run says so
        return
    if family.no_adapters is not None:
        yield _no_adapters(family)
        return
    if given.model_name_or_path is None:
        yield "--use_peft: adapters are trained on a model that exists; train the new model whole, or use finetune.py"
    if model_config.get("quantization_config"):
        yield "--use_peft with quantization_config in config.json: not tested here; give the model in 16 bit"
    try:
        adapter = chosen_adapter(given, family, model_config)
    except UserError as error:
        yield from error.problems
        return
    modules, parameters = adapter.modules, adapter.parameters
    if given.adapter is not None:
        yield from _folder_problems(Path(given.adapter), given)
    yield from _target_problems(modules, parameters, family, model_config)
    if adapter.dropout and parameters:
        yield (
            f"--lora_dropout {adapter.dropout}: PEFT has no dropout for experts; set it to 0, or name modules only "
            "(--lora_target_modules)"
        )
    if given.adapter_layout == "per_expert":
        yield from per_expert_problems(family, parameters)
    if ds is not None:
        recompute = bool(given.gradient_checkpointing)
        yield from adapter_layout_problems(ds, on_experts=bool(parameters), recompute=recompute)


def plan_problems(given: Any, model_config: Mapping[str, Any]) -> Iterator[str]:
    """:func:`adapter_problems` of a recipe that trains nothing and has the flags of rank and targets only."""
    targets = {"lora_target_modules": given.lora_target_modules, "lora_target_parameters": given.lora_target_parameters}
    if not given.use_peft:
        for name, value in targets.items():
            if value:
                yield f"--{name}: does nothing without --use_peft; add the flag, or drop this one"
        return
    if given.lora_r < 1:
        yield f"--lora_r {given.lora_r}: must be 1 or more"
    if getattr(given, "use_liger_kernel", False):  # recipes/check.py has no such flag
        yield "--use_liger_kernel with --use_peft: not tested here; drop one of them"
    family = family_of(model_config)
    if family is not None and family.no_adapters is not None:
        yield _no_adapters(family)
    elif family is not None:
        modules, parameters = (_words(value) for value in targets.values())
        yield from _target_problems(modules, parameters, family, model_config)


def _no_adapters(family: Family) -> str:
    return f"--use_peft with model_type = {family.model_type}: {family.no_adapters}; train the whole model"


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


def _folder_problems(folder: Path, given: Any) -> Iterator[str]:
    """What is wrong with the adapter to go on from, and flags that it decides."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        yield f"--adapter {folder}: no {ADAPTER_WEIGHTS} in it; give a folder that PEFT or this recipe wrote"
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        yield from plain_lora_problems(folder, config)
    except UserError as error:
        yield from error.problems
        return
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform"):
        if config.get(key):
            yield f"--adapter {folder}: {key} = {show(config[key])}: not built; give an adapter without it"
    if isinstance(config.get("target_modules"), str):
        yield f"--adapter {folder}: target_modules = {show(config['target_modules'])}: a pattern; give one with a list"
    decided = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    flags = [name for name, default in decided.items() if getattr(given, name) != default]
    flags += [name for name in ("lora_target_modules", "lora_target_parameters", "use_rslora") if getattr(given, name)]
    for name in flags:
        yield f"--{name} with --adapter: that folder decides it; drop the flag"


PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none",), "modules_to_save": (None, []),
    "lora_bias": (False, None), "fan_in_fan_out": (False,), "trainable_token_indices": (None,),
    "exclude_modules": (None, []), "layer_replication": (None,),
}  # fmt: skip
"""Keys of adapter_config.json, and the values with which an adapter is nothing but factors A and B."""


def plain_lora_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key by which the adapter in ``folder`` is more than factors A and B."""
    for key, allowed in PLAIN_LORA.items():
        if key in config and config[key] not in allowed:
            yield (
                f"{folder / ADAPTER_CONFIG}: {key} = {show(config[key])}: only {show(allowed[0])} is built here; merge "
                "it with PEFT's merge_and_unload()"
            )


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


def per_expert_problems(family: Family, parameters: Sequence[str]) -> Iterator[str]:
    """Why this adapter cannot be written in the per-expert layout: PEFT would not read it back."""
    key = "--adapter_layout per_expert"
    if not family.per_expert_adapters:
        yield f"{key} with model_type = {family.model_type}: PEFT 0.21 drops the experts' factors; use fused"
        return
    if not parameters:
        yield f"{key}: no experts are adapted; drop it"
    elif EXPERT_TARGETS[1] not in parameters:
        yield f"{key} without {EXPERT_TARGETS[1]}: PEFT 0.21 then drops those of gate and up; add it, or use fused"


def adapter_layout_problems(ds: DsConfig, *, on_experts: bool, recompute: bool) -> Iterator[str]:
    """Layouts in which adapters are not built or not tested; ``recompute``: with activation checkpointing."""
    if ds.moe.layer is not None:
        yield "--use_peft with moe.layer: not built for native layers; use expert_parallel"
    if ds.moe.kernels == "fused":
        yield '--use_peft with moe.kernels = "fused": the fused experts know no adapters; remove moe.kernels'
    if ds.tp_size > 1:
        yield f"--use_peft with tensor_parallel.autotp_size = {ds.tp_size}: AutoTP would not split adapters; remove it"
    if ds.sp_size > 1:
        yield f"--use_peft with sequence_parallel_size = {ds.sp_size}: not tested here; remove it"
    if ds.zero_stage == 0:
        yield "--use_peft with zero_optimization.stage = 0: not tested here; set it to 1, 2 or 3"
    if ds.zero_stage == 3 and ds.expert_parallel is None and on_experts:
        yield (
            "--use_peft on experts with ZeRO stage 3 and without expert_parallel: PEFT would read weights that are not "
            'gathered; add "expert_parallel": {"enabled": true, "autoep_size": 1}, or use stage 1 or 2'
        )
    if ds.zero_stage == 3 and recompute:
        yield (
            "--gradient_checkpointing with --use_peft and ZeRO stage 3: TRL would make it reentrant, which deprives "
            "the auxiliary loss of its gradient; set it to false, or use stage 1 or 2"
        )
    if ds.moe.balance is not None and ds.moe.balance.bias_update_rate:
        yield ("moe.balance.bias_update_rate with --use_peft: an adapter has no place for a selection bias; remove it")
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


# ---------------------------------------------------------------------------------- going on from a checkpoint


def adapter_facts(given: Any, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What :data:`ADAPTERS` of a checkpoint of this run will say; None without adapters or for an unknown model."""
    family = family_of(model_config)
    if not given.use_peft or family is None:
        return None
    return chosen_adapter(given, family, model_config).facts()


def resume_problems(given: Any, model_config: Mapping[str, Any], checkpoint: Path | None) -> Iterator[str]:
    """Why this run cannot go on from ``checkpoint``, as far as adapters say it."""
    if checkpoint is None or not (checkpoint / LAYOUT_FILE).is_file():
        return
    saved = read_json(checkpoint / LAYOUT_FILE)
    yield from adapter_resume_problems(checkpoint, saved, adapter_facts(given, model_config))


def adapter_resume_problems(
    checkpoint: str | Path, saved: dict[str, Any] | None, adapters: dict[str, Any] | None
) -> list[str]:
    """A line if a run with these ``adapters`` (None: all weights) cannot go on from what the checkpoint trained."""
    found = (saved or {}).get(ADAPTERS)
    if found == adapters:
        return []
    if adapters is None:
        return [
            f"--resume_from_checkpoint {checkpoint}: it trained an adapter; add --use_peft with its flags ({found})"
        ]
    if found is None:
        return [f"--resume_from_checkpoint {checkpoint}: it trained all weights, no adapter; drop --use_peft"]
    differing = []
    for name, value in adapters.items():
        if (found.get(name) or None) != (value or None):  # PEFT writes no target as None, or as an empty list
            differing.append(f"{name} {found.get(name)} there, {value} here")
    if not differing:
        return []
    return [
        f"--resume_from_checkpoint {checkpoint}: it trained another adapter: {'; '.join(differing)}; give its flags"
    ]
