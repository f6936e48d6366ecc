"""What differs between HF MoE families, as data: one row per ``model_type``.

Four layouts of the same weights meet here:

- *module* layout, what transformers >= 5 holds in memory: all experts of a block in one tensor,
  ``{prefix}.mlp.experts.gate_up_proj`` [E, 2F, D] (gate rows first, then up) and ``.down_proj`` [E, D, F];
- *hub* layout, what checkpoints on disk use and what vLLM and older transformers read: one tensor per expert and
  projection, e.g. ``{prefix}.block_sparse_moe.experts.3.w1.weight`` [F, D];
- *AutoEP* layout, what DeepSpeed's AutoEP holds on each rank: ``{prefix}.mlp.experts.w1`` (gate), ``.w3`` (up)
  [E_local, F, D] and ``.w2`` (down) [E_local, D, F], and the router as ``{prefix}.mlp.router.gate.weight``. The names
  are the same for every family, because AutoEP builds the block from its own class;
- *native* layout, what ``moe_models/engine/native.py`` holds: one module for each local expert in
  ``{prefix}.mlp.moe.deepspeed_moe``, and the HF router as the gate's ``wg``.

A new family is one row of :data:`FAMILIES`. Nothing outside this package compares a ``model_type``
(``tests/house/test_families_are_rows.py``): what code has to know about a family is a column of :class:`Family`.
The table was checked against transformers 5.20.2; ``tests/families/test_families.py`` compares it with what
``save_pretrained`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EXPERT_PROJECTIONS = ("gate", "up", "down")
"""The three matrices of a SwiGLU expert: down(silu(gate(x)) * up(x))."""

AUTOEP_EXPERT_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}
"""Names AutoEP gives the three stacked expert weights, after ``{block}.experts.``."""

NATIVE_EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"
"""Where a native layer keeps its experts, after ``{block}.`` and before ``.{e}.{projection}_proj.weight``."""

NATIVE_ROUTER = "moe.deepspeed_moe.gate.wg.weight"
"""Where a native layer keeps the router, after ``{block}.``."""


# --- which decoder layers have experts

LayerRule = Callable[[Mapping[str, Any], int], bool]
"""``rule(config, layer)``: whether decoder layer ``layer`` of a model with this ``config.json`` has experts."""


def all_layers(config: Mapping[str, Any], layer: int) -> bool:
    """Experts in every layer."""
    return True


def after(key: str, default: int = 0) -> LayerRule:
    """Experts in every layer but the first ``config[key]``; ``default`` of them where config.json has no such key."""

    def rule(config: Mapping[str, Any], layer: int) -> bool:
        return layer >= int(config.get(key, default))

    return rule


def listed(key: str, otherwise: LayerRule) -> LayerRule:
    """Experts in the layers that ``config[key]`` calls sparse; ``otherwise`` where config.json has no such list."""

    def rule(config: Mapping[str, Any], layer: int) -> bool:
        kinds = config.get(key)
        if kinds is None:
            return otherwise(config, layer)
        return bool(kinds[layer] == "sparse")

    return rule


def all_but_the_first(config: Mapping[str, Any], layer: int) -> bool:
    """Experts in every layer but the first."""
    return layer > 0


def every(step: str, *, but: str) -> LayerRule:
    """Experts in every ``config[step]``-th layer, except those that ``config[but]`` lists."""

    def rule(config: Mapping[str, Any], layer: int) -> bool:
        dense = config.get(but) or []
        return layer not in dense and (layer + 1) % int(config.get(step, 1)) == 0

    return rule


# --- the parts of a row


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a family's router weighs the experts of a token."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalise: bool | str = False
    """Whether the weights of the chosen experts are divided by their sum; or the key of config.json that says it."""
    normalise_one: bool = True
    """Whether the weight of a single chosen expert is divided by itself too, which makes it 1."""

    def normalises(self, config: Mapping[str, Any], top_k: int) -> bool:
        """Whether the weights of ``top_k`` chosen experts sum to 1 in a model with this ``config.json``."""
        if top_k == 1 and not self.normalise_one:
            return False
        if isinstance(self.normalise, str):
            return bool(config.get(self.normalise, False))
        return self.normalise


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An MLP inside the block that every token passes through, beside the routed experts."""

    name: str
    """Its module, after ``{block}.``."""
    gate: str | None = None
    """Module of the linear layer that weighs it, after ``{block}.``; None: it is added as it is."""
    size_key: str
    """Key of its FFN size in config.json."""
    count_key: str | None = None
    """Key of config.json by which the size is multiplied; absent or 0 there means no shared expert."""

    def size(self, config: Mapping[str, Any]) -> int:
        """FFN size, 0 where the model has none. Raises KeyError if ``config.json`` does not say."""
        if self.count_key is None:
            return int(config[self.size_key])
        count = int(config.get(self.count_key) or 0)
        return count * int(config[self.size_key]) if count else 0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What a family's attention has beyond four matrices without bias."""

    latent: bool = False
    """Multi-head latent attention (DeepSeek, arXiv 2405.04434): queries, keys and values come from low ranks."""
    bias_key: str | None = None
    """Key of config.json that turns biases on; None: the class has none."""
    bias_default: bool = False
    """What a config.json without that key means."""
    output_bias: bool = False
    """Whether the output projection then has a bias too."""
    norms: Literal["none", "each head", "all heads"] = "none"
    """RMS norms of queries and keys: none, one weight for each head's width, or one over all heads together."""
    norms_key: str | None = None
    """Key of config.json that turns these norms on; None: they are always there."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the MoE blocks of one HF ``model_type`` are, what their tensors are called, and what it cannot do."""

    model_type: str

    # The experts
    num_experts_key: str
    """Key of the expert count E in the hub's config.json (transformers may write its own spelling: num_experts())."""
    expert_size_key: str
    """Key of the expert FFN size F in config.json."""
    moe_layers: LayerRule = all_layers
    """Which decoder layers have experts."""
    router: Router = Router()
    """How experts are weighed."""
    shared: SharedExpert | None = None
    """The expert that every token passes through, if there is one."""
    residual_mlp: bool = False
    """Whether a dense MLP is mixed with the experts' output (``residual_mlp``, ``coefficient``; arXiv 2201.05596)."""

    # The names on the hub
    hub_block: str = "mlp"
    """Name of the MoE block in the hub layout; it is ``mlp`` in every module layout."""
    hub_expert_names: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    """Hub name of each expert projection, after ``{block}.experts.{e}.`` and before ``.weight``."""
    hub_bias: str = "gate.e_score_correction_bias"
    """Hub name of the selection bias, after ``{block}.``; in memory it is always that of the default."""

    # The rest of the model
    attention: Attention = Attention()
    """What its attention has."""
    dense_sources: tuple[str, ...] = ()
    """Dense ``model_type``s whose checkpoints upcycling turns into this family: the same model but for the MLPs."""

    # Training
    selection_bias: bool = False
    """Whether the router has a selection bias (``e_score_correction_bias``), in memory and on the hub."""
    returns_aux_loss: bool = True
    """Whether the HF class returns ``aux_loss`` (DeepSeek's do not: they balance by bias or not at all)."""
    pools_layers: bool = True
    """Whether the auxiliary loss can pool the layers: not where they may differ in their number of experts."""
    counts_flops: bool = True
    """Whether sizes and FLOP follow from config.json (``sizes.py`` describes models whose MoE layers are all alike)."""
    mlp_adapters: bool = False
    """Whether an adapter can be put on dense MLPs and shared experts; of other families PEFT 0.21 takes their names for
    those of the experts, and adapts these instead."""
    per_expert_adapters: bool = False
    """Whether PEFT 0.21 reads an adapter with a pair of factors for each expert's matrix; of others it drops them."""
    fp32_scores: bool = False
    """Whether the HF router hands out its weights in fp32, so that the weighted sum of a bf16 model is fp32 too."""
    liger_kernels: bool = False
    """Whether liger-kernel 0.8.5 has kernels for it; for others transformers leaves the model as it is, silently."""

    # What it cannot do: the reason, as it ends the line that refuses it; None where nothing is in the way
    autoep_preset: str | None = None
    """Name of the AutoEP preset; DeepSpeed finds it by itself, from the model type. None: see ``no_autoep``."""
    own_preset: str | None = None
    """How the HF class names begin, where DeepSpeed has no such preset: ``engine/autoep.py`` makes it of this row."""
    no_autoep: str | None = None
    """Why AutoEP cannot spread its experts."""
    no_native_layers: str | None = None
    """Why ``deepspeed.moe.layer.MoE`` cannot compute its blocks, whatever config.json says."""
    no_tensor_parallel: str | None = None
    """Why AutoTP cannot split its attention."""
    no_sequence_parallel: str | None = None
    """Why Ulysses cannot exchange its heads."""

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Expert count E of a model with this ``config.json``. Raises KeyError if it does not say."""
        for key in (self.num_experts_key, "num_local_experts", "num_experts"):
            if config.get(key) is not None:
                return int(config[key])
        raise KeyError(self.num_experts_key)

    def expert_counts(self, config: Mapping[str, Any]) -> list[int]:
        """Expert count of each MoE block, in order. Raises KeyError, TypeError or ValueError if it cannot be told."""
        blocks = len(list(moe_blocks(self, config)))
        counts = config.get(self.num_experts_key)
        if not isinstance(counts, list):
            return [self.num_experts(config)] * blocks
        if len(counts) != blocks:
            raise ValueError(f"{self.num_experts_key} = {counts}: there are {blocks} MoE layers")
        return [int(count) for count in counts]

    def module_to_hub(self, name: str) -> str:
        """Hub name of a tensor that is not an expert weight."""
        name = re.sub(r"\.mlp\.gate\.e_score_correction_bias$", f".mlp.{self.hub_bias}", name)
        if self.hub_block == "mlp":
            return name
        return re.sub(r"^(model\.layers\.\d+)\.mlp\.", rf"\1.{self.hub_block}.", name)

    def hub_expert(self, block: str, expert: int, projection: str) -> str:
        """Hub name of one expert matrix; ``block`` is the module path, e.g. ``model.layers.0.mlp``."""
        hub_block = self.module_to_hub(block + ".")
        return f"{hub_block}experts.{expert}.{self.hub_expert_names[projection]}.weight"

    def renames(self) -> Iterator[tuple[str, str]]:
        """AutoEP or native name -> module name inside the block, beyond router and experts."""
        if self.shared is not None:
            if self.shared.gate is not None:
                yield "shared_experts_gate", self.shared.gate
            yield "shared_experts", self.shared.name
        if self.residual_mlp:
            yield "moe.mlp", "residual_mlp"
            yield "moe.coefficient", "coefficient"

    def autoep_to_module(self, name: str) -> str:
        """Module name of an AutoEP or native tensor that is not an expert weight (router, shared experts)."""
        name = name.replace(f".mlp.{NATIVE_ROUTER}", ".mlp.gate.weight")
        name = re.sub(r"\.mlp\.router\.gate\.(weight|bias)$", r".mlp.gate.\1", name)
        name = re.sub(r"\.mlp\.router\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias", name)
        for autoep, module in self.renames():
            name = name.replace(f".mlp.{autoep}.", f".mlp.{module}.")
        return name


# --- the rows

_MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

_DEEPSEEK_SHARED = SharedExpert(name="shared_experts", size_key="moe_intermediate_size", count_key="n_shared_experts")
_DEEPSEEK_ATTENTION = Attention(latent=True, bias_key="attention_bias", output_bias=True)
_ONE_ROTARY_KEY = "its latent attention shares one rotary key among all heads, whose gradient AutoTP does not sum"
_NOT_COMPARED = "its attention was not compared with Hugging Face's there"
_SIGMOID = "the layer has no sigmoid scores and expert groups"
_TWO_WIDTHS = "Ulysses exchanges heads of one width, and the queries and values of latent attention have two"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",  # arXiv 2401.04088
            num_experts_key="num_local_experts",
            expert_size_key="intermediate_size",
            router=Router(normalise=True),
            hub_block="block_sparse_moe",
            hub_expert_names=_MIXTRAL_NAMES,
            dense_sources=("llama", "mistral"),
            per_expert_adapters=True,
            fp32_scores=True,
            liger_kernels=True,
            autoep_preset="mixtral",
        ),
        Family(
            model_type="qwen2_moe",
            num_experts_key="num_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=every("decoder_sparse_step", but="mlp_only_layers"),
            router=Router(normalise="norm_topk_prob"),
            shared=SharedExpert(
                name="shared_expert", gate="shared_expert_gate", size_key="shared_expert_intermediate_size"
            ),
            attention=Attention(bias_key="qkv_bias", bias_default=True),
            dense_sources=("qwen2",),
            mlp_adapters=True,
            autoep_preset="qwen3_moe",
        ),
        Family(
            model_type="qwen3_moe",  # arXiv 2505.09388
            num_experts_key="num_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=every("decoder_sparse_step", but="mlp_only_layers"),
            router=Router(normalise="norm_topk_prob"),
            attention=Attention(bias_key="attention_bias", output_bias=True, norms="each head"),
            dense_sources=("qwen3",),
            per_expert_adapters=True,
            liger_kernels=True,
            autoep_preset="qwen3_moe",
        ),
        Family(
            model_type="olmoe",  # arXiv 2409.02060
            num_experts_key="num_experts",
            expert_size_key="intermediate_size",
            router=Router(normalise="norm_topk_prob"),
            attention=Attention(bias_key="attention_bias", output_bias=True, norms="all heads"),
            per_expert_adapters=True,
            autoep_preset="olmoe",
            own_preset="Olmoe",
            no_tensor_parallel="it normalises queries and keys over all heads together, and a peer has only its own",
        ),
        Family(
            model_type="deepseek_v2",  # arXiv 2405.04434
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=after("first_k_dense_replace"),
            shared=_DEEPSEEK_SHARED,
            attention=_DEEPSEEK_ATTENTION,
            returns_aux_loss=False,
            fp32_scores=True,
            liger_kernels=True,
            autoep_preset="deepseek_v2",
            no_native_layers="the layer has no un-normalised, scaled weights",
            no_tensor_parallel=_ONE_ROTARY_KEY,
            no_sequence_parallel=_TWO_WIDTHS,
        ),
        Family(
            model_type="deepseek_v3",  # arXiv 2412.19437
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=after("first_k_dense_replace"),
            router=Router(score="sigmoid", normalise="norm_topk_prob"),
            shared=_DEEPSEEK_SHARED,
            attention=_DEEPSEEK_ATTENTION,
            selection_bias=True,
            returns_aux_loss=False,
            fp32_scores=True,
            liger_kernels=True,
            autoep_preset="deepseek_v3",
            no_native_layers=_SIGMOID,
            no_tensor_parallel=_ONE_ROTARY_KEY,
            no_sequence_parallel=_TWO_WIDTHS,
        ),
        Family(
            model_type="glm4_moe",  # GLM-4.5 to 4.7, arXiv 2508.06471
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=after("first_k_dense_replace", default=1),
            router=Router(score="sigmoid", normalise="norm_topk_prob"),
            shared=_DEEPSEEK_SHARED,
            attention=Attention(bias_key="attention_bias", norms="each head", norms_key="use_qk_norm"),
            selection_bias=True,
            returns_aux_loss=False,
            fp32_scores=True,
            autoep_preset="glm4_moe",
            own_preset="Glm4Moe",
            no_native_layers=_SIGMOID,
            no_tensor_parallel=_NOT_COMPARED,
            no_sequence_parallel=_NOT_COMPARED,
        ),
        Family(
            model_type="glm4_moe_lite",  # GLM-4.7-Flash: GLM's experts, DeepSeek's attention
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=listed("mlp_layer_types", all_but_the_first),
            router=Router(score="sigmoid", normalise="norm_topk_prob"),
            shared=_DEEPSEEK_SHARED,
            attention=_DEEPSEEK_ATTENTION,
            selection_bias=True,
            returns_aux_loss=False,
            fp32_scores=True,
            autoep_preset="glm4_moe_lite",
            own_preset="Glm4MoeLite",
            no_native_layers=_SIGMOID,
            no_tensor_parallel=_ONE_ROTARY_KEY,
            no_sequence_parallel=_TWO_WIDTHS,
        ),
        Family(
            model_type="dots1",  # arXiv 2506.05767
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=after("first_k_dense_replace"),
            router=Router(score="sigmoid", normalise="norm_topk_prob"),
            shared=_DEEPSEEK_SHARED,
            attention=Attention(bias_key="attention_bias", output_bias=True, norms="each head"),
            selection_bias=True,
            returns_aux_loss=False,
            fp32_scores=True,
            autoep_preset="dots1",
            own_preset="Dots1",
            no_native_layers=_SIGMOID,
            no_tensor_parallel=_NOT_COMPARED,
            no_sequence_parallel=_NOT_COMPARED,
        ),
        Family(
            model_type="exaone_moe",  # K-EXAONE, arXiv 2601.01739
            num_experts_key="num_experts",
            expert_size_key="moe_intermediate_size",
            moe_layers=listed("mlp_layer_types", after("first_k_dense_replace", default=1)),
            router=Router(score="sigmoid", normalise="norm_topk_prob"),
            shared=SharedExpert(
                name="shared_experts", size_key="moe_intermediate_size", count_key="num_shared_experts"
            ),
            attention=Attention(norms="each head"),
            hub_bias="e_score_correction_bias",
            selection_bias=True,
            returns_aux_loss=False,
            fp32_scores=True,
            autoep_preset="exaone_moe",
            own_preset="ExaoneMoe",
            no_native_layers=_SIGMOID,
            no_tensor_parallel=_NOT_COMPARED,
            no_sequence_parallel=_NOT_COMPARED,
        ),
        Family(
            model_type="prmoe",  # arXiv 2201.05596; ours: moe_models/prmoe.py registers it with transformers
            num_experts_key="num_local_experts",
            expert_size_key="intermediate_size",
            router=Router(normalise=True, normalise_one=False),
            residual_mlp=True,
            hub_block="block_sparse_moe",
            hub_expert_names=_MIXTRAL_NAMES,
            pools_layers=False,
            counts_flops=False,
            no_autoep="AutoEP would leave out its residual MLP",
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The row of a model with this ``config.json``, or None for a model that is not in the table."""
    return FAMILIES.get(str(config.get("model_type")))


def is_moe_layer(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether decoder layer ``layer`` holds an MoE block (families mix dense and MoE layers in different ways)."""
    return family.moe_layers(config, layer)


def moe_blocks(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Module paths of the MoE blocks that a model with this ``config.json`` has, in order."""
    for layer in range(int(config["num_hidden_layers"])):
        if family.moe_layers(config, layer):
            yield f"model.layers.{layer}.mlp"
