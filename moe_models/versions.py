"""Which versions of the four libraries around training were run, and which are known to fail.

``requirements.txt`` has the exact set that was tested together, ``pyproject.toml`` the ranges that may be installed;
``tests/test_versions.py`` holds all three together.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache

TESTED: dict[str, tuple[str, ...]] = {
    "deepspeed": ("0.19.8",),
    "transformers": ("5.17.0", "5.20.2"),
    "trl": ("1.16.0",),
    "accelerate": ("1.15.0",),
    "peft": ("0.21.2",),
}
"""Versions that the tests ran with, oldest first."""


@cache
def installed_version(package: str) -> str | None:
    """Version of an installed package, from its metadata (nothing is imported), or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problems(*, expert_parallel: bool) -> Iterator[str]:
    """A line for each version that cannot work: TRL's and accelerate's in every layout, transformers' with AutoEP."""
    if expert_parallel:
        yield from _autoep_problems()

    # Older TRL has no SFTConfig.router_aux_loss_coef, which recipes and trainer read (huggingface/trl#6085).
    trl = installed_version("trl")
    if trl is not None and () < _release(trl) < (1, 7):
        yield f"trl {trl}: --router_aux_loss_coef came with 1.7; install {' or '.join(TESTED['trl'])}"

    # What the metadata of trl 1.16.0 asks for.
    accelerate = installed_version("accelerate")
    if accelerate is not None and () < _release(accelerate) < (1, 10):
        yield f"accelerate {accelerate}: trl 1.16.0 needs 1.10.1 or later; install {' or '.join(TESTED['accelerate'])}"


def _autoep_problems() -> Iterator[str]:
    """A line for a transformers version with which AutoEP cannot work."""
    version = installed_version("transformers")
    release = _release(version or "")
    tested = " or ".join(TESTED["transformers"])
    if not release:
        yield f"transformers {version or 'is not installed'}: expert_parallel needs it; install {tested}"
    elif release < (5, 0):
        yield f"transformers {version}: expert_parallel needs the fused experts of 5.0 and later; install {tested}"
    elif release >= (5, 23):
        yield (
            f"transformers {version}: AutoEP of deepspeed 0.19.8 fails there (_CanRecordRegistry.get() takes 2 "
            f"positional arguments but 3 were given); install {tested}"
        )


def untested_versions(*, expert_parallel: bool) -> Iterator[str]:
    """A line for each version that was never tried, with AutoEP or at all."""
    for package, tested in TESTED.items():
        version = installed_version(package)
        if version is None or version in tested:
            continue
        part_of_autoep = package in ("deepspeed", "transformers")
        use = "expert_parallel" if expert_parallel and part_of_autoep else "these recipes"
        yield f"{package} {version} is untested with {use}; tested: {', '.join(tested)}"


def _release(version: str) -> tuple[int, int] | tuple[()]:
    """(major, minor) of a version, or () if it is none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()
