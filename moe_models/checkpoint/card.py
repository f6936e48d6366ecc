"""The model card, README.md, of every folder that this package writes.

A run notes what it is (:class:`RunFacts`) when it starts. Checkpoints carry the note (``card.json``), so that an export
from a checkpoint tells the same. What was measured (losses, the proof) joins when the folder is written. The hub reads
the metadata at its top: base model, data sets, licence. A card holds no date and no path, so that the same run writes
the same bytes.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_models.errors import UserError
from moe_models.families.config_json import HUB_ID
from moe_models.files import read_json
from moe_models.versions import installed_version

CARD_FILE = "README.md"
FACTS_FILE = "card.json"
"""In a checkpoint: what its run noted of itself."""

MARK = "<!-- written by moe-recipes; a new export replaces this file -->"
"""A card that holds this line is ours, and may be replaced."""

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "accelerate", "peft")
"""Whose versions a card names, beside those of Python's package itself."""

Kind = Literal["model", "adapter", "merged", "upcycled"]


# ------------------------------------------------------------------------------------------------------------ the facts


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows of itself before its first step."""

    base_model: str | None = None
    """Hub id for the metadata. None where the base is a folder here, of which no hub id is known."""
    base_name: str | None = None
    """What the base is called in the text: the hub id, or the last part of the folder's path."""
    revision: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    """``license``, ``license_name`` and ``license_link`` of the base model's own card."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data."""
    data: tuple[str, ...] = ()
    """What the training data are called in the text."""
    layout: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Name -> value of the flags that a reader wants to know."""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known when the folder is written."""

    steps: int | None = None
    losses: tuple[tuple[int, float], ...] = ()
    """(step, training loss) of each log."""
    held_out: tuple[tuple[int, float], ...] = ()
    """(step, held-out loss) of each evaluation."""
    proof: Mapping[str, float] | None = None
    """The fields of an ExportProof or AdapterProof; None where nothing was compared."""


def versions() -> dict[str, str]:
    """Installed versions of this package and of :data:`PACKAGES`."""
    found = {name: installed_version(name) for name in ("moe-recipes", *PACKAGES)}
    return {name: version for name, version in found.items() if version is not None}


def facts_of_base(name: str | None, revision: str | None = None) -> dict[str, Any]:
    """The fields of :class:`RunFacts` that follow from the base model, a folder or a hub id, and from its own card."""
    if not name:
        return {}
    folder = Path(name)
    is_folder = folder.is_dir()
    metadata = metadata_of(_card_of(name, revision, is_folder=is_folder))
    base_model = name if not is_folder and HUB_ID.fullmatch(name) else _hub_id(metadata.get("base_model"))
    return {
        "base_model": base_model,
        "base_name": folder.absolute().name if is_folder else name,
        "revision": None if revision in (None, "main") else revision,
        "licence": _licence(metadata),
    }


def _licence(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a card's metadata say of the licence."""
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}


def _card_of(name: str, revision: str | None, *, is_folder: bool) -> Path | None:
    """The README.md of a folder, or of a hub id as far as the hub or its cache gives it."""
    if is_folder:
        return Path(name) / CARD_FILE
    from huggingface_hub import hf_hub_download

    with suppress(OSError, ValueError):  # a model without a card; no hub
        return Path(hf_hub_download(name, CARD_FILE, revision=revision))
    return None


def metadata_of(card: Path | None) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there are none, or none that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    if card is None or not card.is_file():
        return {}
    try:
        text = card.read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):
            return {}
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        metadata: dict[str, Any] = data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # somebody's own page
        return {}
    return metadata


