"""The proof of an export: what it accepts, and the faults that it sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.checkpoint.hf_folder import ExportError
from tests.support import roundtrip
from tests.support.roundtrip import load_tensors


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def proven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """(folder, ids, logits, fingerprints) of a Qwen3 model: 8 experts, top-4, 3 layers."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import PROBE_SHAPE, model_fingerprints

    folder = roundtrip.save_source(tmp_path_factory.mktemp("proof"), "qwen3_moe", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.randint(0, 64, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return folder, ids, logits, dict(model_fingerprints(model))


def tampered(folder: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def swap_experts(tensors: dict[str, Any]) -> None:
    for projection in ("gate", "up", "down"):
        a, b = EXPERT.format(2, projection), EXPERT.format(5, projection)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def zero_expert(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.format(3, "down")].zero_()


def repeat_expert(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.format(7, "up")] = tensors[EXPERT.format(6, "up")].clone()


def swap_gate_and_up_of_one(tensors: dict[str, Any]) -> None:
    a, b = EXPERT.format(0, "gate"), EXPERT.format(0, "up")
    tensors[a], tensors[b] = tensors[b], tensors[a]


def flip_one_bit(tensors: dict[str, Any]) -> None:
    import torch

    weight = tensors[EXPERT.format(4, "gate")]
    bits = weight.view(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
    bits[17] ^= 1


def swap_layer_norms(tensors: dict[str, Any]) -> None:
    for i in (0, 1):
        tensors[f"model.layers.{i}.input_layernorm.weight"] += i + 1.0


def test_the_proof_accepts_the_model(proven: tuple[Path, Any, Any, Any]) -> None:
    from moe_models.checkpoint.proof import prove_folder

    folder, ids, logits, prints = proven
    proof = prove_folder(folder, ids, logits, prints)
    assert proof.max_logit_difference < 1e-5
    assert proof.equal_tensors == len(load_tensors(folder))


@pytest.mark.parametrize(
    "fault",
    [swap_experts, zero_expert, repeat_expert, swap_gate_and_up_of_one, flip_one_bit, swap_layer_norms],
    ids=lambda fault: fault.__name__,
)
def test_the_proof_sees_changed_bits(
    fault: Callable[[dict[str, Any]], None], proven: tuple[Path, Any, Any, Any], tmp_path: Path
) -> None:
    from moe_models.checkpoint.proof import prove_folder

    folder, ids, logits, prints = proven
    bad = tampered(folder, tmp_path / "bad", fault)
    with pytest.raises(ExportError, match=r"holds other bits than the trained one in model\.layers"):
        prove_folder(bad, ids, logits, prints)


def swap_gate_and_up(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("gate_proj.weight") and ".experts." in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def check_wrong_use(proven: tuple[Path, Any, Any, Any], bad: Path, **changes: Any) -> None:
    """With fingerprints that agree: what is left is the function, and the logits must tell."""
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import model_fingerprints, prove_folder

    _, ids, logits, _ = proven
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, **changes}))
    agreeing = dict(model_fingerprints(AutoModelForCausalLM.from_pretrained(bad, dtype="auto")))
    with pytest.raises(ExportError, match="the reloaded model differs from the trained one: logits by"):
        prove_folder(bad, ids, logits, agreeing)


def test_the_logits_see_gate_used_as_up(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    check_wrong_use(proven, tampered(proven[0], tmp_path / "bad", swap_gate_and_up))


def test_the_logits_see_another_rotary_base(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    bad = tampered(proven[0], tmp_path / "bad", lambda tensors: None)
    check_wrong_use(proven, bad, rope_parameters={"rope_type": "default", "rope_theta": 10.0})


@pytest.mark.parametrize("proven", ["float32"], indirect=True)
def test_the_logits_see_subtle_faults_in_fp32(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    """Missing top-k normalisation moves the median logit by 4%; bf16 must leave room for rounding in deep models."""
    bad = tampered(proven[0], tmp_path / "bad", lambda tensors: None)
    check_wrong_use(proven, bad, norm_topk_prob=False)


def test_the_proof_sees_missing_and_unexpected_keys(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    from moe_models.checkpoint.proof import prove_folder

    folder, ids, logits, prints = proven
    lost = tampered(folder, tmp_path / "lost", lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"))
    with pytest.raises(ExportError, match=r"missing \['model.layers.2.self_attn.q_norm.weight'\]"):
        prove_folder(lost, ids, logits, prints)
    extra = tampered(
        folder, tmp_path / "extra", lambda t: t.update({"model.extra.weight": t["model.norm.weight"].clone()})
    )
    with pytest.raises(ExportError, match=r"unexpected \['model.extra.weight'\]"):
        prove_folder(extra, ids, logits, prints)
