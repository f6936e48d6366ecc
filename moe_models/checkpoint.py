"""The way back: from a DeepSpeed engine, or from a DeepSpeed checkpoint folder, to a Hugging Face folder.

DeepSpeed spreads the experts over ranks (AutoEP) and every tensor over partitions (ZeRO). Both sources below answer the
same two questions, tensor by tensor and in the model's own order:

- ``dense(name)``: a replicated tensor by its module name;
- ``experts(block, projection)``: all experts of one block and projection, [E, F, D] (gate, up) or [E, D, F] (down).

:func:`export` asks them for every tensor that the model must have, gives each its hub name and hands it to an
:class:`~moe_models.hf_folder.HFFolderWriter`, which refuses to finish unless nothing is missing. A source that still
has tensors that nobody asked for is refused as well.

Memory: the writing rank holds one tensor of one layer in host memory (for experts: one projection of all E, or HF's own
fused pair), and one shard; on its device no more than another rank's share. The others hold one tensor at a time.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

import moe_models.prmoe  # noqa: F401 (its class, for AutoConfig and AutoModelForCausalLM)
from moe_models.errors import UserError
from moe_models.families import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, Family
from moe_models.hf_folder import (
    DEFAULT_MAX_SHARD_BYTES,
    ExportError,
    HFFolderWriter,
    copy_companions,
    expected_tensors,
    kept_in_fp32,
    save_companions,
    tied_names,
)
from moe_models.tp_shards import join_on_rank_0, split_dimension

T = TypeVar("T")

HEARTBEAT_SECONDS = 20.0
"""How often waiting ranks hear from the writer; collectives that wait for half an hour are taken for dead."""


class TensorSource(Protocol):
    """Where an export takes its tensors from. A collective source returns None on ranks that do not write."""

    dtype: torch.dtype

    def dense(self, name: str) -> torch.Tensor | None:
        """The full tensor with this module-layout name, on CPU."""

    def experts(self, block: str, projection: str) -> torch.Tensor | None:
        """All E experts of ``block`` (module path) for ``projection`` (gate, up or down), on CPU."""

    def unasked(self) -> Iterable[str]:
        """Names of trained tensors that were not asked for so far."""


def is_writer() -> bool:
    """Whether this process writes the folder: rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def fingerprint(tensor: torch.Tensor) -> int:
    """CRC-32 of the tensor's bytes: equal for equal bits, whatever device, stride or rank they come from."""
    content: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)


