"""What a node's host needs: memory to read, train and export, time to read, disk. Torch-free.

Memory is that of the fullest node, whose writing rank exports, all its ranks together. On GPUs the weights pass through
the host and do not stay there. Three phases:

- *read*: each rank reads the weights that it keeps, dense tensors straight to its GPU, one by one, and of the experts
  its own. Where that cannot be done (:func:`why_whole`) every rank holds the whole model.
- *train*: what ZeRO-Offload moved to the host.
- *export*: that, and on one rank a shard with one stacked projection; then the proof, one decoder layer at a time.

benchmarks/loading.md has what was measured, and tests/planner/test_host.py compares. Bytes; GB is 10^9 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from moe_models.config.ds_config import DsConfig
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB
from moe_models.planner.memory import ADAM
from moe_models.planner.pipeline import stage_cases
from moe_models.planner.zero_states import BF16, FP32, SUB_GROUP

PROCESS = 3 * GIB // 2
"""One rank's process on a GPU before it reads. Measured on an H100: 1 to 2 GiB (benchmarks/loading.md)."""
WHOLE_UNDER_ZERO_3 = 1.6
"""Where ZeRO-3 reads the whole model on every rank: times its size, for each rank. Measured on 2 CPU ranks: 1.61 with
EP 2, 1.63 without (benchmarks/loading.md): transformers joins all files, then partitions."""
SHARD = 5 * 10**9
"""Largest file of an export where --export_max_shard_size does not say (``checkpoint/hf_folder.py``)."""
READ_GB_PER_S = 2.0
"""What the disk or file system of a node is taken to deliver where --read_gb_per_s does not say. Assumed: a local NVMe
disk reads 3 to 7 GB/s, a shared file system often less than 2."""

Phase = Literal["read", "train", "export"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """What one node needs, in bytes."""

    read: int
    """Host memory while the model is read and the engine built, the ranks' processes counted, as in all three."""
    train: int
    export: int
    """While the model folder is written and proven."""
    from_disk: int
    """What the node has to get from the model's files; what several of its ranks read comes from the page cache."""
    whole: str | None
    """Why every rank reads the whole model; None where each reads its share."""

    @property
    def peak(self) -> int:
        """Host memory at the fullest time."""
        return max(self.read, self.train, self.export)

    @property
    def fullest(self) -> Phase:
        """When that is."""
        phases: tuple[Phase, ...] = ("train", "read", "export")
        return max(phases, key=lambda phase: int(getattr(self, phase)))

    def seconds_to_read(self, gb_per_s: float) -> float:
        """Time to get the model from a disk with this speed."""
        return self.from_disk / gb_per_s / 1e9


def host_needs(case: Case) -> Host:
    """What the host of one node needs for a case on GPUs."""
    ranks = ranks_of_a_node(case)
    processes = ranks * PROCESS
    offloaded = ranks * offloaded_bytes(case)
    whole = why_whole(case)

    # 1. To read. Offloaded weights stay in the host; the optimizer's states come when the weights have gone.
    if whole is None:
        at_once = ranks * _largest_dense(case)
        stays = ranks * _offloaded_weights(case)
        reading = at_once + stays
    else:
        reading = int(ranks * _whole_factor(case) * model_bytes(case))

    # 2. To export. What was offloaded is still there.
    writing = min(SHARD, export_bytes(case)) + max(_stacked(case), _largest_dense(case))
    if case.adapter is not None:
        writing = 2 * adapter_bytes(case)
    exporting = max(writing, proof_bytes(case))
    return Host(
        read=processes + reading,
        train=processes + offloaded,
        export=processes + offloaded + exporting,
        from_disk=from_disk(case),
        whole=whole,
    )


def ranks_of_a_node(case: Case) -> int:
    """Ranks of one node."""
    return min(case.gpus_per_node, case.layout.world_size * case.stages)


def model_bytes(case: Case) -> int:
    """The model's files, in the dtype that its config.json names."""
    whole = case.model.sizes
    return (whole.dense_params + whole.expert_params) * stored_element(case)


def export_bytes(case: Case) -> int:
    """The exported folder, in the dtype of the training."""
    whole = case.model.sizes
    return (whole.dense_params + whole.expert_params) * case.work.element_bytes


def adapter_bytes(case: Case) -> int:
    """The exported adapter, in the dtype of the training; 0 where all weights are trained."""
    if case.adapter is None:
        return 0
    of_experts = case.sizes.moe_layers * case.sizes.num_experts * sum(case.adapter.expert)
    return (sum(case.adapter.dense) + of_experts) * case.work.element_bytes


def stored_element(case: Case) -> int:
    """Bytes of one weight in the model's files."""
    config = case.model.config
    dtype = config.get("dtype") or config.get("torch_dtype")
    return FP32 if dtype == "float32" else BF16


# --- reading


def why_whole(case: Case) -> str | None:
    """Why every rank has to read the whole model; None where each reads its share."""
    if case.model.config.get("quantization_config") is not None:
        return "its weights are quantized (quantization_config)"
    if not case.safetensors:
        return "it has no safetensors files"
    return case.ds.odd_partitions


def has_safetensors(name: str) -> bool:
    """False for a folder whose weights are ``.bin`` files only; a hub id is taken to have them."""
    folder = Path(name)
    return any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))


