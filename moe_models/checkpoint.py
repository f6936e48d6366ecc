"""The way back: from a DeepSpeed engine, or from a DeepSpeed checkpoint folder, to a Hugging Face folder.

DeepSpeed spreads the experts over ranks (AutoEP) and every tensor over partitions (ZeRO). Both sources below answer the
same two questions, tensor by tensor and in the model's own order:

- ``dense(name)``: a replicated tensor by its module name;
- ``experts(block, projection)``: all experts of one block and projection, [E, F, D] (gate, up) or [E, D, F] (down).

:func:`export` asks them for every tensor that the model must have, gives each its hub name and hands it to an
:class:`~moe_models.hf_folder.HFFolderWriter`, which refuses to finish unless nothing is missing.

Memory: the writing rank holds one stacked projection of one layer and one shard; the others one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_models.families import AUTOEP_EXPERT_NAMES, Family
from moe_models.hf_folder import (
    DEFAULT_MAX_SHARD_BYTES,
    ExportError,
    HFFolderWriter,
    expected_tensors,
    save_companions,
    with_progress,
)


class TensorSource(Protocol):
    """Where an export takes its tensors from. A collective source returns None on ranks that do not write."""

    dtype: torch.dtype

    def dense(self, name: str) -> torch.Tensor | None:
        """The full tensor with this module-layout name, on CPU."""

    def experts(self, block: str, projection: str) -> torch.Tensor | None:
        """All E experts of ``block`` (module path) for ``projection`` (gate, up or down), on CPU."""


def is_writer() -> bool:
    """Whether this process writes the folder: rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


class EngineSource:
    """Tensors of a live DeepSpeed engine; every rank must make the same calls in the same order (collective).

    Works for AutoEP and native blocks at any EP size and for plain HF blocks, under ZeRO 0 to 3. ZeRO-3 partitions are
    gathered one tensor at a time; experts then travel from the EP group of rank 0 to rank 0.
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
        self._zero3 = engine.zero_optimization_stage() == 3
        self.dtype: torch.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def _gather(self, parameter: torch.Tensor) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], enabled=self._zero3 and hasattr(parameter, "ds_id"))

    def dense(self, name: str) -> torch.Tensor | None:
        """See :class:`TensorSource`. Raises KeyError on every rank alike if the model has no such tensor."""
        tensor = self._tensors[name]
        with self._gather(tensor):
            return tensor.detach().to("cpu", copy=True) if is_writer() else None

    def experts(self, block: str, projection: str) -> torch.Tensor | None:
        """See :class:`TensorSource`."""
        if block in self._native:
            moe = self._native[block].moe
            group = moe.deepspeed_moe.ep_group if moe.ep_size > 1 else None
            return _gather_to_writer(self._native[block].experts(projection), group)
        if block not in self._layers:
            return _split_fused(self.dense, block, projection)
        layer = self._layers[block]
        local = getattr(layer.experts, AUTOEP_EXPERT_NAMES[projection])
        with self._gather(local):
            return _gather_to_writer(local.detach(), layer.ep_group if layer.ep_size > 1 else None)


def _gather_to_writer(local: torch.Tensor, ep_group: Any) -> torch.Tensor | None:
    """Stack the experts of the EP group that rank 0 is in, [E_local, ...] -> [E, ...], on rank 0's CPU."""
    if ep_group is None:
        return local.to("cpu", copy=True) if is_writer() else None
    ranks = dist.get_process_group_ranks(ep_group)
    if 0 not in ranks:  # an expert data parallel replica: it holds the same experts
        return None
    parts = [torch.empty_like(local) for _ in ranks] if is_writer() else None
    dist.gather(local.contiguous(), parts, dst=0, group=ep_group)
    return torch.cat([part.cpu() for part in parts]) if parts is not None else None


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
    for name, shape in expected_tensors(config).items():
        if name.endswith(".experts.gate_up_proj"):
            E, twice_F, D = shape
            block, projections, expert_shape = (
                name.removesuffix(".experts.gate_up_proj"),
                ("gate", "up"),
                (twice_F // 2, D),
            )
        elif name.endswith(".experts.down_proj"):
            E, *rest = shape
            block, projections, expert_shape = name.removesuffix(".experts.down_proj"), ("down",), tuple(rest)
        else:
            plan.append(("dense", name, {family.module_to_hub(name): shape}))
            continue
        for projection in projections:
            hub = {family.hub_expert(block, e, projection): expert_shape for e in range(E)}
            plan.append(("experts", f"{block}/{projection}", hub))
    return plan


def hub_tensors(source: TensorSource, family: Family, config: Any) -> Iterator[dict[str, torch.Tensor] | None]:
    """Every tensor of the checkpoint under its hub name, one plan entry at a time (None where this rank only helps)."""
    for kind, name, hub in hub_plan(family, config):
        if kind == "dense":
            tensor = source.dense(name)
            yield None if tensor is None else dict.fromkeys(hub, tensor)
        else:
            block, projection = name.split("/")
            stacked = source.experts(block, projection)
            if stacked is None:
                yield None
            else:
                if stacked.shape[0] != len(hub):
                    raise ExportError(f"{block}: {stacked.shape[0]} experts arrived, the model has {len(hub)}")
                yield dict(zip(hub, stacked.unbind(0), strict=True))


def export(
    source: TensorSource,
    family: Family,
    config: Any,
    folder: Path,
    *,
    tokenizer: Any | None = None,
    generation_config: Any | None = None,
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
        max_shard_bytes: largest safetensors file.
        progress: called with (tensors done, tensors in all) on the writing rank.
        prove: called with the staged folder on the writing rank before the rename; what it raises stops the export.

    Raises:
        ExportError: on every rank, with the reason; the folder that was there before is untouched.
    """
    plan = hub_plan(family, config)
    expected = {name: shape for _, _, hub in plan for name, shape in hub.items()}
    writer: HFFolderWriter | None = None
    problem: Exception | None = None
    try:
        if is_writer():
            writer = HFFolderWriter(folder, expected, max_shard_bytes)
    except (ExportError, OSError) as error:
        problem = error
    # Ranks agree before the first tensor moves; after that a failing writer keeps taking part, so that none waits.
    _raise_together(problem)
    done = 0
    stream = hub_tensors(source, family, config)
    while True:
        try:
            tensors = next(stream)
        except StopIteration:
            break
        except Exception as error:  # the source lacks a tensor: every rank sees that alike
            problem = error
            break
        if writer is None or tensors is None or problem is not None:
            continue
        try:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            done += len(tensors)
            with_progress(progress, done, len(expected))
        except (ExportError, OSError) as error:
            problem = error
    if writer is not None and problem is None:
        try:
            writer.close_weights()
            save_companions(
                writer.staging, config, source.dtype, tokenizer=tokenizer, generation_config=generation_config
            )
            if prove is not None:
                prove(writer.staging)
            writer.finish()
        except Exception as error:
            problem = error
    if writer is not None and problem is not None:
        writer.discard()
    _raise_together(problem)
    return Path(folder)


def _raise_together(problem: Exception | None) -> None:
    """Raise on every rank if the writer met a problem, so that no rank goes on alone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [None if problem is None else f"{type(problem).__name__}: {problem}"]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None and problem is None:
            raise ExportError(told[0])
    if problem is not None:
        raise problem if isinstance(problem, ExportError) else ExportError(f"{type(problem).__name__}: {problem}")
