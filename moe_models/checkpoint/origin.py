"""The checkpoint that a run started from, and what its export owes to it.

A model's class may leave a part of its checkpoint on the disk: vision towers, layers for multi-token prediction. An
export gives these tensors back as they were, under their names. Afterwards it is compared with its origin: the same
names, the same shapes, and which tensors training has changed.

Which tensors the class has no place for is not guessed from names. transformers loads the origin, with tensors that are
still on disk (``on_disk.py``), and what none of the model's parameters was made of is left over.
"""

from __future__ import annotations

import copy
import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_models.checkpoint.expected import tied_names
from moe_models.checkpoint.export import hub_plan
from moe_models.checkpoint.hf_folder import ExportError
from moe_models.checkpoint.model_files import weight_files
from moe_models.checkpoint.on_disk import DTYPES, LazyFile, OnDisk, Stored, read_header
from moe_models.checkpoint.reading import nothing_read
from moe_models.checkpoint.source import is_writer
from moe_models.engine.plain_transformers import as_shipped, without_zero3
from moe_models.errors import UserError, one_line, some_of, warn
from moe_models.families.config_json import HUB_ID
from moe_models.families.table import Family
from moe_models.files import read_json, write

ORIGIN_FILE = "origin.json"
"""In a checkpoint folder: the model that the run started from."""

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a multimodal model that a language model has no use for."""

CHUNK = 1 << 20
"""Values that are compared at a time. A tensor that training changed differs in the first of them, as a rule."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The safetensors files of a model folder."""

    folder: Path
    tensors: Mapping[str, tuple[Path, Stored]]
    """Name -> its file, and what the file's header says of it."""
    left_over: tuple[str, ...] = ()
    """Names of the tensors that no parameter of the trained class is made of."""
    unexpected: frozenset[str] = frozenset()
    """What transformers calls those of them that it reports."""
    tied: frozenset[str] = frozenset()
    """Names of tensors that are another one, as the class has it: an export has no copy of them."""
    stored_as: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the family's row by which this checkpoint names its tensors (``Family.stored_as``)."""
    whole_config: Mapping[str, Any] | None = None
    """``config.json`` of the multimodal model whose language model is trained; None where that is all."""

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of what is left over."""
        return {name: (self.tensors[name][1].shape, DTYPES[self.tensors[name][1].dtype]) for name in self.left_over}

    def leftovers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, values) of what is left over, one after the other."""
        for name in self.left_over:
            yield name, self.unread(name).read()

    def complete(self, folder: Path, dtype: torch.dtype) -> None:
        """Make of an exported language model the multimodal model that it came from: its config and processors."""
        if self.whole_config is None:
            return
        config = copy.deepcopy(dict(self.whole_config))
        for part in (config, config["text_config"]):
            part.pop("torch_dtype", None)
            part["dtype"] = str(dtype).removeprefix("torch.")
        write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for name in PROCESSORS:
            if (self.folder / name).is_file() and not (folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)

    def unread(self, name: str) -> OnDisk:
        """One tensor, still on disk."""
        return LazyFile(self.tensors[name][0]).get_tensor(name)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An exported folder beside its origin."""

    tensors: int
    """Of the origin."""
    changed: int
    unchanged: int
    passed_on: int
    """Bit-equal, because the trained class has no place for them."""
    renamed: int
    """Of the origin, and not in the folder, which has the same weights under the hub's names."""
    some_unchanged: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.changed:,} of {self.tensors:,} tensors changed"]
        if self.unchanged:
            parts.append(f"{self.unchanged:,} as they were ({some_of(self.some_unchanged)})")
        if self.passed_on:
            parts.append(f"{self.passed_on:,} passed on, which the trained class does not hold")
        if self.renamed:
            parts.append(f"{self.renamed:,} under the hub's names instead of their own")
        return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- what it holds


def origin_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model, by path or by hub id from the cache; None where there is none."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name).absolute()
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def read_origin(folder: Path, family: Family, config: Any) -> Origin | None:
    """What ``folder`` holds, beside the class of ``config``; None where it has no safetensors, or quantized ones."""
    if getattr(config, "quantization_config", None) is not None:
        return None
    # 1. Every tensor that there is.
    tensors = stored_tensors(folder)
    if not tensors:
        return None
    # 2. Names that the export will have, or has in another tensor.
    stored_as = family.stored_as(tensors)
    family = family.with_columns(stored_as)
    of_the_folder = read_json(folder / "config.json")
    whole_config = of_the_folder if of_the_folder.get("model_type") != config.model_type else None
    names: dict[str, Any] = {"stored_as": stored_as, "whole_config": whole_config}
    tied = frozenset(family.module_to_hub(name) for name in tied_names(config))
    known = {name for entry in hub_plan(family, config) for name in entry.hub} | tied
    unknown = [name for name in tensors if name not in known]
    if not unknown:
        return Origin(folder=folder, tensors=tensors, tied=tied, **names)
    # 3. Others may be of another layout: then the class takes them.
    used, unexpected = names_that_load(folder, tensors)
    left_over = tuple(name for name in unknown if name not in used)
    return Origin(folder=folder, tensors=tensors, left_over=left_over, unexpected=unexpected, tied=tied, **names)


