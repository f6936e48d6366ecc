"""What the round-trip tests run on the ranks of a cluster, and how they compare folders."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_models.families.table import Family
from tests.support import parity
from tests.support.tiny import SELECTION_BIASES, make_model

AWKWARD_BIAS = 5.0
"""Routing biases near this value and 0.001 apart: bf16 would give all of them the same value."""


def save_source(folder: Path, model_type: str, dtype: str = "float32", **overrides: Any) -> Path:
    """A random checkpoint as a hub would hold it: in ``dtype``, the routing bias in fp32 where the class has it so."""
    import torch

    from moe_models.checkpoint.expected import kept_in_fp32

    model = make_model(model_type, **overrides).to(getattr(torch, dtype))
    fp32 = kept_in_fp32(model.config)
    for name, buffer in list(model.named_buffers()):
        if name.endswith(SELECTION_BIASES) and fp32 is not None and fp32.search(name):
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = AWKWARD_BIAS + 1e-3 * torch.arange(
                buffer.numel(), dtype=torch.float32
            )
    model.save_pretrained(folder)
    return folder


def load_tensors(folder: Path | str) -> dict[str, Any]:
    """Every tensor of a folder, over all its shards."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in tensors, f"{name} is in two shards"
            tensors[name] = tensor
    return tensors


def count_apart(tensors: dict[str, Any], family: Family) -> int:
    """Tensors of a folder, each expert's counted apart: what a proof says."""
    stacked = family.hub_stacked or {}
    count = len(tensors)
    for name, tensor in tensors.items():
        if "gate_up" in stacked and name.endswith(stacked["gate_up"]):
            count += 2 * len(tensor) - 1
        elif "down" in stacked and name.endswith(stacked["down"]):
            count += len(tensor) - 1
    return count


def assert_same_tensors(ours: Path | str, source: Path | str) -> None:
    """Same names, dtypes and bits, tensor by tensor."""
    import torch

    a, b = load_tensors(ours), load_tensors(source)
    assert sorted(a) == sorted(b)
    wrong = [k for k in b if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]
    assert not wrong, wrong


def files_of(folder: Path | str) -> dict[str, bytes]:
    """Name -> content of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def apart_from_measured(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same without the section of the model card that says what was measured, the proof above all."""
    head, found, tail = files["README.md"].partition(b"## What was measured")
    assert found
    _, found, rest = tail.partition(b"## How to go on")
    assert found
    return {**files, "README.md": head + rest}


def ds_config(stage: int, ep_size: int | None, dtype: str = "float32", **zero: Any) -> dict[str, Any]:
    """A ds_config for MoETrainer; ``zero`` goes into zero_optimization."""
    config = parity.ds_config(stage, ep_size, bf16={"enabled": dtype == "bfloat16"})
    config["zero_optimization"].update(zero)
    return config


def make_engine(
    source: str, stage: int, ep_size: int | None, dtype: str, frozen: str = "",
    tensor_parallel: dict[str, Any] | None = None, **zero: Any
) -> Any:  # fmt: skip
    """An engine on this rank without a Trainer around it (quicker); the model comes in as recipes load it."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from moe_models.checkpoint.expected import keep_in_fp32
    from moe_models.engine.autoep import register_presets, restore_rotary_buffers
    from moe_models.engine.library_globals import forget_engines

    forget_engines()
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, **zero},
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    if ep_size is not None:
        config["expert_parallel"] = {"enabled": True, "autoep_size": ep_size}
    if tensor_parallel is not None:
        config["tensor_parallel"] = tensor_parallel
    keep_in_fp32(AutoConfig.from_pretrained(source))
    keeper = HfDeepSpeedConfig(copy.deepcopy(config))  # from_pretrained partitions under ZeRO-3 while this lives
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    restore_rotary_buffers(model)
    register_presets()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.keeper = keeper
    return engine


def export_engine(
    engine: Any, source: str, out: str, *, change: Callable[[Any], None] | None = None, **options: Any
) -> Any:
    """Export ``engine`` with the config of ``source``; ``change`` may plant a fault in the tensor source."""
    from transformers import AutoConfig

    from moe_models.checkpoint.export import export
    from moe_models.checkpoint.from_engine import EngineSource
    from moe_models.families.table import FAMILIES

    config = AutoConfig.from_pretrained(source)
    tensors = EngineSource(engine, FAMILIES[config.model_type])
    if change is not None:
        change(tensors)
    export(tensors, FAMILIES[config.model_type], config, Path(out), **options)
    return tensors


def export_unchanged(
    source: str, out: str, stage: int, ep_size: int | None, dtype: str, tensor_parallel: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Engine from ``source``, no step, export to ``out``; returns what the writing rank can say about it."""
    import torch
    from transformers import AutoConfig

    from moe_models.checkpoint.proof import prove_folder, record_logits
    from moe_models.checkpoint.source import is_writer

    engine = make_engine(source, stage, ep_size, dtype, tensor_parallel=tensor_parallel)
    rotary = {b.dtype for n, b in engine.module.named_buffers() if n.endswith("inv_freq")}
    ids, logits = record_logits(engine, AutoConfig.from_pretrained(source).vocab_size)
    tensors = export_engine(engine, source, out)
    proof = prove_folder(Path(out), ids, logits, tensors.fingerprints) if is_writer() else None
    engine.destroy()
    return {"proof": proof, "rotary_fp32": rotary == {torch.float32}}


