"""Data in every format the recipe takes, from the file to the labels: which tokens are there, which are learned.

The rows go through the recipe's own functions (flags, data, trainer) on the ranks of a session cluster. The tokenizer
has one token per word, so each expectation can be written down by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.data import load_rows
from moe_models.errors import UserError
from tests.support.cluster import Cluster
from tests.support.recipe import (
    ROOT,
    command,
    save_model,
    start_in_cluster,
    text_rows,
    word_tokenizer,
    words,
    write_jsonl,
)

EOS, USER, ASSISTANT = 2, 3, 4
DS_CONFIG = ROOT / "ds_configs" / "zero1_ep2.json"
CHAT = [
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w12"},
    {"role": "user", "content": "w13"},
    {"role": "assistant", "content": "w14 w15"},
]
CHAT_IDS = [USER, 10, 11, EOS, ASSISTANT, 12, EOS, USER, 13, EOS, ASSISTANT, 14, 15, EOS]
CHAT_ASSISTANT_LABELS = [-100] * 5 + [12, EOS] + [-100] * 4 + [14, 15, EOS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def prepared(arguments: list[str]) -> list[dict[str, Any]]:
    """Training rows as the trainer holds them."""
    return list(start_in_cluster(arguments)[0].train_dataset)


def rows_of(
    clusters: Callable[[int], Cluster], model: Path, data: Path, out: Path, **flags: Any
) -> list[dict[str, Any]]:
    rows, same = clusters(2).run(prepared, command(model, data, DS_CONFIG, out, **flags))
    assert rows == same, "the ranks must hold the same rows"
    return rows


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


# --------------------------------------------------------------------------------------------------------- file formats

TEXTS = [words(5, 1), words(9, 2), words(7, 3)]


def save_text(kind: str, folder: Path) -> Path:
    """TEXTS in one format; returns what --dataset_name takes."""
    from datasets import Dataset, DatasetDict

    rows = [{"text": text} for text in TEXTS]
    path = folder / f"data.{kind}"
    match kind:
        case "txt":
            path.write_text("\n".join(TEXTS) + "\n")
        case "jsonl":
            write_jsonl(path, rows)
        case "json":
            path.write_text(json.dumps(rows))
        case "parquet":
            Dataset.from_list(rows).to_parquet(path)
        case "folder":
            path.mkdir()
            write_jsonl(path / "a.jsonl", rows[:2])
            write_jsonl(path / "b.jsonl", rows[2:])
        case "folder of txt":
            path.mkdir()
            for number, text in enumerate(TEXTS):
                (path / f"{number}.txt").write_text(text)
        case "save_to_disk":
            Dataset.from_list(rows).save_to_disk(path)
        case "save_to_disk with splits":
            splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
            DatasetDict(splits).save_to_disk(path)
    return path


KINDS = ("txt", "jsonl", "json", "parquet", "folder", "folder of txt", "save_to_disk", "save_to_disk with splits")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_text(kind: str, tmp_path: Path) -> None:
    rows = [row["text"].strip() for row in load_rows(str(save_text(kind, tmp_path)))]
    if kind == "txt":  # a file of text is one document
        assert rows == ["\n".join(TEXTS)]
    else:
        assert sorted(rows) == sorted(TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_streaming_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = str(save_text(kind, tmp_path))
    assert list(load_rows(path, streaming=True)) == list(load_rows(path))


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    path = str(save_text("save_to_disk with splits", tmp_path))
    assert len(load_rows(path, split="test")) == 1
    with pytest.raises(UserError) as caught:
        load_rows(path, split="validation")
    line = f"data set {path}, split 'validation': no such split; it has 'train', 'test'"
    assert caught.value.problems == [line]


def test_nulls_are_counted_behind_a_selection(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"text": "w5"}, {"text": None}, {"text": "w6"}, {"text": None}])
    rows.select([0, 2]).save_to_disk(tmp_path / "sound")
    rows.shuffle(seed=0).save_to_disk(tmp_path / "not")
    assert load_rows(str(tmp_path / "sound"))["text"][:] == ["w5", "w6"]
    with pytest.raises(UserError, match="text is null in 2 of 4 rows; remove them"):
        load_rows(str(tmp_path / "not"))


# ---------------------------------------------------------------------------------------------------- tokens and labels


def test_text(clusters: Callable[[int], Cluster], model: Path, tmp_path: Path) -> None:
    data = save_text("jsonl", tmp_path)
    rows = rows_of(clusters, model, data, tmp_path / "out")
    expected = [[*ids(text), EOS] for text in TEXTS]
    assert [row["input_ids"] for row in rows] == expected
    assert [row["labels"] for row in rows] == expected


@pytest.mark.parametrize("assistant_only", [False, True])
def test_messages(assistant_only: bool, clusters: Callable[[int], Cluster], model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    rows = rows_of(clusters, model, data, tmp_path / "out", assistant_only_loss=assistant_only)
    assert [row["input_ids"] for row in rows] == [CHAT_IDS, CHAT_IDS[:7]]
    labels = CHAT_ASSISTANT_LABELS if assistant_only else CHAT_IDS
    assert [row["labels"] for row in rows] == [labels, labels[:7]]


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_completion_learn_the_completion(
    chat: bool, clusters: Callable[[int], Cluster], model: Path, tmp_path: Path
) -> None:
    if chat:
        record, tokens, learned = {"prompt": CHAT[:3], "completion": CHAT[3:]}, CHAT_IDS, 4
        learned_labels = [ASSISTANT, 14, 15, EOS]
    else:
        record, tokens, learned = {"prompt": "w20 w21 ", "completion": "w22"}, [20, 21, 22, EOS], 2
        learned_labels = [22, EOS]
    rows = rows_of(clusters, model, write_jsonl(tmp_path / "pc.jsonl", [record] * 4), tmp_path / "out")
    assert [row["input_ids"] for row in rows] == [tokens] * 4
    assert [row["labels"] for row in rows] == [[-100] * (len(tokens) - learned) + learned_labels] * 4
    both = rows_of(clusters, model, tmp_path / "pc.jsonl", tmp_path / "out2", completion_only_loss=False)
    assert [row["labels"] for row in both] == [tokens] * 4


def test_packing_loses_no_token(clusters: Callable[[int], Cluster], model: Path, tmp_path: Path) -> None:
    """Short, long and very long rows (three times max_length): every token comes out once, and learns once."""
    texts = [row["text"] for row in text_rows(30)] + [words(100, 7), words(33, 8), words(31, 9), words(32, 10)]
    data = write_jsonl(tmp_path / "mixed.jsonl", [{"text": text} for text in texts])
    rows = rows_of(clusters, model, data, tmp_path / "out", packing=True, max_length=32)
    expected = [[*ids(text), EOS] for text in texts]
    assert sum(len(row["input_ids"]) for row in rows) == sum(map(len, expected))
    assert max(len(row["input_ids"]) for row in rows) == 32
    assert all(row["labels"] == row["input_ids"] for row in rows)
    # Cut at the document lengths that TRL keeps beside the tokens: pieces of documents, nothing else.
    pieces = []
    for row in rows:
        start = 0
        assert sum(row["seq_lengths"]) == len(row["input_ids"])
        for length in row["seq_lengths"]:
            pieces.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(pieces) == sorted(full[at : at + 32] for full in expected for at in range(0, len(full), 32))


def test_packed_documents_do_not_see_each_other(
    clusters: Callable[[int], Cluster], model: Path, tmp_path: Path
) -> None:
    """The loss of packed documents is the loss of the documents one by one."""
    data = write_jsonl(tmp_path / "two.jsonl", text_rows(8))
    flags = {"per_device_train_batch_size": 1, "eval_dataset": data, "per_device_eval_batch_size": 1}
    packed, alone = (
        clusters(2).run(
            evaluation_loss,
            command(model, data, DS_CONFIG, tmp_path / str(packing), packing=packing, max_steps=1, **flags),
        )[0]
        for packing in (True, False)
    )
    assert packed["rows"] < alone["rows"] == 8
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def evaluation_loss(arguments: list[str]) -> dict[str, Any]:
    """Cross-entropy per learned token over the held-out rows, and how many rows they became."""
    import torch

    trainer, _, _, _ = start_in_cluster(arguments)
    model = trainer.model.eval()
    total = count = 0
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(trainer.eval_dataset, batch_size=1, collate_fn=trainer.data_collator):
            labels = batch.pop("labels")
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits = model(**inputs, labels=None, use_cache=False).logits
            kept = labels[:, 1:] != -100
            losses = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum")
            total, count = total + losses.item(), count + int(kept.sum())
    return {"loss": total / count, "rows": len(trainer.eval_dataset), "count": count}


# --------------------------------------------------------------------------------------------------- what is lost, said


def what_it_says(arguments: list[str]) -> str:
    """The warnings while the trainer is built."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        start_in_cluster(arguments)
    return "\n".join(line for line in said.getvalue().splitlines() if line.startswith("warning: "))


