"""requirements.txt, the ranges of pyproject.toml and ``versions.TESTED`` say the same."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

from moe_models.versions import TESTED

ROOT = Path(__file__).parents[1]


def exact_versions() -> dict[str, str]:
    """requirements.txt: the set that was tested together."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip(): version.strip() for name, version in pins}


def ranges() -> dict[str, Requirement]:
    """``dependencies`` of pyproject.toml (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    found = [Requirement(word) for word in re.findall(r'^ +"([^"]+)"', section[1], re.MULTILINE)]
    return {requirement.name: requirement for requirement in found}


def test_the_exact_set_lies_in_the_ranges() -> None:
    exact, allowed = exact_versions(), ranges()
    assert set(exact) == set(allowed)
    for name, version in exact.items():
        assert allowed[name].specifier.contains(version), f"{name} {version}: {allowed[name]}"


def test_tested_versions_lie_in_the_ranges_and_the_exact_set_is_tested() -> None:
    exact, allowed = exact_versions(), ranges()
    for name, versions in TESTED.items():
        assert exact[name] in versions
        for version in versions:
            assert allowed[name].specifier.contains(version), f"{name} {version}: {allowed[name]}"


def test_ranges_allow_the_gpu_image_and_no_version_that_is_known_to_fail() -> None:
    allowed = {name: requirement.specifier for name, requirement in ranges().items()}
    assert allowed["torch"].contains("2.11.0+cu130")
    assert not allowed["transformers"].contains("5.23.0")
    assert not allowed["trl"].contains("1.6.0")
    assert not allowed["accelerate"].contains("1.9.0")
