"""The adapter (LoRA) of a live engine as PEFT's own folder, complete and proven.

PEFT's own ``save_pretrained`` would leave out the factors of spread experts, without an error. Here each factor comes
from the rank that trains it. What the file must hold is what PEFT itself puts into the same model, built on the meta
device. The proof reads the folder as a user would, with plain ``PeftModel.from_pretrained`` on plain transformers:

- *Bits*: a checksum of every factor, for experts of each expert's by itself, from the rank that owns it against PEFT's
  own reading of the file.
- *Logits* of fixed tokens: that PEFT uses the factors as the engine does. The same tokens without the adapter say how
  much of the answer is the adapter's.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.export import together
from moe_models.checkpoint.from_engine import gather_to_writer, reaches_writer
from moe_models.checkpoint.from_peft import load_adapted
from moe_models.checkpoint.hf_folder import ExportError, is_companion
from moe_models.checkpoint.per_expert import AdapterLayout, fingerprints_of, per_expert, per_expert_config
from moe_models.checkpoint.proof import RELATIVE_TOLERANCE, record_logits
from moe_models.checkpoint.source import fingerprint, is_writer
from moe_models.checkpoint.unread import OnePartAtATime
from moe_models.disk import ends_if_full, free_bytes, full_line
from moe_models.engine.blocks import find_blocks, hf_model
from moe_models.engine.lora import ADAPTER, PEFT_PREFIX, adapter_config, pack, peft_key, unpack
from moe_models.engine.plain_transformers import as_shipped, without_zero3
from moe_models.errors import some_of
from moe_models.families.table import FAMILIES, Family
from moe_models.files import _sync, replace_folder, restore_previous
from moe_models.preflight.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moe_models.routing.callback import Routing

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterProof:
    """What was compared. Differences are relative to the largest logit."""

    equal_tensors: int
    """Factors (those of each expert count) that hold the same bits as in the engine."""
    max_logit_difference: float
    median_logit_difference: float
    same_top1: float
    """Share of positions with the same most likely token."""
    median_without_adapter: float
    """The median difference of the base model alone: how much of the answer is the adapter's."""


# ------------------------------------------------------------------------------------------------ what must be there


