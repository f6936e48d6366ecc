"""Collectives as expert parallelism calls them, timed: dispatch and combine with even, skewed or recorded routing.

Shape suffixes: N rows that a rank sends, M rows that it receives; a row is one copy of a token, D values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_models.bench.machine import Pairs, median_seconds
from moe_models.errors import UserError

SMALLEST_PAYLOAD = 2**16
"""Bytes of the first message of a sweep; each further one is eight times as large."""


def skewed(experts: int, ep_size: int, skew: float) -> list[float]:
    """Share of each expert where the first rank's experts get ``skew`` times their even share, the others the rest."""
    held = experts // ep_size
    rest = 1.0
    if ep_size > 1:
        rest = (ep_size - skew) / (ep_size - 1)
    return [(skew if expert < held else rest) / experts for expert in range(experts)]


def recorded(path: str, experts: int) -> dict[str, list[float]]:
    """Shares of the last training step in an expert_load.jsonl, layer by layer.

    Raises UserError for a file that is none, and for another number of experts.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        last = [line for line in lines if line["split"] == "train"][-1]
        counts = {f"step {last['step']}, {layer['layer']}": layer["tokens"] for layer in last["layers"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--routing {path}: no expert_load.jsonl of a run ({type(error).__name__}: {error})") from error
    shares: dict[str, list[float]] = {}
    for name, tokens in counts.items():
        if len(tokens) != experts:
            raise UserError(f"--routing {path}: {name} has {len(tokens)} experts, the model {experts}")
        total = max(1, sum(tokens))
        shares[name] = [count / total for count in tokens]
    return shares


def splits(shares: list[float], rows: int, ep_size: int) -> list[int]:
    """Rows of one rank that go to each rank of its group: whole numbers that sum to ``rows``."""
    # 1. What each rank's experts should get, rounded down.
    held = len(shares) // ep_size
    exact = [sum(shares[rank * held : (rank + 1) * held]) * rows for rank in range(ep_size)]
    sent = [int(value) for value in exact]
    # 2. The rows that are left go to the ranks that rounding took most from.
    most_cut_first = sorted(range(ep_size), key=lambda rank: sent[rank] - exact[rank])
    for rank in most_cut_first[: rows - sum(sent)]:
        sent[rank] += 1
    return sent


def exchange(
    shares: list[float], rows: int, hidden: int, dtype: Any, group: Any, device: Any, repeats: int
) -> dict[str, Any]:
    """Time of one dispatch and one combine with these shares, and GB/s of the average and of the busiest rank.

    Collective. GB/s are 10^9 bytes a second that cross the wire: what a rank sends to itself does not count.
    """
    # 1. Who sends how much. Every rank has the same routing, so a rank gets as many rows from each peer.
    ep_size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    sent = splits(shares, rows, ep_size)
    received = [sent[rank]] * ep_size
    # 2. Dispatch, and combine: the same rows back.
    x_ND = torch.randn(rows, hidden, dtype=dtype, device=device)
    there_MD = torch.empty(sum(received), hidden, dtype=dtype, device=device)
    back_ND = torch.empty_like(x_ND)
    dispatch = timed(lambda: dist.all_to_all_single(there_MD, x_ND, received, sent, group=group), device, repeats)
    combine = timed(lambda: dist.all_to_all_single(back_ND, there_MD, sent, received, group=group), device, repeats)
    # 3. Bytes on the wire: what leaves a rank, averaged, and what reaches the fullest one.
    row_bytes = hidden * x_ND.element_size()
    mean_sent = sum((rows - own) * row_bytes for own in sent) / ep_size
    fullest = max(sent) * (ep_size - 1) * row_bytes
    return {
        "max_mean": max(sent) * ep_size / rows,
        "dispatch_ms": dispatch * 1e3,
        "combine_ms": combine * 1e3,
        "mean_sent_mib": mean_sent / 2**20,
        "gb_per_s": mean_sent / dispatch / 1e9,
        "busiest_gb_per_s": max(fullest, mean_sent) / dispatch / 1e9,
        "came_back": bool(torch.equal(x_ND, back_ND)),
    }


def timed(call: Callable[[], object], device: Any, repeats: int) -> float:
    """Median seconds of a collective, of the slowest rank."""
    dist.barrier()
    seconds = torch.tensor(median_seconds(call, device, repeats), dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def sweep(name: str, largest_mib: float, group: Any, device: Any, repeats: int) -> Pairs:
    """``[bytes that one rank puts on the wire, 10^9 bytes a second]`` for payloads of 64 KiB to ``largest_mib``.

    ``name`` is all_to_all, all_reduce, all_gather or reduce_scatter. Empty for a group of one. Collective.
    """
    group_size = dist.get_world_size(group)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = []
    payload = SMALLEST_PAYLOAD
    while payload <= max(largest_mib * 2**20, SMALLEST_PAYLOAD):
        count = payload // dtype.itemsize // group_size * group_size
        call = _collective(name, count, dtype, group, device)
        seconds = timed(call, device, max(5, repeats // 2))
        # Ring algorithms: a rank passes on all but its own part; all-reduce is reduce-scatter and all-gather.
        wire = count * dtype.itemsize * (group_size - 1) / group_size
        if name == "all_reduce":
            wire *= 2
        if group_size > 1:
            pairs.append([int(wire), float(f"{wire / seconds / 1e9:.4g}")])
        payload *= 8
    return pairs


def _collective(name: str, count: int, dtype: torch.dtype, group: Any, device: Any) -> Callable[[], object]:
    """A call of the collective on ``count`` random values of this rank."""
    whole = torch.randn(count, dtype=dtype, device=device)
    if name == "all_reduce":
        return partial(dist.all_reduce, whole, group=group)
    if name == "all_to_all":
        return partial(dist.all_to_all_single, torch.empty_like(whole), whole, group=group)
    part = torch.empty(count // dist.get_world_size(group), dtype=dtype, device=device)
    if name == "all_gather":
        return partial(dist.all_gather_into_tensor, whole, part, group=group)
    return partial(dist.reduce_scatter_tensor, part, whole, group=group)
