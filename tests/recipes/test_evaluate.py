"""``recipes/evaluate.py``: what it refuses and compares; with lm-eval installed, its figures against a plain loop."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from tests.support.recipe import ENVIRONMENT, ROOT, save_model, text_rows, write_jsonl

sys.path.insert(0, str(ROOT / "recipes"))  # as python does for a script

import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with its summary, what it was before, an adapter's config, and text."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "base")
    save_model(folder / "run" / "model", initializer_range=0.05)
    (folder / "run" / "summary.json").write_text(json.dumps({"base_model": str(folder / "base")}))
    (folder / "adapter").mkdir()
    config = {"base_model_name_or_path": str(folder / "base"), "peft_type": "LORA"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    write_jsonl(folder / "held.jsonl", text_rows(6, seed=3))
    return folder


def parsed(*words: Any) -> argparse.Namespace:
    return evaluate.parse([str(word) for word in words])


def test_every_problem_at_once(folder: Path, tmp_path: Path) -> None:
    flags = ["--model", tmp_path / "gone", "--before", folder / "base", "--tasks", "gone.yaml", "--text", "gone.txt"]
    with pytest.raises(UserError) as caught:
        evaluate.check(parsed(*flags, "--include_path", tmp_path / "tasks", "--limit", 0, "--max_length", 65))
    lines = caught.value.problems
    if find_spec("lm_eval") is None:
        assert lines.pop(0).startswith("lm-eval is not installed; ./run.sh evaluate installs it")
    starts = (
        "--tasks gone.yaml: no such file",
        f"--include_path {tmp_path / 'tasks'}: no such folder",
        "data set gone.txt: no such file or folder",
        "--limit 0: must be 1 or more",
        f"{tmp_path / 'gone'}: no such folder",
        f"--max_length 65: longer than the context of {folder / 'base'}: 64",
    )
    assert len(lines) == len(starts), lines
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def test_before_is_what_the_run_started_from(folder: Path) -> None:
    base = evaluate.Subject(model=str(folder / "base"))

    def before(*words: Any) -> Any:
        arguments = parsed(*words)
        return evaluate.before_of(arguments, evaluate.subject_of(arguments.model))

    assert before("--model", folder / "run" / "model") == base  # by summary.json
    assert before("--model", folder / "adapter") == base
    assert before("--model", folder / "adapter", "--before", "none") is None
    assert before("--model", folder / "base") is None  # nothing is known of it
    chosen = before("--model", folder / "base", "--before", folder / "adapter")
    assert chosen.adapter == folder / "adapter"
    assert str(chosen) == f"{folder / 'adapter'} on {folder / 'base'}"


def test_rows_of_all_formats_are_documents(folder: Path) -> None:
    tokenizer = evaluate.tokenizer_of(evaluate.Subject(model=str(folder / "base")))
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    chat = "<user> w5 <eos> <assistant> w6 <eos> "
    assert evaluate.document({"text": "w7 w8"}, None) == "w7 w8"
    assert evaluate.document({"prompt": "w7 ", "completion": "w8"}, None) == "w7 w8"
    assert evaluate.document({"messages": turns}, tokenizer) == chat
    assert evaluate.document({"prompt": turns[:1], "completion": turns[1:]}, tokenizer) == chat


def test_figures_stand_side_by_side() -> None:
    def answer(value: float) -> dict[str, Any]:
        figures = {"alias": "arc", "acc,none": value, "acc_stderr,none": 0.01, "em,strict": value / 2, "sample_len": 9}
        return {"results": {"arc": figures}, "higher_is_better": {"arc": {"acc": True}}}

    acc, em = evaluate.table_rows({"before": answer(0.25), "after": answer(0.5)})
    assert acc == {
        "task": "arc", "metric": "acc", "higher_is_better": True, "before": 0.25, "after": 0.5, "stderr": 0.01,
    }  # fmt: skip
    assert (em["metric"], em["before"], em["after"], em["stderr"]) == ("em (strict)", 0.125, 0.25, None)


# ------------------------------------------------------------------------------------------------------- with lm-eval


def run_evaluate(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *map(str, words)]
    env = {**ENVIRONMENT, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def bits_per_byte(model_folder: Path, adapter: Path | None, rows: list[dict[str, str]]) -> float:
    """The obvious loop: every token of every row, after <bos>, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    nats = 0.0
    for row in rows:
        ids = [tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(log_p[place, token].item() for place, token in enumerate(ids[1:]))
    return nats / math.log(2) / sum(len(row["text"].encode()) for row in rows)


@pytest.mark.lm_eval
@pytest.mark.conformance
def test_perplexity_of_text_is_that_of_a_plain_loop(folder: Path, tmp_path: Path) -> None:
    """Before and after, of a model and of an adapter. Tolerance: another order of summation in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    rows = text_rows(6, seed=3)
    base = bits_per_byte(folder / "base", None, rows)
    for model, after in (
        (folder / "run" / "model", bits_per_byte(folder / "run" / "model", None, rows)),
        (tmp_path / "adapter", bits_per_byte(folder / "base", tmp_path / "adapter", rows)),
    ):
        output = tmp_path / f"{model.name}.json"
        flags = ["--model", model, "--text", folder / "held.jsonl", "--max_length", 64, "--output", output]
        done = run_evaluate(*flags)
        assert done.returncode == 0, done.stderr
        figures = {row["metric"]: row for row in json.loads(output.read_text())["results"]}
        assert figures["bits_per_byte"]["before"] == pytest.approx(base, rel=1e-5)
        assert figures["bits_per_byte"]["after"] == pytest.approx(after, rel=1e-5)
        assert abs(base - after) > 1e-3 * base, "the two must be told apart"
        assert figures["word_perplexity"]["higher_is_better"] is False
        assert "fatal" not in done.stderr


@pytest.mark.lm_eval
@pytest.mark.conformance
def test_a_task_in_yaml_runs_offline(folder: Path, tmp_path: Path) -> None:
    """The model must prefer w5 to w6 after a prompt as often as plain transformers says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = []
    right = 0
    for seed in range(8):
        prompt = f"w{10 + seed} w{30 + seed}"
        rows.append({"question": prompt, "choices": ["w5", "w6"], "label": seed % 2})
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        chosen = int(logits[6] > logits[5])
        right += chosen == seed % 2
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    (tmp_path / "task.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{label}}'\nmetric_list:\n  - metric: acc\n"
    )
    flags = ["--model", folder / "base", "--tasks", tmp_path / "task.yaml", "--max_length", 64]
    done = run_evaluate(*flags, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (row["task"], row["metric"], row["after"], row["before"]) == ("mine", "acc", right / 8, None)


@pytest.mark.lm_eval
@pytest.mark.conformance
def test_unknown_and_unreachable_tasks_get_one_line(folder: Path) -> None:
    for task, words in (("no_such", "lm-eval has no such task"), ("arc_easy", "cannot be loaded: Couldn't reach")):
        done = run_evaluate("--model", folder / "base", "--tasks", task, "--max_length", 64)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in line
        assert "Traceback" not in done.stderr
        assert "Loading weights" not in done.stderr
