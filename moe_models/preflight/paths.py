"""The paths and names on a command line: what is required, and model, data set and output folder before any loading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_models.errors import show
from moe_models.families.config_json import HUB_ID
from moe_models.files import beside_run_sh
from moe_models.held import LOCK_FILE, held_line, holder
from moe_models.ranks import rank

DATA_ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
"""File endings the recipes read as a data set."""
UNFINISHED = (LOCK_FILE, ".writing", ".model.writing", "expert_load.jsonl", "log.jsonl")
"""What a run leaves in its output folder that was killed before its first checkpoint. The next one removes it."""


def start_problems(given: Any, required: Iterable[str], recipe: str) -> Iterator[str]:
    """Required flags that are missing, and a ``recipe`` that was started without a launcher."""
    for name in required:
        if not getattr(given, name):
            yield f"--{name}: is required; see --help"
    if "RANK" not in os.environ:
        yield f"no RANK in the environment; start it as: deepspeed --num_gpus N {recipe} ..."


def check_output_dir(path: str | Path, resume: bool | str | None = None) -> list[str]:
    """Problems with the folder that a run writes to; ``resume`` is HF's ``resume_from_checkpoint``."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        return [f"--output_dir {path}: is a file; give a folder"]
    if isinstance(resume, str):
        return _checkpoint_problems(Path(resume))
    if rank() == 0 and holder(path) is not None:  # the other ranks would meet rank 0's own
        return [held_line(path)]
    holds_something = path.is_dir() and any(entry.name not in UNFINISHED for entry in path.iterdir())
    checkpoints = [p for p in path.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if resume and not checkpoints:
        remove = " and remove that folder" if holds_something else ""
        return [
            f"--output_dir {path}: nothing to resume from (no checkpoint-* in it); drop --resume_from_checkpoint"
            f"{remove}"
        ]
    if not resume and checkpoints:
        return [
            f"--output_dir {path}: not empty; give another folder, or go on from it with --resume_from_checkpoint true"
        ]
    if not resume and holds_something:
        return [f"--output_dir {path}: not empty, and no checkpoint to go on from; give another folder, or remove it"]
    return []


def _checkpoint_problems(checkpoint: Path) -> list[str]:
    """Problems with the one checkpoint that ``--resume_from_checkpoint`` names."""
    if not checkpoint.is_dir():
        return [f"--resume_from_checkpoint {checkpoint}: no such checkpoint folder"]
    if not (checkpoint / "trainer_state.json").is_file():
        return [f"--resume_from_checkpoint {checkpoint}: no trainer_state.json in it; give a checkpoint-N folder"]
    return []


def check_dataset_path(name: str | Path) -> list[str]:
    """Problems with a data set: a hub id, a folder, or a file ending in one of ``DATA_ENDINGS``."""
    path = Path(name)
    allowed = f"allowed: a hub id, a folder, or a file ending in {', '.join(DATA_ENDINGS)}"
    if path.is_dir():
        return [] if any(path.iterdir()) else [f"data set {path}: the folder is empty; {allowed}"]
    if path.is_file():
        if path.suffix not in DATA_ENDINGS:
            return [f"data set {path}: unknown ending {show(path.suffix)}; {allowed}"]
        return [] if path.stat().st_size else [f"data set {path}: the file is empty; {allowed}"]
    if path.suffix in DATA_ENDINGS or not HUB_ID.fullmatch(str(name)):
        return [f"data set {path}: no such file or folder{beside_run_sh(path)}; {allowed}"]
    beside = beside_run_sh(path)
    return [f"data set {path}: no such file or folder here{beside}"] if beside else []
