"""The way back: from a DeepSpeed engine, or from a DeepSpeed checkpoint folder, to a Hugging Face folder.

DeepSpeed spreads the experts over ranks (AutoEP) and every tensor over partitions (ZeRO). Two sources, a live engine
(``from_engine.py``) and a saved checkpoint (``from_folder.py``), answer the same two questions, tensor by tensor and in
the model's own order:

- ``dense(name)``: a replicated tensor by its module name;
- ``experts(block, projection)``: all experts of one block and projection, [E, F, D] (gate, up) or [E, D, F] (down).

:func:`export` asks them for every tensor that the model must have, gives each its hub name and hands it to an
:class:`~moe_models.checkpoint.hf_folder.HFFolderWriter`, which refuses to finish unless nothing is missing. A source
that still has tensors that were not asked for is refused as well.

Every rank of one expert-parallel group writes its own experts, rank 0 the rest, into files that are planned beforehand
(:mod:`moe_models.checkpoint.shards`). Where these ranks are on several machines, rank 0 writes alone, and the experts
travel to it.

Memory: a rank holds one tensor of one layer in host memory (for experts: one projection of those it holds; of all E on
rank 0 where it writes alone); on its device no more than another rank's share.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

import moe_models.prmoe  # noqa: F401 (its class, for AutoConfig and AutoModelForCausalLM)
from moe_models.checkpoint.expected import expected_tensors, kept_in_fp32, tied_names
from moe_models.checkpoint.hf_folder import (
    DEFAULT_MAX_SHARD_BYTES,
    ExportError,
    HFFolderWriter,
    TensorWriter,
    copy_companions,
    save_companions,
)
from moe_models.checkpoint.source import TensorSource, is_writer
from moe_models.disk import ends_if_full, free_bytes, full_line
from moe_models.errors import UserError
from moe_models.families.table import Family

T = TypeVar("T")
Shape = tuple[int, ...]

HEARTBEAT_SECONDS = 20.0
"""How often waiting ranks hear from the writer; collectives that wait for half an hour are taken for dead."""


class LeftOver(Protocol):
    """What a checkpoint holds beside the model (:class:`~moe_models.checkpoint.origin.Origin`)."""

    def expected(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (shape, dtype)."""

    def leftovers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, values), one after the other."""


@dataclass(frozen=True)
class Entry:
    """One question to the source, and where its answer goes."""

    name: str
    """Module name of a dense tensor, or module path of an MoE block."""
    projection: str | None
    """None for a dense tensor; else one projection of all experts of the block."""
    hub: dict[str, Shape]
    """Hub name -> shape; with experts, those of expert 0, 1, ..."""


def hub_plan(family: Family, config: Any) -> list[Entry]:
    """What to write, in model order."""
    plan = []
    for name, shape in expected_tensors(config).items():
        block, _, weight = name.rpartition(".experts.")
        if weight == "gate_up_proj":
            E, twice_F, D = shape
            plan.append(_expert_entry(family, block, "gate", E, (twice_F // 2, D)))
            plan.append(_expert_entry(family, block, "up", E, (twice_F // 2, D)))
        elif weight == "down_proj":
            E, D, F = shape
            plan.append(_expert_entry(family, block, "down", E, (D, F)))
        else:
            plan.append(Entry(name, None, {family.module_to_hub(name): shape}))
    return plan


def _expert_entry(family: Family, block: str, projection: str, E: int, shape: Shape) -> Entry:
    hub = {family.hub_expert(block, expert, projection): shape for expert in range(E)}
    return Entry(block, projection, hub)


def hub_tensors(source: TensorSource, entry: Entry) -> dict[str, torch.Tensor]:
    """The tensors of one entry under their hub names; empty where this rank only helps."""
    label = entry.name if entry.projection is None else f"{entry.name}/{entry.projection}"
    try:
        tensor: Any
        if entry.projection is None:
            tensor = source.dense(entry.name)
        else:
            tensor = source.experts(entry.name, entry.projection)
    except KeyError:
        raise ExportError(
            f"{label}: config.json asks for this tensor, but the trained model does not have it"
        ) from None
    if tensor is None:
        return {}
    if entry.projection is None:
        return dict.fromkeys(entry.hub, tensor)
    names = list(entry.hub)
    stacked, which = tensor
    if len(stacked) != len(which) or which.stop > len(names):
        raise ExportError(f"{entry.name}: {len(stacked)} experts arrived, the model has {len(names)}")
    return dict(zip(names[which.start : which.stop], stacked.unbind(0), strict=True))


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
    before_rename: Callable[[Path], None] | None = None,
    origin: LeftOver | None = None,
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
        before_rename: called with the staged folder on the writing rank when all is in it; it may add files. What it
            raises stops the export.
        origin: the checkpoint that training started from; what it holds beside the model is written as it is.

    Raises:
        ExportError: on every rank, with the reason; the folder that was there before is untouched.
    """
    plan = hub_plan(family, config)
    expected = _expected_on_disk(plan, config, source.dtype)
    if origin is not None:
        expected |= origin.expected()
    needed = _nbytes(expected)

    # 1. Open the staging folder. The ranks that can write their own experts join rank 0.
    def open_writer() -> HFFolderWriter | None:
        if not is_writer():
            return None
        writer = HFFolderWriter(folder, expected, max_shard_bytes)
        if free_bytes(writer.staging) < needed:
            writer.discard()
            raise ExportError(full_line(folder, needed))
        return writer

    writer = together(open_writer)
    own_writer: TensorWriter | None = writer
    done = 0

    def join() -> TensorWriter | None:
        if shared is None or is_writer():
            return writer
        staging, shard_bytes = shared
        return TensorWriter(staging, expected, shard_bytes)

    def move(entry: Entry) -> None:
        nonlocal done
        tensors = hub_tensors(source, entry)
        if own_writer is None:
            return
        with ends_if_full(folder, ExportError, needed):
            own_writer.add_all(tensors)
        done += len(entry.hub)
        if progress is not None and is_writer():
            progress(done, len(expected))

    def pass_on() -> None:
        if writer is None or origin is None:
            return
        for name, tensor in origin.leftovers():
            with ends_if_full(folder, ExportError, needed):
                writer.add(name, tensor, finite=False)

    def finish() -> None:
        left = [name for name in source.unasked() if name not in tied_names(config)]
        if left:
            raise ExportError(f"{len(left)} trained tensors have no place in this model's checkpoint: {left[:4]}")
        if writer is None:
            return
        writer.add_seen(seen_elsewhere)
        with ends_if_full(folder, ExportError, needed):
            write_the_rest(writer)

    def write_the_rest(writer: HFFolderWriter) -> None:
        writer.close_weights()
        if companions is not None:
            copy_companions(companions, writer.staging)
        else:
            save_companions(
                writer.staging, config, source.dtype, tokenizer=tokenizer, generation_config=generation_config
            )
        if before_rename is not None:
            before_rename(writer.staging)
        writer.finish()

    try:
        shared = _shared_staging(source, writer)
        own_writer = together(join)
        # 2. One tensor after the other. Ranks agree after each: one may fail where the others cannot see it.
        for entry in plan:
            together(partial(move, entry))
        # 3. What the trained class has no place for.
        together(pass_on, slow=True)
        # 4. What is beside the weights, and the rename.
        seen_elsewhere = _seen_elsewhere(own_writer)
        together(finish, slow=True)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    finally:
        if own_writer is not None:
            own_writer.close()
    return Path(folder)


