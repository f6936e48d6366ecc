"""Which process this is: rank, world size, ranks on this machine. From the environment; torch-free."""

from __future__ import annotations

import os


def rank() -> int:
    """This process among all of the run; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Ranks on this machine: LOCAL_WORLD_SIZE (torchrun, accelerate), LOCAL_SIZE (deepspeed), or else all."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def several_nodes() -> bool:
    """Whether this run has ranks on other machines."""
    return ranks_per_node() < world_size()
