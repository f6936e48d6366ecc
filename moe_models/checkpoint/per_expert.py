"""An adapter in the per-expert layout: a pair of factors for each expert's matrix, under the hub's names.

It is what PEFT wrote before transformers fused the experts, and what vLLM reads by default for Mixtral and Qwen3-MoE.
Gate and up of an expert have the same A. Plain PEFT reads it back into the fused layout, for the families that
``per_expert_adapters`` of the table names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from moe_models.checkpoint.source import fingerprint
from moe_models.engine.lora import PEFT_PREFIX, unpack
from moe_models.families.table import Family

AdapterLayout = Literal["fused", "per_expert"]

PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def per_expert(
    tensors: Mapping[str, torch.Tensor], fused: Mapping[str, tuple[str, int]], family: Family
) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's fused file, those of experts taken apart.

    ``fused``: key of each pair of experts' factors -> (fused tensor, E), of :func:`~moe_models.checkpoint.adapter.
    fused_keys`.
    """
    apart = {name: tensor for name, tensor in tensors.items() if _pair(name)[0] not in fused}
    for key, (parameter, num_experts) in fused.items():
        A_ErD, B_EFr = unpack(tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"], num_experts)
        for expert, (A_rD, B_Fr) in enumerate(zip(A_ErD, B_EFr, strict=True)):
            names = list(expert_names(key, parameter, expert, family))
            for name, B in zip(names, B_Fr.chunk(len(names)), strict=True):
                apart[f"{name}.lora_A.weight"] = A_rD.clone()
                apart[f"{name}.lora_B.weight"] = B.clone(memory_format=torch.contiguous_format)
    return apart


def expert_names(key: str, parameter: str, expert: int, family: Family) -> Iterator[str]:
    """PEFT's names, up to ``.lora_A.weight``, of one expert's matrices out of a fused tensor."""
    block = key.removeprefix(PEFT_PREFIX).partition(".experts")[0]
    for projection in PROJECTIONS[parameter]:
        yield PEFT_PREFIX + family.hub_expert(block, expert, projection).removesuffix(".weight")


def per_expert_config(config: Any, family: Family) -> Any:
    """PEFT's config of the same adapter in this layout."""
    apart = copy.deepcopy(config)
    names = set(config.target_modules or [])
    for target in config.target_parameters or []:
        for projection in PROJECTIONS[target.rpartition(".")[2]]:
            names.add(family.hub_expert_names[projection])
    apart.target_modules = sorted(names)
    apart.target_parameters = None
    return apart


def fingerprints_of(
    tensors: Mapping[str, torch.Tensor], fused: Mapping[str, tuple[str, int]], family: Family, dtype: torch.dtype
) -> dict[str, int]:
    """Fingerprints of a per-expert file's factors in ``dtype``, named like those of the fused layout."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found: dict[str, int] = {}
    of_experts: set[str] = set()
    for key, (parameter, num_experts) in fused.items():
        for expert in range(num_experts):
            names = list(expert_names(key, parameter, expert, family))
            As = [tensors[f"{name}.lora_A.weight"] for name in names]
            of_experts.update(f"{name}.lora_{x}.weight" for name in names for x in "AB")
            if not all(torch.equal(A, As[0]) for A in As):  # gate and up share one
                continue
            found[f"{key}.{expert}.lora_A"] = fingerprint(As[0])
            B = torch.cat([tensors[f"{name}.lora_B.weight"] for name in names])
            found[f"{key}.{expert}.lora_B"] = fingerprint(B)
    for name, tensor in tensors.items():
        if name not in of_experts:
            found[name] = fingerprint(tensor)
    return found


def _pair(name: str) -> tuple[str, str]:
    """(key of the pair, which of the two) of a tensor's name."""
    key, _, which = name.removesuffix(".weight").rpartition(".")
    return key, which
