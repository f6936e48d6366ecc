"""Merging a PEFT folder into its base model, and rewriting it: no GPU, no engine, each with its proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_models.checkpoint.adapter import (
    AdapterProof,
    adapter_fingerprints,
    prove_adapter,
    staged_adapter,
    write_adapter,
)
from moe_models.checkpoint.card import RunFacts, facts_of_base, measured_in, read_facts, write_card
from moe_models.checkpoint.export import export
from moe_models.checkpoint.from_peft import PeftSource, answer, load_adapted, read_adapter_config
from moe_models.checkpoint.hf_folder import DEFAULT_MAX_SHARD_BYTES
from moe_models.checkpoint.origin import Comparison, compare, origin_folder, read_origin
from moe_models.checkpoint.per_expert import AdapterLayout
from moe_models.checkpoint.proof import ExportProof, prove_folder
from moe_models.engine.lora import adapter_config
from moe_models.errors import UserError
from moe_models.families.table import FAMILIES
from moe_models.preflight.adapters import ADAPTER_WEIGHTS


def base_of(adapter: Path, base: str | None = None) -> tuple[str, str | None]:
    """(base model, revision) of a PEFT folder; ``base`` instead of the one that it names. Raises UserError."""
    config = read_adapter_config(adapter)
    if base is not None:
        return base, None
    named = config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter}: its adapter_config.json names no base model; give --base_model")
    return str(named), config.get("revision")


def merge_folder(
    adapter: Path,
    folder: Path,
    *,
    base: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ExportProof, Comparison | None]:
    """Write the base model with ``adapter`` added to its weights, as a Hugging Face folder under hub names.

    The folder is reloaded with plain transformers and must answer like plain PEFT on the base model. What the base
    model's folder holds beside the trained class goes through unchanged.

    Args:
        adapter: PEFT's folder, or a checkpoint of a run that trained an adapter.
        folder: where the finished folder appears, by rename.
        base: folder or hub id of the base model; otherwise the one that ``adapter`` names.
        max_shard_bytes: largest safetensors file.
        progress: called with (tensors done, tensors in all).

    Returns:
        What was compared with plain PEFT, and with the base model's folder where it has safetensors.

    Raises:
        UserError: for an adapter that is not plain LoRA, or that does not fit its base.
        ExportError: if the folder cannot be completed, or does not answer like PEFT.
    """
    name, revision = base_of(adapter, base)
    # 1. What plain PEFT answers. The hooks of this pass stay on its model, so the weights come from another one.
    probed = load_adapted(adapter, name, revision)
    model_type = probed.get_base_model().config.model_type
    if model_type not in FAMILIES:
        raise UserError(f"{name}: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    ids_BT, logits_BTV = answer(probed)
    # 2. Weights, one after the other.
    model = load_adapted(adapter, name, revision)
    base_model = model.get_base_model()
    source = PeftSource(model)
    family = FAMILIES[model_type]
    base_folder = origin_folder(name, revision)
    origin = read_origin(base_folder, family, base_model.config) if base_folder is not None else None
    proofs: list[tuple[ExportProof, Comparison | None]] = []

    def prove(staged: Path) -> None:
        passed_on = origin.unexpected if origin is not None else frozenset()
        proof = prove_folder(staged, ids_BT, logits_BTV, source.fingerprints, passed_on)
        proofs.append((proof, compare(staged, origin) if origin is not None else None))
        write_card(staged, "merged", _facts(adapter, name, revision), measured_in(adapter, proof))

    export(
        source,
        family,
        base_model.config,
        folder,
        tokenizer=_tokenizer(adapter, name, revision),
        generation_config=base_model.generation_config,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        before_rename=prove,
        origin=origin,
    )
    return proofs[0]


def rewrite_adapter(
    adapter: Path, folder: Path, *, base: str | None = None, layout: AdapterLayout = "fused"
) -> AdapterProof:
    """Write the adapter of a PEFT folder or checkpoint to ``folder``, in ``layout``; proven as a run's own is.

    Args:
        adapter: PEFT's folder in the fused layout, or a checkpoint of a run that trained an adapter.
        folder: where the finished folder appears, by rename.
        base: folder or hub id of the base model; otherwise the one that ``adapter`` names.
        layout: of the experts' factors.

    Raises:
        UserError: for an adapter that is not plain LoRA, or that does not fit its base.
        ExportError: if it is not complete, or not in the fused layout.
    """
    from safetensors.torch import load_file

    name, revision = base_of(adapter, base)
    model = load_adapted(adapter, name, revision)
    config = adapter_config(model)
    config.base_model_name_or_path = name
    config.revision = revision
    base_model = model.get_base_model()
    fingerprints = adapter_fingerprints(base_model, base_model.dtype)
    ids_BT, logits_BTV = answer(model)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with staged_adapter(folder, needed) as staging:
        write_adapter(staging, tensors, config, base_model.config, _tokenizer(adapter, name, revision), layout)
        proof = prove_adapter(
            staging, config, base_model.config, base_model.dtype, ids_BT, logits_BTV, fingerprints, layout
        )
        write_card(staging, "adapter", _facts(adapter, name, revision), measured_in(adapter, proof))
        return proof


def _facts(adapter: Path, base: str, revision: str | None) -> RunFacts:
    """What is known of the run that trained the adapter; its base model is the one that it is on now."""
    return dataclasses.replace(read_facts(adapter), **facts_of_base(base, revision))


def _tokenizer(adapter: Path, base: str, revision: str | None) -> Any:
    """The adapter's tokenizer, else that of the base model; None where there is none."""
    from transformers import AutoTokenizer

    if (adapter / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(adapter)
    try:
        return AutoTokenizer.from_pretrained(base, revision=revision)
    except (OSError, ValueError):
        return None
