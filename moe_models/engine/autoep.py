"""What AutoEP needs before ``deepspeed.initialize``, and the check afterwards that it did what was asked.

DeepSpeed's AutoEP replaces the MoE blocks of a stock HF model inside ``deepspeed.initialize``, from the
``expert_parallel`` section of the JSON. Source: ``deepspeed/module_inject/auto_ep*.py`` of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_models.engine.blocks import find_blocks
from moe_models.families.table import FAMILIES, Family, moe_blocks


def register_presets() -> None:
    """Teach AutoEP the families of our table that DeepSpeed 0.19.8 has no preset for (``own_preset``). Idempotent.

    The pattern keys of ``expert_parallel`` would find the blocks too. But only a preset carries an adapter. A family
    with an auxiliary loss needs the one that points transformers' router-logit recorder at the new router, or the loss
    has nothing to work on. The others route in groups as DeepSeek-V3 does, whose adapter reads them from the config.
    """
    from deepspeed.module_inject.auto_ep_presets import registry
    from deepspeed.module_inject.auto_ep_presets.base import MoEModelPreset, TransformersTopLevelRouterLogitsAdapter
    from deepspeed.module_inject.auto_ep_presets.deepseek_v3 import DeepSeekV3PresetAdapter

    name_recorders_by_class()

    # upstream: deepspeed 0.19.8: has no preset for these families, and no public way to add one.
    # Remove `own_preset` of a family when: DeepSpeed has its preset.
    for family in FAMILIES.values():
        if family.own_preset is None:
            continue
        adapter: Any = DeepSeekV3PresetAdapter()
        if family.returns_aux_loss:
            adapter = TransformersTopLevelRouterLogitsAdapter(
                display_name=family.model_type,
                hf_model_types=(family.model_type,),
                class_name_fragments=(family.own_preset,),
            )
        registry._PRESET_ADAPTERS.setdefault(family.model_type, adapter)
        shared = ""
        shared_gate = ""
        if family.shared is not None:
            shared = family.shared.name
            shared_gate = family.shared.gate or ""
        registry.PRESET_MODELS.setdefault(
            family.model_type,
            MoEModelPreset(
                moe_layer_pattern=r"model\.layers\.\d+\.mlp",
                router_pattern="gate",
                experts_pattern="experts",
                expert_storage="fused_3d",
                expert_w1="gate_up_proj",
                expert_w2="down_proj",
                expert_w3=None,
                num_experts_attr=family.num_experts_key,
                top_k_attr="num_experts_per_tok",
                score_func=family.router.score,
                score_apply="post",
                route_norm=family.router.normalise is True,  # where it is a key, the model's own value overrides this
                gate_bias=False,
                has_shared_experts=family.shared is not None,
                shared_experts_pattern=shared,
                shared_experts_gate_pattern=shared_gate,
                preset_adapter=family.model_type,
                hf_model_types=(family.model_type,),
            ),
        )


# upstream: deepspeed 0.19.8: keys transformers' registry of output recorders by str(class) and reads it with a default;
# since transformers 5.23.0 it is keyed by model, and its get takes one argument (TypeError).
# Remove when: DeepSpeed's auto_ep_presets/base.py reads the registry of 5.23.
def name_recorders_by_class() -> None:
    """Let transformers' registry of output recorders answer to class names too, as it did before 5.23. Idempotent."""
    from transformers.utils import output_capturing

    by_model = getattr(output_capturing, "_CanRecordRegistry", None)
    registry = output_capturing._CAN_RECORD_REGISTRY
    if by_model is None or type(registry) is not by_model:  # before 5.23, or done already
        return

    def set_item(self: Any, key: Any, value: Any) -> None:
        dict.__setitem__(self, _class_name(key), value)

    def get(self: Any, key: Any, default: Any = None) -> Any:
        if isinstance(key, str):
            return dict.get(self, key, default)
        return dict.get(self, _class_name(key)) or {}

    registry.__class__ = type("ByClassName", (by_model,), {"__setitem__": set_item, "get": get})


def _class_name(key: Any) -> str:
    return key if isinstance(key, str) else str(key.__class__)


def check_replaced(model: nn.Module, family: Family, config: Mapping[str, Any], ep_size: int) -> None:
    """Raise RuntimeError unless every MoE block of the model, and nothing else, became an AutoEP layer of ``ep_size``.

    AutoEP skips a block that it does not recognise with a debug message. Such a block would train with the gradients of
    its replicas mixed up, or with all its experts on every rank.
    """
    # 1. The right blocks.
    found = {block.path: block for block in find_blocks(model) if block.kind == "autoep"}
    expected = set(moe_blocks(family, config))
    problems = [f"{path} was not replaced" for path in sorted(expected - set(found))]
    problems += [f"{path} was replaced but is not an MoE block" for path in sorted(set(found) - expected)]
    # 2. The right number of experts in each.
    E = family.num_experts(config)
    for path, block in found.items():
        if block.ep_size != ep_size or block.num_experts != E:
            held = len(block.local)
            problems.append(f"{path} holds {held} of {E} experts at ep_size {block.ep_size}")
    if problems:
        raise RuntimeError("AutoEP did not build the layout that the JSON asks for: " + "; ".join(problems))


def restore_rotary_buffers(model: nn.Module) -> list[str]:
    """Rebuild rotary ``inv_freq`` buffers in fp32 where loading made them bf16; returns the module names.

    A bf16 ``inv_freq`` is off by up to 0.4%: at position 4096 that turns a phase by more than two full circles.
    """
    # upstream: transformers 5.20.2: under ZeRO-3 it builds the model inside deepspeed's zero.Init, which silently
    # creates buffers in the training dtype. Remove when: from_pretrained keeps inv_freq in fp32 under any ZeRO stage.
    fixed = []
    for name, module in model.named_modules():
        inv_freq = module._buffers.get("inv_freq")
        if inv_freq is None or inv_freq.dtype == torch.float32 or not hasattr(module, "config"):
            continue
        fresh = type(module)(module.config)
        for key, buffer in fresh._buffers.items():
            if buffer is not None:
                buffer = buffer.to(device=inv_freq.device, dtype=torch.float32)
            module._buffers[key] = buffer
        for key in ("inv_freq", "original_inv_freq"):  # the latter is a plain attribute in some versions
            if key in fresh.__dict__:
                setattr(module, key, getattr(fresh, key).to(inv_freq.device))
        fixed.append(name)
    return fixed
