"""What this machine reaches: rates that a plan or a benchmark is measured against, taken when they are needed.

All figures are medians of repeated calls on random data; on CUDA they are timed with events, after a warm-up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Pairs = list[list[float]]


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of ``call``; on CUDA between events on the current stream."""
    seconds: list[float] = []
    for repeat in range(warmup + repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()  # type: ignore[no-untyped-call]
            call()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()
            spent = float(begin.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]
        else:
            start = time.perf_counter()
            call()
            spent = time.perf_counter() - start
        if repeat >= warmup:
            seconds.append(spent)
    return median(seconds)


def matmul_tflops(device: torch.device, size: int | None = None) -> float:
    """10^12 FLOP a second of one large square matrix product: bf16 on CUDA, fp32 on CPU."""
    n = size or (8192 if device.type == "cuda" else 512)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * n * n * n / median_seconds(lambda: torch.mm(left, right), device) / 1e12


def memory_gb_per_s(device: torch.device) -> float:
    """10^9 bytes a second, read plus written, of a sum of two large tensors."""
    count = 2**29 if device.type == "cuda" else 2**22
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(count, device=device, dtype=dtype) for _ in range(2))
    total = torch.empty_like(left)
    seconds = median_seconds(lambda: torch.add(left, right, out=total), device)
    return 3 * count * left.element_size() / seconds / 1e9


def grouped_matmul_efficiency(
    device: torch.device, hidden: int, inner: int, experts: int, rows: list[int], tflops: float
) -> Pairs:
    """``[rows of one expert, share of tflops]`` that AutoEP's grouped product [rows, D] x [E, D, F] reaches."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    w_EFD = torch.randn(experts, inner, hidden, device=device, dtype=dtype)
    pairs: Pairs = []
    for count in rows:
        x_TD = torch.randn(experts * count, hidden, device=device, dtype=dtype)
        ends_E = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * count
        w_EDF = w_EFD.transpose(-2, -1)

        def product(x_TD: torch.Tensor = x_TD, ends_E: torch.Tensor = ends_E, w: torch.Tensor = w_EDF) -> object:
            return torch._grouped_mm(x_TD, w, offs=ends_E)

        seconds = median_seconds(product, device, repeats=10)
        share = 2.0 * experts * count * hidden * inner / seconds / 1e12 / tflops
        pairs.append([count, min(1.0, float(f"{share:.4g}"))])  # above 1 where the large product was slower
    return pairs


def usable_gib(device: torch.device) -> float | None:
    """2^30 bytes that torch can take on this GPU now; None on CPU."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else None


def reserved_gib(device: torch.device) -> float | None:
    """2^30 bytes in use on the GPU that torch's allocator does not count (context, kernels, NCCL); None on CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / 2**30
