"""Tensors that are still in their safetensors file, and a file that hands them out.

An :class:`OnDisk` tensor has a shape, a dtype and a device, and instead of values it knows where in which files its
values are. Cutting it, stacking it, joining it with others and casting it read nothing: the result is another
:class:`OnDisk`. What needs values (``clone``, ``copy_``, arithmetic) reads exactly the bytes it needs, by ``preadv``
straight into the memory where they stay.

:class:`LazyFile` is what transformers uses of ``safetensors.safe_open``, with such tensors.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_models.checkpoint.threads import each
from moe_models.errors import RunError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""What a safetensors header calls a dtype."""
CHUNK_BYTES = 32 << 20
"""Bytes of one read. A GPU's tensor passes through host memory in pieces of this size."""
MOST_RUNS = 1 << 15
"""A join that would break a tensor into more pieces than this reads it instead."""
LARGE_BYTES = 1 << 20
"""From this size on a read is worth asking the allocator for what earlier layers left behind."""


class ReadError(RunError):
    """A file of the model could not be read where its header says that there are values."""


@dataclass
class Tally:
    """What this rank has read so far."""

    bytes: int = 0
    expected: int = 0
    """What it will have read in the end, as far as it is known."""
    seconds: float = 0.0
    """In which at least one read was going on."""
    on_progress: Callable[[], None] | None = None
    """Called after each read, from the reading threads."""
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def add(self, count: int) -> None:
        """Note ``count`` bytes that arrived."""
        with self._lock:
            self.bytes += count
        if self.on_progress is not None:
            self.on_progress()


TALLY = Tally()


# ------------------------------------------------------------------------------------------------------ runs of values


class _File:
    """An open file. It is closed with the last tensor that is in it, and may be unlinked before."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if "descriptor" in self.__dict__:
            close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` values that follow each other in a file."""

    file: _File
    offset: int
    """Byte at which the first one begins."""
    dtype: torch.dtype
    count: int

    def part(self, start: int, stop: int) -> Run:
        """Values [start, stop)."""
        return replace(self, offset=self.offset + start * self.dtype.itemsize, count=stop - start)


