"""``expert_load.jsonl`` of a training run, as the page's heat map over steps."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_models.errors import UserError
from moe_models.routing.callback import LOAD_FILE

MAX_COLUMNS = 120
MAX_CELLS = 300_000
"""One byte each in the page."""
STEP_OF_RATIO = 1 / 32
"""Load over mean is kept in steps of this, up to 255 of them."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run logged while it trained."""

    steps: list[int]
    """Optimizer steps that were logged, ascending."""
    tokens_SLE: list[list[list[int]]]
    """Tokens per expert of each layer at each of them."""
    rank_max_mean_SL: list[list[float]]
    """Fullest EP rank over the mean, as the run computed it."""
    ds_config: str | None
    """File name of the run's ds_config, if it ended."""
    world_size: int | None
    """Its number of ranks, if it ended."""
    notes: list[str]
    """What could not be used, in one line each."""


def read_history(run: Path, num_layers: int, num_experts: int) -> History:
    """Read a run's output folder.

    Raises UserError if there is no log of expert load in it, or if it is of another model. A line that a killed
    process left half written is skipped; of a step that was run twice, as after a resume, the later one counts.
    """
    file = run / LOAD_FILE
    if not file.is_file():
        raise UserError(f"--run {run}: no {LOAD_FILE} in it; give the --output_dir of a training run")
    rows: dict[int, list[dict[str, Any]]] = {}
    cut_off = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["split"] == "train":
                rows[int(row["step"])] = [
                    {"tokens": [int(count) for count in layer["tokens"]], "ranks": float(layer["rank_max_mean"])}
                    for layer in row["layers"]
                ]
        except (ValueError, KeyError, TypeError):
            cut_off += 1
    steps = sorted(rows)
    if not steps:
        raise UserError(f"--run {run}: {LOAD_FILE} holds no training step; wait until one is logged (--logging_steps)")
    shapes = {(len(row), len(layer["tokens"])) for row in rows.values() for layer in row}
    if shapes != {(num_layers, num_experts)}:
        found = " and ".join(f"{layers} layers of {experts} experts" for layers, experts in sorted(shapes))
        raise UserError(
            f"--run {run}: logged {found or 'no layers'}, and --checkpoint has {num_layers} of {num_experts}; "
            "give the run that the checkpoint came from"
        )
    ds_config, world_size = _layout_of(run / "summary.json")
    return History(
        steps=steps,
        tokens_SLE=[[layer["tokens"] for layer in rows[step]] for step in steps],
        rank_max_mean_SL=[[layer["ranks"] for layer in rows[step]] for step in steps],
        ds_config=ds_config,
        world_size=world_size,
        notes=[f"{LOAD_FILE}: broken lines left out: {cut_off}"] if cut_off else [],
    )


def _layout_of(summary: Path) -> tuple[str | None, int | None]:
    """(file name of the ds_config, ranks) out of ``summary.json``, which is written last: (None, None) without it."""
    try:
        measured = json.loads(summary.read_text(encoding="utf-8"))
        named = re.search(r"\(([^()]+\.json)\)", measured["layout"])
        return Path(named[1]).name if named else None, int(measured["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def compact(history: History) -> dict[str, Any]:
    """At most ``MAX_COLUMNS`` columns, each the sum of neighbouring logged steps, small enough for the page."""
    S, L, E = len(history.steps), len(history.tokens_SLE[0]), len(history.tokens_SLE[0][0])
    columns = max(1, min(S, MAX_COLUMNS, MAX_CELLS // (L * E)))
    bounds = [column * S // columns for column in range(columns + 1)]
    parts = list(itertools.pairwise(bounds))
    ratios = bytearray()
    fullest: list[list[float]] = []
    ranks: list[list[float]] = []
    for layer in range(L):
        fullest.append([])
        ranks.append([])
        for start, stop in parts:
            tokens = [sum(history.tokens_SLE[s][layer][e] for s in range(start, stop)) for e in range(E)]
            mean = sum(tokens) / E or 1.0
            ratios += bytes(min(255, round(count / mean / STEP_OF_RATIO)) for count in tokens)
            fullest[-1].append(round(max(tokens) / mean, 3))
            ranks[-1].append(
                round(sum(history.rank_max_mean_SL[s][layer] for s in range(start, stop)) / (stop - start), 3)
            )
    return {
        "first": [history.steps[start] for start, _ in parts],
        "last": [history.steps[stop - 1] for _, stop in parts],
        "unit": STEP_OF_RATIO,
        "ratios": base64.b64encode(bytes(ratios)).decode("ascii"),  # [layer][column][expert]
        "fullest": fullest,
        "ranks": ranks,
    }
