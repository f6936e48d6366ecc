"""Reading a DeepSpeed checkpoint folder, without DeepSpeed's engine, a GPU or a process group.

Layouts, as DeepSpeed 0.19.8 writes them under ``global_step<N>/``:

- ZeRO 0-2: ``mp_rank_00_model_states.pt`` holds every tensor but AutoEP's experts; each of those is a file
  ``layer_<moe layer>_expert_<e>_mp_rank_00_model_states.pt`` with w1, w2, w3. With tensor parallelism there is one
  ``mp_rank_<t>`` for each peer, with its shards, and an expert lies under the number of a peer that holds it.
- Native layers (ZeRO 1-2): the same, with the tensors of one expert module in each file; the layers count MoE blocks.
- ZeRO-3: ``zero_pp_rank_<r>_mp_rank_00_model_states.pt`` holds names and shapes, and the weights lie as fp32 partitions
  in ``*zero_pp_rank_<r>_mp_rank_00_optim_states.pt``: per group one flat tensor, the partitions of its parameters one
  after the other. Dense groups are partitioned over all ranks, expert groups over the ranks that hold the same experts.

Files are read with ``torch.load(weights_only=True, mmap=True)``: nothing in them is executed, and only the tensors
asked for come into memory (as pages of the file, which the kernel may drop again).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.partitions import _index_pieces
from moe_models.checkpoint.source import split_fused
from moe_models.checkpoint.tp_shards import join_saved
from moe_models.errors import UserError
from moe_models.families.table import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, NATIVE_ROUTER, Family


def load_states(path: Path) -> dict[str, Any]:
    """One DeepSpeed ``.pt`` file, memory-mapped. Raises UserError where it cannot be read without executing code."""
    # Plain data classes that DeepSpeed puts beside the tensors; nothing else is allowed to be built.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_named(enum: Any, name: str) -> Any:
        """What Python 3.11.0 to 3.11.3 write for a member of an enum is a call of getattr."""
        if enum is not ZeroStageEnum:
            raise ValueError(f"getattr of {enum}")
        return ZeroStageEnum[name]

    allowed: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    allowed += [(stage_named, "builtins.getattr")]
    try:
        with torch.serialization.safe_globals(allowed):
            states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as plain tensors ({reason}); it is damaged, or holds objects that only code "
            "execution could restore: resume the run and let it export, or use another checkpoint"
        ) from error
    if not isinstance(states, dict):
        raise UserError(f"{path}: holds a {type(states).__name__}, not the states that DeepSpeed writes")
    return states


def find_step_folder(checkpoint: Path) -> Path:
    """The ``global_step<N>`` folder of ``checkpoint`` (a ``checkpoint-N`` folder or the step folder itself)."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such folder; give a checkpoint-N folder that training wrote")
    if list(checkpoint.glob("*model_states.pt")):
        return checkpoint
    latest = checkpoint / "latest"
    if not latest.exists():
        inside = sorted(p.name for p in checkpoint.glob("checkpoint-*"))
        hint = f"; did you mean one of {', '.join(inside)} in it?" if inside else ""
        raise UserError(f"{checkpoint}: not a DeepSpeed checkpoint (no file named latest){hint}")
    step = checkpoint / latest.read_text().strip()
    if not step.is_dir():
        raise UserError(f"{latest}: points to {step.name}, which does not exist; the checkpoint is incomplete")
    return step


