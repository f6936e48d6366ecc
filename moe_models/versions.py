"""Which versions of DeepSpeed and transformers the layouts were run with, and which are known to fail."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

TESTED_DEEPSPEED = ("0.19.8",)
"""DeepSpeed versions the tests ran with."""
TESTED_TRANSFORMERS = ("5.17.0", "5.20.2")
"""transformers versions AutoEP was run with."""


def installed_version(package: str) -> str | None:
    """Version of an installed package, from its metadata (nothing is imported), or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problems() -> Iterator[str]:
    """A line for a transformers version with which AutoEP cannot work."""
    version = installed_version("transformers")
    found = re.match(r"(\d+)\.(\d+)", version or "")
    tested = " or ".join(TESTED_TRANSFORMERS)
    if found is None:
        yield f"transformers {version or 'is not installed'}: expert_parallel needs it; install {tested}"
    elif tuple(map(int, found.groups())) < (5, 0):
        yield f"transformers {version}: expert_parallel needs the fused experts of 5.0 and later; install {tested}"
    elif tuple(map(int, found.groups())) >= (5, 23):
        yield (
            f"transformers {version}: AutoEP of deepspeed 0.19.8 fails there (_CanRecordRegistry.get() takes 2 "
            f"positional arguments but 3 were given); install {tested}"
        )


def untested_versions(*, expert_parallel: bool) -> Iterator[str]:
    """A line for each version that nobody has tried with AutoEP."""
    if not expert_parallel:
        return
    for package, tested in (("deepspeed", TESTED_DEEPSPEED), ("transformers", TESTED_TRANSFORMERS)):
        version = installed_version(package)
        if version is not None and version not in tested:
            yield f"{package} {version} is untested with expert_parallel; tested: {', '.join(tested)}"