def _hub_id(value: Any) -> str | None:
    """The one hub id that a card's ``base_model`` names."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and HUB_ID.fullmatch(value):
        return value
    return None


def facts_of_data(names: Iterable[str | None]) -> dict[str, Any]:
    """The fields of :class:`RunFacts` that follow from the names of data sets: files, folders or hub ids."""
    datasets = []
    data = []
    for name in names:
        if not name:
            continue
        if Path(name).exists():
            data.append(Path(name).absolute().name)
        else:
            data.append(name)
            datasets.append(name)
    return {"datasets": tuple(datasets), "data": tuple(data)}


def save_facts(folder: Path, facts: RunFacts) -> None:
    """Put the note into a checkpoint."""
    (folder / FACTS_FILE).write_text(json.dumps(dataclasses.asdict(facts), indent=1) + "\n")


def read_facts(folder: Path) -> RunFacts:
    """The note of a checkpoint, or what the card in a folder says of base and data; empty where there is neither.

    A note of another version of this package may have fewer fields, or more.
    """
    if (folder / FACTS_FILE).is_file():
        with suppress(UserError):
            known = {entry.name for entry in dataclasses.fields(RunFacts)}
            noted = {key: value for key, value in read_json(folder / FACTS_FILE).items() if key in known}
            for key in ("datasets", "data"):
                noted[key] = tuple(noted.get(key, ()))
            return RunFacts(**noted)
    metadata = metadata_of(folder / CARD_FILE)
    listed = metadata.get("datasets") or []
    datasets = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
    base = _hub_id(metadata.get("base_model"))
    return RunFacts(base_model=base, base_name=base, licence=_licence(metadata), datasets=datasets, data=datasets)


def measured(history: Iterable[Mapping[str, Any]], steps: int | None, proof: Any = None) -> Measured:
    """What ``trainer_state.json`` or a Trainer's ``log_history`` says, and the proof, a dataclass or None."""
    losses = []
    held_out = []
    for entry in history:
        step = int(entry.get("step", 0))
        if "loss" in entry:
            losses.append((step, float(entry["loss"])))
        if "eval_loss" in entry:
            held_out.append((step, float(entry["eval_loss"])))
    return Measured(
        steps=steps,
        losses=tuple(losses),
        held_out=tuple(held_out),
        proof=None if proof is None else dataclasses.asdict(proof),
    )


def measured_in(checkpoint: Path, proof: Any = None) -> Measured:
    """What the ``trainer_state.json`` of a checkpoint says; only the proof where there is none."""
    state: dict[str, Any] = {}
    with suppress(UserError):
        state = read_json(checkpoint / "trainer_state.json")
    return measured(state.get("log_history", ()), state.get("global_step"), proof)


# ------------------------------------------------------------------------------------------------------------- the card


def is_our_card(file: Path) -> bool:
    """Whether a README.md was written here, and may be replaced."""
    try:
        return MARK in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_card(folder: Path, kind: Kind, facts: RunFacts, figures: Measured) -> None:
    """Write the card into ``folder``, which holds what it is about."""
    model_type = None
    with suppress(UserError):
        model_type = read_json(folder / "config.json").get("model_type")
    (folder / CARD_FILE).write_text(card_text(kind, facts, figures, model_type), encoding="utf-8")


def card_text(kind: Kind, facts: RunFacts, figures: Measured, model_type: str | None = None) -> str:
    """The whole card: the hub's metadata, what it is, how it was made, what was measured, how to go on."""
    from huggingface_hub import ModelCardData

    # 1. The metadata that the hub reads.
    tags = ["moe", "mixture-of-experts", "deepspeed", "moe-recipes"]
    if kind == "adapter":
        tags += ["lora", "peft"]
    if kind != "upcycled":
        tags += ["trl", "sft"]
    data: Any = ModelCardData(
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **{str(key): value for key, value in facts.licence.items()},  # type: ignore[arg-type]
    )
    if facts.base_model is not None and kind != "upcycled":
        data.base_model_relation = "adapter" if kind == "adapter" else "finetune"

    # 2. The text.
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {_title(kind, facts)}",
        _about(kind, facts, model_type),
        "\n".join(["## How it was made", "", *_table(_made(facts, figures))]),
        "\n".join(["## What was measured", "", *_figures(figures)]),
        "\n".join(["## How to go on", "", *_lines(kind, facts, model_type)]),
    ]
    return "\n\n".join(parts) + "\n"


def _code(text: object) -> str:
    """Any text as a code span on one line that no text can leave."""
    flat = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat.replace('|', chr(92) + '|')}{pad}{fence}"


def _title(kind: Kind, facts: RunFacts) -> str:
    """What it is called; a name given by a user is escaped for HTML and Markdown."""
    what = {
        "model": "a fine-tuned Mixture of Experts",
        "adapter": "an adapter (LoRA) for a Mixture of Experts",
        "merged": "a Mixture of Experts with an adapter merged in",
        "upcycled": "a Mixture of Experts made of a dense model",
    }[kind]
    if facts.base_name is None:
        return what[0].upper() + what[1:]
    name = re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(" ".join(facts.base_name.split())))
    return f"{name}: {what}"


