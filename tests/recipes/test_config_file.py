"""``--config run.yaml``, and flags that cannot be honoured at the end of a run: reporters, the hub, assistant marks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from moe_models.data import check_assistant_marks
from moe_models.errors import UserError
from tests.recipes import test_finetune_cli
from tests.recipes.test_finetune_cli import PRESETS, refused
from tests.support.recipe import ROOT, ForkedRecipe, command, word_tokenizer

sys.path.insert(0, str(ROOT / "recipes"))  # as python does for a script

from config_file import with_config

data = test_finetune_cli.data
model = test_finetune_cli.model
recipe = test_finetune_cli.recipe


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_flags_come_before_and_beside_them_win(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "max_steps: 5\npacking: true\nlearning-rate: 1e-5\nreport_to: [wandb, tensorboard]\nseed: null\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nrun_name: --odd\n",
    )
    words, problems = with_config(["--config", str(path), "--no_packing", "--max_steps=7"])
    assert problems == []
    assert words == [
        "--learning-rate=1e-5", "--report_to", "wandb", "tensorboard",
        '--gradient_checkpointing_kwargs={"use_reentrant": false}', "--run_name=--odd", "--no_packing", "--max_steps=7",
    ]  # fmt: skip
    assert with_config(["--max_steps", "7"]) == (["--max_steps", "7"], [])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("- a\n", ['holds ["a"]; it must hold lines such as `max_steps: 100`']),
        ("a: [1\n", ["cannot be read as YAML: while parsing a flow sequence"]),
        ("seed: 1\nseed: 2\n", ["seed stands twice; keep one"]),
        (
            "env: {A: b}\nconfig: other.yaml\n5: x\n",
            ["env: set environment variables in the shell", "config: a file cannot name another one", "5: is no name"],
        ),
        ("!!python/object/apply:os.system ['true']\n", ["cannot be read as YAML: could not determine a constructor"]),
    ],
)
def test_a_wrong_file_gets_a_line_for_each_problem(text: str, lines: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    words, problems = with_config([f"--config={path}", "--seed", "1"])
    assert words == ["--seed", "1"]
    assert len(problems) == len(lines), problems
    for problem, line in zip(problems, lines, strict=True):
        assert problem.startswith(f"--config {path}: {line}")


def test_all_problems_of_flags_and_file_at_once(recipe: ForkedRecipe, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = written(
        tmp_path,
        f"model_name_or_path: {model}\ndataset_name: gone.jsonl\ndeepspeed: {PRESETS / 'zero1_ep2.json'}\n"
        f"output_dir: {out}\nlerning_rate: 1\nmax_steps: many\nreport_to: comet_ml\npush_to_hub: true\n"
        "hub_model_id: a/b/c\nhub_strategy: checkpoint\nmax_length: 32\n",
    )
    ended = recipe(["--config", str(path), "--dataset_name", str(data)], WORLD_SIZE="2")
    refused(
        ended, out,
        "--max_steps: invalid int value: 'many'",
        "--lerning_rate: no such flag; see --help",
        "--report_to comet_ml: comet_ml is not installed; install it, or use tensorboard or none",
        "--push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or drop the flag and upload later "
        "with: hf upload NAME OUTPUT_DIR/model",
        "--hub_model_id a/b/c: is no name on the hub; write it as owner/name",
        "--hub_strategy checkpoint: checkpoints are not uploaded, only the proven folder at the end; drop it, or write "
        "end",
    )  # fmt: skip


def test_a_missing_file_is_all_that_is_said(recipe: ForkedRecipe, tmp_path: Path) -> None:
    ended = recipe(["--config", "gone.yaml"], WORLD_SIZE="2")
    refused(
        ended,
        tmp_path / "out",
        "--config gone.yaml: no such file; give a YAML file with one `flag: value` on each line",
    )


# -------------------------------------------------------------------------------------------------- assistant-only loss


UNMARKED = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"


def test_a_template_without_marks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "marked.jinja"
    check_assistant_marks(word_tokenizer(), "mine")  # its template marks the assistant
    with pytest.raises(UserError, match="the chat template of mine does not mark what the assistant says"):
        check_assistant_marks(word_tokenizer(UNMARKED), "mine")
    file.write_text(str(word_tokenizer().chat_template))
    check_assistant_marks(word_tokenizer(UNMARKED), "mine", str(file))
    file.write_text(UNMARKED)
    with pytest.raises(UserError, match=r"the chat template of .*marked\.jinja does not mark"):
        check_assistant_marks(word_tokenizer(), "mine", str(file))


def test_a_template_that_trl_knows_goes_on() -> None:
    """TRL trains with its own marked version of these."""
    from trl import chat_template_utils

    check_assistant_marks(word_tokenizer(chat_template_utils.qwen3_chat_template), "Qwen3")


def test_assistant_only_loss_is_refused_before_weights(
    recipe: ForkedRecipe, model: Path, tmp_path: Path, data: Any
) -> None:
    import shutil

    from tests.support.recipe import write_jsonl

    unmarked = shutil.copytree(model, tmp_path / "unmarked")
    word_tokenizer(UNMARKED).save_pretrained(unmarked)
    for weights in unmarked.glob("*.safetensors"):
        weights.unlink()
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rows = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 4)
    one = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    words = command(
        unmarked, rows, PRESETS / "zero3.json", tmp_path / "out", assistant_only_loss=True, report_to="none"
    )
    ended = recipe(words, **one)
    assert ended.code == 2, ended
    (line,) = ended.errors
    assert line.startswith(f"--assistant_only_loss: the chat template of {unmarked} does not mark"), ended
