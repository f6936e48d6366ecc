"""The proof of an adapter's folder sees each way in which stacks of this field have written a wrong one.

PEFT itself plays the engine: a model with a random adapter, its logits, and the fingerprints of its factors. No ranks.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import adapters
from tests.support.parity import daily, planted

IDS_BT = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Trained:
    """What the proof compares with."""

    source: Path
    config: Any
    model_config: Any
    tensors: dict[str, torch.Tensor]
    logits: torch.Tensor
    fingerprints: dict[str, int]


def make_trained(source: Path, model_type: str, which: str = "both") -> Trained:
    """A random adapter on the model in ``source``."""
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.adapter import adapter_fingerprints

    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = get_peft_model(base, adapters.lora(model_type, which))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        logits = model.eval()(input_ids=IDS_BT).logits
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    prints = adapter_fingerprints(model.get_base_model(), torch.float32)
    return Trained(source, model.peft_config["default"], base.config, tensors, logits, prints)


@pytest.fixture(scope="module")
def trained(tiny_checkpoints: Callable[[str], Path]) -> Trained:
    return make_trained(tiny_checkpoints("mixtral"), "mixtral")


def prove(trained: Trained, tensors: dict[str, torch.Tensor], folder: Path, layout: Any = "fused") -> Any:
    from moe_models.checkpoint.adapter import prove_adapter, write_adapter

    folder.mkdir(exist_ok=True)
    write_adapter(folder, tensors, trained.config, trained.model_config, layout=layout)
    return prove_adapter(
        folder,
        trained.config,
        trained.model_config,
        torch.float32,
        IDS_BT,
        trained.logits,
        trained.fingerprints,
        layout,
    )


def test_what_peft_wrote_is_proven(trained: Trained, tmp_path: Path) -> None:
    proof = prove(trained, trained.tensors, tmp_path / "adapter")
    assert proof.equal_tensors == 2 * 4 * 2 + 2 * 2 * 4 * 2  # layers, matrices or experts' pairs, experts, A and B
    assert proof.max_logit_difference < 1e-6
    assert proof.median_without_adapter > 0.1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained.source)


E = 4


def expert_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "experts" in name and "lora_B" in name:
        return tensor.view(tensor.shape[0], -1, E).transpose(1, 2).reshape(tensor.shape)
    return tensor


def halves_exchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "experts.base_layer" in name and "lora_B" in name:
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


def one_ranks_twice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "experts" in name and "lora_A" in name:
        return torch.cat([tensor.chunk(2)[0]] * 2)
    return tensor


def one_expert_zero(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "experts" in name and "lora_B" in name:
        return tensor * (torch.arange(tensor.shape[1]) % E != 2)
    return tensor


FAULTS = {
    "B in the order of experts": expert_order,
    "gate and up exchanged": halves_exchanged,
    "one rank's factors on both": one_ranks_twice,
    "one expert's B zero": one_expert_zero,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_file_are_seen(fault: str, trained: Trained, tmp_path: Path) -> None:
    """By the bits; and where the fingerprints have the same fault, by the logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.adapter import adapter_fingerprints
    from moe_models.checkpoint.hf_folder import ExportError

    wrong = {name: FAULTS[fault](name, tensor).contiguous() for name, tensor in trained.tensors.items()}
    with pytest.raises(ExportError, match=r"other bits than the trained one in .*experts"):
        prove(trained, wrong, tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(trained.source, dtype=torch.float32)
    blind = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    prints = adapter_fingerprints(blind.get_base_model(), torch.float32)
    with pytest.raises(ExportError, match="differs from the trained one: logits"):
        prove(dataclasses.replace(trained, fingerprints=prints), wrong, tmp_path / "adapter")


def test_missing_and_foreign_tensors_are_refused(trained: Trained, tmp_path: Path) -> None:
    from moe_models.checkpoint.hf_folder import ExportError

    few = {name: tensor for name, tensor in trained.tensors.items() if "experts" not in name}
    with pytest.raises(ExportError, match="8 of 24 tensors of the adapter are missing"):
        prove(trained, few, tmp_path / "adapter")
    with pytest.raises(ExportError, match="no such tensor"):
        prove(trained, {**trained.tensors, "more": torch.zeros(1)}, tmp_path / "adapter")
    name = next(iter(trained.tensors))
    with pytest.raises(ExportError, match="NaN"):
        prove(trained, {**trained.tensors, name: trained.tensors[name] / 0}, tmp_path / "adapter")


def test_an_adapter_that_is_not_applied_is_seen(trained: Trained, tmp_path: Path) -> None:
    """A small one, which the tolerance of the logits would let pass: by PEFT, and by the engine."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint import adapter
    from moe_models.checkpoint.hf_folder import ExportError

    # 1. PEFT.
    disabled = planted(BaseTunerLayer, "disable_adapters", property(lambda self: True))
    lenient = planted(adapter, "RELATIVE_TOLERANCE", {torch.float32: 10.0})
    with lenient, disabled, pytest.raises(ExportError, match="PEFT does not apply the adapter"):
        prove(trained, trained.tensors, tmp_path / "adapter")
    # 2. The engine.
    base = AutoModelForCausalLM.from_pretrained(trained.source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = base(input_ids=IDS_BT).logits
    lenient = planted(adapter, "RELATIVE_TOLERANCE", {torch.float32: 10.0})
    with lenient, pytest.raises(ExportError, match="answers like its base"):
        prove(dataclasses.replace(trained, logits=logits), trained.tensors, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("model_type", "which"), daily([("mixtral", "both"), ("olmoe", "down"), ("qwen3_moe", "both")], chosen={0})
)
def test_per_expert_layout(model_type: str, which: str, tmp_path: Path) -> None:
    """Plain PEFT reads it with the logits of the fused layout, and a factor in a wrong place is seen."""
    from safetensors.torch import load_file, save_file

    from moe_models.checkpoint.adapter import prove_adapter
    from moe_models.checkpoint.hf_folder import ExportError
    from tests.support.tiny import save_tiny

    trained = make_trained(save_tiny(tmp_path / "model", model_type), model_type, which)
    proof = prove(trained, trained.tensors, tmp_path / "fused")
    apart = prove(trained, trained.tensors, tmp_path / "apart", "per_expert")
    # PEFT reads it as a pair of twice the rank, so sums have another order.
    assert apart.equal_tensors == proof.equal_tensors
    assert apart.max_logit_difference < 1e-6
    config = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None

    file = tmp_path / "apart" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert all(
        ".experts." not in name or re.search(r"\.experts\.\d+\.\w+\.lora_[AB]\.weight$", name) for name in tensors
    )
    first, *others = sorted(name for name in tensors if ".experts." in name and "lora_B" in name)
    second = next(name for name in others if tensors[name].shape == tensors[first].shape)
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="other bits than the trained one"):
        prove_adapter(
            tmp_path / "apart", trained.config, trained.model_config, torch.float32, IDS_BT, trained.logits,
            trained.fingerprints, "per_expert",
        )  # fmt: skip


def test_merging_a_folder_without_an_engine(trained: Trained, tmp_path: Path) -> None:
    """Every tensor is that of PEFT's own ``merge_and_unload``, and the folder answers like PEFT."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.adapter import write_adapter
    from moe_models.checkpoint.merging import merge_folder

    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", trained.tensors, trained.config, trained.model_config)
    proof, comparison = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert proof.max_logit_difference < 1e-5
    assert comparison is not None
    assert comparison.changed > 0
    base = AutoModelForCausalLM.from_pretrained(trained.source, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert set(ours) == set(expected)
    assert max(float((ours[name] - expected[name]).abs().max()) for name in ours) < 1e-6

    # What the base model's folder holds beside the class goes through.
    base_folder = shutil.copytree(trained.source, tmp_path / "base")
    tensors = load_file(base_folder / "model.safetensors") | {"model.visual.weight": torch.arange(6.0)}
    save_file(tensors, base_folder / "model.safetensors", metadata={"format": "pt"})
    _, comparison = merge_folder(tmp_path / "adapter", tmp_path / "with", base=str(base_folder))
    assert comparison is not None
    assert comparison.passed_on == 1
    whole = load_file(tmp_path / "with/model.safetensors")
    assert torch.equal(whole.pop("model.visual.weight"), torch.arange(6.0))
    assert all(torch.equal(whole[name], ours[name]) for name in ours)
