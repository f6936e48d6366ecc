from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from tests.support import support_matrix
from tests.support.cluster import Cluster
from tests.support.hosts import namespaces_permitted

collect_ignore = [] if find_spec("triton") else ["engine/test_fused_kernels.py"]


@functools.cache
def mounts_permitted() -> bool:
    """Whether this process may mount a file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
            return False
        return subprocess.run(["umount", folder], capture_output=True).returncode == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (deselected, which the summary counts) what asks for what is not here, or for the conformance run."""
    wanted = "conformance" in (config.getoption("-m") or "")
    browser = (shutil.which("chromium") or shutil.which("google-chrome")) and shutil.which("chromedriver")
    kept, left_out = [], []
    for item in items:
        gpu = item.get_closest_marker("gpu")
        fits = gpu is None or torch.cuda.device_count() >= gpu.args[0]
        fits = fits and bool(browser or item.get_closest_marker("browser") is None)
        fits = fits and (item.get_closest_marker("lm_eval") is None or find_spec("lm_eval") is not None)
        daily = item.get_closest_marker("conformance") is None or item.get_closest_marker("daily") is not None
        fits = fits and (wanted or daily)
        fits = fits and (item.get_closest_marker("netns") is None or namespaces_permitted())
        fits = fits and (item.get_closest_marker("tmpfs") is None or mounts_permitted())
        (kept if fits else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A conformance run with all parity tests and without a failure writes what it saw."""
    chosen, ran = session.config.option, {item.path.stem for item in getattr(session, "items", [])}
    everything = chosen.markexpr == "conformance" and not (chosen.keyword or chosen.collectonly)
    everything = everything and not hasattr(session.config, "workerinput")  # one of several (-n) has seen a part
    everything = everything and ran >= support_matrix.FILLED_BY
    if everything and exitstatus == 0:
        support_matrix.write(session.config.rootpath / "docs" / "support-matrix.md")


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
    from tests.support.tiny import save_tiny

    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get
