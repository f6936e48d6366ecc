"""Which matrices tensor parallelism splits, as the ``"tensor_parallel"`` section of a ds_config says. Torch-free.

DeepSpeed's AutoTP (0.19.8, ``module_inject/autotp_config.py``) takes the first entry of
``partition_config.layer_specs`` one of whose patterns matches ``<module>.weight``. ``column`` splits the outputs of a
matrix and sums the gradient of its input over the TP group; ``row`` splits its inputs and sums its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import divisors
from moe_models.config.tp_plan import Kind, kind_of, layer_specs, spec_of
from moe_models.errors import UserError
from moe_models.families.sizes import model_sizes
from moe_models.families.table import family_of


def tensor_parallel_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be trained with ``"tensor_parallel"``, for the JSON and then for the model."""
    if ds.tp_size == 1 or ds.moe.layer is not None:  # native.py refuses it
        return
    key = f"tensor_parallel.autotp_size = {ds.tp_size}"
    example = "copy the section of ds_configs/zero1_ep2_tp2.json"
    if ds.expert_parallel is None:
        yield f"{key} without expert_parallel: not tested here; add expert_parallel, or remove tensor_parallel"
    if ds.zero_stage == 3:
        yield (
            f"{key} with ZeRO stage 3: transformers cannot load MoE weights then (its weight conversions refuse it); "
            "use stage 1 or 2"
        )
    if ds.moe.balance is not None:
        yield f"{key} with moe.balance: not tested together; remove one of the two"
    family = family_of(model_config)
    if family is not None and family.no_tensor_parallel is not None:
        yield f"{key} with model_type = {family.model_type}: {family.no_tensor_parallel}; remove tensor_parallel"
        return
    specs = layer_specs(ds.raw)
    if not specs or ds.value("tensor_parallel", "preset_model"):
        yield (
            f"{key} needs partition_config.layer_specs and no preset_model: DeepSpeed refuses transformers' own plan "
            f"for MoE models, and its presets miss layers; {example}"
        )
        return
    try:
        sizes = model_sizes(model_config)
    except UserError:  # a config.json that is broken beyond this: transformers will report it
        return
    # Each head, with its queries, keys and values, lives on one rank.
    for count, what in ((sizes.heads, "attention heads"), (sizes.kv_heads, "key-value heads")):
        if count % ds.tp_size:
            fits = [n for n in divisors(count) if n <= ds.tp_size]
            yield f"{key} does not divide the model's {count} {what}; use one of {fits}"
    yield from _pattern_problems([name for name, _ in sizes.dense], specs, example)


_PARTS: dict[str, dict[str, Kind]] = {
    "self_attn": {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"},
    "mlp": {"gate_proj": "column", "up_proj": "column", "down_proj": "row"},
}
"""How the matrices of a block have to be split, if one of them is."""


def _pattern_problems(names: list[str], specs: list[Mapping[str, Any]], example: str) -> Iterator[str]:
    """Patterns that split half of a block, or what cannot be split."""
    where = "tensor_parallel.partition_config.layer_specs"

    # 1. Embedding and head stay whole.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if kind_of(name, specs) != "skip":
            yield f"{where} split {name}, but each rank needs the whole (TRL takes the loss from it); {example}"

    # 2. A block is split in full, column then row, or not at all; attention must be.
    for block, kinds in _PARTS.items():
        found: dict[str, Kind] = {}  # the layers are alike
        for name in names:
            for part in kinds:
                if name.endswith(f".{block}.{part}.weight"):
                    found[part] = kind_of(name, specs)
        split = any(kind != "skip" for kind in found.values())
        if block == "self_attn" and found and not split:
            yield f"{where} split no attention, so that tensor parallelism would do nothing; {example}"
        elif split and any(kind != kinds[part] for part, kind in found.items()):
            yield f"{where} must make {', '.join(f'{part} {kind}' for part, kind in kinds.items())}; {example}"

    # 3. Norms of queries and keys see one peer's heads, so their gradients are partial sums.
    norms = {name for name in names if name.endswith((".q_norm.weight", ".k_norm.weight"))}
    if any(not (spec_of(name, specs) or {}).get("grad_allreduce") for name in norms):
        yield f'{where} must have "grad_allreduce": true for q_norm and k_norm, which see one peer\'s heads; {example}'
