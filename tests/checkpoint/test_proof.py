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
from tests.support.tiny import TINY


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


# ------------------------------------------------------------------------------------------ one layer after the other


def whole_proof(folder: Path, ids: Any) -> tuple[Any, dict[str, int]]:
    """(logits, fingerprints) of the slow, obvious way: the whole model in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import model_fingerprints

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float(), dict(model_fingerprints(model))


def streamed_proof(folder: Path, ids: Any) -> tuple[Any, dict[str, int], list[int]]:
    """(logits, fingerprints, parts in memory whenever one has been read) of the streamed way."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import tensor_fingerprints, tied_in
    from moe_models.checkpoint.unread import OnePartAtATime, unread_tensors

    with unread_tensors(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    prints: dict[str, int] = {}
    in_memory: list[int] = []

    def take(name: str, values: Any) -> None:
        assert name not in prints, "a tensor was taken twice"
        if parts is not None:  # else it is a buffer
            in_memory.append(len(parts._unread))
        if name not in tied_in(model):
            prints.update(tensor_fingerprints(name, values))

    parts: Any = None
    parts = OnePartAtATime(model, take)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        parts.read_the_rest()
    return logits, prints, in_memory


MODELS = [
    *[(model_type, "float32", {}) for model_type in TINY],
    *[(model_type, "bfloat16", {}) for model_type in TINY],
    ("qwen3_moe", "float32", {"tie_word_embeddings": True}),
    ("mixtral", "bfloat16", {"tie_word_embeddings": True}),
    ("qwen2_moe", "float32", {"mlp_only_layers": [1]}),
]


@pytest.mark.parametrize(("model_type", "dtype", "overrides"), MODELS)
def test_one_layer_at_a_time_is_the_whole_model(
    model_type: str, dtype: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Every family, tied heads, dense layers, shared experts, buffers: equal logits and checksums, bit by bit."""
    import torch

    from moe_models.checkpoint.proof import PROBE_SHAPE

    folder = roundtrip.save_source(tmp_path / "model", model_type, dtype, **overrides)
    ids = torch.randint(0, 64, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    logits, prints = whole_proof(folder, ids)
    streamed_logits, streamed_prints, in_memory = streamed_proof(folder, ids)
    assert logits.abs().max() > 0.1, "logits near zero prove nothing"
    assert torch.equal(streamed_logits, logits)
    assert streamed_prints == prints
    assert max(in_memory) == 0, "while one part is read, no other one is in memory"


def test_one_layer_at_a_time_of_prmoe(tmp_path: Path) -> None:
    """A residual expert beside the others, and layers of unequal numbers of experts."""
    import torch

    from moe_models.checkpoint.proof import PROBE_SHAPE
    from tests.test_prmoe import make_prmoe

    make_prmoe().save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 64, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    logits, prints = whole_proof(tmp_path / "model", ids)
    streamed_logits, streamed_prints, _ = streamed_proof(tmp_path / "model", ids)
    assert torch.equal(streamed_logits, logits)
    assert streamed_prints == prints


def test_shards_are_one_model(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import prove_folder

    folder, ids, logits, prints = proven
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert prove_folder(tmp_path / "many", ids, logits, prints).equal_tensors == len(load_tensors(folder))


def test_a_layer_dropped_too_early_is_seen(proven: tuple[Path, Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters have no values then, and using them is an error: no old or empty values can reach the logits."""
    from moe_models.checkpoint.proof import prove_folder
    from moe_models.checkpoint.unread import OnePartAtATime

    folder, ids, logits, prints = proven
    read = OnePartAtATime.read

    def read_and_drop(self: Any, path: str) -> None:
        read(self, path)
        if path == "model.layers.1":
            self.drop(path)

    monkeypatch.setattr(OnePartAtATime, "read", read_and_drop)
    with pytest.raises(
        RuntimeError, match="of a tensor that is not read: it was used outside of its part of the model"
    ):
        prove_folder(folder, ids, logits, prints)


def test_a_layer_of_another_layer_is_seen(proven: tuple[Path, Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not dropped but kept for the next layer: its own are never seen, and the logits differ."""
    from moe_models.checkpoint.proof import prove_folder
    from moe_models.checkpoint.unread import OnePartAtATime

    folder, ids, logits, prints = proven
    read = OnePartAtATime.read

    def read_the_first(self: Any, path: str) -> None:
        read(self, path)
        if path == "model.layers.2":
            self._parts[path].load_state_dict(kept)
        if path == "model.layers.1":
            kept.update({name: value.clone() for name, value in self._parts[path].state_dict().items()})

    kept: dict[str, Any] = {}
    monkeypatch.setattr(OnePartAtATime, "read", read_the_first)
    with pytest.raises(ExportError, match="the reloaded model differs from the trained one: logits by"):
        prove_folder(folder, ids, logits, prints)


def test_a_tensor_that_the_model_never_uses_is_compared(
    proven: tuple[Path, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the last look its checksum is missing, and that is an error."""
    from moe_models.checkpoint.proof import prove_folder
    from moe_models.checkpoint.unread import OnePartAtATime

    folder, ids, logits, prints = proven
    original = OnePartAtATime.__init__

    def without_the_last_layer(self: Any, model: Any, seen: Any) -> None:
        original(self, model, seen)
        del model.model.layers[2]

    monkeypatch.setattr(OnePartAtATime, "__init__", without_the_last_layer)
    with pytest.raises(ExportError, match="logits by"):
        prove_folder(folder, ids, logits, prints)
    monkeypatch.setattr(OnePartAtATime, "read_the_rest", lambda self: None)
    with pytest.raises(ExportError, match=r"holds other bits than the trained one in model\.layers\.2"):
        prove_folder(folder, ids, logits, prints)


def test_a_changed_tensor_while_loading_is_refused(proven: tuple[Path, Any, Any, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.unread import unread_tensors

    with unread_tensors(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(proven[0], dtype="auto")
        with pytest.raises(RuntimeError, match="would change a tensor that is not read"):
            model.lm_head.weight.zero_()
