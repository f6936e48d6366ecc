"""Training rows from a hub id, a folder or a file, in the formats that TRL's SFTTrainer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_models.errors import UserError

FORMATS = {
    "text": ("text",),
    "messages (chat)": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "already tokenised": ("input_ids",),
}
"""What a data set may look like: name -> columns it needs."""

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(name: str, *, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """One split of a data set as a ``datasets.Dataset`` (or ``IterableDataset`` when streaming).

    Args:
        name: a file (.txt: the whole file is one row; .jsonl, .json, .parquet: a row per record), a folder of such
            files or one that ``save_to_disk`` wrote, or a hub id.
        config: the hub data set's configuration.
        split: which split; a single file is "train".
        streaming: read rows as training needs them.

    Raises:
        UserError: if nothing can be read, the split does not exist, there is no row, or no known format fits.
    """
    import datasets

    path = Path(name)
    try:
        if path.is_file():
            options: dict[str, Any] = {"sample_by": "document"} if path.suffix == ".txt" else {}
            rows = datasets.load_dataset(
                _READERS[path.suffix], data_files={split: str(path)}, split=split, streaming=streaming, **options
            )
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, name=config, split=split, streaming=streaming)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"data set {name}, split {split!r}: cannot be read ({reason[:200]})") from error
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"data set {name}, split {split!r}: has no rows; give one with at least one row")
    if not any(set(columns) <= set(first) for columns in FORMATS.values()):
        known = "; ".join(f"{label}: {', '.join(columns)}" for label, columns in FORMATS.items())
        raise UserError(f"data set {name}: has columns {', '.join(first)}; one of these is needed: {known}")
    return rows


def cut_rows(rows: Any, max_length: int | None) -> tuple[int, int]:
    """(rows that were cut to ``max_length`` tokens, rows in all) of a data set that the trainer has tokenised.

    A row of exactly ``max_length`` tokens counts as cut: its original length is no longer known.
    """
    if max_length is None or not hasattr(rows, "__len__"):
        return 0, 0
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sum(length >= max_length for length in lengths), len(lengths)
