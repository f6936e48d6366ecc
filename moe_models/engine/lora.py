"""Adapters (LoRA) on experts that AutoEP spreads, and what PEFT's wrapping of a model asks of DeepSpeed.

PEFT decides what is adapted, draws the first values, and owns names and file format. Hugging Face's fused experts it
adapts by a wrapper (``ParamWrapper``) around ``mlp.experts``, with A [E*r, in], expert by expert, and B [out, r*E], the
expert fastest. AutoEP, which looks for ``mlp.experts.gate_up_proj``, does not see through it. So:

1. Just before ``deepspeed.initialize`` the wrappers come off, and the block keeps their factors
   (:func:`take_off_wrappers`). The experts themselves may still be on disk: nothing of them is read here.
2. While AutoEP builds its block, the factors of this rank's experts join it (``lora_experts.py``), as parameters of
   spread experts: reduced over the ranks that hold the same experts, partitioned among them.

Where nothing spreads the experts, PEFT's wrappers stay and compute.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_models.engine.blocks import hf_model
from moe_models.errors import UserError, one_line

ADAPTER = "default"
"""What PEFT calls the adapter of a model that has one."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the path of each module of the model that it wraps."""

HELD = "expert_adapters"
"""Where an MoE block keeps its experts' factors until AutoEP has replaced it."""

_FUSED = {"gate_up_proj": "gate_up", "down_proj": "down"}


# ------------------------------------------------------------------------------------------------- PEFT's config


def lora_config(model_args: Any) -> Any:
    """PEFT's ``LoraConfig`` of the flags in TRL's ``ModelConfig``; None without ``--use_peft``."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is None:
        return None
    # TRL makes a string of a single module, which PEFT reads as a regular expression; and where only experts are named,
    # PEFT would add the modules that it thinks fit for the family.
    modules = config.target_modules or []
    config.target_modules = {modules} if isinstance(modules, str) else set(modules)
    config.revision = model_args.model_revision
    return config


def continued_adapter(model: Any, folder: str, model_args: Any) -> Any:
    """``model`` with the adapter of PEFT's ``folder``, to be trained further. Raises UserError if it does not fit."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        adapted = PeftModel.from_pretrained(
            model, folder, is_trainable=True, autocast_adapter_dtype=False, torch_device="cpu"
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--adapter {folder}: {one_line(error)}") from error
    config = adapted.peft_config[ADAPTER]
    config.base_model_name_or_path = model_args.model_name_or_path
    config.revision = model_args.model_revision
    return adapted


