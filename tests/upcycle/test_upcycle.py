"""Upcycling: same function, nothing lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from moe_models.upcycle.upcycle import upcycle

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama-tied-llama3-rope": lambda: LlamaConfig(**TINY, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama-yarn-head-dim": lambda: LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN_ROPE, rms_norm_eps=1e-2),
    "mistral-window": lambda: MistralConfig(**TINY, sliding_window=5),
    "mistral-tied-no-window": lambda: MistralConfig(**TINY, sliding_window=None, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**TINY, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6),
    "qwen2-tied": lambda: Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=16),
    "qwen3-bias": lambda: Qwen3Config(**TINY, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}
X = torch.arange(2 * 40).remainder(97).view(2, 40)
EPS = 32 * torch.finfo(torch.float32).eps
"""Relative to the largest logit: K weights that sum to 1 up to rounding, summed over three layers."""


def save_dense(folder: Path, config: PreTrainedConfig, **save: Any) -> torch.nn.Module:
    """A random model whose every parameter counts: biases and norms are moved away from 0 and 1 too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, **save)
    return model


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_dense(tmp_path / "dense", CONFIGS["llama"]())
    return tmp_path / "dense"


def load(folder: Path) -> torch.nn.Module:
    """Loads with nothing missing, left over or mismatched, or fails."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def gap(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Largest difference of the logits, relative to the largest logit."""
    a_logits, b_logits = a(input_ids=X).logits, b(input_ids=X).logits
    assert a_logits.abs().max() > 0.1
    return float((a_logits - b_logits).abs().max() / a_logits.abs().max())


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_dense_models(tmp_path: Path, name: str, sharded: bool) -> None:
    model = save_dense(tmp_path / "dense", CONFIGS[name](), **({"max_shard_size": "20KB"} if sharded else {}))
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1 or not sharded
    size = "30KB" if sharded else "5GB"
    report = upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, num_experts_per_tok=2, max_shard_size=size)
    moe = load(tmp_path / "moe")
    assert gap(model, moe) < EPS

    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) == report.shards
    assert (report.shards > 1) == sharded
    if (
        sharded
    ):  # two neighbours never fit into one shard, and a shard holds more than the limit only if it is one tensor
        assert all(sum(t.nbytes for t in part.values()) <= 30_000 or len(part) == 1 for part in map(load_file, files))
        assert report.shards <= 2 * report.nbytes / 30_000 + 1
        index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report.nbytes
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert report.total_parameters == moe.num_parameters()
    assert report.dense_parameters == model.num_parameters()
    # Active: what is left of the built model when all but K experts of each layer are gone.
    expert = sum(t.numel() for n, t in tensors(tmp_path / "moe").items() if re.search(r"layers\.0\..*experts\.0\.", n))
    assert report.active_parameters == moe.num_parameters() - 3 * 2 * expert


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_top_k_keeps_the_function(tmp_path: Path, top_k: int) -> None:
    model = save_dense(tmp_path / "dense", CONFIGS["qwen3"]())
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, num_experts_per_tok=top_k)
    assert gap(model, load(tmp_path / "moe")) < EPS


def test_the_tests_would_see_swapped_projections(tmp_path: Path) -> None:
    """silu(gate) * up is not symmetric: the tolerance above is far below what a swap of w1 and w3 does."""
    model = save_dense(tmp_path / "dense", CONFIGS["llama"]())
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4)
    file = tmp_path / "moe" / "model.safetensors"
    swap = {"w1": "w3", "w3": "w1"}
    save_file(
        {re.sub(r"w[13]", lambda m: swap[m[0]], n): t for n, t in load_file(file).items()}, file, {"format": "pt"}
    )
    assert gap(model, load(tmp_path / "moe")) > 1000 * EPS


def test_names_are_those_that_transformers_itself_writes_for_mixtral(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", num_experts=4)
    MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4)).save_pretrained(tmp_path / "stock")
    ours, stock = tensors(tmp_path / "moe"), tensors(tmp_path / "stock")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in stock.items()}
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in ours


def test_config_carries_everything_over(tmp_path: Path) -> None:
    config = LlamaConfig(
        **TINY,
        head_dim=16,
        rope_parameters=LLAMA3_ROPE,
        rms_norm_eps=3e-6,
        tie_word_embeddings=True,
        bos_token_id=7,
        eos_token_id=[8, 9],
        pad_token_id=10,
        initializer_range=0.03,
        attention_dropout=0.1,
        custom_key="kept",
        dtype="bfloat16",
    )
    save_dense(tmp_path / "dense", config)
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=5, num_experts_per_tok=3)
    before = json.loads((tmp_path / "dense" / "config.json").read_text())
    after = json.loads((tmp_path / "moe" / "config.json").read_text())
    gone = {"attention_bias", "mlp_bias", "pretraining_tp"}
    changed = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    assert {key: value for key, value in before.items() if key not in gone} | changed == {
        k: after.get(k) for k in before.keys() - gone
    }
    assert (after["num_local_experts"], after["num_experts_per_tok"]) == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    config = CONFIGS["qwen2"]()
    config.dtype = dtype
    save_dense(tmp_path / "dense", config)
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=2, noise=0.1)
    assert {t.dtype for t in tensors(tmp_path / "moe").values()} == {dtype}
    assert load(tmp_path / "moe").dtype == dtype


