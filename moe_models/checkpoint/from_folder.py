"""Reading a DeepSpeed checkpoint folder, without DeepSpeed's engine, a GPU or a process group.

Under ``global_step<N>/`` DeepSpeed 0.19.8 writes:

- ZeRO 0 to 2: ``mp_rank_00_model_states.pt`` has every tensor but AutoEP's experts. Each of those has its own file,
  ``layer_<moe layer>_expert_<e>_mp_rank_00_model_states.pt``, with w1, w2 and w3. With tensor parallelism each peer t
  has its shards in ``mp_rank_<t>``, and an expert's file has the number of a peer that held it.
- Native layers (ZeRO 1 and 2): the same, with the tensors of one expert module in each file. The numbers of layers
  count MoE blocks.
- A pipeline: the same for each stage s, with ``mp_rank_<s>`` (:mod:`moe_models.checkpoint.from_stages`).
- ZeRO-3: ``zero_pp_rank_<r>_mp_rank_00_model_states.pt`` has names and shapes. The weights are fp32 partitions in
  ``*zero_pp_rank_<r>_mp_rank_00_optim_states.pt`` (:mod:`moe_models.checkpoint.partitions`).

Files are read with ``torch.load(weights_only=True, mmap=True)``: nothing in them is executed, and only the tensors
asked for come into memory (as pages of the file, which the kernel may drop again).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.partitions import Partitions, zero3_partition
from moe_models.checkpoint.tp_shards import join_saved
from moe_models.engine.blocks import autoep_parameter, native_parameter, plain_parameter, take_projection
from moe_models.errors import UserError, some_of
from moe_models.families.table import AUTOEP_EXPERT_NAMES, NATIVE_EXPERTS, NATIVE_ROUTER, Family


def load_states(path: Path) -> dict[str, Any]:
    """One DeepSpeed ``.pt`` file, memory-mapped. Raises UserError where it cannot be read without executing code."""
    # The plain data classes that DeepSpeed puts beside the tensors. Nothing else may be built.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_named(enum: Any, name: str) -> Any:
        """A member of an enum: Python 3.11.0 to 3.11.3 pickle one as a call of getattr."""
        if enum is not ZeroStageEnum:
            raise ValueError(f"getattr of {enum}")
        return ZeroStageEnum[name]

    by_name = (stage_named, "builtins.getattr")
    allowed: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, by_name]
    try:
        with torch.serialization.safe_globals(allowed):
            states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as plain tensors ({reason}); it is damaged, or holds objects that only code "
            "execution could restore: use another checkpoint"
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


@dataclass(frozen=True, kw_only=True)
class SavedBlock:
    """An MoE block of a checkpoint that keeps its experts apart from the other tensors: AutoEP's or a native one."""

    path: str
    """Module path."""
    kind: str
    """``autoep`` or ``native``."""
    number: int
    """Its number in the names of the expert files."""
    num_experts: int
    E_local: int
    """Experts of each rank; for native blocks that were not trained it is not known, and E."""

    @property
    def ep_size(self) -> int:
        """Ranks that held one copy of the experts together."""
        return self.num_experts // self.E_local

    def parameter(self, projection: str, local: int) -> str:
        """The parameter that held one projection of a rank's ``local``-th expert (AutoEP: of all its experts)."""
        if self.kind == "native":
            return native_parameter(self.path, local, projection)
        return autoep_parameter(self.path, projection)

    def name_in_file(self, projection: str, expert: int) -> str:
        """The key of this expert's matrix in its own file."""
        if self.kind == "native":
            return native_parameter(self.path, expert, projection)
        return f"{autoep_parameter(self.path, projection)}.{expert}"