def stored_tensors(folder: Path) -> dict[str, tuple[Path, Stored]]:
    """Name -> (file, what its header says) of every tensor in a model folder."""
    return {name: (file, stored) for file in weight_files(folder) for name, stored in read_header(file).items()}


def names_that_load(folder: Path, tensors: Mapping[str, tuple[Path, Stored]]) -> tuple[set[str], frozenset[str]]:
    """(names of the tensors that transformers makes parameters of, what it calls unexpected); reads headers only.

    Raises UserError if a parameter's values had to be computed while loading, so that its origin cannot be told.
    """
    from transformers import AutoModelForCausalLM

    with without_zero3(), as_shipped(), nothing_read(set()):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    # 1. Where in which file each tensor begins.
    begins: dict[str, list[tuple[int, str]]] = {}
    for name, (file, stored) in tensors.items():
        begins.setdefault(str(file), []).append((stored.offset, name))
    for places in begins.values():
        places.sort()
    # 2. The tensors in which the model's parameters lie.
    used = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, OnDisk):
            raise UserError(f"{folder}: {name} is computed while it is loaded, so what is left over cannot be told")
        for run in tensor.runs:
            places = begins[run.file.path]
            used.add(places[bisect_right(places, (run.offset, "\U0010ffff")) - 1][1])
    return used, frozenset(info["unexpected_keys"])


def shared_origin(name: str, revision: str | None, family: Family, config: Any) -> Origin | None:
    """The origin of a run, the same on every rank; collective. Where it cannot be read, a warning says so."""
    told: list[Origin | None] = [None]
    if is_writer():
        try:
            folder = origin_folder(name, revision)
            if folder is not None:
                told = [read_origin(folder, family, config)]
        except Exception as error:  # many kinds, in libraries' words; whatever it is, the other ranks wait
            warn([f"{name}: the export will not be compared with it, and gets nothing from it: {one_line(error)}"])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]


# ------------------------------------------------------------------------------------------------- the comparison


def compare(folder: Path, origin: Origin) -> Comparison:
    """An exported ``folder`` beside its origin.

    Raises:
        ExportError: if a tensor of the origin is lost or has another shape, or one that should have been passed on is
            another.
    """
    ours = stored_tensors(folder)
    files = {file: LazyFile(file) for file, _ in [*ours.values(), *origin.tensors.values()]}
    # 1. The same names. In another layout the folder has the same weights under other names.
    absent = [name for name in origin.tensors if name not in ours and name not in origin.tied]
    added = [name for name in ours if name not in origin.tensors]
    lost = [name for name in absent if name in origin.left_over]
    if absent and not added:
        lost = absent
    if lost:
        raise ExportError(f"{len(lost)} of {len(origin.tensors)} tensors of {origin.folder} are lost: {some_of(lost)}")
    # 2. The same shapes.
    both = [name for name in origin.tensors if name in ours]
    reshaped = [name for name in both if ours[name][1].shape != origin.tensors[name][1].shape]
    if reshaped:
        raise ExportError(f"{len(reshaped)} tensors have another shape than in {origin.folder}: {some_of(reshaped)}")
    # 3. What changed.
    left_over = set(origin.left_over)
    changed = 0
    unchanged = []
    for name in both:
        same = same_bits(files[ours[name][0]].get_tensor(name), files[origin.tensors[name][0]].get_tensor(name))
        if name in left_over and not same:
            raise ExportError(f"{name}: should be as it is in {origin.folder}, and is not")
        if same and name not in left_over:
            unchanged.append(name)
        changed += not same
    return Comparison(
        tensors=len(origin.tensors),
        changed=changed,
        unchanged=len(unchanged),
        passed_on=len(left_over),
        renamed=len(absent),
        some_unchanged=tuple(unchanged[:3]),
    )


def same_bits(ours: OnDisk, theirs: OnDisk) -> bool:
    """Whether two tensors of one shape hold the same values, in the dtype of the first; read as far as they do."""
    theirs = theirs.placed("cpu", ours.dtype)
    for start in range(0, ours.numel(), CHUNK):
        count = min(CHUNK, ours.numel() - start)
        one = torch.empty(count, dtype=ours.dtype)
        other = torch.empty(count, dtype=ours.dtype)
        ours.read_range(one, start)
        theirs.read_range(other, start)
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            return False
    return True


def refuse_unchanged(comparison: Comparison, origin: Origin, steps: int) -> None:
    """Raise ExportError if ``steps`` steps changed nothing: what was trained is then not what is exported."""
    if comparison.changed or comparison.renamed:
        return
    raise ExportError(
        f"after {steps} steps no tensor differs from {origin.folder}; what was trained is not in the export, or the "
        "learning rate is too small for this dtype. Look at the loss and at --learning_rate"
    )


# ------------------------------------------------------------------------------------ beside a checkpoint of training


def note_origin(folder: Path, name: str, revision: str | None) -> None:
    """Write down which model a run started from, for ``recipes/export.py``; nothing for a model that was drawn."""
    if not name:
        return
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    write(folder / ORIGIN_FILE, json.dumps({"model": name, "revision": revision}, indent=2) + "\n")


def noted_origin(checkpoint: Path) -> tuple[str, str | None] | None:
    """(model, revision) that a checkpoint says it started from; None in one that does not."""
    file = checkpoint / ORIGIN_FILE
    if not file.is_file():
        return None
    noted = read_json(file)
    return str(noted.get("model")), noted.get("revision")
