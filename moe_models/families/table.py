"""What differs between HF MoE families, as data: one row per ``model_type``.

Two layouts of the same weights meet here:

- *module* layout, what transformers >= 5 holds in memory: all experts of a block in one tensor,
  ``{prefix}.mlp.experts.gate_up_proj`` [E, 2F, D] (gate rows first, then up) and ``.down_proj`` [E, D, F];
- *hub* layout, what checkpoints on disk use and what vLLM and older transformers read: one tensor per expert and
  projection, e.g. ``{prefix}.block_sparse_moe.experts.3.w1.weight`` [F, D].

DeepSpeed's AutoEP holds a third: ``{prefix}.mlp.experts.w1`` (gate), ``.w3`` (up) [E_local, F, D] and ``.w2`` (down)
[E_local, D, F] on each rank, and the router as ``{prefix}.mlp.router.gate.weight``. Its names are the same for every
family, because AutoEP builds the block from its own class. Native layers (``moe_models/engine/native.py``) hold a
fourth: one module for each local expert in ``{prefix}.mlp.moe.deepspeed_moe``, and the HF router in the place of the
gate's ``wg``.

The table was checked against transformers 5.20.2; ``tests/families/test_families.py`` compares it with what
``save_pretrained`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EXPERT_PROJECTIONS = ("gate", "up", "down")
"""The three matrices of a SwiGLU expert: down(silu(gate(x)) * up(x))."""

AUTOEP_EXPERT_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}
"""Names AutoEP gives the three stacked expert weights, after ``{block}.experts.``."""


NATIVE_EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"
"""Where a native layer keeps its experts, after ``{block}.`` and before ``.{e}.{projection}_proj.weight``."""

NATIVE_ROUTER = "moe.deepspeed_moe.gate.wg.weight"
"""Where a native layer keeps the router, after ``{block}.``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the MoE blocks of one HF ``model_type`` sit and what their tensors are called."""

    model_type: str
    num_experts_key: str
    """Key of the expert count E in the hub's config.json (transformers may write its own spelling: num_experts())."""
    expert_size_key: str
    """Key of the expert FFN size F in config.json."""
    autoep_preset: str | None
    """Name of the AutoEP preset; DeepSpeed finds it by itself, from the model type. None: AutoEP has none."""
    hub_block: str = "mlp"
    """Name of the MoE block in the hub layout; it is ``mlp`` in every module layout."""
    hub_expert_names: Mapping[str, str]
    """Hub name of each expert projection, after ``{block}.experts.{e}.`` and before ``.weight``."""
    renames: tuple[tuple[str, str], ...] = ()
    """AutoEP or native name -> module name inside the block, beyond router and experts (shared and residual ones)."""
    fp32_scores: bool = False
    """Whether the HF router hands out its weights in fp32, so that the weighted sum of a bf16 model is fp32 too."""
    returns_aux_loss: bool = True
    """Whether the HF class returns ``aux_loss`` (DeepSeek's do not: they balance by bias or not at all)."""
    liger_kernels: bool = False
    """Whether liger-kernel 0.8.5 has kernels for it; for others transformers leaves the model as it is, silently."""

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
        if self.hub_block == "mlp":
            return name
        return re.sub(r"^(model\.layers\.\d+)\.mlp\.", rf"\1.{self.hub_block}.", name)

    def hub_expert(self, block: str, expert: int, projection: str) -> str:
        """Hub name of one expert matrix; ``block`` is the module path, e.g. ``model.layers.0.mlp``."""
        hub_block = self.module_to_hub(block + ".")
        return f"{hub_block}experts.{expert}.{self.hub_expert_names[projection]}.weight"

    def autoep_to_module(self, name: str) -> str:
        """Module name of an AutoEP or native tensor that is not an expert weight (router, shared experts)."""
        name = name.replace(f".mlp.{NATIVE_ROUTER}", ".mlp.gate.weight")
        name = re.sub(r"\.mlp\.router\.gate\.(weight|bias)$", r".mlp.gate.\1", name)
        name = re.sub(r"\.mlp\.router\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias", name)
        for autoep, module in self.renames:
            name = name.replace(f".mlp.{autoep}.", f".mlp.{module}.")
        return name


HAS_SELECTION_BIAS = ("deepseek_v3",)
"""Families whose router has a selection bias of its own (``e_score_correction_bias``), in memory and on the hub."""

_PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",  # arXiv 2401.04088
            num_experts_key="num_local_experts",
            expert_size_key="intermediate_size",
            autoep_preset="mixtral",
            hub_block="block_sparse_moe",
            hub_expert_names={"gate": "w1", "up": "w3", "down": "w2"},
            fp32_scores=True,
            liger_kernels=True,
        ),
        Family(
            model_type="qwen2_moe",
            num_experts_key="num_experts",
            expert_size_key="moe_intermediate_size",
            autoep_preset="qwen3_moe",
            hub_expert_names=_PROJ,
            renames=(("shared_experts_gate", "shared_expert_gate"), ("shared_experts", "shared_expert")),
        ),
        Family(
            model_type="qwen3_moe",  # arXiv 2505.09388
            num_experts_key="num_experts",
            expert_size_key="moe_intermediate_size",
            autoep_preset="qwen3_moe",
            hub_expert_names=_PROJ,
            liger_kernels=True,
        ),
        Family(
            model_type="olmoe",  # arXiv 2409.02060
            num_experts_key="num_experts",
            expert_size_key="intermediate_size",
            autoep_preset="olmoe",  # ours: moe_models/engine/autoep.py registers it with DeepSpeed
            hub_expert_names=_PROJ,
        ),
        Family(
            model_type="deepseek_v2",  # arXiv 2405.04434
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            autoep_preset="deepseek_v2",
            hub_expert_names=_PROJ,
            returns_aux_loss=False,
            fp32_scores=True,
            liger_kernels=True,
        ),
        Family(
            model_type="deepseek_v3",  # arXiv 2412.19437
            num_experts_key="n_routed_experts",
            expert_size_key="moe_intermediate_size",
            autoep_preset="deepseek_v3",
            hub_expert_names=_PROJ,
            returns_aux_loss=False,
            fp32_scores=True,
            liger_kernels=True,
        ),
        Family(
            model_type="prmoe",  # arXiv 2201.05596; ours: moe_models/prmoe.py registers it with transformers
            num_experts_key="num_local_experts",
            expert_size_key="intermediate_size",
            autoep_preset=None,
            hub_block="block_sparse_moe",
            hub_expert_names={"gate": "w1", "up": "w3", "down": "w2"},
            renames=(("moe.mlp", "residual_mlp"), ("moe.coefficient", "coefficient")),
        ),
    )
}


def is_moe_layer(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether decoder layer ``layer`` holds an MoE block (families mix dense and MoE layers in different ways)."""
    if family.model_type in ("deepseek_v2", "deepseek_v3"):
        return layer >= int(config.get("first_k_dense_replace", 0))
    if family.model_type in ("qwen2_moe", "qwen3_moe"):
        step = int(config.get("decoder_sparse_step", 1))
        return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0
    return True


def moe_blocks(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Module paths of the MoE blocks that a model with this ``config.json`` has, in order."""
    for layer in range(int(config["num_hidden_layers"])):
        if is_moe_layer(family, config, layer):
            yield f"model.layers.{layer}.mlp"
