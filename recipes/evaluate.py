"""Evaluate a trained model with lm-eval: tasks, or the perplexity of your own text, before and after side by side.

    # perplexity of held-out text: a file (.txt, .jsonl, .json, .parquet), a folder, or a hub id
    python recipes/evaluate.py --model out/mixtral/model --text heldout.jsonl

    # tasks that lm-eval ships (their data comes from the hub), or your own YAML; offline where its data is a local file
    python recipes/evaluate.py --model out/mixtral/model --tasks arc_easy,hellaswag
    python recipes/evaluate.py --model out/mixtral/model --tasks my_task.yaml

    # an adapter, beside its base model
    python recipes/evaluate.py --model out/lora/adapter --text heldout.jsonl

--model is a Hugging Face folder or hub id, or PEFT's folder of an adapter. What it was before training is evaluated
too: the base model of an adapter, or the model that the run started from, as summary.json beside the folder says.
--before names another one, and `--before none` leaves it out.

Text: each row is a document. Conversations go through the chat template; a prompt is followed by its completion.
lm-eval reports perplexity by word and by byte, and bits by byte. The last two compare models with different tokenizers.

On several GPUs the layers of a model are spread over all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_models.errors import Problems, UserError, one_line, run, some_of, warn
from moe_models.files import read_json, write

TEXT_TASK = "text"
"""The name under which ``--text`` is reported."""
SUMMARY = "summary.json"


def main(words: list[str]) -> int:
    """Check, evaluate before and after, tell."""
    arguments = parse(words)
    quieten()
    before, after = check(arguments)
    with tasks_of(arguments, after) as tasks:
        results = {}
        for name, subject in (("before", before), ("after", after)):
            if subject is not None:
                print(f"{name}: {subject}", flush=True)
                results[name] = evaluate(subject, tasks, arguments)
    rows = table_rows(results)
    print_table(rows, both=before is not None)
    if arguments.output is not None:
        subjects = {"before": str(before) if before else None, "after": str(after)}
        write(arguments.output, json.dumps({**subjects, "limit": arguments.limit, "results": rows}, indent=2) + "\n")
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="what training wrote: a model folder, an adapter's folder, or a hub id")
    add("--before", help="what to compare with (default: the model it was trained from); none leaves it out")
    add("--tasks", default="", help="tasks of lm-eval, separated by commas, or YAML files of your own")
    add("--include_path", type=Path, help="a folder with more tasks in YAML")
    add("--text", help="held-out text: a file, a folder or a hub id, as --dataset_name of training")
    add("--text_split", default="train", help="its split (default train; a file has no other)")
    add("--max_length", type=int, default=2048, help="tokens that the model sees at once (default 2048)")
    add("--batch_size", type=int, default=1, help="sequences at once (default 1)")
    add("--limit", type=int, help="only so many documents of each task, for a try")
    add("--num_fewshot", type=int, help="examples before each question (default: the task's own)")
    add("--apply_chat_template", action="store_true", help="tasks as turns of a chat, through the model's template")
    add("--output", type=Path, help="write the figures to this JSON file, too")
    return parser.parse_args(words)


# ----------------------------------------------------------------------------------------------------------- the checks


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model to evaluate."""

    model: str
    """Folder or hub id of whole weights."""
    adapter: Path | None = None
    """PEFT's folder, put on the model."""
    revision: str | None = None

    def __str__(self) -> str:
        if self.adapter is not None:
            return f"{self.adapter} on {self.model}"
        return self.model


def check(arguments: argparse.Namespace) -> tuple[Subject | None, Subject]:
    """(what it was before, what it is). Raises UserError with every problem, before a weight is read."""
    from moe_models.families.config_json import read_model_config
    from moe_models.preflight.paths import check_dataset_path

    # 1. The flags, and whether lm-eval is there.
    problems = Problems()
    names = task_names(arguments)
    if find_spec("lm_eval") is None:
        problems.add("lm-eval is not installed; ./run.sh evaluate installs it, or: pip install 'moe-recipes[eval]'")
    if not names and not arguments.text:
        problems.add("--tasks, --text: one of them is needed; see --help")
    for name in names:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            problems.add(f"--tasks {name}: no such file")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        problems.add(f"--include_path {arguments.include_path}: no such folder")
    if arguments.text:
        problems.add(*check_dataset_path(arguments.text))
    for name in ("max_length", "batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.add(f"--{name} {value}: must be 1 or more")

    # 2. The models. A folder that lacks config.json is refused here.
    after = Subject(model=arguments.model)
    before = None
    with problems.note():
        after = subject_of(arguments.model)
        before = before_of(arguments, after)
    for subject in (after, before):
        if subject is None:
            continue
        with problems.note():
            length = read_model_config(subject.model).get("max_position_embeddings")
            if length and arguments.max_length > length:
                problems.add(
                    f"--max_length {arguments.max_length}: longer than the context of {subject.model}: {length}"
                )
    problems.refuse()
    return before, after


def task_names(arguments: argparse.Namespace) -> list[str]:
    """The words of ``--tasks``."""
    return [name.strip() for name in arguments.tasks.split(",") if name.strip()]


def subject_of(name: str) -> Subject:
    """A folder that holds an adapter, or any other model. Raises UserError for an adapter without a base model."""
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file():
        return Subject(model=name)
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}: its adapter_config.json names no base model")
    return Subject(model=str(base), adapter=folder, revision=config.get("revision"))


