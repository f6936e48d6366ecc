"""Running the same recipes on CPU processes: what accelerate and DeepSpeed need to be told."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch

from moe_models.config.ds_config import without_own_autos
from moe_models.errors import UserError, show
from moe_models.ranks import ranks_per_node


def on_cpu() -> bool:
    """Whether this process trains on CPU: asked for with DS_ACCELERATOR=cpu, or no GPU is there."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def join_cpu_ranks() -> dict[str, Any]:
    """Set accelerate up for DeepSpeed on gloo ranks; returns the ``accelerator_config`` for ``TrainingArguments``.

    Left to itself, accelerate would let every rank train on the same data as if it were alone.
    """
    import deepspeed
    from accelerate import PartialState

    # upstream: deepspeed 0.19.8: compiles a shared-memory all-reduce at the first start on CPU. That needs a C++
    # compiler, a process killed while it compiles leaves a lock that every later run waits for without end, its buffers
    # stay in /dev/shm, and it spins, which is slow as soon as ranks outnumber cores. Plain gloo needs none of that.
    # Remove when: an option leaves it out.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["DS_ACCELERATOR"] = "cpu"

    # Every rank would take all cores, and they would wait for each other.
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks_per_node()))

    # upstream: accelerate 1.15.0: finds no GPU and settles for one process without a backend, unless the backend is
    # named while ACCELERATE_USE_DEEPSPEED is set. Remove when: it reads RANK and WORLD_SIZE on CPU, too.
    previous = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    if previous is None:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"use_configured_state": True}


def adapt_for_cpu(deepspeed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Copy a DeepSpeed config for processes without a GPU, with one line for each change (none if none is needed).

    fp32 throughout, torch's AdamW instead of DeepSpeed's CUDA kernel, and the AutoEP settings that are CUDA kernels
    back to their defaults. Everything else, the parallel layout above all, stays as it is. The caller has to turn off
    ``bf16`` and ``fp16`` of its TrainingArguments too, because HF compares them with the JSON.

    Raises UserError for an optimizer that has no CPU version.
    """
    config = copy.deepcopy(dict(deepspeed))
    lines: list[str] = []

    def change(section: dict[str, Any], where: str, key: str, new: object, why: str) -> None:
        old = show(section[key]) if key in section else "absent"
        lines.append(f"cpu: {where}{key} {old} -> {show(new)} ({why})")
        section[key] = new

    # 1. Precision: fp32 throughout.
    fp32 = "CPU processes train in fp32"
    for name in ("bf16", "fp16", "torch_autocast"):
        section = config.get(name, {})
        if section.get("enabled", False):
            change(section, f"{name}.", "enabled", False, fp32)
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads"):
            if section.get(key):
                change(section, f"{name}.", key, False, fp32)
    data_types = config.get("data_types", {})
    for key in ("param_dtype", "grad_accum_dtype", "buffer_dtype"):
        if data_types.get(key) in ("bf16", "fp16"):
            change(data_types, "data_types.", key, "fp32", fp32)
    if config.get("communication_data_type") in ("bf16", "fp16"):
        change(config, "", "communication_data_type", "fp32", fp32)

    # 2. The optimizer: torch's AdamW.
    optimizer = config.get("optimizer", {})
    kind = str(optimizer.get("type", "")).lower()
    if kind in ("adam", "adamw") and not optimizer.get("params", {}).get("torch_adam"):
        params = optimizer.setdefault("params", {})
        change(params, "optimizer.params.", "torch_adam", True, "DeepSpeed's FusedAdam is a CUDA kernel")
    elif kind in ("lamb", "lion"):
        raise UserError(
            f"optimizer.type = {show(optimizer['type'])}: DeepSpeed has a CUDA kernel for it and nothing for CPU "
            "processes; use AdamW"
        )

    # 3. AutoEP and the compiler: no CUDA kernels.
    experts = config.get("expert_parallel", {})
    for key, cuda, cpu in (
        ("comm_backend", "deepep", "comm"),
        ("row_weighting_impl", "fused", "auto"),
        ("combine_impl", "fused_weighted_sum", "auto"),
        ("async_split_plan", True, False),
    ):
        if experts.get(key) == cuda:
            change(experts, "expert_parallel.", key, cpu, "CUDA only")
    without_own_autos(config)
    compiler = config.get("compile", {})
    if compiler.get("deepcompile"):
        change(compiler, "compile.", "deepcompile", False, "CUDA only")
    return config, lines
