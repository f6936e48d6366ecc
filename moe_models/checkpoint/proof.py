"""Proof that an exported folder is the model: loaded by plain transformers it has the same bits and the same logits.

Two comparisons, because each is blind where the other sees:

- *Bits*: a checksum of every tensor, and of every projection of every expert, against the reloaded model. The rank that
  owns the weights takes it from the engine's memory. It is exact in every dtype and needs no token to visit an expert.
- *Logits* of fixed tokens: that the tensors are also used as the engine uses them (names, gate against up, rotary
  embedding, routing). In 16 bit it is coarse: one wrong expert of many moves few tokens, and so do ties in routing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.hf_folder import ExportError
from moe_models.checkpoint.source import fingerprints as fingerprints_of
from moe_models.checkpoint.unread import OnePartAtATime, unread_tensors
from moe_models.engine.blocks import split_gate_up
from moe_models.engine.plain_transformers import as_shipped, without_zero3
from moe_models.errors import some_of

PROBE_SHAPE = (2, 48)
"""Sequences and tokens of the probe; enough for every expert of a common layer to be chosen."""

# Largest allowed |difference| of logits over their largest magnitude. In fp32 only the order of summation differs. In
# 16 bit there is one rounding (2^-8 for bf16) per layer and projection, at random, and a token whose two best experts
# tie may take the other one: medians of 5e-3 were seen with 3 layers, and they grow with the root of the depth. Wrong
# use of the weights (gate for up, say) moves all logits by their own size.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class ExportProof:
    """What was compared. Differences are relative to the largest logit."""

    missing_keys: int
    unexpected_keys: int
    equal_tensors: int
    """Tensors (each projection of each expert counts) that hold the same bits as in the engine."""
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


@as_shipped()
@torch.no_grad()
def prove_folder(
    folder: Path,
    ids_BT: torch.Tensor,
    logits_BTV: torch.Tensor,
    fingerprints: Mapping[str, int],
    passed_on: Collection[str] = (),
) -> ExportProof:
    """Load ``folder`` with ``AutoModelForCausalLM.from_pretrained`` and compare it with the engine.

    One decoder layer is in memory at a time: it is read when it is about to compute, its checksums are taken from the
    very values that compute, and it is dropped (:mod:`moe_models.checkpoint.unread`). On the CPU, in the dtype of the
    folder.

    Args:
        folder: the Hugging Face folder.
        ids_BT: the probe of :func:`record_logits`.
        logits_BTV: the engine's logits for it.
        fingerprints: those of an :class:`~moe_models.checkpoint.from_engine.EngineSource`.
        passed_on: keys that the class has no place for, as transformers names them; the origin has them, too.

    Raises:
        ExportError: if a key is missing or unexpected, a tensor holds other bits than the engine, or the logits differ
            by more than the dtype explains.
    """
    from transformers import AutoModelForCausalLM

    # 1. Every key of the model is in the folder, and nothing else.
    with without_zero3(), unread_tensors():  # the whole model, in one process
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    missing = sorted(info["missing_keys"])
    unexpected = sorted(set(info["unexpected_keys"]) - set(passed_on))
    if missing or unexpected or info["mismatched_keys"]:
        raise ExportError(f"{folder}: reloading finds missing {missing[:4]} and unexpected {unexpected[:4]} keys")
    # 2. The model answers the probe, and every tensor that it uses leaves its fingerprint.
    tied = tied_in(model)
    reloaded: dict[str, int] = {}

    def take(name: str, values: torch.Tensor) -> None:
        if name not in tied:
            reloaded.update(tensor_fingerprints(name, values))

    parts = OnePartAtATime(model, take)
    reloaded_BTV = model.eval()(input_ids=ids_BT, use_cache=False).logits.float()
    parts.read_the_rest()
    # 3. Every tensor holds the engine's bits.
    differing = [name for name in {**fingerprints, **reloaded} if fingerprints.get(name) != reloaded.get(name)]
    if differing:
        raise ExportError(f"{folder}: the reloaded model holds other bits than the trained one in {some_of(differing)}")
    # 4. The answer is the engine's.
    largest = logits_BTV.abs().max().clamp_min(1e-12)
    difference_BT = (reloaded_BTV - logits_BTV).abs().amax(-1) / largest
    same_BT = reloaded_BTV.argmax(-1) == logits_BTV.argmax(-1)
    proof = ExportProof(
        missing_keys=len(missing),
        unexpected_keys=len(unexpected),
        equal_tensors=len(reloaded),
        max_logit_difference=difference_BT.max().item(),
        median_logit_difference=difference_BT.median().item(),
        same_top1=same_BT.float().mean().item(),
    )
    # In 16 bit the median is judged: a tie between two experts moves single positions, wrong use of the weights most.
    judged = proof.median_logit_difference
    if model.dtype == torch.float32:
        judged = proof.max_logit_difference
    tolerance = RELATIVE_TOLERANCE[model.dtype]
    if not judged <= tolerance:  # NaN fails, too
        raise ExportError(
            f"{folder}: the reloaded model differs from the trained one: logits by {judged:.2e} of their size, "
            f"{tolerance:.0e} allowed for {model.dtype}"
        )
    return proof


def model_fingerprints(model: Any) -> Iterator[tuple[str, int]]:
    """Fingerprint of every tensor of an HF model, experts one by one, under the names that ``EngineSource`` gives."""
    tied = tied_in(model)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield from tensor_fingerprints(name, tensor)


def tied_in(model: Any) -> set[str]:
    """Names of the tensors that are the same as another one."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def tensor_fingerprints(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, int]]:
    """The fingerprint of one tensor; of each expert's gate, up and down where it holds those of a block."""
    experts, _, _ = name.rpartition(".")
    parts = {name: tensor}
    if name.endswith(".experts.gate_up_proj"):
        gate_EFD, up_EFD = split_gate_up(tensor)
        parts = {f"{experts}.{e}.gate": gate_FD for e, gate_FD in enumerate(gate_EFD)}
        parts |= {f"{experts}.{e}.up": up_FD for e, up_FD in enumerate(up_EFD)}
    elif name.endswith(".experts.down_proj"):
        parts = {f"{experts}.{e}.down": down_DF for e, down_DF in enumerate(tensor)}
    return zip(parts, fingerprints_of(parts.values()), strict=True)