def _about(kind: Kind, facts: RunFacts, model_type: str | None) -> str:
    """One sentence on what it is, and one on the licence."""
    of_type = "" if model_type is None else f" ({_code(model_type)})"
    base = "a base model" if facts.base_name is None else _code(facts.base_name)
    if kind == "upcycled":
        about = f"Each expert of this model{of_type} is a copy of the dense MLP of {base}. It was not trained yet."
    elif kind == "adapter":
        about = f"An adapter of {base}, trained with DeepSpeed and TRL by moe-recipes."
    elif facts.base_name is None:
        about = f"Trained{of_type} with DeepSpeed and TRL by moe-recipes."
    else:
        about = f"Trained from {base}{of_type} with DeepSpeed and TRL by moe-recipes."
    if facts.base_name is None:
        return about
    if "license" in facts.licence:
        return f"{about}\n\nThe licence of the base model applies: {_code(facts.licence['license'])}."
    return f"{about}\n\nThe licence of the base model applies. No card here names it."


def _made(facts: RunFacts, figures: Measured) -> dict[str, str]:
    """Name -> value, in Markdown, of what is known."""
    rows = {}
    if facts.base_name is not None:
        revision = "" if facts.revision is None else f", revision {_code(facts.revision)}"
        rows["base model"] = _code(facts.base_name) + revision
    if facts.data:
        rows["data"] = ", ".join(_code(name) for name in facts.data)
    if facts.layout:
        rows["layout"] = _code(facts.layout)
    if figures.steps is not None:
        rows["optimizer steps"] = f"{figures.steps:,}"
    for name, value in facts.settings.items():
        rows[html.escape(name)] = _code(value)
    if facts.versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return rows


def _table(rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return ["Nothing was noted."]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _figures(figures: Measured) -> list[str]:
    """Losses and proof; what is not known is said."""
    rows = {}
    if figures.losses:
        (first, loss), (last, last_loss) = figures.losses[0], figures.losses[-1]
        rows["training loss"] = f"{loss:.4f} at step {first}, {last_loss:.4f} at step {last}"
    if figures.held_out:
        rows["held-out loss"] = ", ".join(f"{loss:.4f} at step {step}" for step, loss in figures.held_out[-4:])
        if len(figures.held_out) > 4:
            step, loss = figures.held_out[0]
            rows["held-out loss"] = f"{loss:.4f} at step {step}, ..., {rows['held-out loss']}"
    if figures.proof is None:
        rows["proof"] = (
            "complete: every tensor of the architecture, with its shape and finite values. Not compared with a running "
            "model"
        )
    else:
        proof = figures.proof
        rows["proof"] = (
            f"read back by the plain libraries before the folder got its name: {proof['equal_tensors']:,.0f} tensors "
            f"equal bit by bit, logits within {proof['max_logit_difference']:.1e} of the largest one, same top "
            f"token at {proof['same_top1']:.0%} of the positions"
        )
    return _table(rows)


def _lines(kind: Kind, facts: RunFacts, model_type: str | None) -> list[str]:
    """Code to load, serve, evaluate and continue. FOLDER is this folder, or its name on the hub."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    base = facts.base_model or "BASE_MODEL"
    ours = model_type is not None and model_type not in CONFIG_MAPPING_NAMES
    if kind == "adapter":
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="auto")\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
        serve = (
            "# the whole model, the adapter added to it; in a clone of moe-recipes\n"
            "./run.sh export --checkpoint FOLDER --output_dir MERGED --merge\nvllm serve MERGED"
        )
        on = f"--model_name_or_path {base} --use_peft true --adapter FOLDER"
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
        serve = "vllm serve FOLDER"
        if ours:
            load = f"import moe_models.prmoe  # transformers has no such class\n{load}"
            serve = "# vLLM has no such class"
        on = "--model_name_or_path FOLDER"
    return [
        "`FOLDER` is this folder, or its name on the hub.",
        "",
        "```python",
        load,
        "```",
        "",
        "```bash",
        serve,
        "",
        "# tasks, or the perplexity of your text; in a clone of moe-recipes",
        "./run.sh evaluate --model FOLDER --text heldout.jsonl",
        "",
        "# go on training",
        f"./run.sh finetune {on} --dataset_name my.jsonl \\",
        "    --deepspeed ds_configs/zero1_ep8.json --output_dir out/next",
        "```",
    ]
