"""``--use_liger_kernel``: what it needs, and plain transformers back where that is wanted. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe_models.families.table import FAMILIES

_SHIPPED: dict[str, dict[str, Any]] = {}


def remember_shipped(model: Any) -> None:
    """Keep what the names in the model's module mean, before kernels for training take the places of some.

    Liger's norm, RoPE and experts stand there from the first step on, for every model that this process makes later:
    one that is reloaded to prove an export would not be plain transformers, and would not run on the CPU.

    Raises ValueError if they stand there already.
    """
    for name in {cls.__module__ for cls in type(model).__mro__}:  # a user's own class may come first
        if not name.startswith("transformers.models.") or name in _SHIPPED:
            continue
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


def no_kernels(config: Mapping[str, Any], flag: str) -> Iterator[str]:
    """A line if Liger does nothing for the family of this ``config.json``; what is no family is refused elsewhere."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is not None and not family.liger_kernels:
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if family.liger_kernels))
        yield f"{flag}: Liger has no kernels for {family.model_type}, only for {known}; drop it"


def cannot_run(flag: str, *, on_gpu: bool) -> Iterator[str]:
    """A line if Liger's kernels cannot run here, which transformers would find out after loading."""
    from transformers.utils import is_liger_kernel_available

    if not on_gpu:
        yield f"{flag}: Liger's kernels need a GPU; drop it"
    elif not is_liger_kernel_available():
        yield f"{flag}: liger-kernel is not installed; pip install liger-kernel==0.8.5, or drop it"
