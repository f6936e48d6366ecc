"""Where ``"moe": {"kernels": "fused"}`` cannot act, known from the JSON; and how its tokens travel. Torch-free.

What only the layers themselves can tell (their activation, the GPU) is reported when they are built
(``engine/fused/layer.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.moe_section import resolve_dispatch, rows_sent
from moe_models.errors import show
from moe_models.families.table import family_of


def fused_problems(ds: DsConfig) -> Iterator[str]:
    """One line for each reason why AutoEP's layers cannot take fused kernels here, or a key would do nothing."""
    # 1. Only AutoEP's layers have them.
    experts = ds.expert_parallel
    if experts is None:
        yield 'moe.kernels = "fused": acts on the layers of expert_parallel, and there are none; remove the key'
        return

    # 2. What their forward pass does not do.
    no = 'with moe.kernels = "fused"'
    if ds.tp_size > 1:
        yield (
            f"tensor_parallel.autotp_size = {ds.tp_size} {no}: tensor-parallel peers share the rows of a layer, which "
            "only DeepSpeed's own forward pass does; remove moe.kernels"
        )
    if ds.deepcompile:
        yield f"compile.deepcompile = true {no}: the compiler cannot trace it; set deepcompile to false"
    if experts.comm_backend == "deepep":
        yield f'expert_parallel.comm_backend = "deepep" {no}: it has an exchange of its own; remove one of the two keys'

    # 3. What they do in another way. "fused_weighted_sum" is in every preset, and means what they do.
    for key, value in (
        ("async_split_plan", True),
        ("combine_impl", "legacy_bmm"),
        ("gate_up_impl", "fused"),
        ("use_grouped_mm", False),
    ):
        if getattr(experts, key) == value:
            yield f"expert_parallel.{key} = {show(value)} {no}: does nothing; remove one of the two keys"
    if ds.moe.dispatch == "all_gather" and experts.autoep_size == 1:
        yield (
            'moe.dispatch = "all_gather" with expert_parallel.autoep_size = 1: no token travels; remove the key, or '
            "raise autoep_size"
        )


def dispatch_line(ds: DsConfig, model_config: Mapping[str, Any]) -> str | None:
    """How tokens travel under fused kernels, and why; None where that is no question."""
    family = family_of(model_config)
    if ds.moe.kernels != "fused" or ds.expert_parallel is None or ds.ep_size == 1 or family is None:
        return None
    top_k = experts_per_token(ds, model_config)
    ways = {}
    for way in ("all_gather", "all_to_all"):
        count = rows_sent(way, ds.ep_size, top_k)  # type: ignore[arg-type]
        ways[way] = f"{count:.3g}"
    chosen = resolve_dispatch(ds.moe.dispatch, ds.ep_size, top_k)
    other = "all_to_all" if chosen == "all_gather" else "all_gather"
    why = "as moe.dispatch says"
    if ds.moe.dispatch == "auto":
        why = "auto takes the all-gather where it sends fewer"
    return (
        f"dispatch: {chosen} sends {ways[chosen]} rows for each token, {other} {ways[other]} (EP {ds.ep_size}, top-"
        f"{top_k}; {why})"
    )


def experts_per_token(ds: DsConfig, model_config: Mapping[str, Any]) -> int:
    """Top-k under AutoEP: the JSON's, else the model's."""
    if ds.expert_parallel is not None and ds.expert_parallel.top_k != "auto":
        return ds.expert_parallel.top_k
    return int(model_config.get("num_experts_per_tok") or 1)
