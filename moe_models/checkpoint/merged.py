"""A model with its adapter (LoRA) added to its weights: what an export of a run with adapters takes its tensors from.

W + scaling B A is computed in fp32 and rounded once, one tensor (of experts: one projection of those that a rank holds)
at a time. The training weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe_models.checkpoint.from_engine import EngineSource
from moe_models.engine.blocks import hf_model, take_projection
from moe_models.engine.lora import ADAPTER, unpack
from moe_models.families.table import Family


class MergedSource(EngineSource):
    """The tensors of a live engine whose model PEFT wrapped, the adapter added; collective as its base class."""

    def __init__(self, engine: Any, family: Family) -> None:
        super().__init__(engine, family)
        # Name of the merged weight -> PEFT's layer around it.
        self._adapted: dict[str, Any] = {}
        # Every factor must reach a weight; those that have not yet.
        self._unused = {name: None for name, _ in hf_model(engine.module).named_parameters() if "lora_" in name}
        self._names = {id(tensor): name for name, tensor in hf_model(engine.module).named_parameters()}
        for path, module in hf_model(engine.module).named_modules():
            if ADAPTER in getattr(module, "lora_A", ()) and not hasattr(module, "parameter_name"):
                self._adapted[family.autoep_to_module(f"{path}.weight")] = module

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`; factors that were added to nothing, too."""
        return [*super().unasked(), *self._unused]

    def _used(self, *factors: torch.Tensor) -> None:
        for factor in factors:
            self._unused.pop(self._names[id(factor)], None)

    def _whole(self, name: str) -> torch.Tensor | None:
        layer = self._adapted.get(name)
        if layer is None:
            return super()._whole(name)
        A = layer.lora_A[ADAPTER].weight
        B = layer.lora_B[ADAPTER].weight
        self._used(A, B)
        with self._gathered([A]), self._gathered([B]):
            whole = super()._whole(name)
            if whole is None:
                return None
            return merged(whole, A.cpu(), B.cpu(), layer.scaling[ADAPTER])

    def _factors(self, block: Any, projection: str) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """A [E, r, in], B [E, out, r] (views of trained tensors, gathered by the caller) and their scaling."""
        name = "down" if projection == "down" else "gate_up"
        experts = block.module.experts
        if name in getattr(experts, "scaling", {}) and hasattr(experts, "factors"):  # AutoEP's, with ours
            A, B = experts.factors(name)
            self._used(A, B)
            return [(A, B, experts.scaling[name])]
        while hasattr(experts, "parameter_name"):  # PEFT's wrappers
            if experts.parameter_name.startswith(name):
                A = experts.lora_A[ADAPTER].weight
                B = experts.lora_B[ADAPTER].weight
                self._used(A, B)
                return [(*unpack(A, B, experts.num_experts), experts.scaling[ADAPTER])]
            experts = experts.base_layer
        return []

    def _expert_parameters(self, block: Any, projection: str) -> list[torch.Tensor]:
        parameters = super()._expert_parameters(block, projection)
        for A, B, _ in self._factors(block, projection):
            parameters += [A, B]
        return parameters

    def _own_experts(self, block: Any, projection: str) -> torch.Tensor:
        own = super()._own_experts(block, projection)
        for A, B, scaling in self._factors(block, projection):
            if projection != "down":
                B = take_projection(B, projection)
            own = merged(own, A, B, scaling)
        return own


@torch.no_grad()
def merged(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """[..., out, in] + scaling [..., out, r] [..., r, in], in the dtype of ``weight``; a new tensor."""
    delta = B.detach().float() @ A.detach().float()
    return (weight.float() + scaling * delta).to(weight.dtype)
