"""Every command of the cookbook and of the lessons is checked: with the shapes of the models it names, without weights.

Training commands go through all that a recipe checks before it reads a weight. ``plan`` and ``check`` run. What
converts or draws (``upcycle``, ``export``, ``report``) is parsed here; ``tests/docs/test_readme.py`` runs the same
commands small.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from docs.tools.models import HUB
from moe_models.errors import UserError
from moe_models.files import read_json
from tests.support.recipe import word_tokenizer  # puts recipes/ on sys.path

ROOT = Path(__file__).parents[2]
PAGES = [
    page for folder in ("cookbook", "concepts", "samples") for page in sorted((ROOT / "docs" / folder).glob("*.md"))
]
FENCE = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
LAUNCHED = ("finetune", "pretrain")
OTHER_PROGRAMS = ("vllm",)


def commands() -> list[tuple[str, str]]:
    """(page, command), continuation lines joined, comments dropped."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.split("#")[0].split())
                if command:
                    found.append((page.name, command))
    return found


SHOWN = commands()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders under the names of the hub with the models' real config.json, and the data that the commands name."""
    folder = tmp_path_factory.mktemp("cookbook")
    for hub_id, config in HUB.items():
        for name in (hub_id, f"shared/{hub_id.rpartition('/')[2]}"):
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "out" / "moe").mkdir(parents=True)
    small = {**HUB["mistralai/Mixtral-8x7B-v0.1"], "num_hidden_layers": 2}
    (folder / "out" / "moe" / "config.json").write_text(json.dumps(small))
    word_tokenizer().save_pretrained(folder / "my-tokenizer")
    for name in (
        "my.jsonl",
        "chat.jsonl",
        "chat-heldout.jsonl",
        "shared/my.jsonl",
        "shared/chat.jsonl",
        "my-text/one.jsonl",
    ):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"text": "w5 w6 w7"}\n')
    for name in ("ds_configs", "model_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def split(command: str) -> tuple[str, int, list[str]]:
    """(verb, ranks, the recipe's words) of a command line; slurm's and the hostfile's are two nodes of eight."""
    words = shlex.split(command)
    gpus = 8
    for word in words:
        if word.startswith("GPUS="):
            gpus = int(word.removeprefix("GPUS="))
    place = next(place for place, word in enumerate(words) if word.endswith(("run.sh", "slurm.sbatch")))
    if words[0] == "sbatch" or words[0].startswith("HOSTFILE="):
        gpus = 16
    return words[place + 1], gpus, words[place + 2 :]


def test_every_kind_of_command_is_known() -> None:
    verbs = set()
    for page, command in SHOWN:
        assert "run.sh" in command or "slurm.sbatch" in command or command.startswith(OTHER_PROGRAMS), (page, command)
        if not command.startswith(OTHER_PROGRAMS):
            verbs.add(split(command)[0])
    assert verbs == {"finetune", "pretrain", "plan", "check", "upcycle", "export", "report"}


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, id=f"{page}: {command[:50]}") for page, command in SHOWN if "vllm" not in command],
)
def test_command(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, gpus, words = split(command)
    monkeypatch.chdir(workplace)
    words = [word.replace("/shared/", "shared/") for word in words]
    if "--resume_from_checkpoint" in words:
        checkpoint = workplace / words[words.index("--output_dir") + 1] / "checkpoint-500"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    if verb in LAUNCHED:
        check_training(verb, gpus, words, monkeypatch)
    elif verb in ("plan", "check"):
        assert importlib.import_module(verb).main(words) == 0
        assert capsys.readouterr().out
    else:
        importlib.import_module({"report": "routing_report"}.get(verb, verb)).parse(words)
    if "--resume_from_checkpoint" in words:
        shutil.rmtree(checkpoint.parent)


def check_training(verb: str, gpus: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the recipe refuses before weights, as one rank of so many GPUs. Raises UserError with every problem."""
    command_line = importlib.import_module("command_line")
    flags = command_line.FROM_CHECKPOINT if verb == "finetune" else importlib.import_module(verb).FROM_CONFIG
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))  # one node: several would wait for each other
    monkeypatch.setattr("moe_models.engine.cpu.on_cpu", lambda: False)
    monkeypatch.setattr("moe_models.preflight.liger.cannot_run", lambda *_, **__: [])  # no GPU here to run it
    monkeypatch.setattr("moe_models.preflight.flags.cannot_run", lambda *_, **__: [])
    monkeypatch.setattr("moe_models.preflight.adapters.resume_problems", lambda *_: [])  # its checkpoint is empty
    command_line.check(words, "", flags)


def test_a_wrong_command_is_seen(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is none, and experts that EP does not divide."""
    monkeypatch.chdir(workplace)
    shown = next(command for _, command in SHOWN if "Mixtral" in command and "GPUS=8" in command)
    _, _, words = split(shown)
    with pytest.raises(UserError, match="no such flag"):
        check_training("finetune", 8, [*words, "--learning_speed", "1"], monkeypatch)
    with pytest.raises(UserError, match="does not divide"):
        check_training("finetune", 6, words, monkeypatch)


def test_files_that_pages_name_are_read(workplace: Path) -> None:
    """The JSON lines of the chat page are what the loader takes."""
    page = (ROOT / "docs" / "cookbook" / "chat-data.md").read_text()
    (row,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    file = workplace / "row.json"
    file.write_text(row)
    assert [turn["role"] for turn in read_json(file)["messages"]] == ["user", "assistant"]
