"""Proof that an exported folder is the model: plain transformers loads it and says what the engine said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_models.hf_folder import ExportError, without_zero3

PROBE_SHAPE = (2, 48)
"""Sequences and tokens of the probe; enough for every expert of a common layer to be chosen."""

# Largest allowed |difference| of logits over their largest magnitude. In fp32 only the order of summation differs. In
# 16 bit there is one rounding (2^-8 for bf16) per layer and projection, at random, and a token whose two best experts
# tie may take the other one. A lost or swapped expert moves logits by the order of their own size.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class ExportProof:
    """What was compared. Differences are relative to the largest logit."""

    missing_keys: int
    unexpected_keys: int
    max_logit_difference: float
    median_logit_difference: float
    same_top1: float
    """Share of positions with the same most likely token."""


@torch.no_grad()
def record_logits(engine: Any, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's logits for fixed pseudo-random tokens: (ids [B, T], logits [B, T, V] in fp32 on CPU).

    Collective: expert parallelism needs every rank in the forward pass, so all of them run the same probe.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocab_size, PROBE_SHAPE, generator=generator)
    was_training = engine.module.training
    engine.module.eval()
    device = next(engine.module.parameters()).device
    output = engine(input_ids=ids_BT.to(device), use_cache=False)
    engine.module.train(was_training)
    return ids_BT, output.logits.float().cpu()


@torch.no_grad()
def prove_folder(folder: Path, ids_BT: torch.Tensor, logits_BTV: torch.Tensor) -> ExportProof:
    """Load ``folder`` with ``AutoModelForCausalLM.from_pretrained`` and compare its logits with ``logits_BTV``.

    Raises:
        ExportError: if a key is missing or unexpected, or the logits differ by more than the dtype explains.
    """
    from transformers import AutoModelForCausalLM

    with without_zero3():  # the proof wants the whole model in one process
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected or info["mismatched_keys"]:
        raise ExportError(f"{folder}: reloading finds missing {missing[:4]} and unexpected {unexpected[:4]} keys")
    reloaded_BTV = model.eval()(input_ids=ids_BT, use_cache=False).logits.float()
    scale = logits_BTV.abs().max().clamp_min(1e-12)
    difference_BT = (reloaded_BTV - logits_BTV).abs().amax(-1) / scale
    proof = ExportProof(
        missing_keys=len(missing),
        unexpected_keys=len(unexpected),
        max_logit_difference=difference_BT.max().item(),
        median_logit_difference=difference_BT.median().item(),
        same_top1=(reloaded_BTV.argmax(-1) == logits_BTV.argmax(-1)).float().mean().item(),
    )
    tolerance = RELATIVE_TOLERANCE[model.dtype]
    # The median, in 16 bit: a tie between two experts moves single positions, a lost expert moves most.
    judged = proof.max_logit_difference if model.dtype == torch.float32 else proof.median_logit_difference
    if not judged <= tolerance:
        raise ExportError(
            f"{folder}: the reloaded model differs from the trained one: logits by {judged:.2e} of their size, "
            f"{tolerance:.0e} allowed for {model.dtype}"
        )
    return proof
