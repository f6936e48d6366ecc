"""What ``deepspeed.moe.layer.MoE`` can compute of a model, known from JSON, config.json and world size (torch-free).

Read from deepspeed 0.19.8, ``moe/sharded_moe.py``: the gate takes a softmax over all experts and the k largest; for k
of 2 and more their weights are divided by their sum, for k = 1 the weight is the probability itself. There are no
expert groups, no sigmoid scores and no scaling factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import divisors
from moe_models.config.moe_section import MoeLayer
from moe_models.errors import show
from moe_models.families.table import FAMILIES, Family, family_of
from moe_models.families.unsupported import why_unsupported
from moe_models.preflight.combinations import data_before_experts

_INSTEAD = "use expert_parallel instead (ds_configs/zero1_ep2.json and its siblings), or remove moe.layer"


def check_native(ds: DsConfig, layer: MoeLayer, config: Mapping[str, Any], world_size: int) -> list[str]:
    """All known reasons why native layers cannot train this model with this ds_config."""
    return [*_zero_problems(ds), *_model_problems(layer, config, world_size)]


def inexpressible(layer: MoeLayer, family: Family, config: Mapping[str, Any]) -> list[str]:
    """One line for each thing in the model's MoE blocks that the layer cannot compute, and each key without effect."""
    if family.no_native_layers is not None:
        return [f"moe.layer with model_type = {show(family.model_type)}: {family.no_native_layers}; {_INSTEAD}"]
    problems = []

    # 1. The weights of the chosen experts: the layer's own rule (above) must be the model's.
    k = layer.k or int(config["num_experts_per_tok"])
    experts = min(family.expert_counts(config))
    normalised = family.router.normalises(config, k)
    if k > experts:
        problems.append(f"moe.layer.k = {k}: must be 1 to {experts} (the experts)")
    if k > 1 and not normalised:
        problems.append(
            f"config.json: norm_topk_prob = false with {k} experts per token: the layer divides their weights by their "
            f"sum; {_INSTEAD}"
        )
    if k == 1 and normalised:
        problems.append(
            "1 expert per token with normalised weights (always 1): the layer weighs a single expert by its "
            f"probability; {_INSTEAD}"
        )
    if config.get("router_jitter_noise"):
        problems.append(
            f"config.json: router_jitter_noise = {show(config['router_jitter_noise'])}: the layer's noise is another "
            'one; set it to 0 (and "noisy_gate_policy": "Jitter" in moe.layer if you want noise)'
        )

    # 2. Keys that DeepSpeed reads at one number of experts per token only.
    for key, on, needs in (
        ("use_rts", layer.use_rts, 1),
        ("top2_2nd_expert_sampling", layer.top2_2nd_expert_sampling, 2),
        ("noisy_gate_policy", layer.noisy_gate_policy == "RSample", 1),
    ):
        if on and k != needs:
            plural = "s" if needs > 1 else ""
            problems.append(
                f"moe.layer.{key} = {show(getattr(layer, key))} does something at {needs} expert{plural} per token "
                f"only, and there are {k}; remove the key"
            )
    if layer.aux_loss == "layer" and not config.get("router_aux_loss_coef", 0.001):
        problems.append(
            'moe.layer.aux_loss = "layer" does nothing with router_aux_loss_coef = 0 in config.json; remove the key'
        )
    return problems


def _zero_problems(ds: DsConfig) -> Iterator[str]:
    """Native layers with each ZeRO stage, the optimizer and the other kinds of parallelism."""
    if ds.zero_stage not in (1, 2):
        why = "DeepSpeed refuses native layers there" if ds.zero_stage == 3 else "the gradient norm is untested there"
        yield f"moe.layer with zero_optimization.stage = {ds.zero_stage}: {why}; set stage to 1 or 2"
    if not ds.has_optimizer:
        yield (
            "moe.layer without an optimizer section: DeepSpeed has to build it, with the experts in groups of their "
            "own; copy the optimizer section of ds_configs/zero1_ep2_native.json"
        )
    for key in ("reduce_scatter", "contiguous_gradients"):
        if not ds.zero(key, True):
            yield f"zero_optimization.{key} = false: must be true with moe.layer; remove the key"
    for key, size in (("tensor_parallel.autotp_size", ds.tp_size), ("sequence_parallel_size", ds.sp_size)):
        if size > 1:
            yield f"{key} = {size}: not supported with moe.layer; set it to 1, or use expert_parallel"
    if ds.raw.get("use_data_before_expert_parallelism"):
        yield data_before_experts()


def _model_problems(layer: MoeLayer, config: Mapping[str, Any], world_size: int) -> Iterator[str]:
    """A model that native layers do not know, and experts that ``ep_size`` does not divide."""
    family = family_of(config)
    if family is None:
        if why_unsupported(config) is not None:  # it has its line
            return
        yield (
            f"model_type = {show(config.get('model_type'))}: moe.layer knows {', '.join(sorted(FAMILIES))}; make a MoE "
            "of a dense model first (recipes/upcycle.py), or remove moe.layer (ds_configs/zero3.json)"
        )
        return
    try:
        counts = family.expert_counts(config)
        int(config["num_experts_per_tok"])
    except (KeyError, TypeError, ValueError):
        or_a_list = "" if family.pools_layers else " (the first may be a list, one for each layer)"
        yield (
            f"config.json: {family.num_experts_key} and num_experts_per_tok must be whole numbers of at least 1"
            f"{or_a_list}"
        )
        return
    if not counts:
        yield f"config.json: model_type = {show(family.model_type)}, but no layer is an MoE layer; remove moe.layer"
        return
    if any(count % layer.ep_size for count in counts):
        common = math.gcd(*counts)
        both = [size for size in divisors(common) if world_size % size == 0]
        yield (
            f"moe.layer.ep_size = {layer.ep_size} does not divide the model's "
            f"{' and '.join(map(str, sorted(set(counts))))} experts; with {world_size} ranks use one of {both}"
        )
    yield from inexpressible(layer, family, config)
