"""The plan of an adapter: sizes against PEFT on the meta device, memory against runs on one H100, FLOP by hand."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from moe_models.config.work import Work
from moe_models.families.adapters import adapter_sizes
from moe_models.families.flops import train_flops
from moe_models.families.model import Model
from moe_models.families.table import FAMILIES
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, read_device
from moe_models.planner.host import adapter_bytes, checkpoint_bytes
from moe_models.planner.predict import predict
from tests.support import adapters
from tests.support.layouts import FINEGRAINED, MIXTRAL, MIXTRAL_8X7B, from_raw, layout_of
from tests.support.tiny import TINY

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("model_type", "which"),
    [
        *((family, "both") for family in sorted(TINY) if FAMILIES[family].no_adapters is None),
        ("mixtral", "attention"),
        ("olmoe", "down"),
        ("qwen2_moe", "shared"),
    ],
)
def test_sizes_are_those_of_peft(model_type: str, which: str) -> None:
    from transformers import AutoConfig

    from moe_models.checkpoint.adapter import expected_adapter

    config = {**TINY[model_type], "model_type": model_type}
    peft_config = adapters.lora(model_type, which)
    model = Model.of(config)
    targets = (sorted(peft_config.target_modules), sorted(peft_config.target_parameters or []))
    sizes = adapter_sizes(model.sizes, FAMILIES[model_type], config, 4, *targets)
    expected = expected_adapter(AutoConfig.for_model(**config), peft_config)
    numbers = {name: torch.Size(shape).numel() for name, shape in expected.items()}
    assert sum(sizes.dense) == sum(number for name, number in numbers.items() if ".mlp.experts" not in name)
    of_experts = model.sizes.moe_layers * model.sizes.num_experts * sum(sizes.expert)
    assert of_experts == sum(number for name, number in numbers.items() if ".mlp.experts" in name)


def planned(config: dict[str, Any], layers: int, work: Work, modules: Any, parameters: Any) -> Any:
    config = {**config, "num_hidden_layers": layers}
    raw = copy.deepcopy(layout_of(1, 1).raw)
    raw["expert_parallel"] = {"enabled": True, "autoep_size": 1}
    model = Model.of(config)
    adapter = adapter_sizes(model.sizes, FAMILIES[config["model_type"]], config, 16, modules, parameters)
    case = Case.of(from_raw(raw), model, 1, work, 1, adapter=adapter)
    return predict(case, read_device("h100-80g", []))


# shape, layers, recomputation, targets, GiB that torch.cuda.max_memory_allocated said. One H100, bf16, AutoEP EP 1,
# ZeRO-1, r 16, one sequence of 4096 tokens in a micro-batch, 4 micro-batches; with an earlier version of this code.
RUNS = {
    "fine, both": (FINEGRAINED, 4, False, None, 9.8),
    "fine, attention": (FINEGRAINED, 4, False, ATTENTION, 8.0),
    "fine, both, 24 layers": (FINEGRAINED, 24, True, None, 36.6),
    "mixtral, both": (MIXTRAL, 4, False, None, 17.7),
    "mixtral, attention": (MIXTRAL, 4, False, ATTENTION, 15.9),
}


@pytest.mark.parametrize("name", RUNS)
def test_memory_of_runs(name: str) -> None:
    """Within 10%."""
    config, layers, recompute, modules, seen = RUNS[name]
    work = Work(micro_batch=1, length=4096, accumulation=4, recompute=recompute)
    prediction = planned(config, layers, work, modules, None)
    assert abs(prediction.memory.allocated / GIB / seen - 1) < 0.1, prediction.memory.allocated / GIB


def test_frozen_weights_count_no_gradient() -> None:
    """By hand: 4 FLOP for each frozen weight, 6 for each factor and for attention's own products."""
    model = Model.of(MIXTRAL_8X7B)
    sizes = model.sizes
    adapter = adapter_sizes(sizes, FAMILIES["mixtral"], MIXTRAL_8X7B, 16)
    dense, experts = train_flops(sizes, 4096)
    frozen_dense, frozen_experts = train_flops(sizes, 4096, adapter)
    D, F = 4096, 14336
    per_expert = 16 * (D + 2 * F + F + D)
    assert sum(adapter.expert) == per_expert
    assert frozen_experts == pytest.approx(experts * 4 / 6 + 6 * 32 * 2 * per_expert)
    attention = 6 * 32 * 32 * (128 + 128) * 4096 / 2
    assert frozen_dense == pytest.approx((dense - attention) * 4 / 6 + attention + 6 * sum(adapter.dense))


def test_a_checkpoint_is_small_and_a_step_moves_adapters_only() -> None:
    config = json.loads(json.dumps(MIXTRAL_8X7B))
    model = Model.of(config)
    adapter = adapter_sizes(model.sizes, FAMILIES["mixtral"], config, 16)
    work = Work(micro_batch=1, length=4096, recompute=True)
    ds = layout_of(1, 2)
    with_adapter = Case.of(ds, model, 2, work, 2, adapter=adapter)
    whole = Case.of(ds, model, 2, work, 2)
    assert checkpoint_bytes(with_adapter) < checkpoint_bytes(whole) / 20
    assert adapter_bytes(with_adapter) == pytest.approx(2 * (sum(adapter.dense) + 32 * 8 * sum(adapter.expert)))
    device = read_device("h100-80g", [])
    assert predict(with_adapter, device).fits
    assert not predict(whole, device).fits


def test_a_checkpoint_of_the_quickstarts_model_is_smaller_than_a_twentieth() -> None:
    """Its shape: SmolLM2-135M with 4 experts in each layer (recipes/quickstart_inputs.py)."""
    config = {
        **MIXTRAL_8X7B,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_local_experts": 4,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    model = Model.of(config)
    adapter = adapter_sizes(model.sizes, FAMILIES["mixtral"], config, 16)
    work = Work(micro_batch=1, length=256)
    with_adapter = Case.of(layout_of(1, 2), model, 2, work, 2, adapter=adapter)
    whole = Case.of(layout_of(1, 2), model, 2, work, 2)
    assert checkpoint_bytes(with_adapter) < checkpoint_bytes(whole) / 20
