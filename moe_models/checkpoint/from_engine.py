"""Tensors of a live DeepSpeed engine, gathered from the ranks that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from moe_models.checkpoint.source import fingerprint, is_writer, split_fused
from moe_models.checkpoint.tp_shards import join_on_rank_0, split_dimension
from moe_models.engine.autoep import autoep_layers
from moe_models.families.table import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, Family


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
        from moe_models.engine.native import native_blocks

        module = engine.module
        self._native = native_blocks(module)
        self._layers = autoep_layers(module)
        self._tensors: dict[str, torch.Tensor] = {
            family.autoep_to_module(name): tensor
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        self._unasked = {family.autoep_to_module(name): None for name, _ in module.named_parameters()}
        self._zero3 = engine.zero_optimization_stage() == 3
        self.dtype: torch.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        self.fingerprints: dict[str, int] = {}

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
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
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError, on every rank, for an unknown
        name."""
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
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        prints: list[int] = []
        if block in self._layers or block in self._native:
            local, group = self._own_experts(block, projection)
            with self._gather(local):
                own = torch.tensor([fingerprint(expert) for expert in local], device=local.device)
                stacked = _gather_to_writer(local.detach(), group)
                all_prints = _gather_to_writer(own, group)
                prints = [] if all_prints is None else all_prints.tolist()
        else:
            stacked = split_fused(self._whole, block, projection)
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
