"""What works but is probably not meant, what was never tested, and what fails on some machines: warnings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from moe_models import versions
from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import divisors
from moe_models.config.work import Work
from moe_models.errors import show
from moe_models.families.table import family_of
from moe_models.preflight.pipeline import bubble_advice

TOKENS_FOR_ONE_EXPERT = 128
"""Rows in one tile of a grouped matrix product on GPUs of today; fewer tokens cost the same time."""


def warnings_for_run(
    ds: DsConfig,
    model_config: Mapping[str, Any],
    world_size: int,
    gpus_per_node: int | None = None,
    *,
    on_gpu: bool = False,
    work: Work | None = None,
) -> list[str]:
    """One line for each thing that works but is probably not meant, that was never tested, or that fails on some GPUs.

    ``gpus_per_node`` and ``work`` None leave out what depends on them; ``on_gpu`` False leaves out what only GPU
    processes need.
    """
    lines: list[str] = []
    if work is not None:
        lines += bubble_advice(ds, work.accumulation)
        lines += _batch_advice(ds, model_config, work)
    if on_gpu:
        lines += _gpu_advice(ds)
    lines += _bias_advice(ds, model_config)
    if gpus_per_node is not None and world_size > gpus_per_node:
        lines += _peers_across_nodes(ds, gpus_per_node)
    if ds.expert_parallel is not None:
        lines += _expert_parallel_advice(ds.ep_size, world_size, gpus_per_node)
    lines += versions.untested_versions(expert_parallel=ds.expert_parallel is not None)
    return lines


def _gpu_advice(ds: DsConfig) -> Iterator[str]:
    """What GPU processes need or wait for."""
    kind = ds.value("optimizer", "type", "")
    params = ds.value("optimizer", "params", {})
    fused_kernel = str(kind).lower() in ("adam", "adamw") and not params.get("torch_adam")
    compiler = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if fused_kernel and compiler is None:
        yield (
            f"optimizer.type = {show(kind)}: DeepSpeed compiles its fused kernel at the first "
            'start, and there is no nvcc; install the CUDA toolkit, or set "torch_adam": true, "fused": true in '
            "optimizer.params"
        )
    if ds.waits_for_timer:
        yield (
            "timers.throughput: on unless the JSON says otherwise, and then DeepSpeed waits for the GPU before and "
            'after each forward and backward pass; set "timers": {"throughput": {"enabled": false}}'
        )


def _bias_advice(ds: DsConfig, model_config: Mapping[str, Any]) -> Iterator[str]:
    """A selection bias that training uses and the exported model has no place for."""
    balance = ds.moe.balance
    family = family_of(model_config)
    if balance is None or not balance.bias_update_rate:
        return
    if family is None or not family.selection_bias:
        yield (
            f"moe.balance.bias_update_rate = {balance.bias_update_rate}: {model_config.get('model_type')} has no place "
            "for the bias, so the exported model routes without it and may lose quality; the losses stay with the "
            "model, or train deepseek_v3"
        )


def _peers_across_nodes(ds: DsConfig, gpus_per_node: int) -> Iterator[str]:
    """Tensor- and sequence-parallel groups that do not fit into nodes, in a run on several."""
    for key, size in (("tensor_parallel.autotp_size", ds.tp_size), ("sequence_parallel_size", ds.sp_size)):
        if gpus_per_node and gpus_per_node % size:
            yield (
                f"{key} = {size}: its groups cross nodes of {gpus_per_node} GPUs, and every layer waits for them; "
                f"inside a node: {[n for n in divisors(gpus_per_node) if n <= size]}"
            )


def _expert_parallel_advice(ep_size: int, world_size: int, gpus_per_node: int | None) -> Iterator[str]:
    """Expert-parallel groups of one rank, and groups that do not fit into nodes."""
    if ep_size == 1:
        yield (
            "expert_parallel.autoep_size = 1: every rank holds all experts and no token is exchanged; raise it, or "
            "remove expert_parallel"
        )
    if gpus_per_node and world_size > gpus_per_node and gpus_per_node % ep_size:
        inside = [size for size in divisors(gpus_per_node) if size <= ep_size]
        yield (
            f"expert_parallel.autoep_size = {ep_size}: EP groups cross nodes of {gpus_per_node} GPUs, so every MoE "
            f"layer's dispatch and combine go over the network; inside a node: {inside}"
        )


def _batch_advice(ds: DsConfig, model_config: Mapping[str, Any], work: Work) -> Iterator[str]:
    """What the number of tokens in a step says about the layout."""
    # 1. Gradients that travel after every micro-batch.
    if ds.zero_stage == 2 and work.accumulation > 1:
        yield (
            f"zero_optimization.stage = 2 with {work.accumulation} accumulation steps: gradients travel after each of "
            "them; stage 1 sends them once, for 2 bytes more per parameter of a rank"
        )
    experts = ds.expert_parallel
    family = family_of(model_config)
    if experts is None or family is None:
        return

    # 2. More tokens than DeepEP's buffers hold. A rank has its part of each sequence, rounded up.
    length = -(-work.length // ds.sp_size)
    tokens = work.micro_batch * length
    if experts.comm_backend == "deepep" and experts.comm_max_tokens_per_rank < tokens:
        yield (
            f"expert_parallel.comm_max_tokens_per_rank = {experts.comm_max_tokens_per_rank}: a rank can hold "
            f"{tokens} tokens (micro batch {work.micro_batch} x {length}), and DeepEP ends the run at more; "
            f"raise it to {tokens}"
        )

    # 3. Fewer tokens than one expert's matrix product needs. An expert gets its share of what its EP group routes.
    top_k = experts.top_k
    if top_k == "auto":
        top_k = model_config.get("num_experts_per_tok") or 1
    each = tokens * top_k * ds.ep_size // family.num_experts(model_config)
    if each < TOKENS_FOR_ONE_EXPERT:
        yield (
            f"micro batch {work.micro_batch} x {length} tokens: about {each} tokens for one expert in one forward "
            f"pass, which leaves a GPU idle below {TOKENS_FOR_ONE_EXPERT}; raise --per_device_train_batch_size, "
            "or autoep_size"
        )
