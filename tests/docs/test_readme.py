"""Every command that README and docs/ show is run, with its big names replaced by small things."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.cluster import free_port
from tests.support.recipe import venv_for_run_sh

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = {"finetune", "upcycle", "export", "evaluate", "check", "plan", "bench", "report"}
"""Each is shown at least once; ``pretrain`` is shown by model_configs/README.md and run by tests/recipes."""


def commands() -> list[str]:
    """The lines of the pages' bash blocks, continuation lines joined, comments dropped."""
    blocks = []
    for page in PAGES:
        blocks += re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands need, with a tiny Mixtral, a tiny Llama and a few rows of text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.parity import tokenizer
    from tests.support.tiny import save_tiny

    folder = tmp_path_factory.mktemp("readme")
    for name in ("ds_configs", "recipes", "run.sh", "pyproject.toml", "moe_models", *ROOT.glob("requirements*.txt")):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / source.name)
    save_tiny(folder / "tiny-mixtral", "mixtral", num_local_experts=8)
    tokenizer().save_pretrained(folder / "tiny-mixtral")
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(llama).save_pretrained(folder / "models" / "dense")
    tokenizer().save_pretrained(folder / "models" / "dense")
    rows = ({"input_ids": [3 + (i * k) % 61 for i in range(24)]} for k in range(1, 33))
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n')
    (folder / "book.txt").write_text(" ".join(f"w{5 + i % 59}" for i in range(300)))
    venv_for_run_sh(folder)
    return folder


def shrink(command: str) -> str:
    """The same command for two CPU processes and a model of a few thousand parameters."""
    small = {
        "GPUS=8": "GPUS=2",
        "mistralai/Mixtral-8x7B-v0.1": "tiny-mixtral",
        "zero1_ep8.json": "zero1_ep2.json",
        "checkpoint-500": "checkpoint-2",
        "--seq_length 4096": "--seq_length 32",
        "--num_gpus 8": "--num_gpus 2",
        "./run.sh bench": "./run.sh bench --seq_length 32 --micro_batch 1 --steps 1 --warmup 1 --profile_steps 0",
        "./run.sh check": "./run.sh check --max_length 32",  # what the tiny model can take
        "./run.sh evaluate": "./run.sh evaluate --max_length 32",
        "--tasks arc_easy,hellaswag": "--text heldout.jsonl",  # their data are on the hub
        "./run.sh finetune": f"./run.sh finetune --max_steps {4 if 'resume' in command else 2} --save_steps 2 "
        "--max_length 32 --logging_steps 1 --report_to none",
    }
    for big, little in small.items():
        command = command.replace(big, little)
    return command


def assert_only_lm_eval_is_missing(command: str, workplace: Path, env: dict[str, str]) -> None:
    """Where lm-eval is not installed, a shown evaluation is refused for that alone; run.sh would install it."""
    words = shlex.split(shrink(command).replace("./run.sh evaluate", f"{sys.executable} recipes/evaluate.py"))
    done = subprocess.run(words, cwd=workplace, env=env, capture_output=True, text=True, timeout=100, check=False)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: lm-eval is not installed"), done.stderr


def test_shown_commands_run(workplace: Path) -> None:
    """In the order of README and docs/, each may use what the one before left."""
    shown = commands()
    run = [command for command in shown if "run.sh " in command and "run.sh test" not in command]
    # The quickstart has a test of its own, and `./run.sh test` is this run.
    assert set(shown) - set(run) == {"./run.sh", "./run.sh test"}
    assert {command.split("run.sh ")[1].split()[0] for command in run} == VERBS
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    env["MASTER_PORT"] = str(free_port())
    for command in run:
        if "run.sh evaluate" in command and find_spec("lm_eval") is None:
            assert_only_lm_eval_is_missing(command, workplace, env)
            continue
        done = subprocess.run(
            ["bash", "-c", shrink(command)], cwd=workplace, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    from transformers import AutoModelForCausalLM

    for folder in ("out/mixtral/model", "out/moe", "out/mixtral-500"):
        assert AutoModelForCausalLM.from_pretrained(workplace / folder).config.num_local_experts == 8
