"""What one rank holds: its share of the weights, gradients and optimizer states. Integer arithmetic, torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.tp_plan import kind_of, layer_specs
from moe_models.families.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Share:
    """Parameters that one rank computes with, before ZeRO shards anything."""

    dense: int
    """Outside the experts; where nothing spreads the experts, with them."""
    replicated: int
    """The part of ``dense`` that tensor parallelism does not split."""
    expert: int
    """In this rank's experts."""


def share_of_one_rank(ds: DsConfig, sizes: ModelSizes, layout: Layout) -> Share:
    """Parameters of one rank: the experts divided by EP, matrices that tensor parallelism splits by TP."""
    specs = layer_specs(ds.raw) if layout.tp_size > 1 else []
    split = sum(prod(shape) for name, shape in sizes.dense if kind_of(name, specs) != "skip")
    replicated = sizes.dense_params - split
    dense = replicated + split // layout.tp_size
    if ds.expert_parallel is None and ds.moe.layer is None:  # plain HF blocks: all experts on every rank
        return Share(dense=dense + sizes.expert_params, replicated=replicated + sizes.expert_params, expert=0)
    return Share(dense=dense, replicated=replicated, expert=sizes.expert_params // layout.ep_size)


def state_bytes(ds: DsConfig, sizes: ModelSizes, layout: Layout, element_bytes: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW states on one rank, without activations and buffers.

    Rajbhandari et al. 2020 (ZeRO): stage 1 shards optimizer states, 2 gradients too, 3 weights too; the dense part over
    all ranks but tensor-parallel peers, experts over the ranks that hold the same. AdamW keeps two moments and, for
    16-bit weights, an fp32 copy. What ``offloaded`` names lies in host memory.
    """
    share, stage = share_of_one_rank(ds, sizes, layout), ds.zero_stage
    parts = ((share.dense, layout.zero_size), (share.expert, layout.edp_size))
    kinds = {
        "weights": (element_bytes, 3),
        "gradients": (element_bytes, 2),
        "optimizer": (8 if element_bytes == 4 else 12, 1),
    }
    return {
        name: sum(n * each // (ranks if stage >= from_stage else 1) for n, ranks in parts)
        for name, (each, from_stage) in kinds.items()
    }


def offloaded(ds: DsConfig) -> set[str]:
    """The kinds of :func:`state_bytes` that ZeRO-Offload keeps in host memory or on NVMe."""
    zero = ds.raw.get("zero_optimization", {})
    places = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    return {kind for key, kind in places.items() if (zero.get(key) or {}).get("device", "none") != "none"}
