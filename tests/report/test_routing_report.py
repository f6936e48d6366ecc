"""The routing report without a browser: what is counted, what is read, what is refused, and what the file may hold."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.layout import Layout
from moe_models.errors import UserError, run
from moe_models.families.model import Model
from moe_models.families.table import FAMILIES
from moe_models.report import data, history, layouts, record, text
from tests.support.layouts import MIXTRAL_8X7B
from tests.support.recipe import ROOT, save_model, words
from tests.support.report import RECIPE, choices_of, recipe, save_run
from tests.support.tiny import TINY

ROWS = [[3 + (i * k + k * k) % 61 for i in range(length)] for k, length in ((1, 64), (5, 50), (7, 64), (2, 20))]


def recorded(checkpoint: Path) -> tuple[record.Recording, int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    config = json.loads((checkpoint / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    return record.record(model, ROWS), family.num_experts(config)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_the_data_equal_a_plain_recount(tiny_checkpoints: Callable[[str], Path], model_type: str) -> None:
    recording, E = recorded(tiny_checkpoints(model_type))
    built = data.build(recording, E, str)
    seen = choices_of(tiny_checkpoints(model_type), ROWS)
    assert built["routed"] == sum(map(len, ROWS))
    for layer, rows in enumerate(seen):
        counted = Counter(expert for row in rows for token in row for expert in token)
        assert built["load"][layer] == [counted[e] for e in range(E)]
    samples = built["samples"]
    assert (samples["count"], samples["size"]) == (3, 48)  # the last row is too short for one
    K, L = built["top_k"], len(seen)
    ids, weights = base64.b64decode(samples["choices"]), base64.b64decode(samples["weights"])
    for s in range(3):
        assert [built["pieces"][token] for token in samples["tokens"][s]] == [str(token) for token in ROWS[s][:48]]
        for layer in range(L):
            for t in range(48):
                at = ((s * L + layer) * 48 + t) * K
                shown = {ids[at + k]: weights[at + k] * samples["weight_unit"] for k in range(K)}
                assert shown == pytest.approx(seen[layer][s][t], abs=samples["weight_unit"] * 0.51)
                assert list(weights[at : at + K]) == sorted(weights[at : at + K], reverse=True)
    check_top_tokens(built, seen, E)


def check_top_tokens(built: dict[str, Any], seen: list[list[list[dict[int, float]]]], E: int) -> None:
    flat = [token for row in ROWS for token in row]
    for layer, rows in enumerate(seen):
        chosen = [token for row in rows for token in row]
        for expert in range(E):
            score, of = {}, {}
            load = sum(expert in token for token in chosen)
            for token in set(flat):
                count = sum(expert in experts for t, experts in zip(flat, chosen, strict=True) if t == token)
                expected = flat.count(token) * load / len(flat)
                if count > expected and flat.count(token) >= 3 and count >= 3:
                    score[str(token)] = count * math.log(count / expected)
                    of[str(token)] = (count, flat.count(token))
            shown = [(built["pieces"][token], count, total) for token, count, total in built["top"][layer][expert]]
            assert all(of[token] == (count, total) for token, count, total in shown)
            best = sorted(score.values(), reverse=True)[:8]
            assert [score[token] for token, _, _ in shown] == pytest.approx(best)


def test_rows_are_cut_from_the_first_document_on() -> None:
    assert record.cut([[1, 2, 3, 4, 5], [], [6, 7, 8]], row=2, max_tokens=7) == [[1, 2], [3, 4], [5], [6, 7]]
    assert record.cut([[1, 2], [3]], row=4, max_tokens=2) == [[1, 2]]


# --------------------------------------------------------------------------------------------------------------- inputs


def test_every_ds_config_becomes_the_grid_that_layout_py_computes() -> None:
    entries = {entry["file"]: entry for entry in layouts.read_layouts(ROOT / "ds_configs", 4)}
    assert sorted(entries) == sorted(file.name for file in (ROOT / "ds_configs").glob("*.json"))
    assert entries["zero1_ep8.json"]["problem"] == "4 experts do not divide over 8 GPUs"
    assert entries["zero1_ep8.json"]["worlds"] == {}
    assert entries["zero2_ep4.json"]["zero"] == 2
    assert list(entries["zero2_ep4.json"]["worlds"]) == ["4", "8", "16"]
    assert entries["zero1_ep2_native.json"]["kind"] == "native"
    assert entries["zero3.json"]["ep"] == 1
    assert entries["zero1_ep2_tp2.json"]["tp"] == 2
    for entry in entries.values():
        for world, grid in entry["worlds"].items():
            layout = Layout(int(world), entry["ep"], entry["tp"], entry["sp"])
            assert grid["groups"] == layout.ep_groups()
            for rank, (ep, edp, dp, _, first, held) in enumerate(grid["ranks"]):
                assert rank in grid["groups"][edp]
                assert grid["groups"][edp][ep] == rank
                assert dp == rank // (entry["tp"] * entry["sp"])
                assert range(first, first + held) == layout.experts_of(rank, 4)


def test_what_a_gpu_gathers_and_reduces_is_what_traffic_says() -> None:
    """Mixtral's shape, 8 GPUs, one micro-batch: by hand. ZeRO-3 gathers every weight twice, ZeRO-1 once."""
    entries = layouts.read_layouts(ROOT / "ds_configs", 8, Model.of(MIXTRAL_8X7B))
    moved = {entry["file"]: entry["worlds"]["8"]["moved"] for entry in entries if "8" in entry["worlds"]}
    sizes = Model.of(MIXTRAL_8X7B).sizes
    weights = 2 * (sizes.dense_params + sizes.expert_params)
    assert moved["zero3.json"][0] == pytest.approx(2 * weights * 7 / 8, rel=0.02)
    assert moved["zero3.json"][1] == pytest.approx(weights * 7 / 8, rel=0.001)
    assert moved["zero1_ep8.json"] == pytest.approx([2 * sizes.dense_params * 7 / 8, 4 * sizes.dense_params * 7 / 8])
    assert moved["zero1_ep8_native.json"] == moved["zero1_ep8.json"]
    assert all(
        "moved" not in grid
        for entry in layouts.read_layouts(ROOT / "ds_configs", 8)
        for grid in entry["worlds"].values()
    )