def saved_blocks(model: Mapping[str, Any]) -> dict[str, SavedBlock]:
    """The blocks of a checkpoint by module path, from one rank's model states; plain blocks are not among them."""
    blocks = {}
    # 1. AutoEP describes its own.
    for entry in model.get("ds_autoep_layers") or []:
        path = entry["module_path"]
        E = int(entry["num_experts"])
        blocks[path] = SavedBlock(
            path=path,
            kind="autoep",
            number=int(entry["moe_layer_id"]),
            num_experts=E,
            E_local=E // int(entry["ep_size"]),
        )
    # 2. Native ones are known by the name of their router, whose rows are the experts. They are numbered in order.
    routers = {name: tensor for name, tensor in model["module"].items() if name.endswith(f".{NATIVE_ROUTER}")}
    E_local = _native_experts_of_a_rank(model)
    for number, (name, router_ED) in enumerate(routers.items()):
        path = name.removesuffix(f".{NATIVE_ROUTER}")
        E = router_ED.shape[0]
        blocks[path] = SavedBlock(path=path, kind="native", number=number, num_experts=E, E_local=E_local.get(path, E))
    return blocks


def _native_experts_of_a_rank(model: Mapping[str, Any]) -> dict[str, int]:
    """Native block -> experts that each rank trained, counted by the names of their parameters."""
    pattern = re.compile(rf"(.*)\.{re.escape(NATIVE_EXPERTS)}\.(\d+)\.gate_proj\.weight")
    counts: dict[str, int] = {}
    for shapes in model.get("param_shapes") or []:
        for name in shapes:
            match = pattern.fullmatch(name)
            if match is not None:
                counts[match[1]] = counts.get(match[1], 0) + 1
    return counts


