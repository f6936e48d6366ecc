"""An export gives back what its class left on the disk, and says what training changed.

Bits are compared, so there is no tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe_models.checkpoint.export import hub_plan
from moe_models.checkpoint.hf_folder import ExportError
from moe_models.checkpoint.origin import Origin, compare, noted_origin, read_origin, refuse_unchanged
from moe_models.families.config_json import read_model_config
from moe_models.families.table import FAMILIES
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.tiny import make_model, save_multimodal, save_tiny

LEFT_OVER = {
    "model.visual.patch_embed.weight": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "model.visual.position_ids": torch.arange(7),
    "mtp.fc.weight": torch.full((3, 5), float("nan")),
    "mtp.layers.0.mlp.experts.1.gate_proj.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(7)),
}
"""A vision tower and layers for multi-token prediction, as text models find them in their checkpoints."""


def with_leftovers(folder: Path, model_type: str, **overrides: Any) -> Path:
    """A tiny checkpoint of two files, the second with tensors that the class does not hold."""
    save_tiny(folder, model_type, **overrides)
    first = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    second = folder / "model-00002-of-00002.safetensors"
    save_file(LEFT_OVER, second, metadata={"format": "pt"})
    places = dict.fromkeys(load_file(first), first.name) | dict.fromkeys(LEFT_OVER, second.name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def origin_of(folder: Path) -> Origin:
    config = AutoConfig.from_pretrained(folder)
    origin = read_origin(folder, FAMILIES[config.model_type], config)
    assert origin is not None
    return origin


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_what_is_left_over(model_type: str, tmp_path: Path) -> None:
    origin = origin_of(with_leftovers(tmp_path, model_type))
    assert sorted(origin.left_over) == sorted(LEFT_OVER)
    read = dict(origin.leftovers())
    for name, tensor in LEFT_OVER.items():
        assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_nothing_is_left_over_of_a_whole_model(tmp_path: Path) -> None:
    """In the hub's layout, in transformers' own, and where the head is the embedding and stored all the same."""
    assert origin_of(save_tiny(tmp_path / "hub", "qwen3_moe")).left_over == ()

    make_model("mixtral").save_pretrained(tmp_path / "own", save_original_format=False)
    own = origin_of(tmp_path / "own")
    assert any(name.endswith(".experts.gate_up_proj") for name in own.tensors)
    assert own.left_over == ()

    tied = save_tiny(tmp_path / "tied", "mixtral", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tied, metadata={"format": "pt"})
    assert origin_of(tmp_path / "tied").left_over == ()


def changed_copy(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Another folder with the tensors of ``source``, in one file, after ``change``."""
    tensors = roundtrip.load_tensors(source)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_a_comparison_says(tmp_path: Path) -> None:
    origin = origin_of(with_leftovers(tmp_path / "source", "mixtral"))

    def train(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][-1, -1] += 1

    compared = compare(changed_copy(origin.folder, tmp_path / "trained", train), origin)
    assert (compared.changed, compared.passed_on, compared.renamed) == (1, len(LEFT_OVER), 0)
    assert compared.unchanged == len(origin.tensors) - 1 - len(LEFT_OVER)
    assert str(compared).startswith(f"1 of {len(origin.tensors)} tensors changed, ")
    refuse_unchanged(compared, origin, 3)
    with pytest.raises(ExportError, match=r"after 3 steps no tensor differs from .*source; "):
        refuse_unchanged(replace(compared, changed=0), origin, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("mtp.fc.weight"), "1 of .* tensors of .* are lost: mtp.fc.weight"),
        (lambda tensors: tensors.pop("model.norm.weight"), "1 of .* tensors of .* are lost: model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "1 tensors have another shape than in .*: model.norm.weight",
        ),
        (
            lambda tensors: tensors["model.visual.position_ids"].add_(1),
            "model.visual.position_ids: should be as it is in .*, and is not",
        ),
    ],
)
def test_a_loss_is_seen(change: Any, words: str, tmp_path: Path) -> None:
    origin = origin_of(with_leftovers(tmp_path / "source", "mixtral"))
    with pytest.raises(ExportError, match=words):
        compare(changed_copy(origin.folder, tmp_path / "bad", change), origin)


def train_and_compare(source: str, out: str, config: dict[str, Any], learning_rate: float) -> Any:
    """Two steps with a checkpoint, and a live export: what it was compared with, or the error, on this rank."""
    trainer = parity.build_trainer(
        source, out, config, max_steps=2, save_strategy="steps", save_steps=2, learning_rate=learning_rate
    )
    trainer.train()
    try:
        trainer.save_model()
    except ExportError as error:
        return str(error)
    return trainer.last_comparison


