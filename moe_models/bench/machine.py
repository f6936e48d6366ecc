"""What this machine reaches: rates that a plan or a benchmark is measured against, taken when they are needed.

All figures are medians of repeated calls on random data. On CUDA they are timed with events, after a warm-up, and the
data are bf16; on CPU fp32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

Pairs = list[list[float]]
"""``[size, rate]`` in ascending order of size."""


def join_process_group() -> torch.device:
    """Join the ranks that the launcher started; returns this rank's device."""
    from moe_models.engine.cpu import join_cpu_ranks, on_cpu

    if on_cpu():
        join_cpu_ranks()
        return torch.device("cpu")
    import deepspeed

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl", verbose=False)
    return device


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of ``call``; on CUDA between events on the current stream."""
    once = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    for _ in range(warmup):
        once(call)
    return median(once(call) for _ in range(repeats))


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()  # type: ignore[no-untyped-call]
    call()
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()  # type: ignore[no-untyped-call]
    return float(begin.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def matmul_tflops(device: torch.device, size: int | None = None) -> float:
    """10^12 FLOP a second of one large square matrix product."""
    if size is None:
        size = 8192 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=_dtype(device))
    right = torch.randn(size, size, device=device, dtype=_dtype(device))
    seconds = median_seconds(lambda: torch.mm(left, right), device)
    return 2.0 * size**3 / seconds / 1e12


def memory_gb_per_s(device: torch.device) -> float:
    """10^9 bytes a second, read plus written, of a sum of two large tensors."""
    count = 2**29 if device.type == "cuda" else 2**22
    left = torch.randn(count, device=device, dtype=_dtype(device))
    right = torch.randn(count, device=device, dtype=_dtype(device))
    total = torch.empty_like(left)
    seconds = median_seconds(lambda: torch.add(left, right, out=total), device)
    return 3 * count * left.element_size() / seconds / 1e9


def grouped_matmul_efficiency(
    device: torch.device, hidden: int, inner: int, experts: int, rows: list[int], tflops: float
) -> Pairs:
    """``[rows of one expert, share of tflops]`` that AutoEP's grouped product [rows, D] x [E, D, F] reaches."""
    w_EFD = torch.randn(experts, inner, hidden, device=device, dtype=_dtype(device))
    w_EDF = w_EFD.transpose(-2, -1)  # as AutoEP keeps it: transposed for the product
    pairs: Pairs = []
    for count in rows:
        x_TD = torch.randn(experts * count, hidden, device=device, dtype=_dtype(device))
        ends_E = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * count
        seconds = median_seconds(partial(torch._grouped_mm, x_TD, w_EDF, offs=ends_E), device, repeats=10)
        flop = 2.0 * experts * count * hidden * inner
        share = flop / seconds / 1e12 / tflops
        pairs.append([count, min(1.0, float(f"{share:.4g}"))])  # above 1 where the large product was slower
    return pairs


def usable_gib(device: torch.device) -> float | None:
    """GiB (2^30 bytes) that torch can take on this GPU now; None on CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free / 2**30


def reserved_gib(device: torch.device) -> float | None:
    """GiB in use on the GPU that torch's allocator does not count (context, kernels, NCCL); None on CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / 2**30
