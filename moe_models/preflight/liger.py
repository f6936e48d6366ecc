"""``--use_liger_kernel``: what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_models.families.table import FAMILIES, family_of


def no_kernels(config: Mapping[str, Any], flag: str) -> Iterator[str]:
    """A line if Liger does nothing for the family of this ``config.json``; unknown families are refused elsewhere."""
    family = family_of(config)
    if family is not None and not family.liger_kernels:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.liger_kernels))
        yield f"{flag}: Liger has no kernels for {family.model_type}, only for {known}; drop it"


def cannot_run(flag: str, *, on_gpu: bool) -> Iterator[str]:
    """A line if Liger's kernels cannot run here, which transformers would report after loading the model."""
    from transformers.utils import is_liger_kernel_available

    if not on_gpu:
        yield f"{flag}: Liger's kernels need a GPU; drop it"
    elif not is_liger_kernel_available():
        yield f"{flag}: liger-kernel is not installed; pip install liger-kernel==0.8.5, or drop it"