@pytest.mark.conformance
@pytest.mark.daily
def test_every_tensor_of_the_source_is_in_the_export(clusters: Callable[[int], Cluster], tmp_path: Path) -> None:
    """Live and from a checkpoint, and plain transformers reads the folder."""
    from recipes.export import export_checkpoint

    source = with_leftovers(tmp_path / "source", "deepseek_v3")
    arguments = (train_and_compare, str(source), str(tmp_path / "run"), parity.ds_config(1, 2))
    compared = clusters(2).run(*arguments, 1e-3)[0]
    assert (compared.passed_on, compared.renamed) == (len(LEFT_OVER), 0)
    assert compared.tensors == compared.changed + compared.unchanged + compared.passed_on
    # The selection bias moves by no gradient.
    assert all(name.endswith("e_score_correction_bias") for name in compared.some_unchanged), compared

    before = roundtrip.load_tensors(source)
    live = roundtrip.load_tensors(tmp_path / "run" / "model")
    assert {name: (x.shape, x.dtype) for name, x in live.items()} == {
        name: (x.shape, x.dtype) for name, x in before.items()
    }
    for name, tensor in LEFT_OVER.items():
        assert torch.equal(live[name].view(torch.uint8), tensor.view(torch.uint8)), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")

    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert noted_origin(checkpoint) == (str(source), None)
    export_checkpoint(checkpoint, tmp_path / "offline", "5GB")
    offline, live = (roundtrip.files_of(tmp_path / name) for name in ("offline", "run/model"))
    assert roundtrip.apart_from_measured(offline) == roundtrip.apart_from_measured(live)

    # A run that changed nothing leaves no new folder, and the old one as it was.
    message = clusters(2).run(*arguments, 1e-30)[0]
    assert message.startswith("after 2 steps no tensor differs from ")
    offline, live = (roundtrip.files_of(tmp_path / name) for name in ("offline", "run/model"))
    assert roundtrip.apart_from_measured(offline) == roundtrip.apart_from_measured(live)


def test_what_a_library_raises_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On rank 0, while the others wait for what it found; the next line would be theirs."""
    from moe_models.checkpoint import origin

    def broken(*_: Any) -> None:
        raise TypeError("a library's own words")

    monkeypatch.setattr(origin, "read_origin", broken)
    save_tiny(tmp_path, "mixtral")
    config = AutoConfig.from_pretrained(tmp_path)
    assert origin.shared_origin(str(tmp_path), None, FAMILIES["mixtral"], config) is None
    assert "will not be compared with it" in capsys.readouterr().err


def test_a_source_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    from moe_models.errors import UserError
    from recipes.export import started_from

    (tmp_path / "origin.json").write_text(json.dumps({"model": str(tmp_path / "gone"), "revision": None}))
    with pytest.raises(UserError, match=r"gone: the model that training started from is not there; give .* --source"):
        started_from(tmp_path, None)
    assert started_from(tmp_path, "none") is None
    assert started_from(tmp_path, str(tmp_path)) == tmp_path
    (tmp_path / "origin.json").unlink()
    assert started_from(tmp_path, None) is None


def test_the_plan_and_the_origin_name_tensors_alike(tmp_path: Path) -> None:
    """Otherwise every run would be compared with nothing."""
    for model_type in ("olmoe", "qwen2_moe", "deepseek_v2"):
        origin = origin_of(save_tiny(tmp_path / model_type, model_type))
        config = AutoConfig.from_pretrained(tmp_path / model_type)
        planned = {name for entry in hub_plan(FAMILIES[model_type], config) for name in entry.hub}
        assert planned == set(origin.tensors), model_type


# ------------------------------------------------------------------------------------- a part of a multimodal model


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Its names, its experts in one tensor, and nothing of what it left on the disk forgotten."""
    source = save_multimodal(tmp_path)
    config = AutoConfig.from_pretrained(source).get_text_config()
    family = FAMILIES[config.model_type]
    origin = read_origin(source, family, config)
    assert origin is not None
    stored = load_file(source / "model.safetensors")
    left_over = {name for name in stored if name.startswith(("model.visual.", "mtp."))}
    assert set(origin.left_over) == left_over
    planned = {name for entry in hub_plan(family.with_columns(origin.stored_as), config) for name in entry.hub}
    assert planned == set(stored) - left_over
    assert read_model_config(source) == json.loads((source / "config.json").read_text())["text_config"]


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("stage", "world_size", "ep_size"), [pytest.param(1, 2, 2, marks=pytest.mark.daily), (3, 2, 2), (3, 2, None)]
)
def test_a_multimodal_model_comes_back_whole(
    stage: int, world_size: int, ep_size: int | None, clusters: Callable[[int], Cluster], tmp_path: Path
) -> None:
    """Trained in its language model only; live and from a checkpoint; its own class reads it, no key missing."""
    from transformers import Qwen3_5MoeForConditionalGeneration

    from recipes.export import export_checkpoint

    source = save_multimodal(tmp_path / "source", dtype="float32")
    arguments = (train_and_compare, str(source), str(tmp_path / "run"), parity.ds_config(stage, ep_size))
    compared = clusters(world_size).run(*arguments, 1e-3)[0]
    assert not isinstance(compared, str), compared
    stored, trained = load_file(source / "model.safetensors"), roundtrip.load_tensors(tmp_path / "run" / "model")
    assert compared.renamed == 0
    assert {name: tensor.shape for name, tensor in trained.items()} == {name: t.shape for name, t in stored.items()}
    for name, tensor in stored.items():
        beside = name.startswith(("model.visual.", "mtp."))
        assert torch.equal(trained[name], tensor) == beside, name

    model, info = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    experts = model.model.language_model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts, trained["model.language_model.layers.0.mlp.experts.gate_up_proj"])
    config, config_before = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run" / "model", source)
    )
    assert config["architectures"] == config_before["architectures"]
    assert config["vision_config"] == config_before["vision_config"]
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").exists()

    export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "offline", "5GB")
    offline, live = (roundtrip.files_of(tmp_path / name) for name in ("offline", "run/model"))
    assert roundtrip.apart_from_measured(offline) == roundtrip.apart_from_measured(live)