# ------------------------------------------------------------------------------------------------- PEFT's wrappers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """PEFT's adapter of one fused tensor of one block."""

    A: nn.Parameter
    """[E*r, in], expert by expert."""
    B: nn.Parameter
    """[out, r*E], the expert fastest."""
    num_experts: int
    scaling: float
    key: str
    """Its name in PEFT's file, up to ``.lora_A.weight``."""

    def of(self, experts: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the factors of some experts: [experts, r, in], [experts, out, r]."""
        A, B = unpack(self.A.detach(), self.B.detach(), self.num_experts)
        chosen = slice(experts.start, experts.stop)
        return A[chosen].clone(), B[chosen].contiguous()


def unpack(A: torch.Tensor, B: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's [E*r, in] and [out, r*E] as [E, r, in] and [E, out, r]; views."""
    return A.view(num_experts, -1, A.shape[-1]), B.view(B.shape[0], -1, num_experts).permute(2, 0, 1)


def pack(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back of :func:`unpack`; contiguous."""
    return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


class HeldFactors(nn.Module):
    """PEFT's parameters of a block's experts, a part of the model until AutoEP has replaced the block."""

    def __init__(self, factors: dict[str, Factors]) -> None:
        super().__init__()
        self.factors = factors
        for name, pair in factors.items():
            self.register_parameter(f"{name}_A", pair.A)
            self.register_parameter(f"{name}_B", pair.B)


def _is_wrapper(layer: Any) -> bool:
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def take_off_wrappers(model: nn.Module) -> None:
    """Put the experts back in the place of PEFT's wrappers around them; each block keeps the factors."""
    for path, block in list(model.named_modules()):
        layer: Any = getattr(block, "experts", None)
        if not _is_wrapper(layer):
            continue
        # One wrapper for each fused tensor, one around the other.
        key = f"{path}.experts"
        factors: dict[str, Factors] = {}
        while _is_wrapper(layer):
            factors[_FUSED[layer.parameter_name]] = Factors(
                A=layer.lora_A[ADAPTER].weight,
                B=layer.lora_B[ADAPTER].weight,
                num_experts=layer.num_experts,
                scaling=layer.scaling[ADAPTER],
                key=key,
            )
            layer = layer.base_layer
            key += ".base_layer"
        block.experts = layer
        setattr(block, HELD, HeldFactors(factors))


def is_adapted(model: Any) -> bool:
    """Whether ``model`` is one that PEFT wrapped."""
    return hf_model(model) is not model


def peft_key(name: str) -> str:
    """The name in PEFT's file of a parameter of an adapter, from its name in the Hugging Face model."""
    return PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")


def adapter_config(model: Any) -> Any:
    """PEFT's config of the adapter on ``model``, as its folder has it."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    for name in ("target_modules", "target_parameters"):
        targets = getattr(config, name)
        if targets is not None:
            setattr(config, name, sorted(targets))
    return config


def adapter_facts(engine: Any) -> dict[str, Any]:
    """What two adapters must have in common for one to go on from the other's checkpoint."""
    config = adapter_config(engine.module)
    names = ("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters")
    return {name: getattr(config, name) for name in names}


# ------------------------------------------------------------------------------------------------- DeepSpeed


def see_through_peft() -> None:
    """Let AutoEP's presets find their blocks in a model that PEFT wrapped, too. Idempotent."""
    from deepspeed.module_inject.auto_ep_presets import registry

    # upstream: deepspeed 0.19.8: a preset's pattern is matched against the whole path of a module, without PEFT's
    # prefix. Remove when: AutoEP finds the blocks of a PeftModel.
    optional = f"(?:{re.escape(PEFT_PREFIX)})?"
    for name, preset in registry.PRESET_MODELS.items():
        if not preset.moe_layer_pattern.startswith(optional):
            pattern = optional + preset.moe_layer_pattern
            registry.PRESET_MODELS[name] = dataclasses.replace(preset, moe_layer_pattern=pattern)


# upstream: deepspeed 0.19.8: AutoEP knows no adapters. It slices the experts that it finds, and what else is in the
# block is lost. Remove when: AutoEP slices PEFT's factors too.
@contextmanager
def adapters_join_autoep(model: nn.Module) -> Iterator[None]:
    """Inside, ``deepspeed.initialize`` gives AutoEP's blocks the adapters that PEFT put on ``model``'s experts."""
    from deepspeed.module_inject import auto_ep_layer

    from moe_models.engine.lora_experts import AdaptedExperts

    layer_class = auto_ep_layer.AutoEPMoELayer
    collect = auto_ep_layer.collect_replacement_sources

    class AdaptedLayer(layer_class):  # type: ignore[misc, valid-type]
        """AutoEP's block, with the factors of its experts."""

        def __init__(self, spec: Any, source_module: Any, ep_size: int, ep_rank: int, *args: Any, **options: Any):
            super().__init__(spec, source_module, ep_size, ep_rank, *args, **options)
            held = getattr(source_module, HELD, None)
            if held is None:
                return
            experts = AdaptedExperts.adapt(self.experts)
            first = ep_rank * self.num_local_experts
            own = range(first, first + self.num_local_experts)
            for name, pair in held.factors.items():
                A, B = pair.of(own)
                experts.add(name, A, B, pair.scaling, pair.key, trained=pair.A.requires_grad)

    def collect_with_factors(source_module: Any, replacement: Any, *args: Any) -> Any:
        # Which parameter of the optimizer each new one stands for: without it a factor would join the router's group,
        # which is frozen, and never be trained.
        collected = collect(source_module, replacement, *args)
        held = getattr(source_module, HELD, None)
        if held is not None:
            for name, pair in held.factors.items():
                for new, old in zip(replacement.experts.factors(name), (pair.A, pair.B), strict=True):
                    collected.sources[id(new)] = [old]
        return collected

    take_off_wrappers(model)
    auto_ep_layer.AutoEPMoELayer = AdaptedLayer
    auto_ep_layer.collect_replacement_sources = collect_with_factors
    try:
        with all_experts_may_be_frozen():
            yield
    finally:
        auto_ep_layer.AutoEPMoELayer = layer_class
        auto_ep_layer.collect_replacement_sources = collect


# upstream: deepspeed 0.19.8: ZeRO 1 and 2 assert that a model with spread experts trains some of them. Remove when:
# _configure_moe_settings takes a model whose experts are all frozen.
@contextmanager
def all_experts_may_be_frozen() -> Iterator[None]:
    """Inside, ZeRO 1 and 2 take a model with spread experts of which none is trained: adapters on attention alone."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    before = {owner: owner._configure_moe_settings for owner in (BF16_Optimizer, DeepSpeedZeroOptimizer)}

    def tolerant(configure: Any) -> Any:
        @functools.wraps(configure)
        def configure_if_any(optimizer: Any) -> None:
            groups = optimizer.optimizer.param_groups
            if any(group.get("moe") for group in groups):
                configure(optimizer)
            else:
                optimizer.is_moe_param_group = [False] * len(groups)
                optimizer.expert_gradients = {}

        return configure_if_any

    for owner, configure in before.items():
        owner._configure_moe_settings = tolerant(configure)
    try:
        yield
    finally:
        for owner, configure in before.items():
            owner._configure_moe_settings = configure


# upstream: deepspeed 0.19.8: with ZeRO 1 and 2 a checkpoint gets every expert, frozen or not, and of what is trained
# in an AutoEP block only w1, w2 and w3; ZeRO-3 refuses frozen experts. A checkpoint of a model without experts leaves
# out what is frozen. Remove when: save_checkpoint(exclude_frozen_parameters=True) leaves out frozen experts.
@contextmanager
def checkpoints_of_trained_tensors(engine: Any) -> Iterator[None]:
    """Inside, ``engine`` saves and loads checkpoints as if it had no spread experts: what is frozen stays out.

    The model states in there have the factors of rank 0's experts only. Each rank's own are in the fp32 master weights
    of its optimizer partition, from which :func:`weights_from_masters` takes them.
    """
    before = engine.has_moe_layers
    engine.has_moe_layers = False
    try:
        yield
    finally:
        engine.has_moe_layers = before


def weights_from_masters(engine: Any) -> None:
    """Set the trained weights of every rank to its fp32 master weights, as an optimizer step does; collective.

    Without it a resumed rank would compute its next step with the factors of rank 0's experts. ZeRO-3 does it itself.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()
