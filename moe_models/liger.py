"""``--use_liger_kernel``: what it needs, and plain transformers back where that is wanted. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WITH_KERNELS = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe")
"""Of our families, those that liger-kernel 0.8.5 knows; for others transformers leaves the model as it is, silently."""

_SHIPPED: dict[str, dict[str, Any]] = {}


def remember_shipped(model: Any) -> None:
    """Keep what the names in the model's module mean, before kernels for training take the places of some.

    Liger's norm, RoPE and experts stand there from the first step on, for every model that this process makes later:
    one that is reloaded to prove an export would not be plain transformers, and would not run on the CPU.

    Raises ValueError if they stand there already.
    """
    classes = type(model).__mro__  # a user's own class may come first
    for name in {cls.__module__ for cls in classes if cls.__module__.startswith("transformers.models.")} - set(
        _SHIPPED
    ):
        meanings = dict(vars(sys.modules[name]))
        taken = sorted(
            key for key, value in meanings.items() if str(getattr(value, "__module__", "")).startswith("liger_kernel")
        )
        if taken:
            raise ValueError(
                f"Liger's kernels already stand in {name} ({', '.join(taken)}), so that no export could be compared "
                "with plain transformers; leave them to use_liger_kernel=True of the training arguments"
            )
        _SHIPPED[name] = meanings


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


def no_kernels(model_type: str) -> str | None:
    """Why Liger does nothing for a family, or None if it does."""
    if model_type in WITH_KERNELS:
        return None
    return f"Liger has no kernels for {model_type}, only for {', '.join(WITH_KERNELS)}"


def liger_problems(model_type: str, *, on_gpu: bool) -> Iterator[str]:
    """Why ``--use_liger_kernel`` cannot do anything here: transformers would find out after loading, or say nothing."""
    from transformers.utils import is_liger_kernel_available

    if why := no_kernels(model_type):
        yield f"--use_liger_kernel: {why}; drop the flag"
    if not on_gpu:
        yield "--use_liger_kernel: Liger's kernels need a GPU; drop the flag"
    elif not is_liger_kernel_available():
        yield "--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel==0.8.5, or drop the flag"
