"""What the page shows, as one JSON object that fits into it.

Loads and top tokens are counted over everything that was routed; routing token by token is kept for as many samples of
the text as fit. The page itself only lays samples over ranks and adds up.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from moe_models.report.record import Recording

SAMPLE = 48
"""Tokens of one sample: divides evenly over 2, 4, 8 and 16 ranks."""
MAX_SAMPLE_BYTES = 450_000
MAX_SAMPLES = 40
MAX_TOP_TOKENS = 30_000
"""Over all experts of all layers."""
FEWEST = 3
"""Times that an expert has to see a token before the token can be one of its top tokens."""


def build(recording: Recording, num_experts: int, piece: Callable[[int], str]) -> dict[str, Any]:
    """The parts of the page's data that follow from a recording; ``piece`` makes a token id readable."""
    L, N, K = recording.choices_LNK.shape
    ids_N = [token for row in recording.rows for token in row]
    load_LE = [
        torch.bincount(layer.long().flatten(), minlength=num_experts).tolist() for layer in recording.choices_LNK
    ]
    starts, size = _sample_starts(recording.rows, L, K)
    picked = torch.tensor([[start + offset for offset in range(size)] for start in starts])
    scale = float(recording.weights_LNK.max()) or 1.0
    top = _top_tokens(recording, ids_N, load_LE)
    shown = [ids_N[index] for index in picked.flatten().tolist()]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys([*shown, *(t for t, _, _ in _flatten(top))]))}
    wide = num_experts > 256
    choices = recording.choices_LNK[:, picked].transpose(0, 1)  # [samples, L, size, K]
    weights = recording.weights_LNK[:, picked].transpose(0, 1)
    return {
        "routed": N,
        "top_k": K,
        "blocks": recording.blocks,
        "pieces": [piece(token) for token in vocabulary],
        "load": load_LE,
        "samples": {
            "count": len(starts),
            "size": size,
            "tokens": [[vocabulary[ids_N[start + offset]] for offset in range(size)] for start in starts],
            "wide": wide,
            "choices": _base64(choices.to(torch.int16 if wide else torch.uint8)),
            "weights": _base64((weights / scale * 255).round().to(torch.uint8)),
            "weight_unit": scale / 255,
        },
        # Per expert: token, times the expert saw it, times it was routed at all.
        "top": [[[[vocabulary[t], seen, of] for t, seen, of in expert] for expert in layer] for layer in top],
    }


def _sample_starts(rows: list[list[int]], num_layers: int, top_k: int) -> tuple[list[int], int]:
    """Where samples begin, spread over the text, none across the end of a row; and how long they are."""
    size = min(SAMPLE, max(len(row) for row in rows))
    starts: list[int] = []
    at = 0
    for row in rows:
        starts += range(at, at + len(row) - size + 1, size)
        at += len(row)
    room = max(1, min(MAX_SAMPLES, MAX_SAMPLE_BYTES // (size * num_layers * top_k * 2)))
    kept = min(room, len(starts))
    return [starts[n * len(starts) // kept] for n in range(kept)], size


def _top_tokens(
    recording: Recording, ids_N: list[int], load_LE: list[list[int]]
) -> list[list[list[tuple[int, int, int]]]]:
    """For each expert the tokens that it sees more often than its share of all tokens would give it.

    Ranked by seen x log(seen / expected), the token's part of the divergence between the expert's tokens and all.
    """
    L, N, _ = recording.choices_LNK.shape
    routed = Counter(ids_N)
    most = max(2, min(8, MAX_TOP_TOKENS // sum(map(len, load_LE))))
    top: list[list[list[tuple[int, int, int]]]] = []
    for layer in range(L):
        seen: list[Counter[int]] = [Counter() for _ in load_LE[layer]]
        for token, experts in zip(ids_N, recording.choices_LNK[layer].tolist(), strict=True):
            for expert in experts:
                seen[expert][token] += 1
        top.append([])
        for expert, tokens in enumerate(seen):
            share = load_LE[layer][expert] / N
            ranked = sorted(
                (-count * math.log(count / (routed[token] * share)), token, count)
                for token, count in tokens.items()
                if count >= min(FEWEST, routed[token]) and count > routed[token] * share and routed[token] >= FEWEST
            )
            top[-1].append([(token, count, routed[token]) for _, token, count in ranked[:most]])
    return top


def _flatten(top: list[list[list[tuple[int, int, int]]]]) -> list[tuple[int, int, int]]:
    return [entry for layer in top for expert in layer for entry in expert]


def _base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")
