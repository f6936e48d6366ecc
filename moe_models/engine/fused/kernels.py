"""The functions of ``rows.py`` and the router as Triton kernels: one launch each, and three for :func:`order`.

Only GPU processes import this module: Triton is no part of torch's CPU builds. Torch has no operation for any of them:
it would sort (an ``argsort`` of expert numbers, the backward pass of an indexed read), or write and read rows once more
for each step. Matrix products stay torch's (``torch.nn.functional.grouped_mm``).

Shapes are those of ``rows.py``. Kernels read how many rows are in use from the device (``ends + E - 1``), so that the
host never waits for it. ``tests/engine/test_fused_kernels.py`` compares each with the torch version, in Triton's
interpreter where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024
"""Choices that one program of :func:`order` sorts."""
GATHERED = 8
"""Rows that one program of :func:`gather` reads."""
SCAN = 8192
"""Counters that the one program in the middle of :func:`order` holds at a time."""


# ------------------------------------------------------------------------------------------------------ order by expert


@triton.jit
def _count(ids, counts, choices, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How often each expert occurs in this tile. Bin E is for experts of other ranks, and for what is past the end."""
    tile = tl.program_id(0)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + place, mask=place < choices, other=E).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    tl.store(counts + tile * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit
def _scan(counts, ends, tiles, E: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """One program: counts become the row at which each tile's rows of each expert begin; and where each expert ends."""
    expert = tl.arange(0, BINS)
    step = tl.arange(0, ROWS)
    # 1. Rows of each expert, and where they end.
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, tiles, ROWS):
        there = (first + step)[:, None] < tiles
        at = counts + (first + step)[:, None] * BINS + expert[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0), 0)
    end = tl.cumsum(total, 0)
    tl.store(ends + expert, end, mask=expert < E)
    # 2. The tiles one after the other from there.
    begin = end - total
    for first in range(0, tiles, ROWS):
        there = (first + step)[:, None] < tiles
        at = counts + (first + step)[:, None] * BINS + expert[None, :]
        count = tl.load(at, mask=there, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + begin[None, :], mask=there)
        begin += tl.sum(count, 0)


