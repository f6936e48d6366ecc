"""PR-MoE (pyramid-residual mixture of experts, arXiv 2201.05596) as a Hugging Face model of our own.

transformers has no such architecture, so this one is Mixtral's with two additions, each computed as DeepSpeed does:

- *residual* (``use_residual``): a dense MLP beside the experts, y = c0 experts(x) + c1 mlp(x), where (c0, c1) is the
  softmax of a linear function of x (``deepspeed.moe.layer.MoE``);
- *pyramid*: ``num_local_experts`` is a list, the experts of each layer; later layers should have more.

With one expert per token its output is weighed by its probability, with more by their share, as DeepSpeed's gate does.
This is the plain model that runs in one process; ``moe_models/engine/native.py`` spreads it. To load a checkpoint of
it::

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
    """For whoever finds a folder of this model, in its config.json."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.router_jitter_noise:
            raise ValueError("router_jitter_noise: prmoe has none; set it to 0")
        counts, layers = self.num_local_experts, self.num_hidden_layers
        each = counts if isinstance(counts, list) else [counts] * layers
        if len(each) != layers or not all(isinstance(n, int) and n >= self.num_experts_per_tok for n in each):
            raise ValueError(
                f"num_local_experts = {counts}: must be a whole number of at least num_experts_per_tok = "
                f"{self.num_experts_per_tok}, or a list of {layers} of them, one for each layer"
            )


class PRMoERouter(MixtralTopKRouter):  # type: ignore[misc]
    """Softmax over all experts and the k largest; normalised to their sum if there is more than one.

    In fp32 whatever the model's dtype, as DeepSpeed's gate, so that native layers choose the same experts.
    """

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., D] -> logits [T, E], weights [T, K], experts [T, K]"""
        logits_TE = nn.functional.linear(x_BTD.reshape(-1, self.hidden_dim).float(), self.weight.float())
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, experts_TK


class DenseMLP(nn.Module):
    """The MLP that every token passes: down(act(gate(x)) * up(x)), of an expert's size."""

    def __init__(self, config: PRMoEConfig) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        return cast(torch.Tensor, self.down_proj(self.act_fn(self.gate_proj(x_D)) * self.up_proj(x_D)))


class PRMoESparseMoeBlock(nn.Module):
    """Experts, and the dense MLP beside them."""

    def __init__(self, config: PRMoEConfig, layer: int) -> None:
        super().__init__()
        own = copy.copy(config)
        if isinstance(config.num_local_experts, list):
            own.num_local_experts = config.num_local_experts[layer]
        self.gate = PRMoERouter(own)
        self.experts = MixtralExperts(own)
        self.experts.config = config  # where transformers looks for the implementation, which may change
        if config.use_residual:
            self.residual_mlp = DenseMLP(config)
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]"""
        _, weights_TK, experts_TK = self.gate(x_BTD)
        y_BTD = self.experts(x_BTD.reshape(-1, x_BTD.shape[-1]), experts_TK, weights_TK).view_as(x_BTD)
        if "coefficient" in self._modules:
            share_BT2 = self.coefficient(x_BTD).softmax(-1)
            y_BTD = y_BTD * share_BT2[..., 0:1] + self.residual_mlp(x_BTD) * share_BT2[..., 1:]
        return cast(torch.Tensor, y_BTD)


class PRMoEDecoderLayer(MixtralDecoderLayer):  # type: ignore[misc]
    """Mixtral's, around another block."""

    def __init__(self, config: PRMoEConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = PRMoESparseMoeBlock(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class _FusedExperts:
    """Lets transformers take its grouped experts: it looks for their decorator in the source file of the model."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class PRMoEModel(_FusedExperts, MixtralModel):  # type: ignore[misc]
    """Mixtral's decoder with these layers."""

    config_class = PRMoEConfig

    def __init__(self, config: PRMoEConfig) -> None:
        without_layers = copy.copy(config)
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers)
        self.config = config
        self.layers = nn.ModuleList([PRMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class PRMoEForCausalLM(_FusedExperts, MixtralForCausalLM):  # type: ignore[misc]
    """Language model. Its auxiliary loss is the mean over layers of Mixtral's; balanced, each is top-k."""

    config_class = PRMoEConfig

    def __init__(self, config: PRMoEConfig) -> None:
        super(MixtralForCausalLM, self).__init__(config)
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
        """As in Mixtral, but for the auxiliary loss."""
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=wanted, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if wanted:  # layers differ in their number of experts, so they cannot be pooled
            k = self.num_experts_per_tok
            of_layers = [
                load_balancing_loss_func((logits_TE,), logits_TE.shape[-1], k, attention_mask)
                for logits_TE in outputs.router_logits
            ]
            aux_loss = torch.stack(of_layers).mean()
            loss = None if loss is None else loss + self.router_aux_loss_coef * aux_loss
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
# On disk its experts lie one by one, under Mixtral's names.
register_checkpoint_conversion_mapping(
    MODEL_TYPE, copy.deepcopy(get_checkpoint_conversion_mapping("mixtral")), overwrite=True
)
