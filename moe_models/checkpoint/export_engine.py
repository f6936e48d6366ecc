"""From a live engine to a Hugging Face folder that is proven to be the trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_models.checkpoint.export import export
from moe_models.checkpoint.from_engine import EngineSource
from moe_models.checkpoint.merged import MergedSource
from moe_models.checkpoint.origin import Comparison, Origin, compare, refuse_unchanged
from moe_models.checkpoint.proof import ExportProof, prove_folder, record_logits
from moe_models.engine.lora import is_adapted
from moe_models.engine.native import exact_routing
from moe_models.families.table import Family
from moe_models.routing.callback import Routing


def export_engine(
    engine: Any,
    family: Family,
    config: Any,
    folder: Path,
    routing: Routing,
    *,
    add_files: Callable[[Path, ExportProof], None],
    origin: Origin | None = None,
    trained_steps: int = 0,
    **options: Any,
) -> tuple[ExportProof, Comparison | None] | None:
    """Write the model of ``engine`` to ``folder``, an adapter added to its weights; every rank calls it.

    The folder is reloaded with plain transformers and compared with the engine, bits and logits, before it gets its
    name.

    Args:
        engine: the DeepSpeed engine.
        family: the model's row of :data:`~moe_models.families.table.FAMILIES`.
        config: the config to export, as it came in.
        folder: where the finished folder appears, by rename.
        routing: what watches and balances the routers. A selection bias that the architecture has no place for is
            left out of the comparison and written beside the weights.
        add_files: called with the staged folder and the proof on the writing rank, to put more files into it.
        origin: the checkpoint that training started from, if there is one.
        trained_steps: steps that must have changed something.
        options: of :func:`~moe_models.checkpoint.export.export`.

    Returns:
        What was compared with the engine and with the origin, on the writing rank; None on the others.

    Raises:
        ExportError: on every rank, with the reason; the folder that was there before is untouched.
    """
    # 1. What the engine answers to the probe, routed as the exported model will route.
    with exact_routing(engine.module), routing.as_exported():
        ids_BT, logits_BTV = record_logits(engine, config.vocab_size)

    # 2. Every tensor from the rank that owns it; its fingerprint is taken there.
    source = EngineSource(engine, family)
    if is_adapted(engine.module):
        source = MergedSource(engine, family)
    proofs: list[tuple[ExportProof, Comparison | None]] = []

    # 3. The comparisons, while the folder still has its staging name.
    def prove(staged: Path) -> None:
        passed_on = origin.unexpected if origin is not None else frozenset()
        proof = prove_folder(staged, ids_BT, logits_BTV, source.fingerprints, passed_on)
        comparison = None
        if origin is not None:
            comparison = compare(staged, origin)
            if trained_steps > 0:
                refuse_unchanged(comparison, origin, trained_steps)
        proofs.append((proof, comparison))
        if routing.left_out:
            routing.save(staged)
        add_files(staged, proof)

    export(source, family, config, folder, before_rename=prove, origin=origin, **options)
    return proofs[0] if proofs else None
