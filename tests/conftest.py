from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.cluster import Cluster


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """``clusters(n)``: the session's cluster of n ranks, started at first use."""
    running: dict[int, Cluster] = {}
    yield lambda world_size: running.setdefault(world_size, Cluster(world_size))
    for cluster in running.values():
        cluster.stop()


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoints(model_type)``: a random fp32 checkpoint of the family in the hub layout, made once."""
    from tests.tiny import save_tiny

    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get
