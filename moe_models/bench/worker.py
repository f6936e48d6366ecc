"""One rank of recipes/bench.py, started by the deepspeed launcher: runs rows until they are done or one fails.

    deepspeed --num_gpus 2 --module moe_models.bench.worker JOBS.json

Rows share a process as long as each leaves the GPU's memory as it found it. Otherwise the rank ends, and bench.py
starts the rest anew. A rank also ends after a failure, because the other ranks then wait in a collective for ever.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from moe_models.files import write
from moe_models.ranks import rank

LEFT_OVER_MIB = 256
"""A row that leaves more than this allocated ends the process."""
MAXIMA = ("step_seconds", "step_seconds_mean", "peak_allocated_gib", "peak_reserved_gib")
"""Figures of which the largest of all ranks counts."""
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the message of an error: it is a lack of memory."""


def main(words: list[str]) -> NoReturn:
    """Run the jobs of the file that ``words`` name; each leaves ``row-N.json`` beside it, or ``row-N.rankR.error``."""
    from moe_models.bench.machine import join_process_group

    path = Path(next(word for word in words if not word.startswith("--local_rank")))
    jobs = json.loads(path.read_text())
    device = join_process_group()
    for job in jobs:
        began = time.perf_counter()
        try:
            row = run_job(job, device)
        except BaseException as error:
            tell_error(path.parent / f"row-{job['row']}.rank{rank()}.error", error)
            os._exit(1)  # the launcher ends the others; torch would wait for them
        if rank() == 0:
            row["wall_seconds"] = round(time.perf_counter() - began, 1)
            write(path.parent / f"row-{job['row']}.json", json.dumps(row))
            print(f"row {job['row']}: {job['name']} in {row['wall_seconds']} s", flush=True)
        if left_over_mib(device) > LEFT_OVER_MIB:
            break
    sys.stdout.flush()
    # upstream: deepspeed 0.19.8: its process groups now and then abort a process that is taken apart, as in
    # recipes/finetune.py. Remove when: destroy_process_group() ends all groups that deepspeed made.
    os._exit(0)


def run_job(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """Measure one row on this rank and all others; returns what bench.py puts into its table. Collective."""
    import torch
    import torch.distributed as dist

    from moe_models.bench.clock import Clock
    from moe_models.bench.loops import LOOPS
    from moe_models.bench.machine import matmul_tflops, reserved_gib, usable_gib
    from moe_models.engine.library_globals import forget_engines

    # 1. As if nothing had run in this process.
    forget_engines()
    if device.type == "cpu":
        from moe_models.engine.cpu import join_cpu_ranks

        join_cpu_ranks()
    # 2. The machine: memory that is free, and the rate of a matrix product, before the model takes its part.
    usable = usable_gib(device)
    dist.barrier()
    tflops = matmul_tflops(device)
    free_memory(device)
    # 3. The row.
    clock = Clock(device, job["warmup"], job["steps"], job["profile_steps"])
    figures = LOOPS[job["kind"]](job, clock, device)
    outside = reserved_gib(device)
    # 4. One number for all ranks: the slowest step, the fullest GPU, the lowest rate.
    slowest = torch.tensor([clock.figures.get(key, 0.0) for key in MAXIMA], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    rates = torch.tensor(tflops, dtype=torch.float64, device=device)
    dist.all_reduce(rates, op=dist.ReduceOp.MIN)
    maxima = {key: value for key, value in zip(MAXIMA, slowest.tolist(), strict=True) if key in clock.figures}
    row = {
        **clock.figures,
        **maxima,
        **figures,
        "matmul_tflops": float(rates),
        "usable_gib": usable,
        "reserved_gib": outside,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    # 5. Nothing stays for the next row.
    del clock
    free_memory(device)
    return row


def free_memory(device: Any) -> None:
    """Give back what the last row's reference cycles held."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def left_over_mib(device: Any) -> float:
    """What the rows so far left allocated, on the rank where it is most; collective."""
    import torch
    import torch.distributed as dist

    mine = 0.0
    if device.type == "cuda":
        mine = torch.cuda.memory_allocated(device) / 2**20
    most = torch.tensor(mine, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def tell_error(path: Path, error: BaseException) -> None:
    """Leave the error where bench.py finds it; a lack of memory is named as such."""
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    message = str(error)
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or any(words in message for words in NO_MEMORY)
    status = "out of memory" if out_of_memory else "failed"
    first = " ".join(message.split())[:300]
    write(path, json.dumps({"status": status, "error": f"{type(error).__name__}: {first}"}))


if __name__ == "__main__":
    main(sys.argv[1:])
