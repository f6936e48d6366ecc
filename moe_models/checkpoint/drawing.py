"""Random weights for a new model, drawn once per machine into a folder from which its ranks read their shares.

All layouts must start from the same numbers. A model draws them in its own order, each weight after the one before, so
one process draws them all, in exactly the way of ``from_config``. But its large tensors are in files that are mapped
into memory: the kernel can put them on disk, and host memory does not have to hold the model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from moe_models.checkpoint.hf_folder import INDEX_NAME, save_companions
from moe_models.engine.plain_transformers import without_zero3
from moe_models.errors import RunError
from moe_models.ranks import local_rank, rank

SHARD_BYTES = 500_000_000
"""Of the files that the drawn weights go to; one of them is in memory at a time."""
MAPPED_BYTES = 1 << 20
"""Tensors from this size on are in files while they are drawn."""


@contextmanager
def drawn_model(config: Any, seed: int, dtype: torch.dtype, attn_implementation: str | None) -> Iterator[Path]:
    """A folder with the weights of a new model, the same for the same seed in every layout; every rank must call it.

    The first rank of each machine draws them into the machine's temporary folder (``TMPDIR``). The folder is gone after
    the block; files that are open then can still be read.

    Raises:
        RunError: on every rank, if there is no room for the weights.
    """
    folder = ""
    problem = None
    if local_rank() == 0:
        try:
            folder = tempfile.mkdtemp(prefix="moe-recipes-drawn-")
            draw(Path(folder), config, seed, dtype, attn_implementation)
        except OSError as error:
            problem = (
                f"{folder or tempfile.gettempdir()}: no place for the new model's weights ({error.strerror or error}); "
                "set TMPDIR to a folder with twice the room"
            )
    found = _from_all((folder, problem))
    try:
        for _, told in found:
            if told is not None:
                raise RunError(told)
        own = found[rank() - local_rank()] if len(found) > 1 else found[0]
        yield Path(own[0])
        _from_all(None)  # every rank has opened its files
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _from_all(value: Any) -> list[Any]:
    """What each rank gives, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def draw(folder: Path, config: Any, seed: int, dtype: torch.dtype, attn_implementation: str | None) -> None:
    """Draw a model into ``folder``, under the names that it has in memory. Raises OSError if the disk is full."""
    from transformers import AutoModelForCausalLM, set_seed

    # 1. Draw. Under ZeRO-3 transformers would draw other numbers: the layout would change the model.
    set_seed(seed)
    with without_zero3(), MappedTensors(folder) as mapped:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    if rank() == 0:
        size = model.num_parameters() / 1e6
        print(f"model: {config.model_type}, {size:,.1f} million parameters, drawn with seed {seed}", flush=True)

    # 2. Shard by shard; what is written is needed no more.
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    weight_map: dict[str, str] = {}
    while tensors:
        shard: dict[str, torch.Tensor] = {}
        size = 0
        file = f"drawn-{len(weight_map):06d}.safetensors"
        for name, tensor in list(tensors.items()):
            nbytes = tensor.numel() * tensor.element_size()
            if shard and size + nbytes > SHARD_BYTES:
                break
            shard[name] = tensors.pop(name).contiguous()
            size += nbytes
        _save(shard, folder / file)
        mapped.drop(shard.values())
        weight_map |= dict.fromkeys(shard, file)
    mapped.drop_all()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_companions(folder, config, dtype)


def _save(shard: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors import SafetensorError

    try:
        save_file(shard, file, {"format": "pt"})
    except SafetensorError as error:  # it is no OSError, even for a full disk
        raise OSError(str(error)) from error


class MappedTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, ``torch.empty`` of a large tensor in host memory gives one whose memory is a file of ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder
        self._count = 0
        self._files: dict[int, Path] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            shape = args[0]
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            nbytes = prod(shape) * dtype.itemsize
            if nbytes >= MAPPED_BYTES:
                return self._mapped(shape, dtype, nbytes)
        return func(*args, **kwargs)

    def _mapped(self, shape: Any, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        path = self.folder / f"tensor-{self._count}"
        self._count += 1
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error here; later it would be a SIGBUS
        tensor = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
        self._files[tensor.untyped_storage().data_ptr()] = path
        return tensor.view(shape)

    def drop(self, tensors: Any) -> None:
        """Remove the files behind these tensors; their memory goes with the last reference."""
        for tensor in tensors:
            path = self._files.get(tensor.untyped_storage().data_ptr())
            if path is not None:
                path.unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Remove every file that is left: those of tied weights and of tensors that the model let go."""
        for path in self.folder.glob("tensor-*"):
            path.unlink()
