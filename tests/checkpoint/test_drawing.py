"""Weights that are drawn once, in files, are those that ``from_config`` draws in memory: bit for bit, any family."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from moe_models.checkpoint import drawing
from moe_models.errors import RunError
from tests.support.tiny import TINY

FAMILIES: dict[str, dict[str, Any]] = {
    **TINY,
    "qwen3_moe": {**TINY["qwen3_moe"], "tie_word_embeddings": True},
    "prmoe": {**TINY["mixtral"], "num_local_experts": [2, 4], "num_experts_per_tok": 1},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder; a tiny model's tensors count as large, and its files are many."""
    monkeypatch.setattr(drawing, "MAPPED_BYTES", 256)
    monkeypatch.setattr(drawing, "SHARD_BYTES", 40_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def config_of(family: str) -> Any:
    from transformers import AutoConfig

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)

    return AutoConfig.for_model(family, **FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_numbers(family: str, precision: str, here: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    dtype = getattr(torch, precision)
    set_seed(7)
    drawn_in_memory = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype).state_dict()
    with drawing.drawn_model(config_of(family), 7, dtype, None) as folder:
        assert len(list(folder.glob("drawn-*.safetensors"))) > 1
        assert not list(folder.glob("tensor-*")), "the room that drawing took is given back"
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert not list(here.glob("moe-recipes-*"))
    assert sorted(ours) == sorted(drawn_in_memory)
    for name, tensor in drawn_in_memory.items():
        if name.endswith("e_score_correction_bias") and family != "minimax_m2":  # whose class has it in bf16
            assert ours[name].dtype == torch.float32, "as in a model that is read; from_config makes it bf16"
            assert not ours[name].any()
        else:
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name


def test_another_order_of_drawing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: one number more is drawn before a large tensor."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    right = drawing.MappedTensors._mapped

    def wrong(self: Any, *rest: Any) -> Any:
        torch.rand(1)
        return right(self, *rest)

    monkeypatch.setattr(drawing.MappedTensors, "_mapped", wrong)
    set_seed(7)
    expected = AutoModelForCausalLM.from_config(config_of("mixtral"), dtype=torch.float32).state_dict()
    with drawing.drawn_model(config_of("mixtral"), 7, torch.float32, None) as folder:
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert any(not torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("where", ["while drawing", "while writing"])
def test_a_full_disk_is_one_line(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "while drawing":
        monkeypatch.setattr("os.posix_fallocate", full)
    else:
        monkeypatch.setattr(drawing, "_save", full)
    with (
        pytest.raises(RunError) as caught,
        drawing.drawn_model(config_of("mixtral"), 7, torch.float32, None),
    ):
        raise AssertionError("not reached")
    (line,) = caught.value.problems
    assert "No space left on device" in line
    assert "TMPDIR" in line
    assert not list(here.glob("moe-recipes-*"))
