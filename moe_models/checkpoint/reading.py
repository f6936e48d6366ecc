"""Reading a model so that each rank takes from the files only what it keeps.

``from_pretrained`` does all that it always does: names, conversions, dtypes, ties, what is missing. But the tensors
that it handles are still on disk (``on_disk.py``). transformers stacks, joins and casts them, AutoEP and the native
layers take their experts out of them, and no value is read before something needs it.

What each rank reads, and when:

- A dense tensor, which every rank keeps: when ``from_pretrained`` is done, one by one, on a GPU straight to the device.
- Experts of a layout that spreads them: only this rank's, when AutoEP (inside ``deepspeed.initialize``) or the native
  layer (``engine/native.py``) takes them. Without such a section they are read like dense tensors.
- With pipeline stages the same of this rank's stage; the other layers are taken out before anything is read.
- Under ZeRO-3 this rank's partition of each tensor: its range of the flattened tensor, inside ``from_pretrained``.

Together the ranks of one expert-parallel group (of each stage) hold the checkpoint once, and not once each. Where that
cannot be done (:func:`why_ordinary`) every rank reads the whole model, and a line says so and what it costs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from moe_models.checkpoint.expected import keep_in_fp32
from moe_models.checkpoint.model_files import check_model_files, type_problems, weight_files
from moe_models.checkpoint.on_disk import TALLY, LazyFile, OnDisk, give_back
from moe_models.config.ds_config import DsConfig
from moe_models.engine.blocks import plain_parameter
from moe_models.engine.pipeline.cut import keep_stage
from moe_models.errors import RunError, UserError, one_line, some_of, warn
from moe_models.families.stages import stage_of
from moe_models.families.table import EXPERT_PROJECTIONS, FAMILIES, moe_blocks
from moe_models.ranks import rank, ranks_per_node, world_size

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What transformers and safetensors raise for files that they cannot use."""


def read_model(name: str, ds: DsConfig, *, dtype: torch.dtype, device: Any, **options: Any) -> Any:
    """A model from a folder or hub id, as ``AutoModelForCausalLM.from_pretrained`` makes it.

    Experts of a layout that spreads them are still on disk afterwards. :func:`refuse_unread` makes sure that nothing
    is when the engine is there.

    Args:
        name: folder or hub id.
        ds: the run's JSON.
        dtype: of the weights.
        device: where this rank trains.
        options: of ``from_pretrained``.

    Raises:
        UserError: if files are missing or damaged, or weights are missing or of another shape.
        RunError: if the disk fails while weights are read.
    """
    import moe_models.prmoe  # noqa: F401 (for AutoConfig and AutoModelForCausalLM)

    try:
        from transformers import AutoConfig

        config = options.get("config") or AutoConfig.from_pretrained(name, revision=options.get("revision"))
        keep_in_fp32(config)
        quantized = getattr(config, "quantization_config", None) is not None
        if Path(name).is_dir():
            check_model_files(Path(name), quantized=quantized)
        why = why_ordinary(ds, name, quantized=quantized)
        if why is None:
            model = _read_own_share(name, ds, config, dtype, device, options)
        else:
            warn([ordinary_warning(name, why)], rank=rank())
            model = _from_pretrained(name, dtype, options)
    except (UserError, RunError):
        raise
    except UNREADABLE as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    return model


def _from_pretrained(name: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The model. Raises UserError for weights that are missing or misshapen: transformers fills them at random."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, all of them by name
        **options,
    )
    mismatched = [weight for weight, *_ in loading["mismatched_keys"]]
    absent = sorted({*loading["missing_keys"], *mismatched})
    if absent:
        raise UserError(
            f"{name}: {len(absent)} weights are missing or incomplete ({', '.join(absent[:4])}); give the whole model"
        )
    return model


# --------------------------------------------------------------------------------------------- where it cannot be done


def why_ordinary(ds: DsConfig, name: str, *, quantized: bool = False) -> str | None:
    """Why every rank has to read the whole model; None where each reads its own share."""
    # 1. The model.
    if quantized:
        return "its weights are quantized (quantization_config)"
    folder = Path(name)
    if folder.is_dir() and not weight_files(folder):
        return "it has no safetensors files; model.save_pretrained writes them"
    # 2. ZeRO-3 with partitions that are not plain ranges of the tensor.
    return ds.odd_partitions


