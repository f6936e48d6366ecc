"""Pages that are lists of what the code has: the flags of each recipe, and the seams to other libraries."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any
from unittest import mock

from docs.tools.models import ROOT
from moe_models.engine.seams import SEAMS

WRITTEN = "<!-- Written by python -m docs.tools.write. Change the code instead. -->\n\n"
"""First line of a page that is all generated."""

VERBS = {
    "check": "check",
    "plan": "plan",
    "bench": "bench",
    "bench_alltoall": "",
    "upcycle": "upcycle",
    "export": "export",
    "routing_report": "report",
    "quickstart": "quickstart",
}
"""Recipe -> verb of run.sh; empty where the launcher starts it."""
MOST_CHOICES = 8
"""Values of a flag that are written out."""


# --- parsers


class _Found(Exception):  # noqa: N818 (it is no error)
    """Carries a recipe's parser out of its ``parse()``."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(recipe: str) -> argparse.ArgumentParser:
    """The parser that a recipe makes of its command line."""
    folder = str(ROOT / "recipes")
    if folder not in sys.path:  # as python does for a script
        sys.path.insert(0, folder)
    module = importlib.import_module(recipe)

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            module.parse([])
        except _Found as found:
            return found.parser
    raise RuntimeError(f"recipes/{recipe}.py: parse() asked no parser")


def training_parser(recipe: str) -> argparse.ArgumentParser:
    """The parser of finetune or pretrain, with the defaults of a run on GPUs."""
    folder = str(ROOT / "recipes")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    command_line = importlib.import_module("command_line")
    flags = command_line.FROM_CHECKPOINT if recipe == "finetune" else importlib.import_module(recipe).FROM_CONFIG
    with mock.patch("moe_models.engine.cpu.on_cpu", return_value=False):
        parser: argparse.ArgumentParser = command_line.parse_flags([], "", flags)[0]
    return parser


# --- tables


def table(actions: list[argparse.Action]) -> str:
    """A row for each flag: name, default, what it does."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for action in actions:
        lines.append(f"| `{name_of(action)}` | {default_of(action)} | {help_of(action)} |")
    return "\n".join(lines) + "\n"


def name_of(action: argparse.Action) -> str:
    """The flag; of two spellings the one that scripts use."""
    names = [name for name in action.option_strings if name.startswith("--")]
    return names[0] if names else action.dest


def default_of(action: argparse.Action) -> str:
    """Its default, as one would write it."""
    value = action.default
    if action.required:
        return "required"
    if isinstance(value, Enum):
        value = value.value
    if value in (None, "", argparse.SUPPRESS) or value == [] or value == {}:
        return ""
    if hasattr(value, "is_relative_to"):  # a path: as it is from the repository's root
        value = value.relative_to(ROOT) if value.is_relative_to(ROOT) else value
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return "`" + str(value).replace("|", "\\|") + "`"


def help_of(action: argparse.Action) -> str:
    """The first sentence of its help, and the values that it takes."""
    text = " ".join((action.help or "").replace("%%", "%").split())
    sentence = re.split(r"(?<=[a-z)`'\"])\.(?=\s|$)", text)[0]
    parts = [escaped(sentence.removesuffix("."))]
    if action.choices:
        values = [str(choice.value if isinstance(choice, Enum) else choice) for choice in action.choices]
        shown = ", ".join(f"`{value}`" for value in values[:MOST_CHOICES])
        rest = len(values) - MOST_CHOICES
        parts.append(f"one of {shown}" + (f" and {rest} more" if rest > 0 else ""))
    return "; ".join(part for part in parts if part)


def escaped(text: str) -> str:
    """Text that a Markdown table shows as it is; what is in backticks stays code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # one backtick has no partner
        pieces = ["'".join(pieces)]
    for place in range(0, len(pieces), 2):
        pieces[place] = re.sub(r"[\\*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", pieces[place])
        pieces[place] = pieces[place].replace("<", "&lt;").replace(">", "&gt;")
    return "`".join(pieces).replace("|", "\\|")


