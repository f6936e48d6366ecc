"""A model whose tensors are still in their safetensors files, and one part of it after the other in memory.

``from_pretrained`` runs as it does for any user. It decides which tensors of the files become which parameters, and
with its own code: renames, stacking of experts, casts, ties, the report of missing keys. Only the values come later.
What it does to an :class:`Unread` tensor is written down, and torch does exactly that when the values are asked for.

:class:`OnePartAtATime` asks for them: when a decoder layer (or the embedding, the last norm, the head) is about to
compute, it gets its parameters, and afterwards it loses them again. A parameter that is used at any other moment is an
error, never an old or an empty value.

The files are read by safetensors' own reader. Nothing here knows their format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from torch.utils import _pytree as pytree


class Unread(torch.Tensor):
    """A tensor without values: its shape, its dtype, and how to get it.

    Functions of torch that are applied to it while a model is loaded give another one. What would need values, or
    change them, raises RuntimeError.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    get: Callable[[], torch.Tensor]
    on_meta: torch.Tensor

    @staticmethod
    def __new__(cls, get: Callable[[], torch.Tensor], meta: torch.Tensor) -> Unread:
        """``get`` returns the values; ``meta`` is a tensor of the same shape and dtype on the meta device."""
        tensor: Unread = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, dtype=meta.dtype, device=torch.device("cpu")
        )
        tensor.get = get
        tensor.on_meta = meta
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Unread({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub leaves out cls
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _loading:
            raise RuntimeError(f"{function} of a tensor that is not read: it was used outside of its part of the model")
        # 1. What comes out, without values. A mutable argument of an operation would be one that changes its values.
        if function._schema.is_mutable:
            raise RuntimeError(f"{function} would change a tensor that is not read")
        meta_kwargs = dict(kwargs)
        if meta_kwargs.get("device") is not None:
            meta_kwargs["device"] = torch.device("meta")
        meta_args, meta_kwargs = pytree.tree_map_only(Unread, lambda unread: unread.on_meta, (args, meta_kwargs))
        meta = function(*meta_args, **meta_kwargs)
        if not isinstance(meta, torch.Tensor):
            raise RuntimeError(f"{function} of a tensor that is not read gives no tensor")

        # 2. The same with values, later.
        def get() -> torch.Tensor:
            read_args, read_kwargs = pytree.tree_map_only(Unread, lambda unread: unread.get(), (args, kwargs))
            result: torch.Tensor = function(*read_args, **read_kwargs)
            return result

        return Unread(get, meta)


_loading: list[bool] = []
"""Not empty while :func:`unread_tensors` is active."""


class _UnreadFile:
    """What transformers uses of ``safetensors.safe_open``. The file is opened when something is asked of it."""

    mapped: ClassVar[set[_UnreadFile]] = set()
    """Those that are open. safetensors maps a file whole, and the pages that were read count as this process's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open = partial(safe_open, *args, **kwargs)
        self._file: Any = None

    @property
    def file(self) -> Any:
        """safetensors' own reader."""
        if self._file is None:
            self._file = self._open()
            self.mapped.add(self)
        return self._file

    @classmethod
    def unmap_all(cls) -> None:
        """Close the files; tensors that are still used keep their mapping."""
        for unread in cls.mapped:
            unread._file = None
        cls.mapped.clear()

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.file.keys())

    def metadata(self) -> Any:
        """The strings beside the tensors."""
        return self.file.metadata()

    def get_tensor(self, name: str) -> Unread:
        """One tensor. safetensors maps the file, so that its shape costs no memory."""
        return Unread(lambda: self.file.get_tensor(name), self.file.get_tensor(name).to("meta"))

    get_slice = get_tensor

    def __enter__(self) -> _UnreadFile:
        return self

    def __exit__(self, *_: Any) -> None:
        """The tensors are read later."""


# upstream: transformers 5.20.2: from_pretrained reads every tensor at once; what it can leave on the disk ("offload")
# is written there a second time first. Remove when: a model can be built over files that are read when it computes.
@contextmanager
def unread_tensors() -> Iterator[None]:
    """Inside, ``from_pretrained`` builds models of :class:`Unread` tensors."""
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    modeling_utils.safe_open = _UnreadFile
    _loading.append(True)
    try:
        yield
    finally:
        _loading.pop()
        modeling_utils.safe_open = before


class OnePartAtATime:
    """Lets each part of ``model`` have its values only while it computes.

    A part is a child of an ``nn.ModuleList`` (a decoder layer), or any other module that has parameters of its own
    (embedding, last norm, head). Buffers are read at once: they are small.

    Args:
        model: built inside :func:`unread_tensors`.
        seen: called with (name, values) once for every parameter and saved buffer, with the values that compute.
    """

    def __init__(self, model: nn.Module, seen: Callable[[str, torch.Tensor], None]) -> None:
        self._seen = seen
        self._names_seen: set[str] = set()
        self._parts: dict[str, nn.Module] = {}
        # Of each part that has its values: what to put back.
        self._unread: dict[str, list[tuple[nn.Module, str, Any]]] = {}
        # 1. Buffers. Those that are computed from the config are there already, and are not saved.
        saved = set(model.state_dict(keep_vars=True))  # or each would be detached
        for path, module in model.named_modules():
            for key, buffer in list(module._buffers.items()):
                if isinstance(buffer, Unread):
                    module._buffers[key] = buffer.get()
                name = _joined(path, key)
                if name in saved:
                    self._show(name, module._buffers[key])
        # 2. The parts read their parameters before they compute, and drop them afterwards.
        for path, part in _parts_of(model, ""):
            self._parts[path] = part
            part.register_forward_pre_hook(lambda module, inputs, path=path: self.read(path))
            part.register_forward_hook(lambda module, inputs, output, path=path: self.drop(path))

    def read(self, path: str) -> None:
        """Give the part its values."""
        unread = []
        for below, module in self._parts[path].named_modules():
            for key, parameter in list(module._parameters.items()):
                if isinstance(parameter, Unread):
                    values = parameter.get()
                    module._parameters[key] = nn.Parameter(values, requires_grad=False)
                    unread.append((module, key, parameter))
                    self._show(_joined(path, below, key), values)
        self._unread[path] = unread

    def drop(self, path: str) -> None:
        """Take them away again."""
        for module, key, parameter in self._unread.pop(path):
            module._parameters[key] = parameter
        _UnreadFile.unmap_all()

    def read_the_rest(self) -> None:
        """Show what no forward pass has used."""
        for path, part in self._parts.items():
            names = {_joined(path, name) for name, _ in part.named_parameters()}
            if names - self._names_seen:
                self.read(path)
                self.drop(path)

    def _show(self, name: str, values: Any) -> None:
        if name not in self._names_seen:
            self._names_seen.add(name)
            self._seen(name, values)


def _parts_of(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model, by path."""
    for name, child in module.named_children():
        below = _joined(path, name)
        alone = isinstance(module, nn.ModuleList) or any(True for _ in child.parameters(recurse=False))
        if alone:
            yield below, child
        else:
            yield from _parts_of(child, below)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