@triton.jit
def _place(
    ids, begins, token, choice, row, choices,
    K: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort this tile by expert, and write each choice's row and each row's choice."""
    # 1. Sorted by expert, then by place: both are in the key.
    tile = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    place = tile * BLOCK + local
    expert = tl.load(ids + place, mask=place < choices, other=E).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    key = tl.sort(expert * BLOCK + local)
    expert = key // BLOCK
    place = tile * BLOCK + key % BLOCK
    # 2. A row is where the tile's rows of its expert begin, plus its place among them.
    count = tl.histogram(expert, BINS)
    first = tl.cumsum(count, 0) - count
    begin = tl.load(begins + tile * BINS + tl.arange(0, BINS)) - first
    at = tl.gather(begin, expert, 0) + local
    # 3. Both ways.
    there = place < choices
    held = there & (expert < E)
    tl.store(row + place, tl.where(expert < E, at, -1), mask=there)
    tl.store(choice + at, place, mask=held)
    tl.store(token + at, place // K, mask=held)


def order(ids_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`moe_models.engine.fused.rows.order`."""
    ids_TK = ids_TK.contiguous()
    T, K = ids_TK.shape
    R = T * K
    bins = triton.next_power_of_2(E + 1)
    tiles = triton.cdiv(R, TILE)
    device = ids_TK.device
    counts = torch.empty(tiles, bins, dtype=torch.int32, device=device)
    ends_E = torch.empty(E, dtype=torch.int32, device=device)
    token_R, choice_R, row_R = torch.empty(3, R, dtype=torch.int32, device=device).unbind(0)
    _count[(tiles,)](ids_TK, counts, R, E, bins, TILE, num_warps=4)
    rows = max(1, min(triton.next_power_of_2(tiles), SCAN // bins, 64))
    _scan[(1,)](counts, ends_E, tiles, E, bins, rows, num_warps=8)
    _place[(tiles,)](ids_TK, counts, token_R, choice_R, row_R, R, K, E, bins, TILE, num_warps=4)
    return ends_E, token_R, choice_R, row_R.view(T, K)


# --------------------------------------------------------------------------------------------------- gather and combine


@triton.jit
def _gather(x, token, in_use, out, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows in one program, so that their reads are under way together."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.load(in_use)
    if first_row < count:
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            for i in tl.static_range(ROWS):
                row = first_row + i
                there = (column < D) & (row < count)
                source = tl.load(token + row, mask=row < count, other=0).to(tl.int64)
                value = tl.load(x + source * D + column, mask=there)
                tl.store(out + row * D + column, value, mask=there)


def gather(x_TD: torch.Tensor, token_R: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """:func:`moe_models.engine.fused.rows.gather`."""
    x_TD = x_TD.contiguous()
    R = token_R.numel()
    D = x_TD.shape[1]
    out_RD = torch.empty(R, D, dtype=x_TD.dtype, device=x_TD.device)
    block = min(2048, triton.next_power_of_2(D))
    _gather[(triton.cdiv(R, GATHERED),)](x_TD, token_R, ends_E[-1:], out_RD, D, block, GATHERED, num_warps=8)
    return out_RD


@triton.jit
def _combine(
    rows, more, row, scores, out,
    D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WEIGHED: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            source = tl.load(row + token * K + k).to(tl.int64)
            there = (column < D) & (source >= 0)
            value = tl.load(rows + source * D + column, mask=there, other=0.0).to(tl.float32)
            if MORE:
                value += tl.load(more + source * D + column, mask=there, other=0.0).to(tl.float32)
            if WEIGHED:
                value *= tl.load(scores + token * K + k).to(tl.float32)
            total += value
        tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


def combine(
    rows_RD: torch.Tensor, row_TK: torch.Tensor, scores_TK: torch.Tensor | None, more_RD: torch.Tensor | None
) -> torch.Tensor:
    """:func:`moe_models.engine.fused.rows.combine`."""
    T, K = row_TK.shape
    D = rows_RD.shape[1]
    out_TD = torch.empty(T, D, dtype=rows_RD.dtype, device=rows_RD.device)
    more = more_RD is not None
    weighed = scores_TK is not None
    block = min(1024, triton.next_power_of_2(D))
    _combine[(T,)](
        rows_RD, more_RD if more else rows_RD, row_TK, scores_TK if weighed else row_TK, out_TD,
        D, K, block, weighed, more, num_warps=4,
    )  # fmt: skip
    return out_TD


# --------------------------------------------------------------------------------------------------------------- SwiGLU


@triton.jit
def _swiglu(gate, up, in_use, out, F: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    count = tl.load(in_use).to(tl.int64) * F
    if first < count:
        place = first + tl.arange(0, BLOCK)
        there = place < count
        g = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
        tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=there)


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """:func:`moe_models.engine.fused.rows.swiglu`."""
    out_RF = torch.empty_like(gate_RF)
    grid = (triton.cdiv(gate_RF.numel(), 2048),)
    _swiglu[grid](gate_RF, up_RF, ends_E[-1:], out_RF, gate_RF.shape[1], 2048, num_warps=8)
    return out_RF


@triton.jit
def _swiglu_backward(
    dh, gate, up, choice, scores, in_use, dgate, dup, weighted, dscores, F: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(in_use):
        at = tl.load(choice + row)
        score = tl.load(scores + at).to(tl.float32)
        dscore = tl.zeros([BLOCK], tl.float32)
        for first in range(0, F, BLOCK):
            column = first + tl.arange(0, BLOCK)
            there = column < F
            place = row * F + column
            d = tl.load(dh + place, mask=there, other=0.0).to(tl.float32)
            g = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
            u = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
            s = tl.sigmoid(g)
            h = g * s * u
            dscore += d * h
            d *= score
            tl.store(dgate + place, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=there)
            tl.store(dup + place, (d * g * s).to(dup.dtype.element_ty), mask=there)
            tl.store(weighted + place, (h * score).to(weighted.dtype.element_ty), mask=there)
        tl.store(dscores + at, tl.sum(dscore, 0))


def swiglu_backward(
    dh_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor, scores_TK: torch.Tensor, choice_R: torch.Tensor,
    ends_E: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`moe_models.engine.fused.rows.swiglu_backward`."""
    R, F = gate_RF.shape
    dgate_RF = torch.empty_like(gate_RF)
    dup_RF = torch.empty_like(gate_RF)
    weighted_RF = torch.empty_like(gate_RF)
    dscores_TK = torch.zeros_like(scores_TK)
    warps = 4 if F <= 1024 else 8
    _swiglu_backward[(R,)](
        dh_RF, gate_RF, up_RF, choice_R, scores_TK, ends_E[-1:], dgate_RF, dup_RF, weighted_RF, dscores_TK,
        F, min(2048, triton.next_power_of_2(F)), num_warps=warps,
    )  # fmt: skip
    return dgate_RF, dup_RF, weighted_RF, dscores_TK


# --------------------------------------------------------------------------------------------------------------- router


@triton.jit
def _route(
    logits, bias, scores, ids, counts, log_sum, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr, NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """One token: softmax, its K largest (the first of equal ones), their scores, and the counts of these experts."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    logit = tl.load(logits + token * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit, 0)
    power = tl.exp(logit - largest)
    total = tl.sum(power, 0)
    score = power / total
    left = score
    if BIASED:
        left += tl.load(bias + expert, mask=expert < E, other=0.0)
    left = tl.where(expert < E, left, float("-inf"))
    place = tl.arange(0, PLACES)
    chosen = tl.zeros([PLACES], tl.int32)
    kept = tl.zeros([PLACES], tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(left, 0)
        chosen = tl.where(place == k, best, chosen)
        kept = tl.where(place == k, tl.sum(tl.where(expert == best, score, 0.0), 0), kept)
        left = tl.where(expert == best, float("-inf"), left)
    if NORMALISE:
        kept = kept / (tl.sum(kept, 0) + 1e-20)
    tl.store(scores + token * K + place, kept * scale, mask=place < K)
    tl.store(ids + token * K + place, chosen.to(ids.dtype.element_ty), mask=place < K)
    tl.atomic_add(counts + chosen, 1, mask=place < K)
    tl.store(log_sum + token, largest + tl.log(total))


@triton.jit
def _route_backward(
    logits, log_sum, ids, dscores, dlogits, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    logit = tl.load(logits + token * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    score = tl.exp(logit - tl.load(log_sum + token))
    chosen = tl.zeros([WIDTH], tl.float32)
    d = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(K):
        one = expert == tl.load(ids + token * K + k)
        chosen = tl.where(one, 1.0, chosen)
        d = tl.where(one, tl.load(dscores + token * K + k) * scale, d)
    if NORMALISE:
        total = tl.sum(score * chosen, 0) + 1e-20
        d = chosen * (d - tl.sum(d * score, 0) / total) / total
    d = score * (d - tl.sum(d * score, 0))
    tl.store(dlogits + token * E + expert, d.to(dlogits.dtype.element_ty), mask=expert < E)


def route(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, K: int, *, normalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax and top-k as AutoEP's router takes them: (scores, ids, counts, log of the sum).

    ``bias_E`` joins the scores for the choice only.
    """
    T, E = logits_TE.shape
    device = logits_TE.device
    scores_TK = torch.empty(T, K, dtype=torch.float32, device=device)
    ids_TK = torch.empty(T, K, dtype=torch.int64, device=device)
    counts_E = torch.zeros(E, dtype=torch.int32, device=device)
    log_sum_T = torch.empty(T, dtype=torch.float32, device=device)
    _route[(T,)](
        logits_TE, logits_TE if bias_E is None else bias_E, scores_TK, ids_TK, counts_E, log_sum_T, scale,
        E, triton.next_power_of_2(E), K, triton.next_power_of_2(K), normalise, bias_E is not None, num_warps=1,
    )  # fmt: skip
    return scores_TK, ids_TK, counts_E, log_sum_T


def route_backward(
    logits_TE: torch.Tensor, log_sum_T: torch.Tensor, ids_TK: torch.Tensor, dscores_TK: torch.Tensor, *,
    normalise: bool, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of :func:`route`'s scores with respect to the logits."""
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    _route_backward[(T,)](
        logits_TE, log_sum_T, ids_TK, dscores_TK.contiguous(), dlogits_TE, scale,
        E, triton.next_power_of_2(E), ids_TK.shape[1], normalise, num_warps=1,
    )  # fmt: skip
    return dlogits_TE