# --- pages


def flags_page() -> str:
    """Every recipe that is no training recipe, with its flags."""
    parts = [
        WRITTEN,
        "# Flags of the recipes\n\n"
        "`./run.sh VERB --help` prints the same, with each recipe's examples. The flags of `finetune` and `pretrain` "
        "have\na [page of their own](training-flags.md).\n",
    ]
    for recipe, verb in VERBS.items():
        parser = parser_of(recipe)
        module = importlib.import_module(recipe)
        about = " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())
        start = f"./run.sh {verb}" if verb else f"deepspeed --num_gpus N recipes/{recipe}.py"
        actions = [action for action in parser._actions if action.dest != "help"]
        parts.append(f"\n## {verb or recipe}\n\n{escaped(about)}\n\n`{start}`\n\n{table(actions)}")
    return "".join(parts)


def training_flags_page() -> str:
    """The flags of finetune and pretrain: ours, what defaults differ, and TRL's."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    finetune = training_parser("finetune")
    pretrain = training_parser("pretrain")
    plain = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    of_trl = {action.dest: action for action in flags_in(plain)}

    # 1. Whose flag it is, and whether its default is not TRL's.
    ours = [action for action in flags_in(finetune) if action.dest not in of_trl]
    ours += [action for action in flags_in(pretrain) if action.dest not in {f.dest for f in flags_in(finetune)}]
    theirs = [action for action in flags_in(finetune) if action.dest in of_trl]
    other = [action for action in theirs if default_of(action) != default_of(of_trl[action.dest])]
    defaults = {action.dest: default_of(action) for action in flags_in(finetune)}
    of_pretrain = [action for action in flags_in(pretrain) if default_of(action) != defaults.get(action.dest)]
    of_pretrain = [action for action in of_pretrain if action.dest in defaults]

    # 2. The page. Defaults of TRL may be computed when its classes are made; these are of a run on GPUs.
    return "".join(
        [
            WRITTEN,
            "# Flags of finetune and pretrain\n\nThey are the fields of TRL's `SFTConfig`, `ModelConfig` and "
            "`ScriptArguments`, and a few of ours. Defaults are those of a\nrun on GPUs.\n\n",
            "## Ours\n\n`--config_name` and `--tokenizer_name` are `pretrain`'s.\n\n",
            table(ours),
            "\n## Defaults that differ from TRL's\n\n",
            table(other),
            "\n`pretrain` has these besides:\n\n",
            table(of_pretrain),
            "\n## TRL's\n\nThe first sentence of each help. `./run.sh finetune --help` has all of it.\n\n",
            table(theirs),
        ]
    )


def flags_in(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags in the parser's order, without help and without the twin that switches a flag off."""
    kept = []
    for action in parser._actions:
        if action.dest == "help" or name_of(action).removeprefix("--").startswith("no_"):
            continue
        kept.append(action)
    return kept


def seams_page() -> str:
    """Every private name of a library that the code depends on."""
    return "".join(
        [
            WRITTEN,
            "# Seams\n\nEvery name of another library that the code overrides, replaces, sets or reads behind its "
            "public interface\n(`moe_models/engine/seams.py`). Without the name a run would go on and lose what the "
            "last column says. So a trainer\nchecks the whole table before it trains, and a test checks it for the "
            f"pinned versions.\n\n{len(SEAMS)} seams.\n",
            *seam_tables(),
        ]
    )


def seam_tables() -> Iterator[str]:
    """A table for each library."""
    libraries = sorted({seam.name.partition(".")[0] for seam in SEAMS})
    for library in libraries:
        yield f"\n## {library}\n\n| name | needed by | lost without it |\n|---|---|---|\n"
        for seam in SEAMS:
            if seam.name.partition(".")[0] == library:
                name = seam.name.replace(":", ".")
                yield f"| `{name}` | `moe_models/{seam.ours}` | {escaped(seam.lost)} |\n"
