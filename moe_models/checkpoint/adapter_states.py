"""An adapter's weights and optimizer states in a DeepSpeed checkpoint, whatever layout wrote it.

A checkpoint of a run that trains an adapter holds what is trained, and nothing else. A factor of experts is one tensor
on each rank where AutoEP spreads them ([E_local, r, in] or [E_local, out, r]), and PEFT's own where nothing does
([E*r, in] or [out, r*E]). Adapters are small, so each is put together whole, and a rank takes its experts out of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.saved_states import TrainedStates
from moe_models.engine.lora import ExpertFactor, expert_factors, pack_one, unpack_one
from moe_models.families.table import Family


class AdapterStates(TrainedStates):
    """The states of a checkpoint, in the shapes of ``model``, whose adapter is the same and whose layout may differ.

    ``saved`` is the layout that wrote the checkpoint: its ``experts`` and ``ep_size``.

    Raises:
        UserError: from ``__init__``, if files are missing or cannot be read as plain tensors.
    """

    def __init__(self, checkpoint: Path, family: Family, saved: dict[str, Any], model: Any) -> None:
        super().__init__(checkpoint, family)
        self._family = family
        self._spread = saved["experts"] == "autoep"
        self._ep_size = int(saved["ep_size"])
        self._factors = {factor.parameter: factor for factor in expert_factors(model)}
        self._spread_here = {name for name, factor in self._factors.items() if name == factor.spread}

    def whole(self, name: str, key: str) -> torch.Tensor:
        """What parameter ``name`` of the model stands for on this rank, fp32.

        ``key`` is one of :data:`~moe_models.checkpoint.saved_states.KEYS`. Raises UserError for what is not there.
        """
        factor = self._factors.get(name)
        if factor is None:
            return self._joined(name, key)
        of_all = self._of_all_experts(factor, key)
        if name in self._spread_here:
            return of_all[factor.local.start : factor.local.stop].contiguous()
        return pack_one(factor.side, of_all)

    def _joined(self, name: str, key: str) -> torch.Tensor:
        """A tensor that all ranks share."""
        stored = self._stored(self._family.autoep_to_module(name))
        return self._partitions.join(stored, self._replicas_of(stored, 0), key)

    def _of_all_experts(self, factor: ExpertFactor, key: str) -> torch.Tensor:
        """[E, r, in] or [E, out, r]."""
        if not self._spread:
            return unpack_one(factor.side, self._joined(factor.wrapped, key), factor.num_experts)
        # Experts are dealt in equal runs to neighbouring ranks, so the EP rank is the rank in the first EP group.
        stored = self._stored(factor.spread)
        runs = []
        for ep_rank in range(self._ep_size):
            holders = self._holders_of(stored, ep_rank, self._ep_size)
            runs.append(self._partitions.join(stored, holders, key))
        return torch.cat(runs)