def test_rows_that_are_cut_are_counted(clusters: Callable[[int], Cluster], model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": words(n, n)} for n in (5, 30, 31, 32, 60)])
    said, other = clusters(2).run(what_it_says, command(model, data, DS_CONFIG, tmp_path / "out"))
    assert (
        "warning: 3 of 5 rows fill --max_length 32; what goes beyond it was cut off. --packing True splits long rows "
        "instead, a larger --max_length keeps more" in said
    )
    assert "warning" not in other, "only rank 0 speaks"
    for number, flags in enumerate(({"packing": True}, {"max_length": 62})):
        words_said = command(model, data, DS_CONFIG, tmp_path / f"out{number}", **flags)
        assert "warning" not in clusters(2).run(what_it_says, words_said)[0]


def test_rows_without_anything_to_learn_are_counted(
    clusters: Callable[[int], Cluster], model: Path, tmp_path: Path
) -> None:
    long = {"prompt": words(40), "completion": " w5"}
    data = write_jsonl(tmp_path / "pc.jsonl", [long, {"prompt": "w6", "completion": " w7"}, long])
    said = clusters(2).run(what_it_says, command(model, data, DS_CONFIG, tmp_path / "out"))[0]
    assert "warning: 2 of 3 rows have no token left to learn within --max_length 32 and were dropped" in said
    write_jsonl(data, [long, long])
    with pytest.raises(
        AssertionError, match="UserError: 2 of 2 rows have no token left to learn within --max_length 3"
    ):
        clusters(2).run(what_it_says, command(model, data, DS_CONFIG, tmp_path / "out2"))


def test_tokenizer_of_this_page() -> None:
    """The ids written down above are what the tokenizer gives."""
    tokenizer = word_tokenizer()
    assert tokenizer("w10 <eos> w63")["input_ids"] == [10, EOS, 63]
    assert tokenizer.apply_chat_template(CHAT)["input_ids"] == CHAT_IDS
