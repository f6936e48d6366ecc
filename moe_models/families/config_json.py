"""``config.json`` of a model folder or hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_models.errors import UserError
from moe_models.families.table import FAMILIES
from moe_models.files import beside_run_sh, read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""``name`` or ``owner/name``, which the hub may know."""


def read_model_config(model_name_or_path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder or hub id; of a multimodal model the part that describes its language model.

    Raises UserError with one line if it cannot be had.
    """
    return language_model(read_config_json(model_name_or_path))


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the language model that is trained: itself, or its ``text_config``."""
    inside = config.get("text_config")
    if isinstance(inside, dict) and inside.get("model_type") in FAMILIES:
        return inside
    return config


def read_config_json(model_name_or_path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder or hub id, as it is. Raises UserError with one line if it cannot be had."""
    path = Path(model_name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json in it; give the folder that save_pretrained wrote")
        return read_json(path / "config.json")
    if path.exists():
        raise UserError(f"{path}: is a file; give the model folder that holds config.json, or a hub id")
    name = str(model_name_or_path)
    beside = beside_run_sh(path)
    if beside:
        raise UserError(f"{name}: no such folder here{beside}")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder; give a model folder or a hub id such as mistralai/Mixtral-8x7B-v0.1")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(hf_hub_download(name, "config.json"))
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:  # the first sentence of several lines of advice
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0].split(". ")[0][:160]
        raise UserError(
            f"{name}: no such folder here, and the hub did not give its config.json "
            f"({type(error).__name__}: {reason}); check the name, log in, or give a folder"
        ) from None
