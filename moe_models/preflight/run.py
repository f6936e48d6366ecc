"""Everything that can be known to be wrong before a weight is read: from the JSON, config.json and the world size.

DeepSpeed makes most of these checks too, but inside ``deepspeed.initialize``: on every rank, with a traceback, one at a
time, after the model was loaded. Each line here names the key, its value, what is allowed and the fix.

One module for each subject: ``combinations`` (sections that exclude each other, whatever the model),
``expert_parallel``, ``fused``, ``native``, ``tensor_parallel``, ``sequence_parallel``, ``balance``, ``torch_compile``,
``liger``, ``flags`` and ``paths`` (the command line). ``advice`` has what is only unwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models import versions
from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import size_problems
from moe_models.errors import show
from moe_models.families.table import FAMILIES, family_of
from moe_models.families.unsupported import why_unsupported
from moe_models.preflight.balance import balance_problems
from moe_models.preflight.combinations import (
    autoep_combination_problems,
    autoep_zero_problems,
    optimizer_problems,
    zero_problems,
)
from moe_models.preflight.expert_parallel import autoep_model_problems
from moe_models.preflight.fused import fused_problems
from moe_models.preflight.native import check_native
from moe_models.preflight.sequence_parallel import sequence_parallel_problems
from moe_models.preflight.tensor_parallel import tensor_parallel_problems

_SIZE_NAMES = {
    "ep_size": "expert_parallel.autoep_size",
    "tp_size": "tensor_parallel.autotp_size",
    "sp_size": "sequence_parallel_size",
}


def check_run(ds: DsConfig, model_config: Mapping[str, Any], world_size: int) -> list[str]:
    """All known reasons why this ds_config, this model and this number of ranks cannot train together.

    ``model_config`` is the model's ``config.json``. Neither weights nor torch are needed.
    """
    # 1. The number of ranks.
    names = dict(_SIZE_NAMES)
    if ds.moe.layer is not None:
        names["ep_size"] = "moe.layer.ep_size"
    problems = size_problems(world_size, ds.ep_size, ds.tp_size, ds.sp_size, names=names)
    problems += _batch_problems(ds, world_size)

    # 2. What holds however the experts are laid out.
    problems += zero_problems(ds)
    problems += optimizer_problems(ds)
    problems += balance_problems(ds, model_config)
    problems += tensor_parallel_problems(ds, model_config)
    problems += sequence_parallel_problems(ds, model_config)

    # 3. The experts: plain Hugging Face blocks, AutoEP's, or native layers.
    why = why_unsupported(model_config)
    if why is not None:
        problems.append(
            f"model_type = {show(model_config['model_type'])}: cannot be trained here: {why}; use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    elif not ds.spreads_experts and family_of(model_config) is None:
        problems.append(
            f"model_type = {show(model_config.get('model_type'))}: known are {', '.join(sorted(FAMILIES))}; turn a "
            "dense model into one of them with recipes/upcycle.py"
        )
    if ds.expert_parallel is not None:
        problems += autoep_model_problems(ds.expert_parallel, model_config, world_size)
        problems += autoep_zero_problems(ds)
        problems += autoep_combination_problems(ds, ds.expert_parallel)
    if ds.moe.layer is not None:
        problems += check_native(ds, ds.moe.layer, model_config, world_size)
    if ds.moe.kernels == "fused":
        problems += fused_problems(ds)

    # 4. What is installed.
    problems += versions.version_problems(expert_parallel=ds.expert_parallel is not None)
    return problems


def _batch_problems(ds: DsConfig, world_size: int) -> Iterator[str]:
    """A global batch size that does not follow from the other two numbers."""
    train = ds.raw.get("train_batch_size")
    micro = ds.raw.get("train_micro_batch_size_per_gpu")
    steps = ds.raw.get("gradient_accumulation_steps")
    if not (isinstance(train, int) and isinstance(micro, int) and isinstance(steps, int)):
        return
    replicas = max(1, world_size // (ds.tp_size * ds.sp_size))
    product = micro * steps * replicas
    if train != product:
        yield (
            f"train_batch_size = {train}: must be micro batch {micro} x accumulation {steps} x {replicas} "
            f'data-parallel ranks = {product}; write "auto" to have it computed'
        )