def test_side_files_come_along(tmp_path: Path, dense: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (dense / name).write_text("{}")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "other.index.json"):
        (dense / name).write_text("not this one")
    upcycle(dense, tmp_path / "moe")
    found = {file.name for file in (tmp_path / "moe").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert found == copied | {"config.json", "model.safetensors"}


def test_a_layout_with_old_rotary_buffers_loads(tmp_path: Path, dense: Path) -> None:
    file = dense / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, {"format": "pt"})
    upcycle(dense, tmp_path / "moe")
    assert not [name for name in tensors(tmp_path / "moe") if "inv_freq" in name]
    load(tmp_path / "moe")


# Router, noise, seed -------------------------------------------------------------------------------------------------


def experts(folder: Path, projection: str = "w1", layer: int = 0) -> torch.Tensor:
    """[E, ...] of one projection of one layer."""
    name = rf"model\.layers\.{layer}\.block_sparse_moe\.experts\.\d+\.{projection}\.weight"
    return torch.stack([t for n, t in sorted(tensors(folder).items()) if re.fullmatch(name, n)])


def test_noise_moves_each_expert_by_its_fraction(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", num_experts=4, noise=0.05)
    source = tensors(dense)
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        weight = source[f"model.layers.1.mlp.{theirs}.weight"]
        moved = (experts(tmp_path / "moe", ours, layer=1) - weight) / weight.std()
        torch.testing.assert_close(moved.flatten(1).std(dim=1), torch.full((4,), 0.05), rtol=0.1, atol=0)
        correlation = torch.corrcoef(moved.flatten(1)) - torch.eye(4)
        assert correlation.abs().max() < 0.15  # independent draws of 1,536 numbers: 0.026 is one deviation


def test_without_noise_experts_are_equal_and_routers_are_not(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", num_experts=4)
    assert (experts(tmp_path / "moe") == experts(tmp_path / "moe")[:1]).all()
    routers = [t for n, t in sorted(tensors(tmp_path / "moe").items()) if n.endswith("gate.weight")]
    assert len(routers) == 3
    for router in routers:
        assert router.shape == (4, 32)
        assert 0.7 * 0.02 < router.std() < 1.3 * 0.02  # initializer_range, 128 draws
    assert not torch.equal(routers[0], routers[1])


def test_zeros_sends_every_token_to_the_same_experts(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", num_experts=4, router_init="zeros")
    model = load(tmp_path / "moe")
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        model(input_ids=X)
    assert len(chosen) == 3
    assert all(len(ids.unique()) == 2 for ids in chosen)


def test_seed_decides_and_shards_do_not(tmp_path: Path, dense: Path) -> None:
    for name, options in {
        "a": {"seed": 1},
        "same": {"seed": 1, "max_shard_size": "10KB"},
        "other": {"seed": 2},
    }.items():
        upcycle(dense, tmp_path / name, num_experts=3, noise=0.1, **options)
    a, same, other = (tensors(tmp_path / name) for name in ("a", "same", "other"))
    assert all(torch.equal(a[n], same[n]) for n in a)
    made = [n for n in a if "block_sparse_moe" in n]
    assert len(made) == 3 * (1 + 3 * 3)
    assert not any(torch.equal(a[n], other[n]) for n in made)
    assert all(torch.equal(a[n], other[n]) for n in a.keys() - set(made))


def test_qwen2_shared_expert_is_silent_and_can_learn(tmp_path: Path) -> None:
    """Its output is exactly 0, and one step of SGD wakes it: a path of zeros in a row could never leave zero."""
    save_dense(tmp_path / "dense", CONFIGS["qwen2"]())
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4)
    model = load(tmp_path / "moe")
    shared = model.model.layers[0].mlp.shared_expert
    assert not shared(torch.randn(5, 32)).any()
    model(input_ids=X, labels=X).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    gate = model.model.layers[0].mlp.shared_expert_gate
    assert all(p.grad.any() for p in (*shared.parameters(), *gate.parameters()))


def test_progress_counts_every_byte(tmp_path: Path, dense: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = upcycle(dense, tmp_path / "moe", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(tensors(tmp_path / "moe"))
    assert seen == sorted(seen)
    assert seen[-1] == (report.nbytes, report.nbytes)


# Memory --------------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
from moe_models.upcycle.upcycle import upcycle
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
upcycle(sys.argv[1], sys.argv[2] + "-warm", num_experts=2, max_shard_size="1MB")
before = peak()
report = upcycle(sys.argv[1], sys.argv[2], num_experts=32, max_shard_size="16MB", noise=0.01)
print(peak() - before, report.nbytes / 2**20)
"""


def test_memory_is_one_shard_and_not_the_model(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 1536}))
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "dense"), str(tmp_path / "moe")]
    result = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
    grown, written = map(float, result.stdout.split()[-2:])
    assert written > 800
    assert grown < 100, f"{grown:.0f} MiB more at the peak for {written:.0f} MiB of output in shards of 16 MB"


# Refusals ------------------------------------------------------------------------------------------------------------
