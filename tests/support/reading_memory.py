"""Host memory and time of reading a model and building its engine, on the ranks of a cluster."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any


def write_checkpoint(folder: Path, **sizes: Any) -> int:
    """A random Mixtral in bf16 under hub names, written layer by layer; returns its bytes."""
    import torch
    from transformers import AutoConfig

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.checkpoint.export import hub_plan
    from moe_models.checkpoint.hf_folder import HFFolderWriter, save_companions
    from moe_models.families.table import FAMILIES

    config = AutoConfig.for_model("mixtral", bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    plan = hub_plan(FAMILIES["mixtral"], config)
    expected = {name: (shape, torch.bfloat16) for entry in plan for name, shape in entry.hub.items()}
    writer = HFFolderWriter(folder, expected, max_shard_bytes=200_000_000)
    random = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in expected.items():
        writer.add(name, torch.randn(shape, generator=random).mul_(0.02).to(dtype))
    writer.close_weights()
    save_companions(writer.staging, config, torch.bfloat16)
    writer.finish()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def own_memory() -> int:
    """Anonymous memory of this process: what belongs to no file."""
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss_Anon"):
                return int(line.split()[1]) * 1024
    raise OSError("the kernel does not say Pss_Anon")


class Peak:
    """The most memory of this process inside the block, looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.most = own_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, own_memory())

    def __exit__(self, *_: Any) -> None:
        self.most = max(self.most, own_memory())
        self._over.set()
        self._thread.join()


class InPlaceError(Exception):
    """Raised where DeepSpeed has the whole module and would build the optimizer."""


def build(folder: str, layout: dict[str, Any], ordinary: bool, peak: Any = None) -> dict[str, float]:
    """Read the model and build its engine as the recipes do, up to the optimizer; seconds of both.

    ``layout`` is ``{"stage": ZeRO stage}`` with ``ep``, ``native`` or ``tensor_parallel``.
    """
    import copy

    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers.integrations import HfDeepSpeedConfig

    from moe_models.checkpoint import reading
    from moe_models.config.moe_section import Moe, MoeLayer
    from moe_models.engine.autoep import register_presets, restore_rotary_buffers
    from moe_models.engine.library_globals import forget_engines
    from moe_models.engine.native import register_deepspeed_moe
    from moe_models.families.table import FAMILIES
    from tests.support.parity import planted

    forget_engines()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = {
        "zero_optimization": {"stage": layout["stage"], **layout.get("zero", {})},
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
    }
    if "ep" in layout:
        config["expert_parallel"] = {"enabled": True, "autoep_size": layout["ep"]}
    if "tensor_parallel" in layout:
        config["tensor_parallel"] = layout["tensor_parallel"]
    ds = _checked(config, Moe(layer=MoeLayer(ep_size=layout["native"])) if "native" in layout else Moe())

    def stop(*_: Any, **__: Any) -> None:
        raise InPlaceError

    # 1. Read. ZeRO-3 partitions while the HfDeepSpeedConfig lives.
    dist.barrier()
    began = time.perf_counter()
    keeper = HfDeepSpeedConfig(copy.deepcopy(config))
    why = reading.why_ordinary
    with planted(reading, "why_ordinary", (lambda *_, **__: "as before") if ordinary else why):
        model = reading.read_model(folder, ds, dtype=torch.bfloat16, device="cpu")
    dist.barrier()
    read = time.perf_counter()
    most = peak.most if peak else 0
    # 2. Build.
    restore_rotary_buffers(model)
    register_presets()
    if ds.moe.layer is not None:
        # The check of the conversion reads one block at a time once more, and computes with it: not measured here.
        model = register_deepspeed_moe(model, ds.moe.layer, FAMILIES[model.config.model_type], "none")
    parameters: Any = [{"params": list(model.parameters()), "name": "all"}]
    if ds.moe.layer is not None:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        parameters = split_params_into_different_moe_groups_for_optimizer(parameters)
    with planted(DeepSpeedEngine, "_configure_optimizer", stop), suppress(InPlaceError):
        deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    reading.refuse_unread(model)
    dist.barrier()
    del keeper
    return {"read": read - began, "built": time.perf_counter() - began, "read_bytes": most}


def _checked(config: dict[str, Any], moe: Any) -> Any:
    """The JSON as the recipes have it, without DeepSpeed's parser."""
    from tests.support.layouts import from_raw

    ds = from_raw(config)
    return replace(ds, moe=moe)


def give_back_small_tensors_too() -> None:
    """Let glibc return freed tensors from 256 KiB on, as it does with those of a real model, from 32 MB on."""
    threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
    ctypes.CDLL(None).mallopt(threshold, 1 << 18)


def measure(small: str, folder: str, layout: dict[str, Any], ordinary: bool) -> dict[str, float]:
    """Bytes over this rank's own at its peak, and seconds. ``small`` is read first: imports, threads, groups."""
    from moe_models.checkpoint.on_disk import give_back

    give_back_small_tensors_too()
    build(small, layout, ordinary)
    gc.collect()
    give_back()
    before = own_memory()
    with Peak() as peak:
        found = build(folder, layout, ordinary, peak)
    gc.collect()
    give_back()
    return {**found, "bytes": peak.most - before, "read_bytes": found["read_bytes"] - before}


TENSOR_PARALLEL = json.loads(
    (Path(__file__).parents[2] / "ds_configs" / "zero1_ep2_tp2.json").read_text()
)["tensor_parallel"]  # fmt: skip


def evict(folder: str) -> None:
    """Let the kernel forget the files of a folder, so that the next read comes from the disk."""
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
