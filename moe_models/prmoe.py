"""PR-MoE (pyramid-residual mixture of experts, arXiv 2201.05596) as a Hugging Face model of our own.

transformers has no such architecture, so this one is Mixtral's with two additions. Both are computed as DeepSpeed does:

- *residual* (``use_residual``): a dense MLP beside the experts, y = c0 experts(x) + c1 mlp(x), where (c0, c1) is the
  softmax of a linear function of x (``deepspeed.moe.layer.MoE``);
- *pyramid*: ``num_local_experts`` is a list, the experts of each layer; later layers should have more.

With one expert per token its output is weighted by its probability, with more by their shares, as in DeepSpeed's gate.
This is the plain model, which runs in one process; ``moe_models/engine/native.py`` spreads its experts over ranks. To
load a checkpoint::

    import moe_models.prmoe
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralForCausalLM,
    MixtralModel,
    MixtralRMSNorm,
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.utils.generic import can_return_tuple

MODEL_TYPE = "prmoe"


@strict
class PRMoEConfig(MixtralConfig):  # type: ignore[misc]
    """MixtralConfig with a dense MLP beside the experts and a number of experts for each layer."""

    model_type = MODEL_TYPE
    num_local_experts: int | list[int] = 8
    use_residual: bool = True
    how_to_load: str = "import moe_models.prmoe (github: moe-recipes), then AutoModelForCausalLM.from_pretrained"
    """Written to config.json, for a reader who finds a folder of this model."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.router_jitter_noise:
            raise ValueError("router_jitter_noise: prmoe has none; set it to 0")
        counts = self.num_local_experts
        layers = self.num_hidden_layers
        each = counts if isinstance(counts, list) else [counts] * layers
        enough = all(isinstance(count, int) and count >= self.num_experts_per_tok for count in each)
        if len(each) != layers or not enough:
            raise ValueError(
                f"num_local_experts = {counts}: must be a whole number of at least num_experts_per_tok = "
                f"{self.num_experts_per_tok}, or a list of {layers} of them, one for each layer"
            )


class PRMoERouter(MixtralTopKRouter):  # type: ignore[misc]
    """Softmax over all experts, then the K largest; scaled to sum to 1 if K is more than one.

    In fp32 whatever the model's dtype, as in DeepSpeed's gate, so that native layers choose the same experts.
    """

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., D] -> logits [T, E], weights [T, K], experts [T, K]"""
        x_TD = x_BTD.reshape(-1, self.hidden_dim)
        logits_TE = nn.functional.linear(x_TD.float(), self.weight.float())
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, experts_TK


class DenseMLP(nn.Module):
    """The MLP that every token passes: down(act(gate(x)) * up(x)), as large as an expert."""

    def __init__(self, config: PRMoEConfig) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        hidden_F = self.act_fn(self.gate_proj(x_D)) * self.up_proj(x_D)
        return cast(torch.Tensor, self.down_proj(hidden_F))


class PRMoESparseMoeBlock(nn.Module):
    """Experts, and the dense MLP beside them."""

    def __init__(self, config: PRMoEConfig, layer: int) -> None:
        super().__init__()
        # Mixtral's modules read one number of experts from the config.
        own = copy.copy(config)
        if isinstance(config.num_local_experts, list):
            own.num_local_experts = config.num_local_experts[layer]
        self.gate = PRMoERouter(own)
        self.experts = MixtralExperts(own)
        # upstream: transformers 5.20.2: experts look up their implementation in config._experts_implementation at every
        # call, and set_experts_implementation() changes it in the model's config, not in copies. Remove when: it is
        # passed to the module.
        self.experts.config = config
        if config.use_residual:
            self.residual_mlp = DenseMLP(config)
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]"""
        # 1. The router chooses K experts for each token.
        _, weights_TK, experts_TK = self.gate(x_BTD)
        # 2. Their weighted sum.
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_BTD = self.experts(x_TD, experts_TK, weights_TK).view_as(x_BTD)
        # 3. Residual: the dense MLP computes every token too; two coefficients per token mix both.
        if "coefficient" in self._modules:
            share_BT2 = self.coefficient(x_BTD).softmax(-1)
            y_BTD = y_BTD * share_BT2[..., 0:1] + self.residual_mlp(x_BTD) * share_BT2[..., 1:]
        return cast(torch.Tensor, y_BTD)


class PRMoEDecoderLayer(MixtralDecoderLayer):  # type: ignore[misc]
    """Mixtral's layer around another MoE block."""

    def __init__(self, config: PRMoEConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # not Mixtral's own, which would build its MoE block
        self.hidden_size = config.hidden_size
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = PRMoESparseMoeBlock(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


# upstream: transformers 5.20.2: a model may use grouped experts only if "@use_experts_implementation" is in the source
# file of its class; ours inherits the decorated class from Mixtral's file. Remove when: it looks at the modules.
class _FusedExperts:
    """Says to transformers that its implementations of experts (grouped matmul, for one) may be used."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class PRMoEModel(_FusedExperts, MixtralModel):  # type: ignore[misc]
    """Mixtral's decoder with the layers above."""

    config_class = PRMoEConfig

    def __init__(self, config: PRMoEConfig) -> None:
        # Mixtral's constructor builds Mixtral's layers; it gets a config without any.
        without_layers = copy.copy(config)
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers)
        self.config = config
        self.layers = nn.ModuleList([PRMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class PRMoEForCausalLM(_FusedExperts, MixtralForCausalLM):  # type: ignore[misc]
    """Language model. Its auxiliary loss is the mean of Mixtral's loss over layers; where balanced, it is K."""

    config_class = PRMoEConfig

    def __init__(self, config: PRMoEConfig) -> None:
        super(MixtralForCausalLM, self).__init__(config)  # not Mixtral's own, which would build a MixtralModel
        self.model = PRMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As in Mixtral, except for the auxiliary loss."""
        # 1. Hidden states, and the logits of the positions that are asked for (0: all).
        with_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=with_routers, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept, :])

        # 2. Cross-entropy.
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.vocab_size, **kwargs)

        # 3. The auxiliary loss, layer by layer: layers differ in their number of experts, so they cannot be pooled.
        aux_loss = None
        if with_routers:
            of_layers = []
            for logits_TE in outputs.router_logits:
                E = logits_TE.shape[-1]
                of_layers.append(load_balancing_loss_func((logits_TE,), E, self.num_experts_per_tok, attention_mask))
            aux_loss = torch.stack(of_layers).mean()
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


AutoConfig.register(MODEL_TYPE, PRMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PRMoEConfig, PRMoEForCausalLM, exist_ok=True)
# On disk each expert has tensors of its own, under Mixtral's hub names.
register_checkpoint_conversion_mapping(
    MODEL_TYPE, copy.deepcopy(get_checkpoint_conversion_mapping("mixtral")), overwrite=True
)
