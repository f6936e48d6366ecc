"""``--use_liger_kernel``: what it needs, and plain transformers back where that is wanted. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers build whole models in here; in a ZeRO-3 run it would partition them over the ranks."""
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            hf_deepspeed.set_hf_deepspeed_config(reference())
