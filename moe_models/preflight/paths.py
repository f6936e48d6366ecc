"""The paths and names on a command line: model, data set, output folder, checked before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_models.config.deepspeed_keys import show
from moe_models.config.ds_config import read_json
from moe_models.errors import UserError

DATA_ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
"""File endings the recipes read as a data set."""

LAYOUT_FILE = "layout.json"
"""In a checkpoint folder: the layout that wrote it."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_model_config(model_name_or_path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder or hub id. Raises UserError with one line if it cannot be had."""
    path = Path(model_name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json in it; give the folder that save_pretrained wrote")
        return read_json(path / "config.json")
    if path.exists():
        raise UserError(f"{path}: is a file; give the model folder that holds config.json, or a hub id")
    name = str(model_name_or_path)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder; give a model folder or a hub id such as mistralai/Mixtral-8x7B-v0.1")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(hf_hub_download(name, "config.json"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:160]
        raise UserError(
            f"{name}: no such folder here, and the hub did not give its config.json "
            f"({type(error).__name__}: {reason}); check the name, log in, or give a folder"
        ) from None


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


def saved_layout(checkpoint: str | Path) -> dict[str, Any] | None:
    """The layout that wrote ``checkpoint``; None where it is not said."""
    file = Path(checkpoint) / LAYOUT_FILE
    return {"tp_size": 1, **read_json(file)} if file.is_file() else None


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
