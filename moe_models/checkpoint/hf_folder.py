"""Writing a Hugging Face model folder that is complete or absent, never half.

Tensors arrive one by one and leave in shards, so the writer holds one shard at most. Everything goes into a hidden
sibling folder first (``.NAME.writing``); :meth:`HFFolderWriter.finish` renames it only after every expected tensor has
been seen once, with its shape, its dtype and finite values, and everything has reached the disk. An earlier export is
moved to ``.NAME.previous`` for the moment between two renames; if the process dies right there, the next export into
the same place puts it back first.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from moe_models.checkpoint.card import CARD_FILE, is_our_card
from moe_models.checkpoint.shards import Expected, ShardFiles, plan_shards
from moe_models.checkpoint.threads import each
from moe_models.errors import RunError, one_line, some_of
from moe_models.files import _sync, replace_folder, restore_previous

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""What ``save_pretrained`` used for years; hub pages and loaders are fine with it."""

INDEX_NAME = "model.safetensors.index.json"

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|selection_bias\.json")
_COMPANIONS = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt"
    r"|spiece\.model|sentencepiece\..*|chat_template\..*|additional_chat_templates"
)
"""With the weights and a card of ours, all that an export writes; a folder that holds anything else is not replaced."""


class ExportError(RunError):
    """The folder cannot be completed; the message names every tensor that is at fault. Nothing was left behind."""


class TensorWriter:
    """Writes hub-named tensors into the files of a staging folder that another process has made.

    Args:
        staging: the folder.
        expected: hub name -> (shape, dtype) of every tensor that the finished folder must hold.
        max_shard_bytes: largest file; the same as in the process that made them.

    Raises:
        ExportError: from :meth:`add` for an unknown, repeated, misshapen or non-finite tensor, or one of another dtype;
            from all methods if the disk refuses.
    """

    def __init__(self, staging: Path, expected: Expected, max_shard_bytes: int, *, create: bool = False) -> None:
        self.staging = staging
        self.max_shard_bytes = max_shard_bytes
        self.seen: set[str] = set()
        """Names of the tensors that were written here."""
        self._expected = dict(expected)
        self._shards = plan_shards(expected, max_shard_bytes)
        with _refusals_of_the_disk(staging):
            self._files = ShardFiles(staging, self._shards, create=create)

    def add_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write several, as :meth:`add` does."""
        each(lambda item: self.add(*item), tensors.items())

    def add(self, name: str, tensor: torch.Tensor, *, finite: bool = True) -> None:
        """Write one tensor (CPU, any stride). Threads may call it for different names.

        ``finite``: refuse one that is not.
        """
        # 1. Refuse what the finished folder must not hold.
        if name not in self._expected:
            raise ExportError(f"{name}: not a tensor of this model's Hugging Face checkpoint")
        if name in self.seen:
            raise ExportError(f"{name}: arrived twice")
        shape, dtype = self._expected[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ExportError(f"{name}: has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != dtype:
            raise ExportError(f"{name}: is {tensor.dtype}, expected {dtype}")
        if finite and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ExportError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
        # 2. To its place.
        with _refusals_of_the_disk(self.staging):
            self._files.write(name, tensor)
        self.seen.add(name)

    def close(self) -> None:
        """Close the files; what was written stays."""
        self._files.close()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. One pass, where ``isfinite(...).all()`` takes five and forty times as long."""
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(tensor.aminmax())  # a NaN comes out as both
    return bool(torch.isfinite(extremes).all())