def expected_adapter(config: Any, peft_config: Any) -> dict[str, Shape]:
    """PEFT's name -> shape of every tensor in its file for this model, from the meta device."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(_on_meta(config, peft_config), save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fused_keys(config: Any, peft_config: Any) -> dict[str, tuple[str, int]]:
    """Key of each pair of experts' factors in PEFT's file, up to ``.lora_A.weight`` -> (fused tensor, E)."""
    base = _on_meta(config, peft_config).get_base_model()
    keys = {}
    for path, module in base.named_modules():
        if hasattr(module, "parameter_name"):
            keys[PEFT_PREFIX + path] = (module.parameter_name, module.num_experts)
    return keys


def _on_meta(config: Any, peft_config: Any) -> Any:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with without_zero3(), as_shipped(), torch.device("meta"):
        return get_peft_model(AutoModelForCausalLM.from_config(config), copy.deepcopy(peft_config))


# ------------------------------------------------------------------------------------------------ from the engine


class AdapterSource:
    """The adapter of a live engine in PEFT's names and shapes.

    :attr:`fingerprints` fills on the writing rank: ``NAME`` of a dense factor, ``KEY.{e}.lora_A`` and ``.lora_B`` of
    the experts', taken by the rank that owns them.
    """

    def __init__(self, engine: Any, family: Family) -> None:
        self._model = hf_model(engine.module)
        self._family = family
        self._zero3 = engine.zero_optimization_stage() == 3
        self.dtype: torch.dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        self.fingerprints: dict[str, int] = {}

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """PEFT's name -> tensor on the CPU, on the writing rank; elsewhere empty. Every rank calls it."""
        # 1. The factors of spread experts.
        tensors: dict[str, torch.Tensor] = {}
        spread: set[int] = set()
        for block in find_blocks(self._model):
            experts: Any = getattr(block.module, "experts", None)
            for name, key in getattr(experts, "adapter_keys", {}).items():
                pair = experts.factors(name)
                spread.update(id(factor) for factor in pair)
                A_ErD, B_EFr = (
                    self._of_all_experts(factor, block, key, x) for factor, x in zip(pair, "AB", strict=True)
                )
                if A_ErD is not None and B_EFr is not None:
                    tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = pack(A_ErD, B_EFr)

        # 2. All others are the same on every rank.
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad or id(parameter) in spread:
                continue
            with self._gathered(parameter):
                if is_writer():
                    tensors[peft_key(self._family.autoep_to_module(name))] = parameter.detach().to("cpu", copy=True)

        # 3. Fingerprints of those, and of experts that nothing spreads.
        wrapped = dict(self._wrapped_experts())
        for name, tensor in tensors.items():
            key, _, x = name.removesuffix(".weight").rpartition(".")
            if key in wrapped:
                A, B = (tensors[f"{key}.lora_{side}.weight"] for side in "AB")
                of_expert = dict(zip(("lora_A", "lora_B"), unpack(A, B, wrapped[key]), strict=True))[x]
                for expert, factor in enumerate(of_expert):
                    self.fingerprints[f"{key}.{expert}.{x}"] = fingerprint(factor)
            elif f"{key}.0.{x}" not in self.fingerprints:
                self.fingerprints[name] = fingerprint(tensor)
        return tensors

    def _of_all_experts(self, factor: torch.Tensor, block: Any, key: str, x: str) -> torch.Tensor | None:
        """[E_local, ...] of each rank of rank 0's EP group -> [E, ...] on rank 0."""
        with self._gathered(factor):
            if not reaches_writer(block.ep_group):
                return None
            local = factor.detach()
            prints = torch.tensor([fingerprint(expert) for expert in local], device=local.device)
            all_prints = gather_to_writer(prints, block.ep_group)
            gathered = gather_to_writer(local, block.ep_group)
        if all_prints is not None:
            for expert, value in enumerate(all_prints.tolist()):
                self.fingerprints[f"{key}.{expert}.lora_{x}"] = value
        return gathered

    def _wrapped_experts(self) -> Iterator[tuple[str, int]]:
        """Key and number of experts of each of PEFT's own wrappers."""
        for path, module in self._model.named_modules():
            if hasattr(module, "parameter_name") and hasattr(module, "num_experts"):
                yield PEFT_PREFIX + path, module.num_experts

    def _gathered(self, parameter: torch.Tensor) -> Any:
        """Inside, a parameter that ZeRO-3 cut into shares is whole; collective."""
        import deepspeed

        partitioned = self._zero3 and hasattr(parameter, "ds_id")
        return deepspeed.zero.GatheredParameters([parameter], enabled=partitioned)


