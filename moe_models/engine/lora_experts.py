"""DeepSpeed's grouped experts with low-rank factors beside their frozen weights.

It imports DeepSpeed, so it is imported only where an engine is built (``moe_models/engine/lora.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation
from torch import nn

FACTORS = ("gate_up", "down")
"""Which fused tensor of Hugging Face a pair of factors belongs to."""

STRIDE_BYTES = 16
"""torch._grouped_mm takes no operand whose rows are not whole multiples of this."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [N, in], weights [E_local, out, in]) -> [N, out], each row by the expert that it was sent to."""


class AdaptedExperts(GroupedExperts):
    """E_local experts, frozen, each with factors A [r, in] and B [out, r]: W x + scaling B (A x).

    The factors are parameters of the module itself, or ZeRO-3's hooks would not gather them: ``gate_up_lora_A``
    [E_local, r, D], ``gate_up_lora_B`` [E_local, 2F, r], ``down_lora_A`` [E_local, r, F], ``down_lora_B``
    [E_local, D, r]. No matrix W + BA is made, and no gradient of a weight.
    """

    scaling: dict[str, float]
    """alpha / r of each pair of factors that is there."""
    adapter_keys: dict[str, str]
    """What PEFT calls each of them in its file, up to ``.lora_A.weight``."""

    @staticmethod
    def adapt(experts: GroupedExperts) -> AdaptedExperts:
        """Make an instance of this class of AutoEP's module, which built and filled it."""
        experts.__class__ = AdaptedExperts
        experts.scaling = {}
        experts.adapter_keys = {}
        adapted: AdaptedExperts = experts
        return adapted

    def add(self, name: str, A: torch.Tensor, B: torch.Tensor, scaling: float, key: str, *, trained: bool) -> None:
        """Register a pair of factors, with the marks by which DeepSpeed knows a parameter of spread experts."""
        for suffix, values in (("A", A), ("B", B)):
            parameter = nn.Parameter(values.to(dtype=self.w1.dtype), requires_grad=trained)
            for mark in ("allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name"):
                setattr(parameter, mark, getattr(self.w1, mark))
            self.register_parameter(f"{name}_lora_{suffix}", parameter)
        self.scaling[name] = scaling
        self.adapter_keys[name] = key

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of ``name``."""
        return getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """x [N, D], rows sorted by expert -> [N, D]."""
        product = self._product(num_tokens_per_expert)
        # 1. Gate and up, and what their shared A adds to both.
        if self.gate_up_impl == "fused":
            gate_up = product(x, torch.cat([self.w1, self.w3], dim=1))
            gate, up = gate_up.chunk(2, dim=-1)
        else:
            gate = product(x, self.w1)
            up = product(x, self.w3)
        if "gate_up" in self.scaling:
            gate_delta, up_delta = self._delta("gate_up", x, product).chunk(2, dim=-1)
            gate = gate + gate_delta
            up = up + up_delta
        # 2. The activation.
        fused = self.use_grouped_mm and x.is_cuda
        h = apply_expert_activation(
            gate, up, self.activation, self.activation_alpha, self.activation_limit, fused=fused
        )
        # 3. Down.
        out = product(h, self.w2)
        if "down" in self.scaling:
            out = out + self._delta("down", h, product)
        return out

    def _delta(self, name: str, x: torch.Tensor, product: Product) -> torch.Tensor:
        A, B = _padded(*self.factors(name))
        return product(product(x, A) * self.scaling[name], B)

    def _product(self, num_tokens_per_expert: torch.Tensor) -> Product:
        """The grouped product that DeepSpeed would take here."""
        if not self.use_grouped_mm:
            counts = num_tokens_per_expert.tolist()

            def one_by_one(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
                # The rows after those of the last expert are padding.
                *parts, padding = torch.split(x, [*counts, x.shape[0] - sum(counts)])
                done = [part @ weight.to(x.dtype).T for part, weight in zip(parts, weights, strict=True)]
                return torch.cat([*done, padding.new_zeros(padding.shape[0], weights.shape[1])])

            return one_by_one

        offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        if self.use_triton_grouped_mm:
            from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

            return lambda x, weights: group_gemm_triton(x, weights.to(x.dtype), offsets, trans_b=True)
        return lambda x, weights: torch._grouped_mm(x, weights.to(x.dtype).transpose(-2, -1), offs=offsets)


def _padded(A: torch.Tensor, B: torch.Tensor) -> tuple[Any, Any]:
    """The factors with zeros up to a rank whose rows are whole strides."""
    padding = -A.shape[1] % (STRIDE_BYTES // A.element_size())
    if padding == 0:
        return A, B
    return nn.functional.pad(A, (0, 0, 0, padding)), nn.functional.pad(B, (0, padding))