class HFFolderWriter(TensorWriter):
    """Collects hub-named tensors into ``folder`` as safetensors shards plus index.

    Args:
        folder: the final place; it must not exist, be empty, or hold an earlier export and nothing else.
        expected: hub name -> (shape, dtype) of every tensor that the finished folder must hold.
        max_shard_bytes: a shard ends where the next tensor would make it larger.

    Raises:
        ExportError: from ``__init__`` if ``folder`` holds something that is not an export, or another process is
            writing there; from :meth:`add` for an unknown, repeated, misshapen or non-finite tensor, or one of another
            dtype; from :meth:`close_weights` for missing ones; from all of them if the disk refuses.
    """

    def __init__(self, folder: Path, expected: Expected, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> None:
        self.folder = Path(os.path.realpath(folder))  # "." has no name, and a link must not be renamed
        # 1. The place must be free, or hold an earlier export.
        restore_previous(self.folder)
        refuse_foreign_folder(self.folder)
        # 2. The staging folder. A living export holds its lock; what a crash left behind is free.
        staging = self.folder.with_name(f".{self.folder.name}.writing")
        if staging.exists():
            os.close(_lock(staging))
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        self._lock_fd = _lock(staging)
        # 3. The files, in their full size; where the file system allows it the values have no place on the disk yet.
        try:
            super().__init__(staging, expected, max_shard_bytes, create=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(self._lock_fd)
            raise
        self._seen_elsewhere: list[str] = []

    def add_seen(self, names: Iterable[str]) -> None:
        """Note tensors that another process has written into the same files."""
        self._seen_elsewhere.extend(names)

    def close_weights(self) -> None:
        """Write the index; raises :class:`ExportError` naming every tensor that never came, or came twice."""
        self.close()
        self._start_to_sync()
        # 1. Nothing may be missing, and nothing may have two writers.
        names = [*self.seen, *self._seen_elsewhere]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ExportError(f"{some_of(repeated)}: arrived twice")
        seen = set(names)
        missing = [name for name in self._expected if name not in seen]
        if missing:
            raise ExportError(f"{len(missing)} of {len(self._expected)} tensors are missing: {some_of(missing, 8)}")
        # 2. A single shard needs no index; for several it says which tensor is where.
        if len(self._shards) == 1:
            return
        weight_map = {name: shard.file for shard in self._shards for name in shard.places}
        total_bytes = 0
        total_parameters = 0
        for shape, dtype in self._expected.values():
            numel = torch.Size(shape).numel()
            total_parameters += numel
            total_bytes += numel * dtype.itemsize
        index = {
            "metadata": {"total_size": total_bytes, "total_parameters": total_parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _start_to_sync(self) -> None:
        """Let the files go to the disk while the folder is proven; :meth:`finish` makes sure that they are there."""

        def sync() -> None:
            for shard in self._shards:
                with suppress(OSError):
                    _sync(self.staging / shard.file)

        Thread(target=sync, daemon=True).start()

    def finish(self) -> Path:
        """Rename the staging folder to its final name, replacing an earlier export, and return it."""
        for file in self.staging.rglob("*"):  # a network file system may report a full disk only here
            _sync(file)
        _sync(self.staging)
        replace_folder(self.staging, self.folder)
        os.close(self._lock_fd)
        return self.folder

    def discard(self) -> None:
        """Remove what was written so far."""
        self.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self._lock_fd)


@contextmanager
def _refusals_of_the_disk(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an ExportError."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {one_line(error)}") from error


def _lock(folder: Path) -> int:
    """Lock ``folder`` for this process, until the returned descriptor is closed or the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ExportError(f"{folder}: another export is writing there; wait for it or give a new folder") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def refuse_foreign_folder(folder: Path) -> None:
    """Raise :class:`ExportError` if writing to ``folder`` would destroy anything but an earlier HF export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file, not a folder")
    entries = sorted(folder.iterdir())
    foreign = [entry.name for entry in entries if not _is_of_an_export(entry)]
    if foreign or (entries and not (folder / "config.json").exists()):
        what = ""
        if foreign:
            what = f" (it holds {foreign[0]})"
        raise ExportError(f"{folder}: is not empty and is not an earlier export{what}; give a new folder")


def _is_of_an_export(entry: Path) -> bool:
    if entry.name == CARD_FILE:
        return is_our_card(entry)
    return bool(_WEIGHT_FILES.fullmatch(entry.name) or _COMPANIONS.fullmatch(entry.name))


def is_companion(name: str) -> bool:
    """Whether a file of this name may lie beside the weights: config, tokenizer, generation config."""
    return _COMPANIONS.fullmatch(name) is not None


def save_companions(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    tokenizer: Any | None = None,
    generation_config: Any | None = None,
) -> None:
    """Write config.json (with the dtype that the weights have), tokenizer and generation_config.json."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and generation config as they are: reading and saving a tokenizer can change its files."""
    for entry in sorted(source.iterdir()):
        if not _COMPANIONS.fullmatch(entry.name):
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copyfile(entry, folder / entry.name)
