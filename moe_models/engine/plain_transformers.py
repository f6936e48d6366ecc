"""Plain transformers back, in a process that trains with Liger's kernels or under ZeRO-3.

The proof of an export loads a second model. It has to be the one that a user's plain transformers would build.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SHIPPED: dict[str, dict[str, Any]] = {}
"""Module of transformers -> what its names meant before kernels replaced some."""


def remember_shipped(model: Any) -> None:
    """Remember what the names in the modules of ``model``'s class mean, before kernels for training replace some.

    Raises:
        ValueError: if Liger's kernels are there already.
    """
    for name in {cls.__module__ for cls in type(model).__mro__}:  # a user's own class may come first
        if not name.startswith("transformers.models.") or name in _SHIPPED:
            continue
        meanings = dict(vars(sys.modules[name]))
        taken = [key for key, value in meanings.items() if _is_ligers(value)]
        if taken:
            raise ValueError(
                f"Liger's kernels already stand in {name} ({', '.join(sorted(taken))}), so that no export could be "
                "compared with plain transformers; leave them to use_liger_kernel=True of the training arguments"
            )
        _SHIPPED[name] = meanings


def _is_ligers(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("liger_kernel")


# upstream: liger-kernel 0.8.5: apply_liger_kernel_to_* replaces norm, RoPE and experts in the module of transformers,
# for every model that the process builds later, and offers no way back; a model that is reloaded on the CPU to prove an
# export would get CUDA kernels. Remove when: Liger patches instances only, or can be undone.
@contextmanager
def as_shipped() -> Iterator[None]:
    """Inside, the remembered modules are as transformers ships them; afterwards they are as before."""
    now = {name: dict(vars(sys.modules[name])) for name in _SHIPPED}
    try:
        for name, meanings in _SHIPPED.items():
            vars(sys.modules[name]).update(meanings)
        yield
    finally:
        for name, meanings in now.items():
            vars(sys.modules[name]).update(meanings)


# upstream: transformers 5.20.2: while a ZeRO-3 config is registered, from_pretrained partitions every model over the
# ranks, also one that a single rank loads; the register is a weak reference without a public getter.
# Remove when: from_pretrained takes an argument that says otherwise.
@contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, transformers builds whole models; in a ZeRO-3 run it would partition them over the ranks."""
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config = reference() if reference is not None else None
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)
