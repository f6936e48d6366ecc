"""The model card: the hub's metadata, what the run noted, what is licensed how; and whose README.md may be replaced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from moe_models.checkpoint.card import (
    Measured,
    RunFacts,
    card_text,
    facts_of_base,
    facts_of_data,
    measured,
    measured_in,
    read_facts,
    save_facts,
    versions,
    write_card,
)
from moe_models.checkpoint.hf_folder import ExportError, refuse_foreign_folder
from moe_models.checkpoint.proof import ExportProof

PROOF = ExportProof(
    missing_keys=0, unexpected_keys=0, equal_tensors=1234, max_logit_difference=1.5e-6, median_logit_difference=1e-7,
    same_top1=1.0,
)  # fmt: skip
FACTS = RunFacts(
    base_model="mistralai/Mixtral-8x7B-v0.1", base_name="mistralai/Mixtral-8x7B-v0.1", revision="abc",
    licence={"license": "apache-2.0"}, datasets=("org/data",), data=("org/data", "my.jsonl"),
    layout="8 ranks: EP 8", settings={"seed": "42"}, versions={"torch": "2.13.0", "peft": "0.21.2", "datasets": "5"},
)  # fmt: skip


def test_sequences_of_a_step_are_those_of_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share rows, stages among them, are one replica."""
    import sys
    from types import SimpleNamespace

    from tests.support.layouts import from_raw
    from tests.support.recipe import ROOT

    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    import finetune

    monkeypatch.setattr(finetune, "world_size", lambda: 8)
    args = SimpleNamespace(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, max_length=64, learning_rate=1e-3, seed=0,
        lr_scheduler_type="linear", bf16=True, fp16=False, packing=False, assistant_only_loss=False,
    )  # fmt: skip
    model_args = SimpleNamespace(model_name_or_path=None, model_revision=None, use_peft=False)
    for degrees, replicas in (({}, 8), ({"pp_size": 2}, 4), ({"sp_size": 4}, 2)):
        ds = dataclasses.replace(from_raw({"zero_optimization": {"stage": 1}}), **degrees)
        facts = finetune.run_facts(SimpleNamespace(dataset_name=None), args, model_args, ds)
        assert facts.settings["sequences per step"] == str(replicas * 6), degrees


HISTORY: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.5}, {"step": 1, "loss": 3.25}, {"step": 9, "loss": 2.5}, {"step": 9, "eval_loss": 2.75},
]  # fmt: skip


def card(kind: Any = "model", facts: RunFacts = FACTS, figures: Measured | None = None) -> tuple[dict[str, Any], str]:
    """(metadata as the hub's own library reads them, text)."""
    whole = card_text(kind, facts, figures or measured(HISTORY, 9, PROOF), "mixtral")
    parsed = ModelCard(whole)
    return parsed.data.to_dict(), parsed.text


def test_the_hub_reads_base_data_and_licence() -> None:
    metadata, text = card()
    assert metadata["base_model"] == "mistralai/Mixtral-8x7B-v0.1"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["org/data"]
    assert metadata["license"] == "apache-2.0"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    for words in (
        "| base model | `mistralai/Mixtral-8x7B-v0.1`, revision `abc` |",
        "| data | `org/data`, `my.jsonl` |",
        "| layout | `8 ranks: EP 8` |",
        "| optimizer steps | 9 |",
        "| training loss | 3.2500 at step 1, 2.5000 at step 9 |",
        "| held-out loss | 3.5000 at step 0, 2.7500 at step 9 |",
        "1,234 tensors equal bit by bit, logits within 1.5e-06 of the largest one, same top token at 100%",
        "The licence of the base model applies: `apache-2.0`.",
        "vllm serve FOLDER",
    ):
        assert words in text


def test_an_adapter_names_its_base_and_library() -> None:
    metadata, text = card("adapter")
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    assert 'AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1"' in text
    assert "--use_peft true --adapter FOLDER" in text


def test_what_is_not_known_is_not_claimed() -> None:
    metadata, text = card(facts=RunFacts(), figures=Measured())
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(metadata)
    assert "licence" not in text
    assert "Not compared with a running model" in text
    _, text = card(facts=RunFacts(base_name="mine"), figures=Measured())
    assert "The licence of the base model applies. No card here names it." in text


def test_a_class_that_transformers_lacks_is_imported_first() -> None:
    text = card_text("model", FACTS, Measured(), "prmoe")
    assert text.index("import moe_models.prmoe") < text.index("from transformers import")
    assert "vllm serve" not in text


def test_hostile_names_stay_text() -> None:
    """A name cannot leave its code span or table cell, nor become HTML, nor end the metadata."""
    evil = "x`|<script>alert(1)</script>\n---\nlicense: mit\n# Title"
    facts = dataclasses.replace(FACTS, base_model=None, base_name=evil, data=(evil,), settings={"<b>": evil})
    metadata, text = card(facts=facts)
    assert metadata["license"] == "apache-2.0"
    flat = "x`\\|<script>alert(1)</script> --- license: mit # Title"
    assert f"| data | `` {flat} `` |" in text
    assert "| &lt;b&gt; |" in text
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert "<script>" not in title
    assert "\n# Title" not in text


def test_the_licence_comes_from_the_base_models_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert facts_of_base(str(base)) == {"base_model": None, "base_name": "base", "revision": None, "licence": {}}
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: org/parent\n---\n# Base\n"
    )
    facts = facts_of_base(str(base), "main")
    assert facts["licence"] == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert facts["base_model"] == "org/parent"  # the nearest name that the hub knows
    for broken in ("---\n[\n---\n", "---\n- a\n---\n", "no metadata", "---\nlicense: [1, 2]\n---\n"):
        (base / "README.md").write_text(broken)
        assert facts_of_base(str(base))["licence"] == {}


def test_data_on_this_machine_are_named_without_their_path(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}")
    facts = facts_of_data([str(tmp_path / "my.jsonl"), "org/data", None])
    assert facts == {"datasets": ("org/data",), "data": ("my.jsonl", "org/data")}


def test_a_checkpoint_carries_the_note(tmp_path: Path) -> None:
    save_facts(tmp_path, FACTS)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 9, "log_history": HISTORY}))
    assert read_facts(tmp_path) == FACTS
    assert card_text("model", read_facts(tmp_path), Measured()) == card_text("model", FACTS, Measured())
    assert measured_in(tmp_path) == measured(HISTORY, 9)
    note = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**note, "of a later version": 1}))
    assert read_facts(tmp_path) == FACTS


def test_a_folder_without_a_note_tells_by_its_card(tmp_path: Path) -> None:
    write_card(tmp_path, "adapter", FACTS, Measured())
    facts = read_facts(tmp_path)
    assert (facts.base_model, facts.datasets, facts.licence) == (FACTS.base_model, FACTS.datasets, FACTS.licence)
    assert read_facts(tmp_path / "nowhere") == RunFacts()


def test_the_same_run_writes_the_same_bytes() -> None:
    assert len({card_text("model", FACTS, measured(HISTORY, 9, PROOF), "mixtral") for _ in range(3)}) == 1
    assert "moe-recipes" in versions()


def test_only_our_own_readme_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_card(folder, "model", FACTS, Measured())
    refuse_foreign_folder(folder)
    (folder / "README.md").write_text("# My own page\n")
    with pytest.raises(ExportError, match=r"it holds README\.md"):
        refuse_foreign_folder(folder)
