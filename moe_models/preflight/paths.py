"""The paths and names on a command line: model, data set, output folder, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from moe_models.errors import show
from moe_models.families.config_json import _HUB_ID

DATA_ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
"""File endings the recipes read as a data set."""


def check_output_dir(path: str | Path, resume: bool | str | None = None) -> list[str]:
    """Problems with the folder that a run writes to; ``resume`` is HF's ``resume_from_checkpoint``."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        return [f"--output_dir {path}: is a file; give a folder"]
    there = [p for p in path.glob("checkpoint-*") if (p / "trainer_state.json").is_file()] if path.is_dir() else []
    if isinstance(resume, str):
        if not Path(resume).is_dir():
            return [f"--resume_from_checkpoint {resume}: no such checkpoint folder"]
        if not (Path(resume) / "trainer_state.json").is_file():
            return [f"--resume_from_checkpoint {resume}: no trainer_state.json in it; give a checkpoint-N folder"]
    elif resume:
        if not there:
            return [
                f"--output_dir {path}: nothing to resume from (no checkpoint-* in it); drop --resume_from_checkpoint"
                + (" and remove that folder" if path.is_dir() and any(path.iterdir()) else "")
            ]
    elif there:
        return [
            f"--output_dir {path}: not empty; give another folder, or go on from it with --resume_from_checkpoint true"
        ]
    elif path.is_dir() and any(path.iterdir()):
        return [f"--output_dir {path}: not empty, and no checkpoint to go on from; give another folder, or remove it"]
    return []


def check_dataset_path(name: str | Path) -> list[str]:
    """Problems with a data set: a hub id, a folder, or a file ending in one of ``DATA_ENDINGS``."""
    path, allowed = Path(name), f"allowed: a hub id, a folder, or a file ending in {', '.join(DATA_ENDINGS)}"
    if path.is_dir():
        return [] if any(path.iterdir()) else [f"data set {path}: the folder is empty; {allowed}"]
    if path.is_file():
        if path.suffix not in DATA_ENDINGS:
            return [f"data set {path}: unknown ending {show(path.suffix)}; {allowed}"]
        return [] if path.stat().st_size else [f"data set {path}: the file is empty; {allowed}"]
    if path.suffix in DATA_ENDINGS or not _HUB_ID.fullmatch(str(name)):
        return [f"data set {path}: no such file or folder; {allowed}"]
    return []