def cut(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """Values [start, stop) of the concatenation of ``runs``."""
    found = []
    at = 0
    for run in runs:
        first = max(start - at, 0)
        last = min(stop - at, run.count)
        if first < last:
            found.append(run.part(first, last))
        at += run.count
        if at >= stop:
            break
    return found


def _fill(out: torch.Tensor, runs: Sequence[Run]) -> None:
    """Read ``runs`` into ``out``, one-dimensional and contiguous; its dtype may be another than that in the file."""
    # 1. Pieces of one read each, and where each goes.
    pieces: list[tuple[torch.Tensor, Run]] = []
    at = 0
    for run in runs:
        step = max(1, CHUNK_BYTES // run.dtype.itemsize)
        for start in range(0, run.count, step):
            piece = run.part(start, min(start + step, run.count))
            pieces.append((out[at : at + piece.count], piece))
            at += piece.count
    # 2. Several at a time.
    began = time.perf_counter()
    each(lambda piece: _read_piece(*piece), pieces)
    TALLY.seconds += time.perf_counter() - began


def _read_piece(out: torch.Tensor, run: Run) -> None:
    """One read, straight into ``out`` where it is in host memory and of the stored dtype."""
    straight = out.device.type == "cpu" and out.dtype == run.dtype
    target = out if straight else torch.empty(run.count, dtype=run.dtype)
    memory = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    try:
        while done < len(memory):
            count = os.preadv(run.file.descriptor, [memory[done:]], run.offset + done)
            if count == 0:
                raise ReadError(
                    f"{run.file.path}: ends before its header says; it was cut or replaced while it was read. Download "
                    "or copy the model again"
                )
            done += count
    except OSError as error:
        raise ReadError(
            f"{run.file.path}: cannot be read at byte {run.offset + done} ({error.strerror or error}); look at the "
            "disk or copy the model again"
        ) from error
    TALLY.add(done)
    if not straight:
        out.copy_(target)


# upstream: glibc: memory of freed tensors below 32 MB stays with the process, in holes that the next layer's tensors do
# not fit; reading 8 layers leaves half a checkpoint behind. Remove when: torch's CPU allocator gives it back.
@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none


def give_back() -> None:
    """Return freed host memory to the system."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


# -------------------------------------------------------------------------------------------------- the tensor on disk


class OnDisk(torch.Tensor):
    """A tensor that has not been read yet; ``runs`` are its values in the order of the flattened tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    runs: list[Run]

    @staticmethod
    def __new__(cls, runs: list[Run], shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> OnDisk:
        """A tensor whose flattened values are ``runs``, one after the other."""
        tensor: OnDisk = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device(device)
        )
        tensor.runs = runs
        return tensor

    def like(self, runs: list[Run], shape: Sequence[int]) -> OnDisk:
        """Other values, of the same dtype and device."""
        return OnDisk(runs, shape, self.dtype, self.device)

    def placed(self, device: Any, dtype: torch.dtype | None = None) -> OnDisk:
        """The same values for another device, or of another dtype."""
        return OnDisk(self.runs, self.shape, dtype or self.dtype, device)

    @property
    def stored_bytes(self) -> int:
        """Bytes that its values take in their files."""
        return sum(run.count * run.dtype.itemsize for run in self.runs)

    def read(self) -> torch.Tensor:
        """The values, on the device where this tensor claims to be."""
        if self.numel() * self.itemsize >= LARGE_BYTES:
            give_back()
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        _fill(out.view(-1), self.runs)
        return out

    def read_into(self, out: torch.Tensor) -> None:
        """``out.copy_(self.read())``, without the copy where none is needed."""
        if out.shape == self.shape and out.dtype == self.dtype and out.is_contiguous():
            _fill(out.detach().view(-1), self.runs)
        else:
            out.copy_(self.read())

    def read_range(self, out: torch.Tensor, start: int) -> None:
        """Fill ``out``, one-dimensional, with the values from ``start`` on of the flattened tensor."""
        wanted = self.like(cut(self.runs, start, start + out.numel()), [out.numel()])
        wanted.read_into(out)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDisk({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # 1. Without values, where that works.
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # 2. Nothing can be written into a tensor that is on disk.
        if func._schema.is_mutable and isinstance(args[0], OnDisk):
            raise RuntimeError(f"{func} of a tensor that is still on disk")
        # 3. Read, and do it with values.
        return func(*_with_values(args), **{key: _with_values(value) for key, value in kwargs.items()})


def _with_values(value: Any) -> Any:
    if isinstance(value, OnDisk):
        return value.read()
    if isinstance(value, list | tuple):
        return type(value)(_with_values(item) for item in value)
    return value


# Handlers of torch's operations. NotImplemented: this case needs values.


def _same(x: OnDisk, *_: Any, **__: Any) -> OnDisk:
    return x.like(x.runs, x.shape)


def _cast(x: OnDisk, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    if device is not None and torch.device(device) != x.device:
        return NotImplemented
    return x.placed(x.device, dtype)


def _clone(x: OnDisk, **_: Any) -> torch.Tensor:
    return x.read()


def _copy(out: Any, x: Any, *_: Any) -> Any:
    if isinstance(out, OnDisk) or not isinstance(x, OnDisk):
        return NotImplemented
    if out.shape != x.shape:
        return NotImplemented
    x.read_into(out)
    return out


def _slice(x: OnDisk, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % x.ndim != 0 or step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(x.shape[0])
    last = max(first, last)
    each = prod(x.shape[1:])
    return x.like(cut(x.runs, first * each, last * each), (last - first, *x.shape[1:]))


def _select(x: OnDisk, dim: int, index: int) -> Any:
    if dim % x.ndim != 0:
        return NotImplemented
    each = prod(x.shape[1:])
    first = index % x.shape[0] * each
    return x.like(cut(x.runs, first, first + each), x.shape[1:])


def _split(x: OnDisk, size: int, dim: int = 0) -> Any:
    if dim % x.ndim != 0:
        return NotImplemented
    return [_slice(x, 0, start, start + size) for start in range(0, x.shape[0], size)]


def _alike(xs: Sequence[Any]) -> bool:
    """Whether all are on disk, and of one dtype, device and number of dimensions."""
    if not all(isinstance(x, OnDisk) for x in xs):
        return False
    return len({(x.dtype, x.device, x.ndim) for x in xs}) == 1


def _stack(xs: Sequence[Any], dim: int = 0) -> Any:
    if dim != 0 or not _alike(xs) or len({x.shape for x in xs}) > 1:
        return NotImplemented
    return xs[0].like([run for x in xs for run in x.runs], (len(xs), *xs[0].shape))


def _cat(xs: Sequence[Any], dim: int = 0) -> Any:
    # 1. All dimensions but one must agree.
    if not _alike(xs):
        return NotImplemented
    dim %= xs[0].ndim
    before = xs[0].shape[:dim]
    after = xs[0].shape[dim + 1 :]
    if any(x.shape[:dim] != before or x.shape[dim + 1 :] != after for x in xs):
        return NotImplemented
    if prod(before) * len(xs) > MOST_RUNS:
        return NotImplemented
    # 2. One stretch of each tensor after the other, for each index of the dimensions before.
    runs = []
    for index in range(prod(before)):
        for x in xs:
            stretch = prod(x.shape[dim:])
            runs += cut(x.runs, index * stretch, (index + 1) * stretch)
    return xs[0].like(runs, (*before, sum(x.shape[dim] for x in xs), *after))


_ATEN = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
    _ATEN._to_copy.default: _cast,
    _ATEN.clone.default: _clone,
    _ATEN.copy_.default: _copy,
    _ATEN.slice.Tensor: _slice,
    _ATEN.select.int: _select,
    _ATEN.split.Tensor: _split,
    _ATEN.stack.default: _stack,
    _ATEN.cat.default: _cat,
}


# ---------------------------------------------------------------------------------------------------- the file of them


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Byte of the file at which its values begin."""


def read_header(path: str | Path) -> dict[str, Stored]:
    """Name -> what the header of a safetensors file says of it.

    Raises SafetensorError or OSError, in safetensors' own words, for a file that is damaged, cut or none.
    """
    with safe_open(path, "pt"):  # checks the header, and that the file is as long as it says
        pass
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for name, about in header.items()
    }


class LazyFile:
    """What transformers uses of ``safetensors.safe_open``, with tensors that are not read."""

    def __init__(self, path: str | Path, framework: str = "pt", device: Any = "cpu", **_: Any) -> None:
        with safe_open(path, framework) as shard:
            self._metadata = shard.metadata()
        self.stored = read_header(path)
        """What the header says of each tensor."""
        self._file = _File(str(path))

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.stored)

    def metadata(self) -> Any:
        """What the header says beside them."""
        return self._metadata

    def get_tensor(self, name: str) -> OnDisk:
        """One tensor, not read."""
        stored = self.stored[name]
        dtype = DTYPES[stored.dtype]
        run = Run(self._file, stored.offset, dtype, prod(stored.shape))
        return OnDisk([run] if run.count else [], stored.shape, dtype)

    get_slice = get_tensor

    def __enter__(self) -> LazyFile:
        return self

    def __exit__(self, *_: Any) -> None:
        """The file stays open as long as tensors are in it."""