def test_tensor_parallel_ranks_are_named(tmp_path: Path) -> None:
    three_d = {"expert_parallel": {"enabled": True, "autoep_size": 4}, "tensor_parallel": {"autotp_size": 2}}
    (tmp_path / "tp.json").write_text(json.dumps(three_d))
    grid = layouts.read_layouts(tmp_path, 8)[0]["worlds"]["8"]
    assert [(dp, tp) for _, _, dp, tp, _, _ in grid["ranks"]] == [(r // 2, r % 2) for r in range(8)]
    assert "TP 2 x DP 4" in grid["title"]


def test_a_run_is_read_with_what_a_kill_and_a_resume_leave(tmp_path: Path) -> None:
    counts = save_run(tmp_path / "run", [2, 4, 6], layers=2, experts=4, ep_size=2)
    file = tmp_path / "run" / "expert_load.jsonl"
    first = file.read_text().splitlines()[0]
    again = json.loads(first)
    again["layers"][0]["tokens"] = [1, 2, 3, 4]
    file.write_text(file.read_text() + '{"step": 8, "split": "tr\n' + json.dumps(again) + "\n")
    read = history.read_history(tmp_path / "run", 2, 4)
    assert read.steps == [2, 4, 6]
    assert read.tokens_SLE == [[[1, 2, 3, 4], counts[0][1]], counts[1], counts[2]]
    assert read.notes == ["expert_load.jsonl: broken lines left out: 1"]
    small = history.compact(read)
    ratios = base64.b64decode(small["ratios"])
    for layer in range(2):
        for column, tokens in enumerate(step[layer] for step in read.tokens_SLE):
            shown = [ratios[(layer * 3 + column) * 4 + e] * small["unit"] for e in range(4)]
            assert shown == pytest.approx([count * 4 / sum(tokens) for count in tokens], abs=small["unit"])
            assert small["fullest"][layer][column] == pytest.approx(max(tokens) * 4 / sum(tokens), abs=1e-3)


def test_many_steps_become_few_columns(tmp_path: Path) -> None:
    counts = save_run(tmp_path / "run", range(1, 1001), layers=1, experts=4, ep_size=2)
    small = history.compact(history.read_history(tmp_path / "run", 1, 4))
    assert len(small["first"]) == 120
    assert (small["first"][0], small["last"][-1]) == (1, 1000)
    tokens = [sum(counts[s - 1][0][e] for s in range(small["first"][7], small["last"][7] + 1)) for e in range(4)]
    assert small["fullest"][0][7] == pytest.approx(max(tokens) * 4 / sum(tokens), abs=1e-3)


HOSTILE = '</script><img src=x onerror="hit()">\x00\x1b[31m \u202eevil\u202c مرحبا 🎉 e\u0301 <!-- \u2028'


def test_text_of_any_kind_is_read(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(HOSTILE.encode() + b"\xff\xfe\xed\xa0\x80")
    documents, notes = text.read_documents(plain)
    assert documents[0].startswith(HOSTILE)
    assert "not UTF-8" in notes[0]
    lines.write_text(json.dumps({"text": HOSTILE}) + '\n\n{"text": "\\ud800 a \\ud83c\\udf89"}\n{"text": " "}\n')
    documents, notes = text.read_documents(lines)
    assert documents == [HOSTILE, "\ufffd a 🎉"]
    assert notes == ["a.jsonl: lone surrogates are shown as \ufffd"]


def test_pieces_are_seen_and_touch_nothing_beside_them() -> None:
    assert text.visible("a\nb\tc") == "a⏎b⇥c"
    assert text.visible("\x00\x1b[31m") == "␀␛[31m"
    assert text.visible("\u202eevil") == "⟨U+202E⟩evil"
    assert text.visible("\ud800\u200b") == "⟨U+D800⟩⟨U+200B⟩"
    assert text.visible("\u0301") == "◌\u0301"
    assert text.visible(" مرحبا 🎉</b>") == " مرحبا 🎉</b>"


def test_parts_of_a_character_are_shown_as_bytes() -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({character: n for n, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = tokenizer("é a\n")["input_ids"]
    assert [text.piece(tokenizer, token) for token in ids] == ["⟨C3⟩", "⟨A9⟩", " ", "a", "⏎"]
    assert text.piece(tokenizer, 100_000) == "⟨100000⟩"
    tokenizer.add_tokens(["-" * 100])
    assert text.piece(tokenizer, len(tokenizer) - 1) == "-" * 60 + "…"


# ----------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("report") / "model")


def test_page_and_pictures_are_written_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(words(300))
    save_run(tmp_path / "run", [1, 2], layers=2, experts=4, ep_size=2)
    flags = ["--checkpoint", str(model), "--text", str(tmp_path / "text.txt"), "--run", str(tmp_path / "run")]
    main = recipe()["main"]
    assert main(flags) == 0
    names = ["routing_report.html", "routing_report.load.png", "routing_report.steps.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / name) for name in names]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["expert_load.jsonl", *names]
    for name in names[1:]:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "run" / names[0]).read_bytes()
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *flags])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("exists already; remove it or give another name") == 3
    assert (tmp_path / "run" / names[0]).read_bytes() == written


def test_the_output_folder_is_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(words(100))
    flags = ["--checkpoint", str(model), "--text", str(tmp_path / "text.txt")]
    folder = tmp_path / "new" / "report"
    main = recipe()["main"]
    assert main([*flags, "--output_dir", str(folder)]) == 0
    names = ["routing_report.html", "routing_report.load.png"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(folder / name) for name in names]
    with pytest.raises(UserError) as refused:
        main([*flags, "--output_dir", str(folder)])
    assert refused.value.problems == [
        f"--output_dir {folder / name}: exists already; remove it or give another name" for name in names
    ]
    with pytest.raises(UserError) as refused:
        main([*flags, "--output_dir", str(tmp_path / "text.txt" / "inside")])
    assert "no folder" in refused.value.problems[0]
    # The page under another name.
    assert main([*flags, "--output", str(folder / "other.html")]) == 0
    assert (folder / "other.load.png").exists()


def test_one_place_for_the_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", str(model), "--text", "t", "--output_dir", str(tmp_path), "--output", "x.html"]
    with pytest.raises(SystemExit) as ended:
        recipe()["main"](flags)
    assert ended.value.code == 2
    assert "--output: not allowed with argument --output_dir" in capsys.readouterr().err


def test_wrong_input_is_told_at_once_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    write_report = recipe()["write_report"]
    (tmp_path / "empty.txt").write_text(" \n\t")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (tmp_path / "text.txt").write_text(words(100))
    mixtral = {"model_type": "mixtral", "num_local_experts": 4}
    wrong = {**mixtral, "num_attention_heads": "many"}
    for name, config in (("dense", {"model_type": "llama"}), ("bare", mixtral), ("wrong", wrong)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "wrong" / "model.safetensors").touch()
    save_run(tmp_path / "other", [1], layers=3, experts=4, ep_size=2)
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "expert_load.jsonl").write_text("")

    def problems(**changed: Any) -> list[str]:
        given = {"checkpoint": model, "text": tmp_path / "text.txt", "output": tmp_path / "new.html", **changed}
        with pytest.raises(UserError) as caught:
            write_report(**given)
        return caught.value.problems

    both = problems(checkpoint=tmp_path / "gone", text=tmp_path / "gone.txt", output=tmp_path / "a.pdf", max_tokens=0)
    assert [line.split(":")[0].split()[0] for line in both] == ["--output", "--max_tokens", "--text", "--checkpoint"]
    assert "a dense model has no routers: make a MoE of it first" in problems(checkpoint=tmp_path / "dense")[0]
    assert "recipes/export.py" in problems(checkpoint=tmp_path / "bare")[0]
    assert "holds no text" in problems(text=tmp_path / "empty.txt")[0]
    assert 'line 2 is no object with a "text"' in problems(text=tmp_path / "lines.jsonl")[0]
    assert "no such file" in problems(text=tmp_path)[0]
    assert "logged 3 layers of 4 experts, and --checkpoint has 2 of 4" in problems(run=tmp_path / "other")[0]
    assert "no expert_load.jsonl in it" in problems(run=tmp_path)[0]
    assert "holds no training step" in problems(run=tmp_path / "quiet")[0]
    assert "no folder" in problems(output=tmp_path / "nowhere" / "x.html")[0]
    assert "its config.json cannot be used" in problems(checkpoint=tmp_path / "wrong")[0]
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "ep3.json").write_text('{"expert_parallel": {"enabled": true, "autoep_size": 3}}')
    assert "none of the layouts fits this model" in problems(ds_configs=tmp_path / "lone")[0]
    (tmp_path / "lone" / "odd.json").write_text('{"expert_parallel": {"autoep_sizes": 2}}')
    assert "its parallel sizes cannot be read" in problems(ds_configs=tmp_path / "lone")[0]
    assert "no JSON file in it" in problems(ds_configs=tmp_path / "dense" / "x")[0]
    assert not list(tmp_path.glob("**/*.html")) + list(tmp_path.glob("**/*.png"))


def test_a_model_that_cannot_be_used_is_told_in_one_line(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_report = recipe()["write_report"]
    (tmp_path / "text.txt").write_text(words(100))
    weights = load_file(model / "model.safetensors")
    gone = next(name for name in weights if "experts.3" in name)
    for name, change in (
        (
            "incomplete",
            lambda folder: save_file({n: t for n, t in weights.items() if n != gone}, folder, {"format": "pt"}),
        ),
        ("torn", lambda file: file.write_bytes(file.read_bytes()[:1000])),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder / "model.safetensors")
        with pytest.raises(UserError, match=r"tensors are missing|cannot be loaded") as caught:
            write_report(folder, tmp_path / "text.txt", tmp_path / "x.html")
        assert len(caught.value.problems) == 1
        assert "\n" not in caught.value.problems[0]
    assert not (tmp_path / "x.html").exists()


def test_help_teaches_and_nothing_heavy_is_imported() -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
    code += "finally: print(sorted(m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert "--checkpoint out/mixtral/model --text book.txt" in done.stdout
    assert "--output_dir DIR" in done.stdout
    assert "--output FILE.html" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