def ordinary_warning(name: str, why: str) -> str:
    """One line: that every rank reads everything, what it costs and why."""
    ranks = ranks_per_node()
    files = [file for file in Path(name).glob("*") if file.suffix in (".safetensors", ".bin")]
    size = sum(file.stat().st_size for file in files)
    cost = f"{ranks} x {size / 1e9:,.2f} GB" if size else f"{ranks} times its size"
    return f"{name}: each rank reads the whole model ({cost} of host memory here) instead of its own share: {why}"


# ------------------------------------------------------------------------------------------------- each its own share


def _read_own_share(
    name: str, ds: DsConfig, config: Any, dtype: torch.dtype, device: Any, options: dict[str, Any]
) -> Any:
    """The model with everything that this rank keeps; experts that will be spread are still on disk."""
    experts = set(expert_parameters(config)) if ds.spreads_experts else set()
    with nothing_read(experts), reading_bar():
        model = _from_pretrained(name, dtype, options)
        if ds.pp_size > 1:
            keep_stage(model, stage_of(config.to_dict(), ds.pp_size, rank(), world_size()))
        read_dense(model, experts, device)
    return model


def expert_parameters(config: Any) -> Iterator[str]:
    """Names of the tensors that hold a model's experts, as transformers holds them."""
    config = config.get_text_config()  # of a multimodal model the language model is trained
    family = FAMILIES[config.model_type]
    for path in moe_blocks(family, config.to_dict()):
        for projection in EXPERT_PROJECTIONS:
            yield plain_parameter(path, projection)


# upstream: transformers 5.20.2: from_pretrained reads every tensor of every file on every rank, and with ZeRO-3 merges
# all files in memory first; its own sharded reading would cut experts that AutoEP then cuts a second time. Remove when:
# from_pretrained takes a reader, or reads partitions and expert ranges by itself.
@contextmanager
def nothing_read(experts: set[str]) -> Iterator[None]:
    """Inside, ``from_pretrained`` makes models of tensors that are still on disk.

    Under ZeRO-3 it fills partitions; only ``experts`` stay on disk there.
    """
    from transformers import modeling_utils
    from transformers.utils import logging

    def fill(model: Any, state_dict: Any, load_config: Any = None) -> Any:
        return fill_partitions(model, state_dict, load_config, experts)

    before = {name: getattr(modeling_utils, name) for name in ("safe_open", "_load_state_dict_into_zero3_model")}
    modeling_utils.safe_open = _open_unread
    modeling_utils._load_state_dict_into_zero3_model = fill
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it counts tensors, and would be full before one is read
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        for name, value in before.items():
            setattr(modeling_utils, name, value)


def _open_unread(path: Any, *args: Any, **options: Any) -> LazyFile:
    file = LazyFile(path, *args, **options)
    problems = list(type_problems(path, file.stored))
    if problems:
        raise UserError(problems)
    return file


@torch.no_grad()
def read_dense(model: nn.Module, experts: set[str], device: Any) -> None:
    """Read every tensor of ``model`` that is still on disk, but for ``experts``; those claim to be on ``device``."""
    unread = unread_tensors(model)
    TALLY.expected += sum(tensor.stored_bytes for name, tensor in unread.items() if name not in experts)
    read: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if not isinstance(parameter, OnDisk):
                continue
            # A tied parameter has two names and is read once.
            if id(parameter) not in read:
                value: torch.Tensor = parameter.placed(device)
                if f"{path}.{key}" not in experts:
                    value = parameter.placed(device).read()
                read[id(parameter)] = _parameter(value, parameter.requires_grad)
            module._parameters[key] = read[id(parameter)]
        for key, buffer in module._buffers.items():
            if isinstance(buffer, OnDisk):
                module._buffers[key] = buffer.placed(device).read()
    give_back()


def _parameter(value: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=requires_grad)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers draws it anew
    return parameter


