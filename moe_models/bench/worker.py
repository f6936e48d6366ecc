"""One rank of recipes/bench.py, started by the deepspeed launcher: runs rows until they are done or one fails.

    deepspeed --num_gpus 2 moe_models/bench/worker.py JOBS.json

Rows share a process as long as each leaves the GPU's memory as it found it; otherwise the rank ends, and bench.py
starts the rest anew. So it does after a failure, because the other ranks then wait in a collective for ever.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from moe_models.files import write

RANK = int(os.environ.get("RANK", "0"))
LEFT_OVER_MIB = 256
"""A row that leaves more than this allocated ends the process."""


def main(jobs_path: str) -> int:
    """Run the jobs of a file; each leaves ``row-N.json`` beside it, or ``row-N.rankR.error``."""
    import torch

    from moe_models.engine.cpu import join_cpu_ranks, on_cpu

    path = Path(jobs_path)
    jobs = json.loads(path.read_text())
    if on_cpu():
        device = torch.device("cpu")
        join_cpu_ranks()
    else:
        import deepspeed

        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", verbose=False)
    for job in jobs:
        began = time.perf_counter()
        try:
            row = run_job(job, device)
        except BaseException as error:
            tell_error(path.parent / f"row-{job['row']}.rank{RANK}.error", error)
            os._exit(1)  # the launcher ends the others; torch would wait for them
        if RANK == 0:
            row["wall_seconds"] = round(time.perf_counter() - began, 1)
            write(path.parent / f"row-{job['row']}.json", json.dumps(row))
            print(f"row {job['row']}: {job['name']} in {row['wall_seconds']} s", flush=True)
        if left_over_mib(device) > LEFT_OVER_MIB:
            break
    sys.stdout.flush()
    os._exit(0)  # as recipes/finetune.py: DeepSpeed's groups now and then abort a process that is taken apart


def run_job(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """Measure one row on this rank and all others; returns what bench.py puts into its table. Collective."""
    import torch
    import torch.distributed as dist

    from moe_models.bench.clock import Clock
    from moe_models.bench.loops import LOOPS
    from moe_models.bench.machine import matmul_tflops, reserved_gib, usable_gib
    from moe_models.engine.library_globals import forget_engines

    forget_engines()
    if device.type == "cpu":
        from moe_models.engine.cpu import join_cpu_ranks

        join_cpu_ranks()
    usable = usable_gib(device)
    dist.barrier()
    tflops = matmul_tflops(device)
    free_memory(device)
    clock = Clock(device, job["warmup"], job["steps"], job["profile_steps"])
    figures = LOOPS[job["kind"]](job, clock, device)
    outside = reserved_gib(device)
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
    del clock
    free_memory(device)
    return row


MAXIMA = ("step_seconds", "step_seconds_mean", "peak_allocated_gib", "peak_reserved_gib")
"""Figures of which the largest of all ranks counts."""


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

    mine = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    most = torch.tensor(mine, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def tell_error(path: Path, error: BaseException) -> None:
    """Leave the error where bench.py finds it; a lack of memory is named as such."""
    text = "".join(traceback.format_exception(error))
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or any(
        word in str(error) for word in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    first = " ".join(str(error).split())[:300]
    what = {"status": "out of memory" if out_of_memory else "failed", "error": f"{type(error).__name__}: {first}"}
    print(text, file=sys.stderr, flush=True)
    write(path, json.dumps(what))


if __name__ == "__main__":
    sys.exit(main(next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))))
