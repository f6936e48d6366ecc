"""The way back: from a DeepSpeed engine, or from a DeepSpeed checkpoint folder, to a Hugging Face folder.

DeepSpeed spreads the experts over ranks (AutoEP) and every tensor over partitions (ZeRO). Two sources, a live engine
(``from_engine.py``) and a saved checkpoint (``from_folder.py``), answer the same two questions, tensor by
tensor and in the model's own order:

- ``dense(name)``: a replicated tensor by its module name;
- ``experts(block, projection)``: all experts of one block and projection, [E, F, D] (gate, up) or [E, D, F] (down).

:func:`export` asks them for every tensor that the model must have, gives each its hub name and hands it to an
:class:`~moe_models.checkpoint.hf_folder.HFFolderWriter`, which refuses to finish unless nothing is missing. A source
that still has tensors that nobody asked for is refused as well.

Memory: the writing rank holds one tensor of one layer in host memory (for experts: one projection of all E, or HF's own
fused pair), and one shard; on its device no more than another rank's share. The others hold one tensor at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import moe_models.prmoe  # noqa: F401 (its class, for AutoConfig and AutoModelForCausalLM)
from moe_models.checkpoint.expected import expected_tensors, kept_in_fp32, tied_names
from moe_models.checkpoint.hf_folder import (
    DEFAULT_MAX_SHARD_BYTES,
    ExportError,
    HFFolderWriter,
    copy_companions,
    save_companions,
)
from moe_models.checkpoint.source import TensorSource, is_writer
from moe_models.errors import UserError
from moe_models.families.table import Family

T = TypeVar("T")

HEARTBEAT_SECONDS = 20.0
"""How often waiting ranks hear from the writer; collectives that wait for half an hour are taken for dead."""


def hub_plan(family: Family, config: Any) -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    """What to write, in model order: (kind, module name or ``block/projection``, hub name -> shape).

    ``kind`` is ``dense`` or ``experts``; an ``experts`` entry covers one projection of all experts of a block.
    """
    plan: list[tuple[str, str, dict[str, tuple[int, ...]]]] = []
    projections: tuple[str, ...]
    expert_shape: tuple[int, ...]
    for name, shape in expected_tensors(config).items():
        if name.endswith(".experts.gate_up_proj"):
            E, twice_F, D = shape
            block = name.removesuffix(".experts.gate_up_proj")
            projections, expert_shape = ("gate", "up"), (twice_F // 2, D)
        elif name.endswith(".experts.down_proj"):
            E, *rest = shape
            block = name.removesuffix(".experts.down_proj")
            projections, expert_shape = ("down",), tuple(rest)
        else:
            plan.append(("dense", name, {family.module_to_hub(name): shape}))
            continue
        for projection in projections:
            hub = {family.hub_expert(block, e, projection): expert_shape for e in range(E)}
            plan.append(("experts", f"{block}/{projection}", hub))
    return plan


def hub_tensors(source: TensorSource, kind: str, name: str, hub: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of one entry of :func:`hub_plan` under their hub names; empty where this rank only helps."""
    try:
        if kind == "dense":
            tensor = source.dense(name)
            return {} if tensor is None else dict.fromkeys(hub, tensor)
        block, projection = name.split("/")
        stacked = source.experts(block, projection)
    except KeyError:
        raise ExportError(f"{name}: config.json asks for this tensor, but the trained model does not have it") from None
    if stacked is None:
        return {}
    if stacked.shape[0] != len(hub):
        raise ExportError(f"{block}: {stacked.shape[0]} experts arrived, the model has {len(hub)}")
    return dict(zip(hub, stacked.unbind(0), strict=True))


def export(
    source: TensorSource,
    family: Family,
    config: Any,
    folder: Path,
    *,
    tokenizer: Any | None = None,
    generation_config: Any | None = None,
    companions: Path | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``source`` as a Hugging Face folder in the hub's layout; all or nothing.

    Args:
        source: an ``EngineSource`` (call on every rank) or a ``FolderSource`` (one process).
        family: the model's row of :data:`~moe_models.families.table.FAMILIES`.
        config: the HF config to write.
        folder: where the finished folder appears, by rename.
        tokenizer: saved beside the weights if given.
        generation_config: likewise.
        companions: a folder whose config, tokenizer and generation config are copied as they are, instead.
        max_shard_bytes: largest safetensors file.
        progress: called with (tensors done, tensors in all) on the writing rank.
        prove: called with the staged folder on the writing rank before the rename; what it raises stops the export.

    Raises:
        ExportError: on every rank, with the reason; the folder that was there before is untouched.
    """
    plan = hub_plan(family, config)
    fp32 = kept_in_fp32(config)
    expected = {
        name: (shape, torch.float32 if fp32 and fp32.search(name) else source.dtype)
        for _, _, hub in plan
        for name, shape in hub.items()
    }
    writer = _together(lambda: HFFolderWriter(folder, expected, max_shard_bytes) if is_writer() else None)
    done = 0

    def move(kind: str, name: str, hub: dict[str, tuple[int, ...]]) -> None:
        nonlocal done
        tensors = hub_tensors(source, kind, name, hub)
        if writer is not None:
            for hub_name, tensor in tensors.items():
                writer.add(hub_name, tensor)
            done += len(tensors)
            if progress is not None:
                progress(done, len(expected))

    def finish() -> None:
        left = [name for name in source.unasked() if name not in tied_names(config)]
        if left:
            raise ExportError(f"{len(left)} trained tensors have no place in this model's checkpoint: {left[:4]}")
        if writer is not None:
            writer.close_weights()
            if companions is not None:
                copy_companions(companions, writer.staging)
            else:
                save_companions(
                    writer.staging, config, source.dtype, tokenizer=tokenizer, generation_config=generation_config
                )
            if prove is not None:
                prove(writer.staging)
            writer.finish()

    try:
        for entry in plan:  # ranks agree after every entry: the writer may fail where the others cannot see it
            _together(partial(move, *entry))
        _together(finish, slow=True)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    return Path(folder)


def _together(action: Callable[[], T], *, slow: bool = False) -> T:
    """Run ``action`` on every rank; if it failed on any of them, raise ExportError on all, so that none goes on alone.

    ``slow``: rank 0 may take longer than the timeout of a collective (it reloads the whole model), so it works in a
    thread and tells the others now and then that it is alive.
    """
    outcome: list[T] = []
    problem: list[Exception] = []

    def attempt() -> None:
        try:
            with torch.no_grad():  # in here: grad mode belongs to the thread
                outcome.append(action())
        except Exception as error:
            problem.append(error)

    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if slow and distributed:
        _with_heartbeat(attempt)
    else:
        attempt()
    text = None
    if problem:
        error = problem[0]
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, ExportError | UserError):
            text = str(error)
    if distributed:
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, text)
        text = next((line for line in told if line is not None), None)
    if text is not None:
        raise ExportError(text) from (problem[0] if problem else None)
    return outcome[0]


def _with_heartbeat(attempt: Callable[[], None]) -> None:
    """Run ``attempt`` on every rank; the others leave this function when rank 0 does."""
    if not is_writer():
        attempt()
    worker = threading.Thread(target=attempt) if is_writer() else None
    if worker is not None:
        worker.start()
    alive = [True]
    while alive[0]:
        if worker is not None:
            worker.join(HEARTBEAT_SECONDS)
            alive = [worker.is_alive()]
        dist.broadcast_object_list(alive, src=0)