@torch.no_grad()
def fill_partitions(model: Any, state_dict: Any, load_config: Any, experts: set[str]) -> tuple[list[str], set[str]]:
    """In place of transformers' loader for ZeRO-3: each rank reads its own partition of each tensor.

    ``experts`` become parameters that are on disk and know nothing of ZeRO; AutoEP takes its own out of them and has
    them partitioned.

    Returns (no error messages, names of the tensors that are missing or have another shape).
    """
    from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

    # 1. The tensors under the model's own names.
    tensors = dict(state_dict)
    if load_config.weight_mapping:
        tensors = _apply_weight_conversions_to_state_dict(model, tensors, load_config.weight_mapping)
    missing = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."  # the checkpoint may be that of the model without its head
    tensors = {prefix + name if prefix + name in missing else name: tensor for name, tensor in tensors.items()}
    # The experts of AutoEP are counted when it comes to them.
    held_now = dict(model.named_parameters())
    for name in (held_now.keys() & tensors.keys()) - experts:
        TALLY.expected += _share_bytes(held_now[name], tensors[name])

    # 2. This rank's range of each.
    for name, tensor in tensors.items():
        if name not in missing:
            continue
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        held = module._parameters.get(key)
        if held is None:
            held = module._buffers[key]
        if tuple(tensor.shape) != tuple(getattr(held, "ds_shape", held.shape)):
            continue
        missing.discard(name)
        if not hasattr(held, "ds_tensor"):
            held.copy_(tensor)
            held._is_hf_initialized = True
        elif name in experts:
            module._parameters[key] = _unpartitioned(held, tensor)
        else:
            _read_partition(held, tensor)
            held._is_hf_initialized = True
    gc.collect()  # partitions of replaced experts are in reference cycles
    give_back()
    return [], missing


def _share_bytes(parameter: Any, tensor: torch.Tensor) -> int:
    """Bytes of the files that this rank's partition of ``parameter`` takes."""
    if not isinstance(tensor, OnDisk) or not hasattr(parameter, "ds_tensor"):
        return 0
    return int(tensor.stored_bytes * parameter.ds_tensor.ds_numel / max(1, parameter.ds_numel))


def _unpartitioned(held: Any, tensor: torch.Tensor) -> nn.Parameter:
    """What takes the place of ZeRO-3's parameter of experts: on disk, and claiming to be where the partition was."""
    placed = tensor.to(dtype=held.dtype)
    if isinstance(placed, OnDisk):
        placed = placed.placed(held.device)
    held.ds_tensor.data = torch.empty(0, dtype=held.dtype)  # its reference cycles would keep it for a while
    return _parameter(placed, held.requires_grad)


def _read_partition(held: Any, tensor: torch.Tensor) -> None:
    """Read this rank's range of ``tensor``; the last partition is longer than what is left of it."""
    partition = held.ds_tensor
    start = partition.ds_numel * dist.get_rank(held.ds_process_group)
    count = min(partition.ds_numel, held.ds_numel - start)
    if count <= 0:
        return
    out = partition.narrow(0, 0, count)
    if isinstance(tensor, OnDisk):
        tensor.placed(out.device, held.dtype).read_range(out, start)
    else:  # transformers had to compute it
        out.copy_(tensor.reshape(-1)[start : start + count])


# --------------------------------------------------------------------------------------------- afterwards: is all read?


def unread_tensors(model: nn.Module) -> dict[str, OnDisk]:
    """The tensors of ``model`` that are still on disk, by name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in tensors if isinstance(tensor, OnDisk)}


def refuse_unread(model: nn.Module) -> None:
    """Raise RunError if a tensor is still on disk: nothing would train it, and the export would have its old values."""
    names = list(unread_tensors(model))
    if names:
        raise RunError(
            f"{len(names)} tensors of the model were never read ({some_of(names)}): no part of the layout took them, "
            "they would not be trained; nothing was written. Please report it with the ds_config JSON"
        )


@contextmanager
def reading_bar(model: nn.Module | None = None, share: float = 1.0) -> Iterator[None]:
    """Inside, rank 0 shows how much of its share is read, and how fast.

    ``model``: its tensors that are still on disk are expected to be read inside, by this rank a ``share`` of them.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    if model is not None:
        TALLY.expected += int(share * sum(tensor.stored_bytes for tensor in unread_tensors(model).values()))
    columns = (TextColumn("reading the model"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=rank() != 0, transient=True) as bar:
        task = bar.add_task("", total=None)
        TALLY.on_progress = lambda: bar.update(task, completed=TALLY.bytes, total=max(TALLY.expected, TALLY.bytes))
        try:
            yield
        finally:
            TALLY.on_progress = None


def report_reading() -> None:
    """One line on rank 0: what it read and how fast. Starts to count anew."""
    if rank() == 0 and TALLY.bytes:
        from rich.filesize import decimal

        speed = int(TALLY.bytes / max(TALLY.seconds, 1e-3))
        print(f"model: rank 0 read {decimal(TALLY.bytes)} in {TALLY.seconds:,.1f} s ({decimal(speed)}/s)", flush=True)
    TALLY.bytes = 0
    TALLY.expected = 0
    TALLY.seconds = 0.0