def _shared_staging(source: TensorSource, writer: HFFolderWriter | None) -> tuple[Path, int] | None:
    """Rank 0's staging folder and largest file, on the ranks that write into it; collective.

    Sets ``source.spread`` on every rank.

    The ranks that hold one copy of the experts write their own, if all of them are on rank 0's machine and see its
    folder. On a network file system two machines may not write into one file at the same time: the later one can put
    back what it had read of the other's bytes. Then rank 0 writes alone, and the experts travel to it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # 1. Where rank 0 writes, and who could.
    told: list[Any] = [None, None, None]
    if writer is not None:
        told = [str(writer.staging), writer.max_shard_bytes, source.writers()]
    dist.broadcast_object_list(told, src=0)
    staging = Path(told[0])
    ranks = told[2]
    # 2. Who sees the same folder on the same machine.
    seen: Any = None
    with suppress(OSError):
        about = staging.stat()
        seen = (socket.gethostname(), about.st_dev, about.st_ino)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, seen)
    source.spread = len(ranks) > 1 and seen is not None and all(places[rank] == places[0] for rank in ranks)
    if source.spread and dist.get_rank() in ranks:
        return staging, told[1]
    return None


def _seen_elsewhere(own_writer: TensorWriter | None) -> list[str]:
    """Names of the tensors that the other ranks have written; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    names: list[str] = []
    if own_writer is not None and not is_writer():
        names = sorted(own_writer.seen)
    told: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(told, names)
    return [name for some in told for name in some]


def _expected_on_disk(plan: list[Entry], config: Any, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """Hub name -> (shape, dtype) of everything that the finished folder must hold."""
    fp32 = kept_in_fp32(config)
    expected = {}
    for entry in plan:
        for name, shape in entry.hub.items():
            keeps_fp32 = fp32 is not None and fp32.search(name)
            expected[name] = (shape, torch.float32 if keeps_fp32 else dtype)
    return expected


def _nbytes(expected: dict[str, tuple[Shape, torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())


def export_bytes(family: Family, config: Any, dtype: torch.dtype, origin: LeftOver | None = None) -> int:
    """Bytes of the weights in an exported folder."""
    passed_on = origin.expected() if origin is not None else {}
    return _nbytes(_expected_on_disk(hub_plan(family, config), config, dtype) | passed_on)


def together(action: Callable[[], T], *, slow: bool = False) -> T:
    """Run ``action`` on every rank; if it failed on any of them, raise ExportError on all, so that none goes on alone.

    ``slow``: rank 0 may take longer than the timeout of a collective (it reloads the whole model). Then it works in a
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

    # 1. Act.
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if slow and distributed:
        _with_heartbeat(attempt)
    else:
        attempt()
    # 2. Every rank learns what went wrong on any of them; the first message counts.
    text = None
    if problem:
        text = _as_text(problem[0])
    if distributed:
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, text)
        text = next((line for line in told if line is not None), None)
    # 3. Go on together, or stop together.
    if text is not None:
        cause = problem[0] if problem else None
        raise ExportError(text) from cause
    return outcome[0]


def _as_text(error: Exception) -> str:
    """The message of an error of ours; of any other with its type."""
    if isinstance(error, ExportError | UserError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _with_heartbeat(attempt: Callable[[], None]) -> None:
    """Run ``attempt`` on every rank; the others leave this function when rank 0 does."""
    if is_writer():
        worker = threading.Thread(target=attempt)
        worker.start()
    else:
        worker = None
        attempt()
    alive = [True]
    while alive[0]:
        if worker is not None:
            worker.join(HEARTBEAT_SECONDS)
            alive = [worker.is_alive()]
        dist.broadcast_object_list(alive, src=0)
