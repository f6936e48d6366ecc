"""Safetensors files that are planned before they are written, so that several processes can write into them.

Names, shapes and dtypes of all tensors are known beforehand. So is, then, which file holds which tensor, and where:
:func:`plan_shards` says it, the same for every process that asks. Each tensor goes straight to its place, and nothing
is kept in memory. The bytes are those of safetensors' own ``save_file`` (``tests/checkpoint/test_shards.py``).

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, ...]
Expected = Mapping[str, tuple[Shape, torch.dtype]]
"""Name -> (shape, dtype)."""

# In the order in which safetensors lays them out: widest first.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    file: str
    header: bytes
    """What is before the tensors: their names, dtypes, shapes and places."""
    places: Mapping[str, int]
    """Tensor -> its first byte in the file."""
    size: int
    """Bytes of the whole file."""


def plan_shards(expected: Expected, max_bytes: int) -> list[Shard]:
    """The files that hold these tensors.

    Tensors fill one file after the other in the order of ``expected``. A file ends where the next tensor would make it
    larger than ``max_bytes``.
    """
    # 1. Which tensors are in one file.
    groups: list[list[str]] = [[]]
    filled = 0
    for name in expected:
        nbytes = _nbytes(expected, name)
        if groups[-1] and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    # 2. The files' names. A single one needs no number.
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    return [_shard(file, group, expected) for file, group in zip(names, groups, strict=True)]


def _nbytes(expected: Expected, name: str) -> int:
    shape, dtype = expected[name]
    return torch.Size(shape).numel() * dtype.itemsize


def _shard(file: str, names: Iterable[str], expected: Expected) -> Shard:
    # 1. safetensors lays tensors out by dtype, then by name: everything is aligned then.
    order = list(_DTYPES)
    laid_out = sorted(names, key=lambda name: (order.index(expected[name][1]), name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name in laid_out:
        shape, dtype = expected[name]
        after = first + _nbytes(expected, name)
        described[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [first, after]}
        first = after
    # 2. The header: its length in 8 bytes, then JSON, filled up with spaces to a multiple of 8.
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    # 3. Places are counted from the end of the header.
    places = {name: len(header) + described[name]["data_offsets"][0] for name in laid_out}
    return Shard(file, header, places, len(header) + first)


class ShardFiles:
    """Files of a plan in a folder, open for writing.

    Raises:
        OSError: from all methods, if the disk refuses.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard], *, create: bool) -> None:
        """``create``: make the files, in their full size and with their headers. Otherwise they must be there."""
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        flags = os.O_WRONLY
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        try:
            for shard in shards:
                descriptor = os.open(folder / shard.file, flags, 0o666)
                self._descriptors.append(descriptor)
                if create:
                    os.ftruncate(descriptor, shard.size)
                    _write_at(descriptor, memoryview(shard.header), 0)
                for name, place in shard.places.items():
                    self._places[name] = (descriptor, place)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor (CPU, any stride) into its place."""
        descriptor, place = self._places[name]
        content: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        _write_at(descriptor, memoryview(content), place)

    def close(self) -> None:
        """Close the files; what was written stays."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _write_at(descriptor: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, place)
        content = content[written:]
        place += written
