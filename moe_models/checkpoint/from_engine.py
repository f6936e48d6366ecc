"""Tensors of a live DeepSpeed engine, gathered from the ranks that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_models.checkpoint.source import fingerprint, fingerprints, is_writer
from moe_models.checkpoint.tp_shards import join_on_rank_0, split_dimension
from moe_models.engine.blocks import Block, find_blocks, hf_model, parameter_names
from moe_models.families.table import Family


class EngineSource:
    """Tensors of a live DeepSpeed engine; every rank must make the same calls in the same order (collective).

    Works for AutoEP and native blocks at any EP size and for plain HF blocks, under ZeRO 0 to 3. ZeRO-3 partitions are
    gathered one tensor at a time; experts then travel from the EP group of rank 0 to rank 0, and tensor-parallel shards
    from its TP group.

    :attr:`fingerprints` fills on the writing rank: one number per tensor, for experts ``{block}.experts.{e}.{gate|up|
    down}``. Spread experts are read by the rank that owns them, before they travel. Their number is the one that the
    router uses. So the finished folder can be compared with what the ranks hold, bit by bit.
    """

    def __init__(self, engine: Any, family: Family) -> None:
        module = hf_model(engine.module)
        self._blocks = {block.path: block for block in find_blocks(module)}
        # Those of an adapter have no place in a Hugging Face folder (merged.py adds them to what they adapt).
        parameters = {name: tensor for name, tensor in module.named_parameters() if "lora_" not in name}
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in [*parameters.items(), *module.named_buffers()]:
            self._tensors[_plain(family.autoep_to_module(name))] = tensor
        self._unasked = {_plain(family.autoep_to_module(name)): None for name in parameters}
        self._zero3 = engine.zero_optimization_stage() == 3
        self.dtype: torch.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        self.fingerprints: dict[str, int] = {}
        self.spread = False

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        return self._unasked

    def dense(self, name: str) -> torch.Tensor | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError, on every rank, for an unknown
        name."""
        whole = self._whole(name)
        if whole is not None:
            self.fingerprints[name] = fingerprint(whole)
        return whole

    def _whole(self, name: str) -> torch.Tensor | None:
        tensor = self._tensors[name]
        self._unasked.pop(name, None)
        with self._gathered([tensor]):
            dimension = split_dimension(tensor)
            if dimension is not None:
                return join_on_rank_0(tensor.detach(), dimension)
            if not is_writer():
                return None
            return tensor.detach().to("cpu", copy=True)

    def writers(self) -> list[int]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        sizes = {block.ep_size: block for block in self._blocks.values()}
        group = sizes[max(sizes)].ep_group if sizes else None
        if len(sizes) != 1 or group is None or not reaches_writer(group):
            return [0]
        return dist.get_process_group_ranks(group)

    def experts(self, path: str, projection: str) -> tuple[torch.Tensor, range] | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError, on every rank, for a module that
        is no MoE block."""
        block = self._blocks[path]
        with self._gathered(self._expert_parameters(block, projection)):
            if not reaches_writer(block.ep_group):
                return None
            # 1. Each rank takes the fingerprints of its own experts, before they travel. ZeRO-3's gathered tensors are
            #    gone afterwards.
            local = self._own_experts(block, projection)
            held = local.to("cpu", copy=self._zero3)
            prints = torch.tensor(fingerprints(held), device=local.device)
            # 2. Experts and fingerprints travel to rank 0 in the order of EP ranks, which is the order of experts.
            #    Where every rank writes its own, only the fingerprints do.
            alone = block.ep_group is None or dist.get_world_size(block.ep_group) == 1
            gathered = None
            if not self.spread and not alone:
                gathered = gather_to_writer(local, block.ep_group)
            all_prints = gather_to_writer(prints, block.ep_group)
        if all_prints is not None:
            for expert, value in enumerate(all_prints.tolist()):
                self.fingerprints[f"{path}.experts.{expert}.{projection}"] = value
        if self.spread or alone:
            return held, block.local
        if gathered is None:
            return None
        return gathered, range(block.num_experts)

    def _expert_parameters(self, block: Block, projection: str) -> list[torch.Tensor]:
        """The parameters that hold this rank's experts, which count as asked for."""
        names = [_plain(name) for name in parameter_names(block, projection)]
        for name in names:
            self._unasked.pop(name, None)
        return [self._tensors[name] for name in names]

    def _own_experts(self, block: Block, projection: str) -> torch.Tensor:
        """This rank's experts, gathered: [E_local, F, D] (gate, up) or [E_local, D, F] (down)."""
        return block.experts(projection)

    def _gathered(self, parameters: Sequence[torch.Tensor]) -> Any:
        """Inside, parameters that ZeRO-3 cut into shares are whole; collective."""
        import deepspeed

        partitioned = self._zero3 and all(hasattr(parameter, "ds_id") for parameter in parameters)
        return deepspeed.zero.GatheredParameters(list(parameters), enabled=partitioned)


def _plain(name: str) -> str:
    """A name without the layers that PEFT put around modules."""
    return name.replace(".base_layer", "")


def reaches_writer(ep_group: Any) -> bool:
    """Whether rank 0 needs this rank's experts: those of its own EP group, or just its own where it holds all.

    Other EP groups are replicas (expert data parallelism).
    """
    if ep_group is None:
        return is_writer()
    return 0 in dist.get_process_group_ranks(ep_group)


def gather_to_writer(local: torch.Tensor, ep_group: Any) -> torch.Tensor | None:
    """Stack the shares of rank 0's EP group, [E_local, ...] -> [E, ...], on rank 0's CPU; None on the other ranks.

    One share after the other: a collective gather would need room for all E on rank 0's device, beside the training.
    """
    if not is_writer():
        dist.send(local.contiguous(), dst=0, group=ep_group)
        return None
    owners = [0]
    if ep_group is not None:
        owners = dist.get_process_group_ranks(ep_group)
    E_local, *shape = local.shape
    stacked = torch.empty((len(owners) * E_local, *shape), dtype=local.dtype)
    for owner, share in zip(owners, stacked.chunk(len(owners)), strict=True):
        if owner == 0:
            share.copy_(local)
            continue
        received = share
        if local.device.type != "cpu":
            received = torch.empty_like(local)
        dist.recv(received, src=owner, group=ep_group)
        share.copy_(received)
    return stacked