def before_of(arguments: argparse.Namespace, after: Subject) -> Subject | None:
    """What ``after`` was trained from, as far as that is known; None with ``--before none``."""
    if arguments.before is not None:
        return None if arguments.before == "none" else subject_of(arguments.before)
    if after.adapter is not None:
        return Subject(model=after.model, revision=after.revision)
    summary = Path(after.model).absolute().parent / SUMMARY
    if Path(after.model).is_dir() and summary.is_file():
        base = read_json(summary).get("base_model")
        if base:
            return subject_of(str(base))
    return None


# ------------------------------------------------------------------------------------------------------------ the tasks


@contextmanager
def tasks_of(arguments: argparse.Namespace, subject: Subject) -> Iterator[list[Any]]:
    """What lm-eval is asked for; ``--text`` is in a file that is gone after the block.

    Raises UserError for a task that is unknown or whose data cannot be had, before a weight is read.
    """
    # 1. Names that lm-eval knows, and YAML files.
    tasks: list[Any] = []
    for name in task_names(arguments):
        if name.endswith((".yaml", ".yml")):
            tasks.append(read_task(name))
        else:
            tasks.append(name)
    refuse_unknown(arguments, [task for task in tasks if isinstance(task, str)])

    # 2. Your text.
    with tempfile.TemporaryDirectory() as folder:
        if arguments.text:
            file = Path(folder) / "text.jsonl"
            write_documents(arguments, subject, file)
            tasks.append(text_task(file))

        # 3. Their data, which lm-eval will find in its cache.
        try:
            task_manager(arguments).load(tasks)
        except Exception as error:  # those of datasets, of the hub and of lm-eval
            asked = f"--tasks {arguments.tasks}" if arguments.tasks else f"--text {arguments.text}"
            raise UserError(f"{asked}: cannot be loaded: {one_line(error)[:300]}") from error
        yield tasks


def read_task(name: str) -> dict[str, Any]:
    """A task in lm-eval's YAML. Raises UserError if it is none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        task: dict[str, Any] = load_yaml(name, resolve_func=True)
    except Exception as error:  # yaml and lm-eval have many
        raise UserError(f"--tasks {name}: cannot be read: {one_line(error)}") from error
    if not task.get("task"):
        raise UserError(f"--tasks {name}: has no key `task`, the name under which it is reported")
    return task


def refuse_unknown(arguments: argparse.Namespace, names: list[str]) -> None:
    """Raise UserError for names that lm-eval has no task for."""
    if not names:
        return
    manager = task_manager(arguments)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks {some_of(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists them, --include_path adds "
            "a folder of your own"
        )


def task_manager(arguments: argparse.Namespace) -> Any:
    """lm-eval's index of tasks, with ``--include_path``."""
    from lm_eval.tasks import TaskManager

    include = None
    if arguments.include_path is not None:
        include = str(arguments.include_path)
    return TaskManager(include_path=include)


def text_task(file: Path) -> dict[str, Any]:
    """lm-eval's task for the perplexity of a file, one document a row."""
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        "task": TEXT_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in metrics],
    }