def train_and_export(
    source: str,
    out: str,
    config: dict[str, Any],
    *,
    steps: int = 2,
    frozen: str = "",
    max_shard_bytes: int = 5 * 10**9,
    **options: Any,
) -> Any:
    """Train, let the Trainer write checkpoint-<steps>, export live to ``out/model``; returns the proof."""
    from moe_models.trainer import MoETrainer

    class Freezing(MoETrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not frozen or frozen not in name)
            super().__init__(model, *args, max_shard_bytes=max_shard_bytes, **kwargs)

    trainer = parity.build_trainer(
        source, out, config, trainer_class=Freezing, max_steps=steps, save_strategy="steps", save_steps=steps, **options
    )
    trainer.train()
    trainer.save_model()
    return trainer.last_proof


@contextmanager
def file_size_limit(limit: int) -> Any:
    """Every write past ``limit`` bytes of a file fails in here, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing_exports(source: str, out: str, stage: int, faults: list[str]) -> dict[str, str]:
    """Export once per fault, each over the export that ``out`` holds already; what each of them raised on this rank."""
    engine = make_engine(source, stage, 2, "float32")
    told = {}
    for fault in faults:
        try:
            _export_with_fault(engine, source, out, fault)
            told[fault] = "no error"
        except Exception as error:
            told[fault] = f"{type(error).__name__}: {error}"
            if type(error).__name__ != "ExportError":
                told[fault] += traceback.format_exc()
    # After all the failures the ranks are still in step.
    export_engine(engine, source, f"{out}-after")
    engine.destroy()
    return told


def _export_with_fault(engine: Any, source: str, out: str, fault: str) -> None:
    import torch.distributed as dist

    from moe_models.checkpoint import export
    from moe_models.checkpoint.hf_folder import HFFolderWriter

    rank = dist.get_rank()
    if fault == "disk full" and rank == 0:
        with file_size_limit(20_000):
            export_engine(engine, source, out, max_shard_bytes=30_000)
    elif fault == "disk full in a companion" and rank == 0:
        save = export.save_companions

        def save_on_a_full_disk(*args: Any, **kwargs: Any) -> None:
            with file_size_limit(200):
                save(*args, **kwargs)

        with parity.planted(export, "save_companions", save_on_a_full_disk):
            export_engine(engine, source, out)
    elif fault == "disk full on another rank" and rank == 1:
        with file_size_limit(20_000):
            export_engine(engine, source, out, max_shard_bytes=30_000)
    elif fault == "writer raises" and rank == 0:
        original_add = HFFolderWriter.add

        def add(self: Any, name: str, tensor: Any) -> None:
            if len(self.seen) >= 9:  # threads add several at a time
                raise RuntimeError("planted")
            original_add(self, name, tensor)

        HFFolderWriter.add = add
        try:
            export_engine(engine, source, out)
        finally:
            HFFolderWriter.add = original_add
    elif fault == "other rank raises" and rank == 1:

        def break_one(tensors: Any) -> None:
            original_dense = tensors.dense

            def dense(name: str) -> Any:
                result = original_dense(name)
                if name == "model.norm.weight":
                    raise MemoryError("planted")
                return result

            tensors.dense = dense

        export_engine(engine, source, out, change=break_one)
    elif fault == "proof fails":

        def prove(folder: Path) -> None:
            raise RuntimeError("planted")

        export_engine(engine, source, out, before_rename=prove)
    elif fault == "foreign folder":
        export_engine(engine, source, str(Path(out).parent))
    elif fault == "lost tensor":

        def forget(tensors: Any) -> None:
            tensors._tensors.pop("model.norm.weight")

        export_engine(engine, source, out, change=forget)
    elif fault == "unknown trained tensor":

        def more(tensors: Any) -> None:
            tensors._unasked["model.layers.9.new.weight"] = None

        export_engine(engine, source, out, change=more)
    else:
        export_engine(engine, source, out, max_shard_bytes=30_000)
