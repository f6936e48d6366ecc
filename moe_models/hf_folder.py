"""Writing a Hugging Face model folder that is complete or absent, never half.

Tensors arrive one by one and leave in shards, so the writer holds one shard at most. Everything goes into a hidden
sibling folder first; :meth:`HFFolderWriter.finish` renames it only after every expected tensor has been seen once, with
its shape, its dtype and finite values.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""What ``save_pretrained`` used for years; hub pages and loaders are fine with it."""

INDEX_NAME = "model.safetensors.index.json"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ExportError(RuntimeError):
    """The folder cannot be completed; the message names every tensor that is at fault. Nothing was left behind."""


def parse_size(text: str) -> int:
    """Bytes in ``"5GB"`` (decimal) or ``"5GiB"`` (binary). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


class HFFolderWriter:
    """Collects hub-named tensors into ``folder`` as safetensors shards plus index.

    Args:
        folder: the final place; it must not exist, be empty, or hold an earlier export and nothing else.
        expected: hub name -> shape of every tensor that the finished folder must hold.
        max_shard_bytes: a shard is written when the next tensor would make it larger.

    Raises:
        ExportError: from ``__init__`` if ``folder`` holds something that is not an export; from :meth:`add` for an
            unknown, repeated, misshapen or non-finite tensor; from :meth:`finish` for missing ones.
    """

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, tuple[int, ...]],
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self._expected = dict(expected)
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = 0
        self._shard_files: list[tuple[str, list[str]]] = []
        self._seen: set[str] = set()
        self.total_bytes = 0
        self.total_parameters = 0
        refuse_foreign_folder(self.folder)
        self.staging = self.folder.with_name(f".{self.folder.name}.writing")
        if self.staging.exists():  # left by a crash: by construction nobody else writes there
            shutil.rmtree(self.staging)
        self.staging.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor (CPU, any stride). It must own its memory or be copied here: shards outlive the caller."""
        if name not in self._expected:
            raise ExportError(f"{name}: not a tensor of this model's Hugging Face checkpoint")
        if name in self._seen:
            raise ExportError(f"{name}: arrived twice")
        if tuple(tensor.shape) != tuple(self._expected[name]):
            raise ExportError(f"{name}: has shape {list(tensor.shape)}, expected {list(self._expected[name])}")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ExportError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
        nbytes = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + nbytes > self._max_shard_bytes:
            self._flush()
        self._seen.add(name)
        # A slice of a gathered tensor would keep the whole gathered tensor alive, so it is copied.
        owns_memory = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == nbytes
        self._shard[name] = tensor if owns_memory else tensor.contiguous().clone()
        self._shard_bytes += nbytes
        self.total_bytes += nbytes
        self.total_parameters += tensor.numel()

    def _flush(self) -> None:
        if not self._shard:
            return
        file = f"shard-{len(self._shard_files):05d}.safetensors"
        save_file(self._shard, self.staging / file, metadata={"format": "pt"})
        self._shard_files.append((file, list(self._shard)))
        self._shard, self._shard_bytes = {}, 0

    def close_weights(self) -> None:
        """Write the last shard and the index; raises :class:`ExportError` naming every tensor that never came."""
        missing = [name for name in self._expected if name not in self._seen]
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ExportError(f"{len(missing)} of {len(self._expected)} tensors are missing: {shown}")
        self._flush()
        count = len(self._shard_files)
        if count == 1:
            os.replace(self.staging / self._shard_files[0][0], self.staging / "model.safetensors")
            return
        weight_map = {}
        for i, (file, names) in enumerate(self._shard_files, start=1):
            final = f"model-{i:05d}-of-{count:05d}.safetensors"
            os.replace(self.staging / file, self.staging / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {
            "metadata": {"total_size": self.total_bytes, "total_parameters": self.total_parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def finish(self) -> Path:
        """Rename the staging folder to its final name, replacing an earlier export, and return it."""
        replace_folder(self.staging, self.folder)
        return self.folder

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.staging, ignore_errors=True)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise :class:`ExportError` if writing to ``folder`` would destroy anything but an earlier HF export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file, not a folder")
    entries = list(folder.iterdir())
    if entries and (any(entry.is_dir() for entry in entries) or not (folder / "config.json").exists()):
        raise ExportError(f"{folder}: is not empty and is not an earlier export; give a new folder")


def replace_folder(staging: Path, final: Path) -> None:
    """Give ``staging`` the name ``final``. Each state that a crash can leave holds at least one whole folder."""
    previous = final.with_name(f".{final.name}.previous")
    if previous.exists() and final.exists():
        shutil.rmtree(previous)
    if final.exists():
        os.replace(final, previous)
    os.replace(staging, final)
    shutil.rmtree(previous, ignore_errors=True)


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Module-layout name -> shape of every tensor a checkpoint of this config holds, in model order.

    Built on the meta device: no memory, no weights. Tied tensors appear once, as ``save_pretrained`` writes them.
    """
    from transformers import AutoModelForCausalLM

    with without_zero3(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers build whole models in here; in a ZeRO-3 run it would partition them over the ranks."""
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            hf_deepspeed.set_hf_deepspeed_config(reference())


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


def with_progress(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    """Report ``done`` of ``total`` tensors, if anybody listens."""
    if progress is not None:
        progress(done, total)
