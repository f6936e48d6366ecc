"""One AutoEP layer outside a model, and the same function as an obvious loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu


def autoep_layer(
    *, D: int, F: int, E: int, K: int, ep_size: int = 1, ep_rank: int = 0, device: Any = "cpu",
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Any:  # fmt: skip
    """DeepSpeed's layer as ``deepspeed.initialize`` builds it, of the same random weights on every rank.

    ``options`` are keys of the section ``expert_parallel``.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

    # 1. What the layer is made of.
    torch.manual_seed(0)
    source = nn.Module()
    with torch.device(device):
        source.gate = nn.Linear(D, E, bias=False, dtype=dtype)
        source.experts = nn.Module()
        source.experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, D, dtype=dtype) / D**0.5)
        source.experts.down_proj = nn.Parameter(torch.randn(E, D, F, dtype=dtype) / F**0.5)
    # 2. The layer. The weights of a single expert are not normalised: they would be 1, and the router without gradient.
    spec = MoELayerSpec(
        moe_module_name="mlp", model_family="qwen3_moe", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
        num_experts=E, top_k=K, hidden_size=D, ffn_hidden_size=F, score_func="softmax", score_apply="post",
        route_norm=K > 1, gate_bias=False, return_router_logits=False, router_logits_capture_target="none",
        router_logits_capture_index=None, router_logits_capture_layer_name=None, has_shared_experts=False,
        shared_experts_name="",
    )  # fmt: skip
    config = AutoEPConfig(enabled=True, autoep_size=ep_size, **options)
    layer = AutoEPMoELayer(spec, source, ep_size, ep_rank, config).to(device=device)
    nn.init.normal_(layer.router.gate.weight, std=D**-0.5)
    return layer


def loop(layer: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """One expert after the other with its tokens, in the dtype of the weights; on the layer's own choices. EP 1."""
    scores_TK, ids_TK, _ = layer.router(x_TD, None)
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    y_TD = torch.zeros_like(x_TD)
    for expert in range(w1.shape[0]):
        token, choice = (ids_TK == expert).nonzero(as_tuple=True)
        if len(token):
            x = x_TD[token]
            y = (silu(x @ w1[expert].T) * (x @ w3[expert].T)) @ w2[expert].T
            y_TD = y_TD.index_add(0, token, (y * scores_TK[token, choice, None]).to(y_TD.dtype))
    return y_TD