class EngineSource:
    """Tensors of a live DeepSpeed engine; every rank must make the same calls in the same order (collective).

    Works for AutoEP and native blocks at any EP size and for plain HF blocks, under ZeRO 0 to 3. ZeRO-3 partitions are
    gathered one tensor at a time; experts then travel from the EP group of rank 0 to rank 0, and tensor-parallel shards
    from its TP group.

    :attr:`fingerprints` fills on the writing rank: one number per tensor, for experts ``{block}.experts.{e}.{gate|up|
    down}``. Spread experts are read by the rank that owns them, before they travel, under the number by which its
    router calls them; so the finished folder can be compared with what the ranks hold, bit by bit.
    """

    def __init__(self, engine: Any, family: Family) -> None:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        from moe_models.native import native_blocks

        module = engine.module
        self._native = native_blocks(module)
        self._layers = {name: m for name, m in module.named_modules() if isinstance(m, AutoEPMoELayer)}
        self._tensors: dict[str, torch.Tensor] = {
            family.autoep_to_module(name): tensor
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        self._unasked = {family.autoep_to_module(name): None for name, _ in module.named_parameters()}
        self._zero3 = engine.zero_optimization_stage() == 3
        self.dtype: torch.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        self.fingerprints: dict[str, int] = {}

    def unasked(self) -> Iterable[str]:
        """See :class:`TensorSource`."""
        return self._unasked

    def _gather(self, parameter: torch.Tensor) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], enabled=self._zero3 and hasattr(parameter, "ds_id"))

    def _whole(self, name: str) -> torch.Tensor | None:
        tensor = self._tensors[name]
        self._unasked.pop(name, None)
        with self._gather(tensor):
            dimension = split_dimension(tensor)
            if dimension is not None:
                return join_on_rank_0(tensor.detach(), dimension)
            return tensor.detach().to("cpu", copy=True) if is_writer() else None

    def dense(self, name: str) -> torch.Tensor | None:
        """See :class:`TensorSource`. Raises KeyError on every rank alike if the model has no such tensor."""
        tensor = self._whole(name)
        if tensor is not None:
            self.fingerprints[name] = fingerprint(tensor)
        return tensor

    def _own_experts(self, block: str, projection: str) -> tuple[torch.Tensor, Any]:
        """(this rank's experts stacked, or their ZeRO-3 partition; the EP group, None where there is one rank in it)"""
        layer: Any
        if block in self._native:
            layer, local = self._native[block].moe, self._native[block].experts(projection)
            for e in range(len(local)):
                self._unasked.pop(f"{block}.{NATIVE_EXPERTS}.{e}.{projection}_proj.weight", None)
            return local, layer.deepspeed_moe.ep_group if layer.ep_size > 1 else None
        layer, name = self._layers[block], AUTOEP_EXPERT_NAMES[projection]
        self._unasked.pop(f"{block}.experts.{name}", None)
        return getattr(layer.experts, name), layer.ep_group if layer.ep_size > 1 else None

    def experts(self, block: str, projection: str) -> torch.Tensor | None:
        """See :class:`TensorSource`."""
        prints: list[int] = []
        if block in self._layers or block in self._native:
            local, group = self._own_experts(block, projection)
            with self._gather(local):
                own = torch.tensor([fingerprint(expert) for expert in local], device=local.device)
                stacked = _gather_to_writer(local.detach(), group)
                all_prints = _gather_to_writer(own, group)
                prints = [] if all_prints is None else all_prints.tolist()
        else:
            stacked = _split_fused(self._whole, block, projection)
            prints = [] if stacked is None else [fingerprint(expert) for expert in stacked]
        self.fingerprints.update({f"{block}.experts.{e}.{projection}": value for e, value in enumerate(prints)})
        return stacked


def _gather_to_writer(local: torch.Tensor, ep_group: Any) -> torch.Tensor | None:
    """Stack the shares of the EP group that rank 0 is in, [E_local, ...] -> [E, ...], on rank 0's CPU.

    One share after the other: a collective gather would need room for all E on rank 0's device, beside the training.
    """
    ranks = [0] if ep_group is None else dist.get_process_group_ranks(ep_group)
    if not is_writer():
        if 0 in ranks and ep_group is not None:  # others are expert data parallel replicas: they hold the same experts
            dist.send(local.contiguous(), dst=0, group=ep_group)
        return None
    stacked = torch.empty((len(ranks) * local.shape[0], *local.shape[1:]), dtype=local.dtype)
    for owner, share in zip(ranks, stacked.chunk(len(ranks)), strict=True):
        if owner == 0:
            share.copy_(local)
            continue
        received = share if local.device.type == "cpu" else torch.empty_like(local)
        dist.recv(received, src=owner, group=ep_group)
        share.copy_(received)
    return stacked


def _split_fused(dense: Callable[[str], torch.Tensor | None], block: str, projection: str) -> torch.Tensor | None:
    """An expert projection out of HF's own fused tensors (a block that AutoEP did not replace)."""
    if projection == "down":
        return dense(f"{block}.experts.down_proj")
    gate_up_E2FD = dense(f"{block}.experts.gate_up_proj")
    if gate_up_E2FD is None:
        return None
    gate_EFD, up_EFD = gate_up_E2FD.chunk(2, dim=1)
    return gate_EFD if projection == "gate" else up_EFD


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
        source: an :class:`EngineSource` (call on every rank) or a folder source (one process).
        family: the model's row of :data:`~moe_models.families.FAMILIES`.
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
