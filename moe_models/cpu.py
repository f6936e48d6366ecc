"""Running the same recipes on CPU processes: what accelerate and DeepSpeed need to be told."""

from __future__ import annotations

import os
from typing import Any

import torch

from moe_models.nodes import ranks_per_node


def on_cpu() -> bool:
    """Whether this process trains on CPU: asked for with DS_ACCELERATOR=cpu, or no GPU is there."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def join_cpu_ranks() -> dict[str, Any]:
    """Set accelerate up for DeepSpeed on gloo ranks; returns the ``accelerator_config`` for ``TrainingArguments``.

    Left to itself, accelerate 1.15.0 finds no GPU, settles for one process without a backend, and every rank would
    train on the same data as if it were alone. Naming the backend gives it the true rank and world size.
    """
    import deepspeed
    from accelerate import PartialState

    # DeepSpeed would compile a shared-memory all-reduce at the first start: it needs a C++ compiler, a process killed
    # while it compiles leaves a lock that every later run waits for without end, its buffers stay in /dev/shm, and it
    # spins, which is slow as soon as ranks outnumber cores. Plain gloo needs none of that.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:  # every rank would take all cores, and they would wait for each other
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_per_node()))
    previous = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    if previous is None:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"use_configured_state": True}