# ------------------------------------------------------------------------------------------------ the folder


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    model_config: Any,
    tokenizer: Any | None = None,
    layout: AdapterLayout = "fused",
) -> None:
    """Write PEFT's files into ``folder``, which exists; ``tensors`` and ``config`` are those of the fused layout.

    Raises ExportError for a tensor that is missing, too many, misshapen or not finite.
    """
    from safetensors.torch import save_file

    # 1. All of it, and nothing else.
    expected = expected_adapter(model_config, config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ExportError(
            f"{len(missing)} of {len(expected)} tensors of the adapter are missing: {some_of(missing, 8)}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name):
            raise ExportError(
                f"{name}: has shape {list(tensor.shape)}, PEFT expects {expected.get(name, 'no such tensor')}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name}: holds values that are NaN or infinite")
    # 2. To disk.
    kept = {name: tensors[name].contiguous() for name in expected}
    if layout == "per_expert":
        family = FAMILIES[model_config.model_type]
        kept = per_expert(kept, fused_keys(model_config, config), family)
        config = per_expert_config(config, family)
    save_file(kept, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_adapter_files(
    engine: Any, family: Family, model_config: Any, folder: Path, noting: Callable[..., Any]
) -> None:
    """Put PEFT's files into a checkpoint that grows in ``folder``; every rank calls it.

    ``noting``: that of :class:`~moe_models.checkpoint.whole_checkpoints.WholeCheckpoints`.
    """
    tensors = AdapterSource(engine, family).tensors()
    if not is_writer():
        return
    with noting(folder / ADAPTER_WEIGHTS, sum(tensor.nbytes for tensor in tensors.values())):
        write_adapter(folder, tensors, adapter_config(engine.module), model_config)


def export_adapter(
    engine: Any,
    family: Family,
    model_config: Any,
    folder: Path,
    routing: Routing,
    *,
    tokenizer: Any | None = None,
    layout: AdapterLayout = "fused",
) -> AdapterProof | None:
    """Write the adapter of ``engine`` to ``folder``; every rank calls it.

    The folder gets its name when plain PEFT on plain transformers has read it back and answered like the engine.

    Args:
        engine: the DeepSpeed engine, around a model that PEFT wrapped.
        family: the model's row of :data:`~moe_models.families.table.FAMILIES`.
        model_config: the config of the base model, as it came in.
        folder: where the finished folder appears, by rename.
        routing: what watches the routers.
        tokenizer: saved beside the weights if given.
        layout: of the experts' factors.

    Returns:
        What was compared, on the writing rank; None on the others.

    Raises:
        ExportError: on every rank, with the reason; the folder that was there before is untouched.
    """
    with routing.as_exported():
        ids_BT, logits_BTV = record_logits(engine, model_config.vocab_size)
    source = AdapterSource(engine, family)
    tensors = source.tensors()

    def write() -> AdapterProof | None:
        if not is_writer():
            return None
        needed = sum(tensor.nbytes for tensor in tensors.values())
        with ends_if_full(folder, ExportError, needed), staged_adapter(folder, needed) as staging:
            config = adapter_config(engine.module)
            write_adapter(staging, tensors, config, model_config, tokenizer, layout)
            return prove_adapter(
                staging, config, model_config, source.dtype, ids_BT, logits_BTV, source.fingerprints, layout
            )

    return together(write, slow=True)


@contextmanager
def staged_adapter(folder: Path, needed: int) -> Iterator[Path]:
    """A staging folder beside ``folder`` that gets its name when the block ends well, and is gone otherwise.

    ``needed``: bytes of what will be in it. Raises ExportError if the disk has not the room, or if ``folder`` holds
    anything but an earlier adapter.
    """
    final = Path(os.path.realpath(folder))
    restore_previous(final)
    refuse_foreign_adapter(final)
    staging = final.with_name(f".{final.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if free_bytes(staging) < needed:
            raise ExportError(full_line(final, needed))
        yield staging
        for file in staging.rglob("*"):  # a network file system may report a full disk only here
            _sync(file)
        replace_folder(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_foreign_adapter(folder: Path) -> None:
    """Raise :class:`ExportError` if writing to ``folder`` would destroy anything but an earlier adapter."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file, not a folder")
    foreign = []
    for entry in sorted(folder.iterdir()):
        if entry.name not in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "README.md") and not is_companion(entry.name):
            foreign.append(entry.name)
    if foreign:
        raise ExportError(
            f"{folder}: is not empty and is not an earlier adapter (it holds {foreign[0]}); give a new folder"
        )


# ------------------------------------------------------------------------------------------------ the proof


@as_shipped()
@torch.no_grad()
def prove_adapter(
    folder: Path,
    config: Any,
    model_config: Any,
    dtype: torch.dtype,
    ids_BT: torch.Tensor,
    logits_BTV: torch.Tensor,
    fingerprints: Mapping[str, int],
    layout: AdapterLayout = "fused",
) -> AdapterProof:
    """Load ``folder`` with plain PEFT on its plain base model, and compare it with the engine.

    One decoder layer of the base model is in memory at a time (:mod:`moe_models.checkpoint.unread`). On the CPU.

    Args:
        folder: PEFT's folder.
        config: PEFT's config of the fused layout, which names the base model.
        model_config: the base model's config.
        dtype: of the weights that the engine computes with.
        ids_BT: the probe of :func:`~moe_models.checkpoint.proof.record_logits`.
        logits_BTV: the engine's logits for it.
        fingerprints: those of :class:`AdapterSource`.
        layout: of the experts' factors in the folder.

    Raises:
        ExportError: if a factor holds other bits than in the engine, if PEFT does not apply it, or if the logits differ
            by more than the dtype explains.
    """
    from safetensors.torch import load_file

    # 1. The base model, still on disk, and the adapter on it.
    model = load_adapted(folder, config.base_model_name_or_path, config.revision, dtype)
    base = model.get_base_model()
    # 2. Every factor has the engine's bits.
    if layout == "fused":
        reloaded = adapter_fingerprints(base, dtype)
    else:
        keys = fused_keys(model_config, config)
        reloaded = fingerprints_of(load_file(folder / ADAPTER_WEIGHTS), keys, FAMILIES[model_config.model_type], dtype)
    differing = [name for name in {**fingerprints, **reloaded} if fingerprints.get(name) != reloaded.get(name)]
    if differing:
        raise ExportError(
            f"{folder}: the reloaded adapter holds other bits than the trained one in {some_of(differing)}"
        )
    # 3. The answers: with the adapter, and without it.
    OnePartAtATime(base, lambda name, values: None)
    with_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    with model.disable_adapter():
        without_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    largest = logits_BTV.abs().max().clamp_min(1e-12)
    difference_BT = (with_BTV - logits_BTV).abs().amax(-1) / largest
    without_BT = (without_BTV - logits_BTV).abs().amax(-1) / largest
    same_BT = with_BTV.argmax(-1) == logits_BTV.argmax(-1)
    proof = AdapterProof(
        equal_tensors=len(reloaded),
        max_logit_difference=difference_BT.max().item(),
        median_logit_difference=difference_BT.median().item(),
        same_top1=same_BT.float().mean().item(),
        median_without_adapter=without_BT.median().item(),
    )
    # 4. In 16 bit the median is judged: a tie between two experts moves single positions, wrong use of factors most.
    judged = proof.median_logit_difference
    if dtype == torch.float32:
        judged = proof.max_logit_difference
    tolerance = RELATIVE_TOLERANCE[dtype]
    if not judged <= tolerance:  # NaN fails, too
        raise ExportError(
            f"{folder}: the reloaded adapter differs from the trained one: logits by {judged:.2e} of their size, "
            f"{tolerance:.0e} allowed for {dtype}"
        )
    # 5. A small adapter can hide within that. Then it must at least act, and the engine must not answer like the base.
    trained = any(bool(module.lora_B[ADAPTER].weight.any()) for module in _adapted_modules(base).values())
    if trained and torch.equal(with_BTV, without_BTV):
        raise ExportError(f"{folder}: PEFT does not apply the adapter: the logits are those of the base model")
    if proof.median_logit_difference > 2 * proof.median_without_adapter:
        raise ExportError(
            f"{folder}: the trained model answers like its base ({proof.median_without_adapter:.2e} of the logits' "
            f"size apart), not like the reloaded adapter ({proof.median_logit_difference:.2e})"
        )
    return proof


def adapter_fingerprints(base: Any, dtype: torch.dtype) -> dict[str, int]:
    """Fingerprint of every factor in PEFT's layers of ``base``, as :class:`AdapterSource` names them.

    The factors of experts are taken out of the file's tensors by PEFT's own code.
    """
    found: dict[str, int] = {}
    module: Any
    for path, module in _adapted_modules(base).items():
        key = PEFT_PREFIX + path
        if hasattr(module, "parameter_name"):  # PEFT's wrapper of a fused tensor
            B_EFr, A_ErD, _ = module.get_delta_factors(ADAPTER)
            for expert, (A_rD, B_Fr) in enumerate(zip(A_ErD, B_EFr, strict=True)):
                found[f"{key}.{expert}.lora_A"] = fingerprint(A_rD)
                found[f"{key}.{expert}.lora_B"] = fingerprint(B_Fr)
            continue
        for x in ("lora_A", "lora_B"):
            found[f"{key}.{x}.weight"] = fingerprint(getattr(module, x)[ADAPTER].weight.to(dtype))
    return found


def _adapted_modules(base: Any) -> dict[str, Any]:
    return {path: module for path, module in base.named_modules() if ADAPTER in getattr(module, "lora_A", ())}