def write_documents(arguments: argparse.Namespace, subject: Subject, file: Path) -> None:
    """Write the rows of ``--text`` as documents. Raises UserError if there is none, or if they cannot be written."""
    from moe_models.data import load_rows

    rows = load_rows(arguments.text, split=arguments.text_split)
    if "input_ids" in rows.column_names:
        raise UserError(f"--text {arguments.text}: holds token ids; give text, messages, or prompt and completion")
    tokenizer = None
    if set(rows.column_names) & {"messages", "prompt"}:
        from moe_models.data import check_chat_template

        tokenizer = tokenizer_of(subject)
        check_chat_template(tokenizer, rows, arguments.model)
    written = 0
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            text = document(row, tokenizer)
            if text.strip():
                out.write(json.dumps({"text": text}) + "\n")
                written += 1
    if written == 0:
        raise UserError(f"--text {arguments.text}: holds no text")


def document(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of one row."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if isinstance(row["prompt"], str):
        return str(row["prompt"] + row["completion"])
    return str(tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False))


# ------------------------------------------------------------------------------------------------------- the evaluation


def quieten() -> None:
    """Let lm-eval report errors only. Offline, its metrics ask no hub."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def evaluate(subject: Subject, tasks: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's answer for one model. Raises UserError if model or data cannot be read."""
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    # upstream: lm-eval 0.4.13: git, which it asks for a commit, prints "fatal: not a git repository". Remove when: it
    # keeps git's stderr to itself.
    evaluator.get_git_commit_hash = lambda: None

    class OneBar(HFLM):  # type: ignore[misc]
        # upstream: lm-eval 0.4.13: the perplexity of text draws a progress bar for every batch. Remove when: it passes
        # disable_tqdm on.
        def _loglikelihood_tokens(self, *others: Any, override_bs: int | None = None, **options: Any) -> Any:
            if override_bs is not None:
                options["disable_tqdm"] = True
            return super()._loglikelihood_tokens(*others, override_bs=override_bs, **options)

    model, tokenizer = load(subject)
    try:
        answer: dict[str, Any] = evaluator.simple_evaluate(
            OneBar(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=arguments.batch_size,
                max_length=arguments.max_length,
            ),
            tasks=tasks,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            log_samples=False,
            apply_chat_template=arguments.apply_chat_template,
            task_manager=task_manager(arguments),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{subject}: the GPUs' memory is too small: {one_line(error)[:200]}; lower --batch_size or --max_length"
        ) from error
    except (OSError, ValueError) as error:  # data that the hub does not give, above all
        raise UserError(f"{subject}: cannot be evaluated: {one_line(error)[:300]}") from error
    del model
    gc.collect()
    return answer


def tokenizer_of(subject: Subject) -> Any:
    """The adapter's tokenizer, where it has one, else the model's. Raises UserError."""
    from transformers import AutoTokenizer

    place: str | Path = subject.model
    revision = subject.revision
    if subject.adapter is not None and (subject.adapter / "tokenizer_config.json").is_file():
        place = subject.adapter
        revision = None
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{place}: its tokenizer cannot be read: {one_line(error)[:300]}") from error


def load(subject: Subject) -> tuple[Any, Any]:
    """(model in eval mode, on the GPUs where there are any; tokenizer). Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401 (for AutoModelForCausalLM)

    options: dict[str, Any] = {"dtype": "auto", "revision": subject.revision}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(subject.model, **options)
        if subject.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(subject.adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{subject}: cannot be read: {one_line(error)[:300]}") from error
    return model.eval(), tokenizer_of(subject)


# ---------------------------------------------------------------------------------------------------------- the figures


def table_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each figure of each task: task, metric, which way is better, before, after, standard error."""
    rows = []
    for task, figures in results["after"]["results"].items():
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric == "sample_len" or not rule:
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            before = None
            if "before" in results:
                before = results["before"]["results"][task].get(key)
            rows.append(
                {
                    "task": task,
                    "metric": metric if rule == "none" else f"{metric} ({rule})",
                    "higher_is_better": results["after"].get("higher_is_better", {}).get(task, {}).get(metric),
                    "before": before,
                    "after": value,
                    "stderr": error if isinstance(error, float) else None,
                }
            )
    return rows


def print_table(rows: list[dict[str, Any]], *, both: bool) -> None:
    """The figures, before and after side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    names = ["before", "after", "change"] if both else ["after"]
    for name in [*names, "+-", "better is"]:
        table.add_column(name, justify="right")
    for row in rows:
        shown = [f"{row['after']:.4f}"]
        if both and row["before"] is not None:
            shown = [f"{row['before']:.4f}", *shown, f"{row['after'] - row['before']:+.4f}"]
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        better = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
        table.add_row(row["task"], row["metric"], *shown, error, better)
    Console().print(table)
    if not rows:
        warn(["lm-eval returned no figure"])


if __name__ == "__main__":
    run(main)
