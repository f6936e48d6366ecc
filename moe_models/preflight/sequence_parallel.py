"""What cannot be trained with ``"sequence_parallel_size"``: Ulysses beside AutoEP. Torch-free.

Sources: deepspeed 0.19.8, ``runtime/sequence_parallel/ulysses_sp.py`` (attention with other ranks' heads, no mask), and
``module_inject/auto_ep_folding.py``; ``moe_models/engine/ulysses.py`` is the run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import divisors
from moe_models.errors import UserError
from moe_models.families.sizes import model_sizes
from moe_models.families.table import family_of


def sequence_parallel_problems(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """What the JSON and the model say against it. Any length of sequence will do: rows are padded to a multiple."""
    if ds.sp_size == 1 or ds.moe.layer is not None:  # native.py refuses it
        return
    key = f"sequence_parallel_size = {ds.sp_size}"
    if ds.expert_parallel is None:
        yield f"{key} without expert_parallel: not tested here; add expert_parallel, or remove sequence_parallel_size"
    if "data_parallel_size" in ds.raw:
        yield f"data_parallel_size with {key}: it follows from the number of ranks; remove it"
    if ds.raw.get("train_batch_size", "auto") != "auto":
        yield (
            f"train_batch_size = {ds.raw['train_batch_size']} with {key}: transformers compares it with a number that "
            'counts the ranks which share a sequence; write "auto"'
        )
    window = model_config.get("sliding_window")
    if window and model_config.get("use_sliding_window", True):
        yield (
            f"{key} with sliding_window = {window} in config.json: Ulysses drops the mask that makes the window; "
            "remove sequence_parallel_size"
        )
    try:
        sizes = model_sizes(model_config)
    except UserError:  # a config.json that is broken beyond this, or a model that AutoEP does not take
        return

    # Each rank takes some heads of the whole sequence: they must be alike, and there must be enough for all.
    family = family_of(model_config)
    if family is not None and family.no_sequence_parallel is not None:
        yield (
            f"{key} with model_type = {family.model_type}: {family.no_sequence_parallel}; remove sequence_parallel_size"
        )
    elif sizes.heads % ds.sp_size:
        yield f"{key} does not divide the model's {sizes.heads} attention heads; use one of {divisors(sizes.heads)}"
    elif sizes.kv_heads % ds.sp_size and ds.sp_size % sizes.kv_heads:
        fits = [n for n in divisors(sizes.heads) if not (sizes.kv_heads % n and n % sizes.kv_heads)]
        yield f"{key}: {sizes.kv_heads} key-value heads can be neither dealt out nor repeated evenly; use one of {fits}"


def sequence_parallel_flags(given: Any, ds: DsConfig) -> Iterator[str]:
    """Flags that cannot be honoured beside it."""
    if ds.sp_size == 1:
        return
    key = f"sequence_parallel_size = {ds.sp_size}"
    if given.padding_free or (given.packing and given.packing_strategy.startswith("bfd")):
        yield (
            f"--packing, --padding_free with {key}: a row of several documents would attend across them; drop them, or "
            "take --packing_strategy wrapped, which does that anyway"
        )
    if given.attn_implementation in ("eager", "flex_attention"):
        yield f"--attn_implementation {given.attn_implementation}: not with {key}; use sdpa or flash attention"
    if given.label_smoothing_factor:
        yield f"--label_smoothing_factor {given.label_smoothing_factor}: not with {key}; drop it"
