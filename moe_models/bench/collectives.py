"""Collectives as expert parallelism calls them, timed: dispatch and combine with even, skewed or recorded routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_models.bench.machine import Pairs, median_seconds
from moe_models.errors import UserError


def skewed(experts: int, ep_size: int, skew: float) -> list[float]:
    """The first rank's experts get ``skew`` times their share, the others what is left."""
    held = experts // ep_size
    rest = (ep_size - skew) / (ep_size - 1) if ep_size > 1 else 1.0
    return [(skew if expert < held else rest) / experts for expert in range(experts)]


def recorded(path: str, experts: int) -> dict[str, list[float]]:
    """Shares of the last training step in an expert_load.jsonl, layer by layer. Raises UserError."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        last = [line for line in lines if line["split"] == "train"][-1]
        counts = {f"step {last['step']}, {layer['layer']}": layer["tokens"] for layer in last["layers"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--routing {path}: no expert_load.jsonl of a run ({type(error).__name__}: {error})") from error
    for name, tokens in counts.items():
        if len(tokens) != experts:
            raise UserError(f"--routing {path}: {name} has {len(tokens)} experts, the model {experts}")
    return {name: [count / max(1, sum(tokens)) for count in tokens] for name, tokens in counts.items()}


def splits(shares: list[float], rows: int, ep_size: int) -> list[int]:
    """Rows of one rank that go to each rank of its group: whole numbers that sum to ``rows``."""
    held = len(shares) // ep_size
    wanted = [sum(shares[rank * held : (rank + 1) * held]) * rows for rank in range(ep_size)]
    sent = [int(value) for value in wanted]
    order = sorted(range(ep_size), key=lambda rank: sent[rank] - wanted[rank])  # those cut most come first
    for rank in order[: rows - sum(sent)]:
        sent[rank] += 1
    return sent


def exchange(
    shares: list[float], rows: int, hidden: int, dtype: Any, group: Any, device: Any, repeats: int
) -> dict[str, Any]:
    """Time of one dispatch and one combine with these shares, and GB/s of the average and of the busiest rank."""
    ep_size, rank = dist.get_world_size(group), dist.get_rank(group)
    sent = splits(shares, rows, ep_size)  # the same on every rank
    received = [sent[rank]] * ep_size
    x_ND = torch.randn(rows, hidden, dtype=dtype, device=device)
    there_MD = torch.empty(sum(received), hidden, dtype=dtype, device=device)
    back_ND = torch.empty_like(x_ND)
    dispatch = timed(lambda: dist.all_to_all_single(there_MD, x_ND, received, sent, group=group), device, repeats)
    combine = timed(lambda: dist.all_to_all_single(back_ND, there_MD, sent, received, group=group), device, repeats)
    row_bytes = hidden * x_ND.element_size()
    each = sum((rows - own) * row_bytes for own in sent) / ep_size  # what leaves a rank, averaged
    fullest = max(sent) * (ep_size - 1) * row_bytes  # what reaches the fullest rank
    return {
        "max_mean": max(sent) * ep_size / rows,
        "dispatch_ms": dispatch * 1e3,
        "combine_ms": combine * 1e3,
        "mean_sent_mib": each / 2**20,
        "gb_per_s": each / dispatch / 1e9,
        "busiest_gb_per_s": max(fullest, each) / dispatch / 1e9,
        "came_back": bool(torch.equal(x_ND, back_ND)),
    }


def timed(call: Callable[[], object], device: Any, repeats: int) -> float:
    """Median seconds of a collective, of the slowest rank."""
    dist.barrier()
    seconds = torch.tensor(median_seconds(call, device, repeats), dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def sweep(name: str, largest_mib: float, group: Any, device: Any, repeats: int) -> Pairs:
    """``[bytes that one rank puts on the wire, 10^9 bytes a second]`` for payloads of 64 KiB to ``largest_mib``."""
    g = dist.get_world_size(group)
    pairs = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    payload = 2**16
    while payload <= max(largest_mib * 2**20, 2**16):
        count = payload // torch.empty((), dtype=dtype).element_size() // g * g
        whole = torch.randn(count, dtype=dtype, device=device)
        other, part = torch.empty_like(whole), torch.empty(count // g, dtype=dtype, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all_to_all": lambda whole=whole, other=other: dist.all_to_all_single(other, whole, group=group),  # type: ignore[misc]
            "all_reduce": lambda whole=whole: dist.all_reduce(whole, group=group),  # type: ignore[misc]
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part, group=group),  # type: ignore[misc]
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole, group=group),  # type: ignore[misc]
        }
        wire = count * whole.element_size() * (g - 1) / g * (2 if name == "all_reduce" else 1)
        seconds = timed(calls[name], device, max(5, repeats // 2))
        if g > 1:
            pairs.append([int(wire), float(f"{wire / seconds / 1e9:.4g}")])
        payload *= 8
    return pairs
