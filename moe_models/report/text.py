"""Text from a file that may hold anything, and token pieces in a form that can be seen."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from moe_models.errors import UserError

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_MARKS = {"\n": "⏎", "\t": "⇥"}
_LONGEST = 60
"""Characters of a piece that are shown: some tokens are a hundred dashes."""
_CHANGES_ITS_NEIGHBOURS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that are invisible themselves: controls, bidi and zero-width marks, surrogates, unassigned."""


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, and one line for each thing that had to be replaced in it.

    A ``.jsonl`` gives the ``text`` of every line; any other file is one text. Bytes that are not UTF-8, and lone
    surrogates that JSON can spell, become U+FFFD. Raises UserError for a path that is no file, a line without ``text``,
    and a file without any text.
    """
    # 1. Bytes.
    if not path.is_file():
        raise UserError(f"--text {path}: no such file; give a text file, or a .jsonl with `text` in every line")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror})") from None
    # 2. Characters. A U+FFFD that the file itself holds is no replacement.
    content = raw.decode("utf-8-sig", errors="replace")
    notes = []
    wrong = content.count("\ufffd") - raw.count("\ufffd".encode())
    if wrong > 0:
        notes.append(f"{path.name}: {wrong} places are not UTF-8 and are shown as \ufffd")
    # 3. Texts. The way through UTF-16 joins the two halves of a character, and replaces halves that are alone.
    if path.suffix == ".jsonl":
        texts = _json_lines(path, content)
    else:
        texts = [content]
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    if clean != texts:
        notes.append(f"{path.name}: lone surrogates are shown as \ufffd")
    documents = [text for text in clean if text.strip()]
    if not documents:
        raise UserError(f"--text {path}: holds no text; give a file with a few hundred words")
    return documents, notes


def _json_lines(path: Path, content: str) -> list[str]:
    """The ``text`` of every line that is not empty."""
    texts = []
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for line ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'--text {path}: line {number} is no object with a "text"; write one, or give a .txt file')
        texts.append(row["text"])
    return texts


def piece(tokenizer: Any, token_id: int) -> str:
    """One token as text: spaces stay, invisible characters are spelled, parts of a character are shown as bytes."""
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None:  # more rows in the embedding than the tokenizer has tokens
        return f"⟨{token_id}⟩"
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Part of a character: SentencePiece calls it <0xC3>, byte-level BPE writes each byte as a letter of its alphabet.
    if _BYTE_PIECE.fullmatch(raw) and ("\ufffd" in text or not text):
        return f"⟨{raw[3:5]}⟩"
    if "\ufffd" in text and "\ufffd" not in raw:
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in raw):
            return f"⟨{' '.join(f'{alphabet[character]:02X}' for character in raw)}⟩"
    if raw.startswith("▁") and not text.startswith(" "):  # SentencePiece drops the first space of what it decodes
        text = " " + text
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return visible(text)


def visible(text: str) -> str:
    """``text`` with every character spelled out that is invisible, or that changes how its neighbours are shown."""
    seen = "".join(_seen(character) for character in text)
    if seen and unicodedata.category(seen[0]).startswith("M"):
        return "◌" + seen  # an accent alone would sit on the character before it
    return seen


def _seen(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # the control pictures: U+2400 is the picture of NUL
    if unicodedata.category(character) in _CHANGES_ITS_NEIGHBOURS:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 is itself, the other bytes follow from U+0100."""
    alphabet = {chr(byte): byte for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    for number, byte in enumerate(others):
        alphabet[chr(0x100 + number)] = byte
    return alphabet