class FolderSource:
    """Tensors of a saved DeepSpeed checkpoint; see :class:`moe_models.checkpoint.source.TensorSource`.

    :attr:`blocks` has the blocks whose experts are kept apart from the other tensors, by module path.

    ``stage`` is the stage of a pipeline, whose tensors these are.

    Raises:
        UserError: from ``__init__``, if files are missing (all are named) or the layout is not one listed above.
    """

    def __init__(self, checkpoint: Path, family: Family, stage: int = 0) -> None:
        self._step = find_step_folder(checkpoint)
        self._stage = stage
        if any(self._step.glob("zero_pp_rank_*_mp_rank_01_model_states.pt")):
            raise UserError(f"{self._step}: ZeRO-3 with tensor parallelism; this export joins ZeRO 1 and 2 only")
        # 1. The model states: of each tensor-parallel peer, or of each rank of ZeRO-3 with its partition.
        self._partitions: Partitions | None = None
        if (self._step / model_states_file(0)).exists():
            self._models = _open_whole(self._step, stage)
        else:
            self._models, self._partitions = _open_zero3(self._step)
        # 2. What is in them: dense tensors by module name, and the blocks that keep their experts elsewhere.
        module: dict[str, torch.Tensor] = self._models[0]["module"]
        self._names = {family.autoep_to_module(name): name for name in module if not family.is_router_alias(name)}
        self.blocks = saved_blocks(self._models[0])
        if self._partitions is None:
            self._require_expert_files()
        # 3. What an export must ask for.
        self._unasked = dict.fromkeys(self._names)
        for path in self.blocks:
            for weight in AUTOEP_EXPERT_NAMES.values():
                self._unasked[f"{path}.experts.{weight}"] = None
        self.spread = False
        self.dtype: torch.dtype = next(tensor.dtype for tensor in module.values() if tensor.is_floating_point())

    def writers(self) -> list[int]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`: one process reads and writes all."""
        return [0]

    def holds(self, name: str) -> bool:
        """Whether it has a dense tensor."""
        return name in self._names

    def holds_block(self, path: str) -> bool:
        """Whether it has the experts of an MoE block."""
        return path in self.blocks or plain_parameter(path, "down") in self._names

    @torch.no_grad()
    def dense(self, name: str) -> torch.Tensor:
        """See :class:`~moe_models.checkpoint.source.TensorSource`. Raises KeyError if the checkpoint has no such
        tensor."""
        stored = self._names[name]
        self._unasked.pop(name, None)
        if self._partitions is None:
            shards = [model["module"][stored] for model in self._models]
            return join_saved(stored, shards, self._models[0])
        kept: torch.Tensor = self._models[0]["module"][stored]
        rank_0 = self._partitions.ranks[0]
        if not rank_0.holds(stored):  # a buffer
            return kept
        return self._partitions.join(stored, rank_0.sharers[stored]).to(kept.dtype)

    @torch.no_grad()
    def experts(self, path: str, projection: str) -> tuple[torch.Tensor, range]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        block = self.blocks.get(path)
        if block is None:  # Hugging Face's own: every rank has all experts
            stacked = take_projection(self.dense(plain_parameter(path, projection)), projection)
            return stacked, range(len(stacked))
        self._unasked.pop(autoep_parameter(path, projection), None)
        every = range(block.num_experts)
        if self._partitions is not None:
            return self._joined_experts(block, projection, self._partitions), every
        experts = []
        for expert in every:
            file = self._expert_file(block, expert)
            experts.append(_tensor_in(file, block.name_in_file(projection, expert)))
        return torch.stack(experts), every

    @torch.no_grad()
    def part(self, name: str, places: range) -> torch.Tensor:
        """The values at ``places`` of a flattened dense tensor, [N], in the dtype of the model; without TP only."""
        stored = self._names[name]
        kept: torch.Tensor = self._models[0]["module"][stored]
        if self._partitions is None or not self._partitions.ranks[0].holds(stored):
            return kept.flatten()[places.start : places.stop]
        sharers = self._partitions.ranks[0].sharers[stored]
        return self._partitions.part(stored, sharers, places).to(kept.dtype)

    def shape(self, name: str) -> torch.Size:
        """The shape of a dense tensor; without TP only."""
        stored = self._names[name]
        if self._partitions is None or not self._partitions.ranks[0].holds(stored):
            return torch.Size(self._models[0]["module"][stored].shape)
        return torch.Size(self._partitions.ranks[0].shapes[stored])

    @torch.no_grad()
    def expert(self, path: str, projection: str, expert: int) -> torch.Tensor:
        """One expert's [F, D] (gate, up) or [D, F] (down), in the dtype of the model."""
        block = self.blocks.get(path)
        if block is None:
            name = plain_parameter(path, projection)
            places, shape = expert_places(self.shape(name), expert, projection)
            return self.part(name, places).view(shape)
        if self._partitions is None:
            return _tensor_in(self._expert_file(block, expert), block.name_in_file(projection, expert))
        # AutoEP under ZeRO-3: the first rank with this part of the experts knows which ranks share it.
        stored = block.parameter(projection, 0)
        ep_rank, local = divmod(expert, block.E_local)
        owner = next(rank for rank, model in enumerate(self._models) if _ep_rank(model, path) == ep_rank)
        partition = self._partitions.ranks[owner]
        matrix = torch.Size(partition.shapes[stored][1:])
        places = range(local * matrix.numel(), (local + 1) * matrix.numel())
        return self._partitions.part(stored, partition.sharers[stored], places).to(self.dtype).view(matrix)

    def _joined_experts(self, block: SavedBlock, projection: str, partitions: Partitions) -> torch.Tensor:
        """All experts of a block of AutoEP under ZeRO-3, [E, F, D] or [E, D, F], in the dtype of the model."""
        stored = block.parameter(projection, 0)
        # 1. The first rank with each part of the experts; it knows which ranks share that part.
        owners: dict[int, int] = {}
        for rank, model in enumerate(self._models):
            owners.setdefault(_ep_rank(model, block.path), rank)
        # 2. One part after the other, from fp32.
        first = partitions.ranks[owners[0]]
        E_local, *shape = first.shapes[stored]
        stacked = torch.empty((E_local * block.ep_size, *shape), dtype=self.dtype)
        for ep_rank, share in enumerate(stacked.chunk(block.ep_size)):
            sharers = partitions.ranks[owners[ep_rank]].sharers[stored]
            share.copy_(partitions.join(stored, sharers))
        return stacked

    def unasked(self) -> Iterable[str]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        return self._unasked

    def _require_expert_files(self) -> None:
        files = []
        for block in self.blocks.values():
            for expert in range(block.num_experts):
                files.append(self._expert_file(block, expert))
        _require_files(files)

    def _expert_file(self, block: SavedBlock, expert: int) -> Path:
        """The file of one expert; it has the number of the stage, or of a tensor-parallel peer that held the expert."""
        files = [
            self._step / f"layer_{block.number}_expert_{expert}_{model_states_file(self._stage + peer)}"
            for peer in range(len(self._models))
        ]
        return next((path for path in files if path.exists()), files[0])


def expert_places(shape: torch.Size, expert: int, projection: str) -> tuple[range, torch.Size]:
    """Where one expert's matrix is in Hugging Face's own flattened tensor, and its shape.

    ``shape`` is [E, 2F, D] for gate and up, gate rows first, and [E, D, F] for down.
    """
    _, rows, columns = shape
    first = expert * rows * columns
    if projection != "down":
        rows //= 2
    numel = rows * columns
    if projection == "up":
        first += numel
    return range(first, first + numel), torch.Size((rows, columns))


def model_states_file(number: int) -> str:
    """The file of model states of a tensor-parallel peer, or of a pipeline stage."""
    return f"mp_rank_{number:02d}_model_states.pt"


def stages_in(step: Path) -> int:
    """How many pipeline stages wrote a checkpoint; 1 where none of its files says it."""
    first = step / model_states_file(0)
    if not first.exists():
        return 1
    return pipeline_degree(load_states(first))


def pipeline_degree(model: Mapping[str, Any]) -> int:
    """The same, from the model states of one rank: DeepSpeed's ``mp_world_size`` counts stages and peers alike."""
    return int((model.get("checkpoint_parallel_dimensions") or {}).get("pp_degree") or 1)


def _open_whole(step: Path, stage: int) -> list[dict[str, Any]]:
    """The model states of ZeRO 0 to 2: of a pipeline's stage, or one for each tensor-parallel peer."""
    first = _load_with(step / model_states_file(0), "module")
    stages = pipeline_degree(first)
    if stages > 1:
        _require_files([step / model_states_file(number) for number in range(stages)])
        return [_load_with(step / model_states_file(stage), "module")]
    peers = int(first.get("mp_world_size") or 1)
    files = [step / model_states_file(peer) for peer in range(peers)]
    _require_files(files)
    return [first] + [_load_with(path, "module") for path in files[1:]]


def _open_zero3(step: Path) -> tuple[list[dict[str, Any]], Partitions]:
    """The model states of ZeRO-3, one for each rank, and the partitions of the weights."""
    first = step / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if not first.exists():
        raise UserError(f"{step}: holds no model states; the checkpoint is incomplete")
    # 1. How many files there must be, and whether all of them are there.
    world_size = int(_load_with(first, "dp_world_size")["dp_world_size"])
    prefix = ""
    if any(step.glob("bf16_zero_pp_rank_*")):
        prefix = "bf16_"
    names = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world_size)]
    model_files = [step / f"{name}_model_states.pt" for name in names]
    optimizer_files = [step / f"{prefix}{name}_optim_states.pt" for name in names]
    _require_files([*model_files, *optimizer_files])
    # 2. Their content, memory-mapped.
    models = [_load_with(path, "module", "param_shapes", "dp_world_size") for path in model_files]
    optimizers = [_load_with(path, "optimizer_state_dict")["optimizer_state_dict"] for path in optimizer_files]
    ranks = [zero3_partition(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    return models, Partitions(step, ranks)


def _ep_rank(model: Mapping[str, Any], path: str) -> int:
    """Which part of the block's experts the rank with these model states held."""
    entry = next(entry for entry in model["ds_autoep_layers"] if entry["module_path"] == path)
    return int(entry["ep_rank"])


def _load_with(path: Path, *keys: str) -> dict[str, Any]:
    """:func:`load_states`; raises UserError unless the file has these keys."""
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


def _require_files(paths: list[Path]) -> None:
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{paths[0].parent}: {len(missing)} of {len(paths)} files are missing ({some_of(missing)}); "
            "the checkpoint is incomplete, use an earlier one"
        )
