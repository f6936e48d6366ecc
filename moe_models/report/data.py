"""What the page shows, as one JSON object that fits into it.

Loads and top tokens are counted over everything that was routed. Routing token by token is kept for as many samples of
the text as fit. The page itself only lays samples over ranks and adds up.

Shape suffixes: N routed tokens, S samples, T tokens of one sample; L, E, K as in the whole package.
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
"""Of all samples in the page; each choice takes at most two bytes, and its weight one more."""
MAX_SAMPLES = 40
MAX_TOP_TOKENS = 30_000
"""Over all experts of all layers."""
FEWEST = 3
"""Occurrences from which a token can be one of an expert's top tokens, in the text and at the expert."""

TopTokens = list[list[list[tuple[int, int, int]]]]
"""[layer][expert] -> (token id, times the expert saw it, times it was routed at all), the most telling first."""


def build(recording: Recording, num_experts: int, piece: Callable[[int], str]) -> dict[str, Any]:
    """The parts of the page's data that follow from a recording; ``piece`` makes a token id readable."""
    L, N, K = recording.choices_LNK.shape
    ids_N = [token for row in recording.rows for token in row]

    # 1. Load: how many of the N x K choices each expert got.
    load_LE = [_count(choices_NK, num_experts) for choices_NK in recording.choices_LNK]

    # 2. Top tokens: what each expert sees more often than its load explains.
    top = _top_tokens(recording, ids_N, load_LE)

    # 3. Samples: stretches of the text whose routing is kept token by token.
    starts_S, size = _sample_starts(recording.rows, L, K)
    at_ST = torch.tensor([[start + offset for offset in range(size)] for start in starts_S])
    choices_SLTK = recording.choices_LNK[:, at_ST].transpose(0, 1)
    weights_SLTK = recording.weights_LNK[:, at_ST].transpose(0, 1)

    # 4. Vocabulary: tokens that the page shows, in order of appearance; it refers to them by their place in this list.
    sample_ids_ST = [[ids_N[index] for index in sample] for sample in at_ST.tolist()]
    place_of: dict[int, int] = {}
    for sample in sample_ids_ST:
        for token in sample:
            place_of.setdefault(token, len(place_of))
    for layer in top:
        for expert in layer:
            for token, _, _ in expert:
                place_of.setdefault(token, len(place_of))

    # 5. Bytes: weights in 255 steps of the largest one, expert ids as small as they fit.
    scale = float(recording.weights_LNK.max()) or 1.0
    wide = num_experts > 256
    id_type = torch.int16 if wide else torch.uint8
    return {
        "routed": N,
        "top_k": K,
        "blocks": recording.blocks,
        "pieces": [piece(token) for token in place_of],
        "load": load_LE,
        "samples": {
            "count": len(starts_S),
            "size": size,
            "tokens": [[place_of[token] for token in sample] for sample in sample_ids_ST],
            "wide": wide,
            "choices": _base64(choices_SLTK.to(id_type)),
            "weights": _base64((weights_SLTK / scale * 255).round().to(torch.uint8)),
            "weight_unit": scale / 255,
        },
        # For each expert: [token, times the expert saw it, times it was routed at all].
        "top": [
            [[[place_of[token], seen, routed] for token, seen, routed in expert] for expert in layer] for layer in top
        ],
    }


def _count(choices_NK: torch.Tensor, num_experts: int) -> list[int]:
    counts: list[int] = torch.bincount(choices_NK.long().flatten(), minlength=num_experts).tolist()
    return counts


def _sample_starts(rows: list[list[int]], num_layers: int, top_k: int) -> tuple[list[int], int]:
    """(token index where each sample begins, tokens of a sample): spread over the text, none across the end of a row.

    Rows shorter than a sample have none; if all rows are short, samples are as long as the longest.
    """
    size = min(SAMPLE, max(len(row) for row in rows))
    # 1. Every place that a sample can have, side by side.
    starts: list[int] = []
    row_start = 0
    for row in rows:
        starts += range(row_start, row_start + len(row) - size + 1, size)
        row_start += len(row)
    # 2. As many as the page has room for, evenly spaced among them.
    sample_bytes = size * num_layers * top_k * 2
    room = max(1, min(MAX_SAMPLES, MAX_SAMPLE_BYTES // sample_bytes))
    kept = min(room, len(starts))
    return [starts[number * len(starts) // kept] for number in range(kept)], size


def _top_tokens(recording: Recording, ids_N: list[int], load_LE: list[list[int]]) -> TopTokens:
    """For each expert the tokens that it sees more often than its share of all tokens would give it.

    An expert with load 40 of 100 tokens is expected to see 40% of the occurrences of every token. Tokens are ranked by
    seen x log(seen / expected), the token's part of the divergence between the expert's tokens and all tokens.
    """
    L, N, _ = recording.choices_LNK.shape
    routed = Counter(ids_N)
    most = max(2, min(8, MAX_TOP_TOKENS // sum(map(len, load_LE))))
    top: TopTokens = []
    for layer in range(L):
        seen_E = _tokens_of_each_expert(ids_N, recording.choices_LNK[layer], len(load_LE[layer]))
        top_of_layer = []
        for load, seen in zip(load_LE[layer], seen_E, strict=True):
            top_of_layer.append(_most_telling(seen, routed, load / N)[:most])
        top.append(top_of_layer)
    return top


def _tokens_of_each_expert(ids_N: list[int], choices_NK: torch.Tensor, num_experts: int) -> list[Counter[int]]:
    """For each expert: token id -> how often it chose the token."""
    seen_E: list[Counter[int]] = [Counter() for _ in range(num_experts)]
    for token, experts in zip(ids_N, choices_NK.tolist(), strict=True):
        for expert in experts:
            seen_E[expert][token] += 1
    return seen_E


def _most_telling(seen: Counter[int], routed: Counter[int], share: float) -> list[tuple[int, int, int]]:
    """(token, seen, routed) of the tokens that an expert with this ``share`` of all tokens prefers, ranked."""
    ranked = []
    for token, count in seen.items():
        expected = routed[token] * share
        if routed[token] < FEWEST or count < FEWEST or count <= expected:
            continue
        ranked.append((-count * math.log(count / expected), token, count))
    ranked.sort()
    return [(token, count, routed[token]) for _, token, count in ranked]


def _base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")
