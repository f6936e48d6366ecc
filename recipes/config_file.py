"""``--config run.yaml``: flags in a YAML file, as TRL's command line takes them. Flags that are given beside it win."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_models.errors import Problems, UserError, one_line, show

FLAG = "--config"
IN_THE_SHELL = "env"
"""TRL's key for environment variables."""


def with_config(words: list[str]) -> tuple[list[str], list[str]]:
    """(the words with those of the file in front, problems with the file).

    Where there are problems, the words are those of the command line alone.
    """
    place, words = _taken_out(words)
    if place is None:
        return words, []
    try:
        settings = read_settings(place)
    except UserError as error:
        return words, error.problems
    given = {_name(word) for word in words if word.startswith("--")}
    from_file: list[str] = []
    for name, value in settings.items():
        if _name(name) not in given:
            from_file += _as_words(name, value)
    return [*from_file, *words], []


def _taken_out(words: list[str]) -> tuple[str | None, list[str]]:
    """(the file that ``--config`` names, the other words); the last one counts, as with other flags."""
    place = None
    others = []
    rest = iter(words)
    for word in rest:
        if word == FLAG:
            place = next(rest, "")
        elif word.startswith(f"{FLAG}="):
            place = word.partition("=")[2]
        else:
            others.append(word)
    return place, others


def _name(word: str) -> str:
    """The setting that a flag is about: ``--no_packing=...`` and ``packing`` are about the same."""
    return word.lstrip("-").partition("=")[0].replace("-", "_").removeprefix("no_")


def read_settings(place: str) -> dict[str, Any]:
    """Name of a flag -> its value. Raises UserError with every problem of the file."""
    import yaml

    # 1. The file.
    path = Path(place)
    if not place or not path.is_file():
        raise UserError(f"{FLAG} {place}: no such file; give a YAML file with one `flag: value` on each line")

    class Loader(yaml.SafeLoader):
        """As YAML, but a key that stands twice is an error; YAML keeps the last one silently."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
        keys = [key for key, _ in pairs]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError([f"{FLAG} {place}: {key} stands twice; keep one" for key in twice])
        return dict(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{FLAG} {place}: cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{FLAG} {place}: holds {show(settings)}; it must hold lines such as `max_steps: 100`")

    # 2. What is in it. Whether there are such flags is the parser's to say.
    problems = Problems()
    for name in settings:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            problems.add(f"{FLAG} {place}: {show(name)}: is no name of a flag")
        elif name == IN_THE_SHELL:
            problems.add(f"{FLAG} {place}: {name}: set environment variables in the shell, before the launcher starts")
        elif name == FLAG.removeprefix("--"):
            problems.add(f"{FLAG} {place}: {name}: a file cannot name another one")
    problems.refuse()
    return settings


def _as_words(name: str, value: Any) -> Iterable[str]:
    """A setting as it would be given in the command line; none for a null."""
    flag = f"--{name}"
    if value is None:
        return []
    if isinstance(value, list):
        return [flag, *(_text(item) for item in value)]
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