class FolderSource:
    """Tensors of a saved DeepSpeed checkpoint; see :class:`moe_models.checkpoint.source.TensorSource`.

    Raises:
        UserError: from ``__init__``, if files are missing (all are named) or the layout is not one listed above.
    """

    def __init__(self, checkpoint: Path, family: Family) -> None:
        self._step = find_step_folder(checkpoint)
        self._family = family
        if any(self._step.glob("zero_pp_rank_*_mp_rank_01_model_states.pt")):
            raise UserError(f"{self._step}: ZeRO-3 with tensor parallelism; this export joins ZeRO 1 and 2 only")
        self._peers = 1
        if (self._step / "mp_rank_00_model_states.pt").exists():
            self._ranks = [_load_with(self._step / "mp_rank_00_model_states.pt", "module")]
            self._peers = int(self._ranks[0].get("mp_world_size") or 1)
            files = [self._step / f"mp_rank_{peer:02d}_model_states.pt" for peer in range(self._peers)]
            _require_files(files)
            self._ranks += [_load_with(path, "module") for path in files[1:]]
            self._optimizers: list[dict[str, Any]] = []
        else:
            self._open_zero3()
        first = self._ranks[0]
        self._names = {family.autoep_to_module(n): n for n in first["module"] if not _is_router_alias(n)}
        self._layers = {entry["module_path"]: entry for entry in first.get("ds_autoep_layers") or []}
        self._layers |= _native_layers(first["module"])
        if not self._optimizers:
            self._check_expert_files()
        self._unasked = dict.fromkeys(self._names)
        for block in self._layers:
            self._unasked.update({f"{block}.experts.{name}": None for name in AUTOEP_EXPERT_NAMES.values()})
        self.dtype: torch.dtype = next(t.dtype for t in first["module"].values() if t.is_floating_point())

    def _open_zero3(self) -> None:
        first = self._step / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        if not first.exists():
            raise UserError(f"{self._step}: holds no model states; the checkpoint is incomplete")
        world_size = int(_load_with(first, "dp_world_size")["dp_world_size"])
        models = [self._step / f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(world_size)]
        prefix = "bf16_" if any(self._step.glob("bf16_zero_pp_rank_*")) else ""
        optimizers = [self._step / f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world_size)]
        _require_files([*models, *optimizers])
        self._ranks = [_load_with(path, "module", "param_shapes", "dp_world_size") for path in models]
        self._optimizers = [_load_with(path, "optimizer_state_dict")["optimizer_state_dict"] for path in optimizers]
        self._pieces = [_index_pieces(m, o) for m, o in zip(self._ranks, self._optimizers, strict=True)]

    def _expert_file(self, entry: Mapping[str, Any], expert: int) -> Path:
        name = f"layer_{entry['moe_layer_id']}_expert_{expert}_mp_rank_{{:02d}}_model_states.pt"
        files = [self._step / name.format(peer) for peer in range(self._peers)]
        return next((path for path in files if path.exists()), files[0])

    def _check_expert_files(self) -> None:
        _require_files(
            [self._expert_file(entry, e) for entry in self._layers.values() for e in range(entry["num_experts"])]
        )

    @torch.no_grad()
    def dense(self, name: str) -> torch.Tensor:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError if the checkpoint has no such
        tensor."""
        stored = self._names[name]
        self._unasked.pop(name, None)
        kept: torch.Tensor = self._ranks[0]["module"][stored]
        if self._optimizers and stored in self._pieces[0]:
            return self._join(stored, 0).to(kept.dtype)
        if self._peers > 1:
            return join_saved(stored, [rank["module"][stored] for rank in self._ranks], self._ranks[0])
        return kept

    @torch.no_grad()
    def experts(self, block: str, projection: str) -> torch.Tensor:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        if block not in self._layers:
            fused = split_fused(self.dense, block, projection)
            assert fused is not None  # a folder has no ranks that only help
            return fused
        entry = self._layers[block]
        weight = AUTOEP_EXPERT_NAMES[projection]
        self._unasked.pop(f"{block}.experts.{weight}", None)
        if "native" in entry:
            name = f"{block}.{NATIVE_EXPERTS}.{{}}.{projection}_proj.weight"
            files = (self._expert_file(entry, e) for e in range(entry["num_experts"]))
            return torch.stack([_tensor_in(path, name.format(e)) for e, path in enumerate(files)])
        stored = f"{entry['expert_key_prefix']}.{weight}"
        if not self._optimizers:
            files = (self._expert_file(entry, e) for e in range(entry["num_experts"]))
            return torch.stack([_tensor_in(path, f"{stored}.{e}") for e, path in enumerate(files)])
        # One rank per EP rank is enough to find the partitions of its experts.
        owners = {self._entry(rank, block)["ep_rank"]: rank for rank in reversed(range(len(self._ranks)))}
        E_local, *shape = self._pieces[owners[0]][stored].shape
        stacked = torch.empty((E_local * entry["ep_size"], *shape), dtype=self.dtype)
        for ep_rank, share in enumerate(stacked.chunk(entry["ep_size"])):
            share.copy_(self._join(stored, owners[ep_rank]))
        return stacked

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        return self._unasked

    def num_experts(self, block: str) -> int:
        """Experts of an AutoEP or native block."""
        return int(self._layers[block]["num_experts"])

    def _entry(self, rank: int, block: str) -> Mapping[str, Any]:
        return next(e for e in self._ranks[rank]["ds_autoep_layers"] if e["module_path"] == block)

    def _join(self, stored: str, rank: int) -> torch.Tensor:
        """The full fp32 tensor (for experts: those of ``rank``) out of the partitions that its group keeps."""
        piece = self._pieces[rank][stored]
        parts = []
        for member in piece.partition_ranks:
            other = self._pieces[member][stored]
            if other.group < 0:
                parts.append(self._ranks[member]["frozen_param_fragments"][stored].flatten())
            else:
                flat = self._optimizers[member]["fp32_flat_groups"][other.group]
                if flat.numel() < other.start + other.numel:
                    raise UserError(
                        f"{self._step}: rank {member} saved {flat.numel()} values where {stored} needs "
                        f"{other.start + other.numel}; weights offloaded to NVMe are not part of a checkpoint"
                    )
                parts.append(flat.narrow(0, other.start, other.numel))
        numel = torch.Size(piece.shape).numel()
        return torch.cat(parts).narrow(0, 0, numel).view(piece.shape)


def _native_layers(module: Mapping[str, torch.Tensor]) -> dict[str, Mapping[str, Any]]:
    """The native blocks of a checkpoint, which describes them by nothing but its names, as AutoEP describes its own."""
    routers = {name.removesuffix(f".{NATIVE_ROUTER}"): t for name, t in module.items() if name.endswith(NATIVE_ROUTER)}
    return {
        block: {"native": True, "moe_layer_id": number, "num_experts": router.shape[0]}
        for number, (block, router) in enumerate(routers.items())
    }


def _load_with(path: Path, *keys: str) -> dict[str, Any]:
    states = load_states(path)
    lacking = [key for key in keys if key not in states]
    if lacking:
        raise UserError(f"{path}: holds no {', '.join(lacking)}; it was not written by DeepSpeed, or is damaged")
    return states


def _tensor_in(path: Path, name: str) -> torch.Tensor:
    tensor = load_states(path).get(name)
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path}: holds no tensor {name}; the checkpoint is damaged, use an earlier one")
    return tensor


def _is_router_alias(name: str) -> bool:
    """AutoEP registers a block's router a second time, as ``gate``, so that HF's output recorders find it."""
    return ".mlp.gate.gate." in name


def _require_files(paths: list[Path]) -> None:
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise UserError(
            f"{paths[0].parent}: {len(missing)} of {len(paths)} files are missing ({shown}); "
            "the checkpoint is incomplete, use an earlier one"
        )
