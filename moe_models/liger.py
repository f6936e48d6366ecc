"""``--use_liger_kernel``: what it needs, and plain transformers back where that is wanted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SHIPPED: dict[str, dict[str, Any]] = {}


def remember_shipped(model: Any) -> None:
    """Keep what the names in the model's module mean, before kernels for training take the places of some.

    Liger's norm, RoPE and experts stand there from the first step on, for every model that this process makes later:
    one that is reloaded to prove an export would not be plain transformers, and would not run on the CPU.
    """
    module = sys.modules[type(model).__module__]
    _SHIPPED.setdefault(module.__name__, dict(vars(module)))


@contextmanager
def as_shipped() -> Iterator[None]:
    """Within the block the remembered modules are as they were; the training goes on with what it had."""
    now = {name: dict(vars(sys.modules[name])) for name in _SHIPPED}
    try:
        for name, meanings in _SHIPPED.items():
            vars(sys.modules[name]).update(meanings)
        yield
    finally:
        for name, meanings in now.items():
            vars(sys.modules[name]).update(meanings)


def liger_problems(model_type: str, *, on_gpu: bool) -> Iterator[str]:
    """Why ``--use_liger_kernel`` cannot do anything here: transformers would find out after loading, or say nothing."""
    from transformers.utils import is_liger_kernel_available

    if not on_gpu:
        yield "--use_liger_kernel: Liger's kernels need a GPU; drop the flag"
    elif not is_liger_kernel_available():
        yield "--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel==0.8.5, or drop the flag"
    else:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
        if model_type not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
            yield f"--use_liger_kernel: Liger has no kernels for {model_type}; drop the flag"
