"""``expert_load.jsonl`` of a training run, as the page's heat map over steps.

Shape suffixes: S logged steps, C columns of the heat map; L, E as in the whole package.
"""

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


@dataclass(frozen=True)
class _LoggedLayer:
    tokens_E: list[int]
    rank_max_mean: float


def read_history(run: Path, num_layers: int, num_experts: int) -> History:
    """Read a run's output folder.

    Raises UserError if there is no log of expert load in it, or if it is of another model. A line that a killed
    process left half written is skipped. Of a step that was run twice, as after a resume, the later one counts.
    """
    # 1. Read what is there.
    file = run / LOAD_FILE
    if not file.is_file():
        raise UserError(f"--run {run}: no {LOAD_FILE} in it; give the --output_dir of a training run")
    layers_of_step, broken = _read_lines(file)
    if not layers_of_step:
        raise UserError(f"--run {run}: {LOAD_FILE} holds no training step; wait until one is logged (--logging_steps)")
    # 2. Compare it with the checkpoint.
    shapes = {(len(layers), len(layer.tokens_E)) for layers in layers_of_step.values() for layer in layers}
    if shapes != {(num_layers, num_experts)}:
        found = " and ".join(f"{layers} layers of {experts} experts" for layers, experts in sorted(shapes))
        raise UserError(
            f"--run {run}: logged {found or 'no layers'}, and --checkpoint has {num_layers} of {num_experts}; "
            "give the run that the checkpoint came from"
        )
    # 3. Steps in order, and the layout of the run.
    steps = sorted(layers_of_step)
    ds_config, world_size = _layout_of(run / "summary.json")
    notes = []
    if broken:
        notes.append(f"{LOAD_FILE}: broken lines left out: {broken}")
    return History(
        steps=steps,
        tokens_SLE=[[layer.tokens_E for layer in layers_of_step[step]] for step in steps],
        rank_max_mean_SL=[[layer.rank_max_mean for layer in layers_of_step[step]] for step in steps],
        ds_config=ds_config,
        world_size=world_size,
        notes=notes,
    )


def _read_lines(file: Path) -> tuple[dict[int, list[_LoggedLayer]], int]:
    """(training step -> its layers, number of lines that could not be read)."""
    layers_of_step: dict[int, list[_LoggedLayer]] = {}
    broken = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["split"] != "train":
                continue
            layers = []
            for layer in row["layers"]:
                tokens_E = [int(count) for count in layer["tokens"]]
                layers.append(_LoggedLayer(tokens_E, float(layer["rank_max_mean"])))
            layers_of_step[int(row["step"])] = layers
        except (ValueError, KeyError, TypeError):
            broken += 1
    return layers_of_step, broken


def _layout_of(summary: Path) -> tuple[str | None, int | None]:
    """(file name of the ds_config, ranks) out of ``summary.json``, which is written last: (None, None) without it."""
    try:
        measured = json.loads(summary.read_text(encoding="utf-8"))
        named = re.search(r"\(([^()]+\.json)\)", measured["layout"])
        ds_config = Path(named[1]).name if named else None
        return ds_config, int(measured["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def compact(history: History) -> dict[str, Any]:
    """At most ``MAX_COLUMNS`` columns, each the sum of neighbouring logged steps, small enough for the page."""
    S = len(history.steps)
    L = len(history.tokens_SLE[0])
    E = len(history.tokens_SLE[0][0])
    # 1. Columns: logged steps [start, stop), as equal in number as they can be.
    columns = max(1, min(S, MAX_COLUMNS, MAX_CELLS // (L * E)))
    bounds = [column * S // columns for column in range(columns + 1)]
    spans = list(itertools.pairwise(bounds))
    # 2. For each layer and column: load over mean of every expert, of the fullest one, and of the fullest EP rank.
    ratios = bytearray()  # [layer][column][expert], one byte each
    fullest_LC: list[list[float]] = []
    ranks_LC: list[list[float]] = []
    for layer in range(L):
        fullest_C = []
        ranks_C = []
        for start, stop in spans:
            tokens_E = _summed(history.tokens_SLE[start:stop], layer)
            mean = sum(tokens_E) / E or 1.0
            ratios += bytes(min(255, round(count / mean / STEP_OF_RATIO)) for count in tokens_E)
            fullest_C.append(round(max(tokens_E) / mean, 3))
            rank_ratios = [step[layer] for step in history.rank_max_mean_SL[start:stop]]
            ranks_C.append(round(sum(rank_ratios) / len(rank_ratios), 3))
        fullest_LC.append(fullest_C)
        ranks_LC.append(ranks_C)
    return {
        "first": [history.steps[start] for start, _ in spans],
        "last": [history.steps[stop - 1] for _, stop in spans],
        "unit": STEP_OF_RATIO,
        "ratios": base64.b64encode(bytes(ratios)).decode("ascii"),
        "fullest": fullest_LC,
        "ranks": ranks_LC,
    }


def _summed(tokens_SLE: list[list[list[int]]], layer: int) -> list[int]:
    """Tokens per expert of one layer, over all given steps."""
    return [sum(counts) for counts in zip(*(step[layer] for step in tokens_SLE), strict=True)]
