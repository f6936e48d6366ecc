"""Training rows from a hub id, a folder or a file, in the formats that TRL's SFTTrainer takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_models.disk import is_full
from moe_models.errors import UserError

FORMATS = {
    "text": ("text",),
    "messages (chat)": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "already tokenised": ("input_ids",),
}
"""What a data set may look like: name -> columns it needs."""

GPU_LOADER: dict[str, Any] = {"dataloader_num_workers": 2, "accelerator_config": {"non_blocking": True}}
"""TrainingArguments by which a GPU does not wait for data: processes that make the batches (in the training process
that took 2 to 3% of the time), and copies from pinned memory for which the host does not wait."""

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_TYPES = ("string", "large_string")
_LIST_TYPES = ("list", "large_list", "struct")
_MEANT = {"messages": "a list of turns", "input_ids": "a list of token ids"}
"""Columns that hold lists; the others hold text, or turns of a conversation."""


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
    where = f"data set {name}, split {split!r}"
    # 1. Read the split, and its first row: a file may be damaged, and streamed rows are not read before.
    try:
        rows = _read(where, name, config, split, streaming)
        first = next(iter(rows), None)
    except UserError:
        raise
    except Exception as error:
        if is_full(error):  # the cache's disk, no fault of the data
            raise
        raise UserError(_why_not(where, error)) from error
    if first is None:
        raise UserError(_no_rows(where))

    # 2. Which format is it? The first one whose columns are there.
    fitting = [columns for columns in FORMATS.values() if set(columns) <= set(first)]
    if not fitting:
        known = "; ".join(f"{label}: {', '.join(columns)}" for label, columns in FORMATS.items())
        raise UserError(f"data set {name}: has columns {', '.join(first)}; one of these is needed: {known}")

    # 3. What is in these columns, as far as it is known.
    if not streaming:
        _refuse_wrong_values(where, rows, fitting[0])
    return rows


def _read(where: str, name: str, config: str | None, split: str, streaming: bool) -> Any:
    """The rows of a file, of a folder that ``save_to_disk`` wrote, of another folder, or of a hub id."""
    import datasets

    path = Path(name)
    if path.is_file():
        _require_split(where, split, ["train"])
        reader = _READERS[path.suffix]
        options = _text_options([path])
        return datasets.load_dataset(reader, data_files=str(path), split="train", streaming=streaming, **options)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, dict):
            _require_split(where, split, list(loaded))
            return loaded[split]
        _require_split(where, split, ["train"])
        return loaded
    options = {}
    if path.is_dir():
        options = _text_options(file for file in path.rglob("*") if file.is_file())
    return datasets.load_dataset(name, name=config, split=split, streaming=streaming, **options)


def _why_not(where: str, error: Exception) -> str:
    """One line for an exception of ``datasets``, which wraps the parser's own words: those say where in the file."""
    if "corresponds to no data" in str(error):  # what datasets makes of a file without rows
        return _no_rows(where)
    lines = str(error.__cause__ or error).splitlines()
    reason = next((line for line in lines if line.strip()), type(error).__name__)
    return f"{where}: cannot be read ({reason[:200]})"


def _no_rows(where: str) -> str:
    return f"{where}: has no rows; give one with at least one row"


def _require_split(where: str, split: str, there: list[str]) -> None:
    """Raise UserError if ``split`` is not one of those that are there."""
    if split not in there:
        raise UserError(f"{where}: no such split; it has {', '.join(map(repr, there))}")


def _text_options(paths: Iterable[Path]) -> dict[str, Any]:
    """One row per file, not per line, where all files are .txt."""
    suffixes = {path.suffix for path in paths}
    return {"sample_by": "document"} if suffixes == {".txt"} else {}


def _refuse_wrong_values(where: str, rows: Any, columns: tuple[str, ...]) -> None:
    """Raise UserError for nulls and for values of another type, on which the tokenizer would fail halfway."""
    for column in columns:
        if rows._indices is None:
            stored = rows.data.column(column)
        else:  # a selection of rows: the table below it may hold nulls that are not selected
            stored = rows.with_format("arrow")[column]
        nulls = stored.null_count
        if nulls:
            raise UserError(f"{where}: {column} is null in {nulls} of {len(rows)} rows; remove them")
        kind = str(stored.type)
        allowed = _LIST_TYPES if column in _MEANT else (*_TEXT_TYPES, *_LIST_TYPES)
        if not kind.startswith(allowed):
            raise UserError(f"{where}: {column} holds {kind}; it must be {_MEANT.get(column, 'text')}")


def warnings_for_rows(given: Any, prepared: Any, args: Any) -> list[str]:
    """What was lost when TRL ``prepared`` the ``given`` rows for training with ``args`` (an SFTConfig).

    Raises UserError if nothing is left. Streamed rows are not known yet; packing cuts and drops nothing.
    """
    if args.packing or args.max_length is None or not hasattr(prepared, "__len__"):
        return []
    lines = []

    # 1. Rows without a token to learn: their completion begins beyond max_length.
    dropped = len(given) - len(prepared)
    if dropped:
        lines.append(
            f"{dropped} of {len(given)} rows have no token left to learn within --max_length {args.max_length} and "
            "were dropped"
        )
    if len(prepared) == 0:
        raise UserError(f"{lines[0]}; raise --max_length, or look at where the completions begin")

    # 2. Rows that were cut. One of exactly max_length tokens counts too: its original length is no longer known.
    full = sum(len(ids) >= args.max_length for ids in prepared["input_ids"])
    if full:
        lines.append(
            f"{full} of {len(given)} rows fill --max_length {args.max_length}; what goes beyond it was cut off. "
            "--packing True splits long rows instead, a larger --max_length keeps more"
        )
    return lines


def check_assistant_marks(tokenizer: Any, name: str, chat_template_path: str | None = None) -> None:
    """Raise UserError if ``--assistant_only_loss`` cannot know the assistant's turns of model ``name``.

    TRL brings templates with marks for those that it knows. It would say so after the weights are read.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    if chat_template_path:
        path = Path(chat_template_path)
        if not path.is_file():  # another model's tokenizer; TRL reads it
            return
        template = path.read_text(encoding="utf-8")
        name = chat_template_path
    if template is None or has_generation_markers(template):
        return
    if not chat_template_path:
        try:
            get_training_chat_template(tokenizer)
        except ValueError:
            pass
        else:
            return
    raise UserError(
        f"--assistant_only_loss: the chat template of {name} does not mark what the assistant says "
        "({% generation %} ... {% endgeneration %}), and TRL knows no version that does; give one with "
        "--chat_template_path FILE, use data with prompt and completion, or drop the flag"
    )


def check_chat_template(tokenizer: Any, rows: Any, name: str) -> None:
    """Raise UserError if the rows are conversations and the tokenizer of model ``name`` cannot write them as text."""
    from trl.data_utils import is_conversational

    if tokenizer.chat_template is None and is_conversational(next(iter(rows))):
        raise UserError(
            f"{name}: the data set holds conversations, and the tokenizer has no chat template; give one with "
            "--chat_template_path (a file, or a model folder whose tokenizer has one), or use data with `text`"
        )
