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
    # 1. Outside the experts: AutoTP splits the matrices that the JSON names and leaves the rest whole.
    specs = layer_specs(ds.raw) if layout.tp_size > 1 else []
    split = sum(prod(shape) for name, shape in sizes.dense if kind_of(name, specs) != "skip")
    replicated = sizes.dense_params - split
    dense = replicated + split // layout.tp_size

    # 2. The experts: AutoEP and native layers deal them to the ranks of an EP group. Plain HF blocks have all of them
    #    on every rank, where ZeRO treats them as any other parameter.
    if ds.spreads_experts:
        return Share(dense=dense, replicated=replicated, expert=sizes.expert_params // layout.ep_size)
    return Share(dense=dense + sizes.expert_params, replicated=replicated + sizes.expert_params, expert=0)


def state_bytes(
    ds: DsConfig, sizes: ModelSizes, layout: Layout, element_bytes: int, trained: Share | None = None
) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW states on one rank, without activations and buffers.

    Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054): stage 1 shards optimizer states, 2 gradients too, 3 weights too.
    The dense part is sharded over all ranks but tensor-parallel peers, experts over the ranks that hold the same.
    AdamW keeps two fp32 moments and, for 16-bit weights, an fp32 copy. What ``ds.offloaded`` names is in host memory.

    ``trained``: of an adapter beside the frozen weights; None where all weights are trained.
    """
    share = share_of_one_rank(ds, sizes, layout)
    adam = 8 if element_bytes == 4 else 12
    kinds = (("weights", element_bytes, 3), ("gradients", element_bytes, 2), ("optimizer", adam, 1))
    held: dict[str, int] = {}
    for name, bytes_each, first_stage in kinds:
        counted = share
        if trained is not None and name == "weights":
            counted = Share(
                dense=share.dense + trained.dense,
                replicated=share.replicated + trained.replicated,
                expert=share.expert + trained.expert,
            )
        elif trained is not None:
            counted = trained
        dense = counted.dense * bytes_each
        experts = counted.expert * bytes_each
        if ds.zero_stage >= first_stage:
            dense //= layout.zero_size
            experts //= layout.edp_size
        held[name] = dense + experts
    return held
