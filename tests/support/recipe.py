"""Running recipes/finetune.py in tests: a tiny model folder with a real tokenizer, data files, and three ways to start.

- :func:`launch` starts the ``deepspeed`` launcher (20 s): where several processes on one command line are the point;
- :func:`run_alone` starts ``python recipes/finetune.py`` (5 s of imports): where the interpreter's start is the point;
- :class:`ForkedRecipe` forks a process that has the imports behind it (0.3 s): for the many ways to be refused.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cluster import forking, free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "finetune.py"
PRETRAIN = ROOT / "recipes" / "pretrain.py"
sys.path.insert(0, str(SCRIPT.parent))  # as python does for a script; runpy does not
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "RANK": "0",  # what the launcher would set; it overwrites it
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <eos>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <eos>' }}{% endif %}{{ ' ' }}{% endfor %}"
)


def word_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token per word: ``w5`` to ``w63`` and the special ones, as many as the tiny models have ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"] + [f"w{i}" for i in range(5, 64)]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_model(folder: Path, model_type: str = "mixtral", **overrides: Any) -> Path:
    """A tiny random model with :func:`word_tokenizer` beside it."""
    from tests.support.tiny import save_tiny

    save_tiny(folder, model_type, **overrides)
    word_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """``count`` random words that the tokenizer knows."""
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5, 64)}" for _ in range(count))


def text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of 6 to 24 words."""
    rng = random.Random(seed)
    return [{"text": words(rng.randrange(6, 25), seed=rng.randrange(10**9))} for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, data: Path, ds_config: Path, output_dir: Path, **flags: Any) -> list[str]:
    """The words after ``finetune.py``; a flag with the value None is left out."""
    given = {
        "model_name_or_path": model,
        "dataset_name": data,
        "deepspeed": ds_config,
        "output_dir": output_dir,
        "max_length": 32,
        **flags,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"

    @property
    def errors(self) -> list[str]:
        """The lines that start with ``error: ``, without it."""
        return [line.removeprefix("error: ") for line in self.stderr.splitlines() if line.startswith("error: ")]


def start_launcher(
    arguments: list[str],
    log: Path,
    world_size: int = 2,
    name: str = "deepspeed",
    script: Path = SCRIPT,
    port: int | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """A launcher in a process group of its own; stdout and stderr go to ``log`` and ``log``.err."""
    count = str(world_size)
    port_word = str(port or free_port())
    words = {
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", count, "--master_port", port_word],
        "run.sh": ["moe_models.nodes.launcher", "--num_gpus", count, "--master_port", port_word],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", count, "--master_port", port_word],
        "accelerate": [
            "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1", "--num_processes", count,
            "--main_process_port", port_word, "--mixed_precision", "no", "--dynamo_backend", "no",
        ],
    }  # fmt: skip
    launcher = [sys.executable, "-m", *words[name]]
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        stdout=log.open("w"),
        stderr=log.with_suffix(".err").open("w"),
        env={**os.environ, **ENVIRONMENT, **environment},
        cwd=ROOT,
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str], log: Path, timeout: float) -> Ended:
    """Wait for a launcher; one that does not end in time is killed with all its processes, and the test fails."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        ended = Ended(-9, log.read_text(), log.with_suffix(".err").read_text())
        raise AssertionError(f"did not end within {timeout:.0f} s: {ended}") from None
    return Ended(code, log.read_text(), log.with_suffix(".err").read_text())


def launch(
    arguments: list[str],
    folder: Path,
    world_size: int = 2,
    timeout: float = 150,
    name: str = "deepspeed",
    script: Path = SCRIPT,
) -> Ended:
    """Run under a launcher, to the end."""
    log = folder / "launch.log"
    return end_of(start_launcher(arguments, log, world_size, name, script), log, timeout)


def run_alone(arguments: list[str], timeout: float = 90, script: Path = SCRIPT, **environment: str) -> Ended:
    """Run ``python recipes/finetune.py`` without a launcher."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def venv_for_run_sh(folder: Path) -> None:
    """``.venv`` beside a copy of run.sh, which would install into it; this interpreter has everything already."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "deepspeed"):
        script = folder / ".venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(sys.executable).with_name(name)))} "$@"\n')
        script.chmod(0o755)
    text = "".join((folder / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    sum_ = subprocess.run(["cksum"], input=text, capture_output=True, text=True, check=True).stdout.strip()
    (folder / ".venv" / ".installed-main").write_text(sum_ + "\n")


class ForkedRecipe:
    """Runs recipes/finetune.py in forks of one process that has imported what the recipe imports."""

    def __init__(self, script: Path = SCRIPT) -> None:
        self._script = script
        os.environ.update(ENVIRONMENT)
        self._context = forking()

    def __call__(self, arguments: list[str], timeout: float = 240, start_in: Path = ROOT, **environment: str) -> Ended:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            words = (self._script, arguments, environment, start_in, out, err)
            process = self._context.Process(target=_run_script, args=words)
            process.start()
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
            ended = Ended(-9 if process.exitcode is None else process.exitcode, out.read_text(), err.read_text())
        assert ended.code >= 0, f"did not end within {timeout:.0f} s: {ended}"
        return ended


def _run_script(
    script: Path, arguments: list[str], environment: dict[str, str], start_in: Path, out: Path, err: Path
) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.update({**ENVIRONMENT, **environment})
    os.chdir(start_in)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


# ------------------------------------------------------------------------------ the recipe's own functions in a cluster


def start_in_cluster(arguments: list[str], from_scratch: bool = False) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(trainer, checked JSON, held-out rows, the script's names) on this rank, up to before ``trainer.train()``.

    ``from_scratch`` is recipes/pretrain.py.
    """
    from moe_models.engine.library_globals import forget_engines

    forget_engines()
    script = runpy.run_path(str(SCRIPT), run_name="recipe")
    kind, make_model = script["FROM_CHECKPOINT"], script["read_model"]
    if from_scratch:
        pretrain = runpy.run_path(str(PRETRAIN), run_name="recipe")
        kind, make_model = pretrain["FROM_CONFIG"], pretrain["new_model"]
    flags, recipe, args, model_args, ds = script["read_command_line"](arguments, flags=kind)
    train_rows, eval_rows = script["load_data"](flags, recipe, args)
    model, tokenizer = make_model(recipe, args, model_args, train_rows, ds)
    trainer = script["build_trainer"](model, tokenizer, recipe, args, ds, train_rows, eval_rows, model_args)
    return trainer, ds, eval_rows, script


def train_in_cluster(
    arguments: list[str], callbacks: tuple[Any, ...] = (), from_scratch: bool = False
) -> dict[str, Any]:
    """Train as the recipe does, export, and return what was logged and where the model lies."""
    trainer, _, eval_rows, script = start_in_cluster(arguments, from_scratch)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=script["resume_value"](trainer.args.resume_from_checkpoint))
    if eval_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    return {
        "history": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
        "proof": trainer.last_proof,
        "folder": str(Path(trainer.args.output_dir) / "model"),
    }


def curve(result: dict[str, Any], *keys: str) -> dict[int, tuple[float, ...]]:
    """step -> the logged values of ``keys``, of the training steps that were logged."""
    rows = [entry for entry in result["history"] if "loss" in entry]
    return {entry["step"]: tuple(entry[key] for key in keys) for entry in rows}


def largest_difference(ours: str | Path, reference: str | Path) -> float:
    """Over all weights of two exported folders, which must hold the same tensors."""
    from safetensors.torch import load_file

    a, b = load_file(f"{ours}/model.safetensors"), load_file(f"{reference}/model.safetensors")
    assert list(a) == list(b), "the two folders hold different tensors"
    return max(float((a[name] - b[name]).abs().max()) for name in a)
