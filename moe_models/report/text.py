"""Text from a file that may hold anything, and token pieces as something that can be looked at."""

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
"""Unicode categories that are not seen themselves: controls, bidi and zero-width marks, surrogates, unassigned."""


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, and one line for each thing that had to be replaced in it.

    ``.jsonl``: the ``text`` of every line; anything else: the whole file. What is not UTF-8, and lone surrogates that
    JSON can spell, become U+FFFD. Raises UserError for a path that is no file, a line without ``text``, and no text.
    """
    if not path.is_file():
        raise UserError(f"--text {path}: no such file; give a text file, or a .jsonl with `text` in every line")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror})") from None
    content = raw.decode("utf-8-sig", errors="replace")
    notes = []
    if (wrong := content.count("\ufffd") - raw.count("\ufffd".encode())) > 0:
        notes.append(f"{path.name}: {wrong} places are not UTF-8 and are shown as \ufffd")
    texts = _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    if clean != texts:
        notes.append(f"{path.name}: lone surrogates are shown as \ufffd")
    documents = [text for text in clean if text.strip()]
    if not documents:
        raise UserError(f"--text {path}: holds no text; give a file with a few hundred words")
    return documents, notes


def _json_lines(path: Path, content: str) -> list[str]:
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
    """One token as text: spaces stay, what cannot be seen is spelled, parts of a character are shown as bytes."""
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None:  # more rows in the embedding than the tokenizer has tokens
        return f"⟨{token_id}⟩"
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _BYTE_PIECE.fullmatch(raw) and ("\ufffd" in text or not text):
        return f"⟨{raw[3:5]}⟩"
    if "\ufffd" in text and "\ufffd" not in raw:
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in raw):
            return f"⟨{' '.join(f'{alphabet[character]:02X}' for character in raw)}⟩"
    if raw.startswith("▁") and not text.startswith(" "):  # SentencePiece drops the first space of what it decodes
        text = " " + text
    return visible(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def visible(text: str) -> str:
    """``text`` with everything spelled out that is not seen, or that changes how its neighbours are shown."""
    seen = "".join(_seen(character) for character in text)
    return "◌" + seen if seen and unicodedata.category(seen[0]).startswith("M") else seen


def _seen(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # the control pictures: U+2400 is the picture of NUL
    if unicodedata.category(character) in _CHANGES_ITS_NEIGHBOURS:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}