def share_bytes(case: Case) -> int:
    """What one rank reads of the files where each reads its share.

    All ranks together then hold this in host memory if they are CPU processes: for the layouts of benchmarks/loading.md
    1.0 to 1.2 times the checkpoint, and 2.1 times with two copies of the experts.
    """
    sizes = case.sizes
    share = case.states.share
    # 1. Dense tensors are read whole, also where tensor parallelism cuts them afterwards; under ZeRO-3 one partition.
    dense = sizes.dense_params if case.spread else sizes.dense_params + sizes.expert_params
    if case.ds.zero_stage == 3:
        dense = -(-dense // case.states.ranks)
    # 2. This rank's experts. Ranks that hold the same each read them, also where ZeRO-3 partitions them then.
    return (dense + share.expert) * stored_element(case)


def from_disk(case: Case) -> int:
    """Bytes of the files that the ranks of one node touch, each counted once."""
    if why_whole(case) is not None:
        return model_bytes(case)
    ranks = min(ranks_of_a_node(case), case.layout.world_size)  # of a stage
    stages = ranks_of_a_node(case) // ranks
    all_shares = ranks * share_bytes(case)
    if not case.spread:
        return min(model_bytes(case), stages * all_shares)
    element = stored_element(case)
    dense = case.sizes.dense_params * element
    if case.ds.zero_stage == 3:
        dense = min(dense, ranks * (dense // case.states.ranks))
    places = min(ranks, case.layout.ep_size)  # EP groups are neighbouring ranks
    return min(model_bytes(case), stages * (dense + places * case.states.share.expert * element))


def _whole_factor(case: Case) -> float:
    """Times the model's size that one rank holds where it reads all of it.

    Below ZeRO-3 AutoEP copies a rank's experts out of the whole model before that is dropped: measured on CPU 1.33 with
    EP 2 and 1.09 with EP 4 (benchmarks/loading.md), where this is 1.5 and 1.25. Native layers go block by block.
    """
    if case.ds.zero_stage == 3:
        return WHOLE_UNDER_ZERO_3
    if case.ds.expert_parallel is not None:
        return 1 + 1 / case.layout.ep_size
    return 1.0


def _largest_dense(case: Case) -> int:
    """Bytes of the largest tensor outside the experts: embedding or head."""
    return max(prod(shape) for _, shape in case.model.sizes.dense) * case.work.element_bytes


# --- training


def offloaded_bytes(case: Case) -> int:
    """Pinned host memory of one rank: what ZeRO-Offload moved there, or the buffers on its way to NVMe."""
    partition = case.trained.partition
    held = 0

    # 1. The optimizer: fp32 weights and two moments, fp32 gradients and a bf16 staging copy. On NVMe, buffers for a
    #    part of them at a time (``swap_tensor/partitioned_optimizer_swapper.py``).
    section = case.ds.zero("offload_optimizer") or {}
    if section.get("device") == "nvme":
        held += section.get("buffer_count", 4) * min(partition, SUB_GROUP) * FP32
    elif _on_host(case.ds, "offload_optimizer"):
        held += partition * (ADAM + FP32 + BF16)

    # 2. The weights (``swap_tensor/partitioned_param_swapper.py``).
    section = case.ds.zero("offload_param") or {}
    if section.get("device") == "nvme":
        held += int(section.get("buffer_count", 5) * section.get("buffer_size", 10**8)) * BF16
    return held + _offloaded_weights(case)


def _offloaded_weights(case: Case) -> int:
    """Bytes of the weights of one rank that stay in host memory."""
    if not _on_host(case.ds, "offload_param"):
        return 0
    return case.states.partition * case.work.element_bytes


def _on_host(ds: DsConfig, key: str) -> bool:
    section = ds.zero(key) or {}
    return bool(section.get("device", "none") == "cpu")


# --- export


def _stacked(case: Case) -> int:
    """One projection of all experts of a layer, [E, F, D]."""
    return case.sizes.num_experts * case.sizes.expert_size // 3 * case.work.element_bytes


def proof_bytes(case: Case) -> int:
    """What the proof holds on the writing rank: the largest decoder layer and its stacked [E, 2F, D].

    It does not grow with the number of layers. Measured: 0.29 GB with layers of 0.18 GB (benchmarks/loading.md).
    """
    sizes = case.model.sizes
    ends = sizes.head_params  # embedding and head, of which one is there at a time
    if not sizes.tied:
        ends *= 2
    outside_a_layer = (sizes.dense_params - ends) // max(1, sizes.layers)
    layer = (outside_a_layer + sizes.num_experts * sizes.expert_size) * case.work.element_bytes
    return max(layer + 2 * _stacked(case), _largest_dense(case))


# --- disk


def checkpoint_bytes(case: Case) -> int:
    """One ``checkpoint-N`` of all ranks together: 12 bytes for each parameter, and below ZeRO-3 the weights.

    ZeRO-3 writes no weights beside the fp32 ones. Tensor-parallel peers each write what is not split. Padding, the
    tokenizer and the rest are left out: some 20 kB for each file.
    """
    if case.layout.pp > 1:
        return sum(checkpoint_bytes(stage) for stage in stage_cases(case))
    states = case.trained
    optimizer = states.partition * case.layout.world_size * ADAM
    if case.adapter is not None:
        file = adapter_bytes(case)
        of_rank_0 = 0 if case.ds.zero_stage == 3 else states.elements * case.work.element_bytes
        return optimizer + file + of_rank_0
    if case.ds.zero_stage == 3:
        return optimizer
    weights = states.share.dense * case.layout.tp_size + states.share.expert * case.layout.ep_size
    return optimizer + weights * case.work.element_bytes
