"""Before the first step every converted block computes what Hugging Face's block computed.

Tolerance: 1e-5 of a token's answer in fp32 (1e-6 seen) and 5e-2 in bf16; each planted fault is far above it in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.engine import autoep, same_function
from tests.support import adapters, parity
from tests.support.cluster import Cluster
from tests.support.tiny import TINY

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
ONE_DENSE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
PATTERN = r"model\.layers\.\d+\.mlp"
WRONG_BY_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_oss": (
        {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
        {"moe_layer_pattern": PATTERN, "router_pattern": "router", "expert_activation": "swiglu_oai"},
    ),
    "phimoe": (
        {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2},
        {"moe_layer_pattern": PATTERN, "router_pattern": "router"},
    ),
    "lfm2_moe": (
        {**BASE, **ONE_DENSE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        {
            "moe_layer_pattern": r"model\.layers\.\d+\.feed_forward",
            "num_experts_attr": "num_experts",
            "score_func": "sigmoid",
        },
    ),
    "afmoe": (
        {**BASE, **ONE_DENSE, "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 8},
        {
            "moe_layer_pattern": PATTERN,
            "router_pattern": "router",
            "num_experts_attr": "num_experts",
            "score_func": "sigmoid",
            "has_shared_experts": True,
            "shared_experts_pattern": "shared_experts",
        },
    ),
}
"""Families that initialise and step by JSON keys alone, and compute another function: config.json, keys.

AutoEP of today: without what ``engine/autoep.py`` adds to it."""

FAULTS = {
    "router bias dropped": "deepseek_v3",
    "gate and up exchanged": "mixtral",
    "softmax twice": "mixtral",
    "shared expert missing": "qwen2_moe",
    "wrong top-k normalisation": "qwen3_moe",
}
"""Fault -> the family it is planted in."""


@contextmanager
def fault(name: str) -> Iterator[dict[str, Any]]:
    """AutoEP with one thing wrong; yields the keys of expert_parallel that belong to it."""
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    layer = auto_ep_layer.AutoEPMoELayer
    if name == "router bias dropped":
        with parity.planted(auto_ep_layer, "_copy_e_score_correction_bias", lambda *args: None):
            yield {}
    elif name == "gate and up exchanged":
        repack = auto_ep_layer.repack_expert_weights

        def exchanged(**kwargs: Any) -> tuple[Any, Any, Any]:
            w1, w2, w3 = repack(**kwargs)
            return w3, w2, w1

        with parity.planted(auto_ep_layer, "repack_expert_weights", exchanged):
            yield {}
    elif name == "softmax twice":
        made = TokenChoiceTopKRouter.__init__

        def twice(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self.gate.register_forward_hook(lambda gate, inputs, logits: logits.softmax(-1))

        with parity.planted(TokenChoiceTopKRouter, "__init__", twice):
            yield {}
    elif name == "shared expert missing":
        built = layer.__init__

        def without(self: Any, *args: Any, **kwargs: Any) -> None:
            built(self, *args, **kwargs)
            self.shared_experts = None

        with parity.planted(layer, "__init__", without):
            yield {}
    else:
        assert name == "wrong top-k normalisation"
        yield {"route_norm": False}


def told(model: Any, paths: list[str], keys: dict[str, Any], planted: str = "", stage: int = 1) -> str:
    """What the check says of a conversion by AutoEP at EP 2; empty where it has nothing to say."""
    import deepspeed

    from moe_models.engine.autoep import register_presets
    from moe_models.engine.library_globals import forget_engines
    from moe_models.errors import RunError

    forget_engines()
    register_presets()
    question = same_function.ask_before(model, paths)
    config = parity.ds_config(stage, 2, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    config["gradient_clipping"] = 0.0
    config["optimizer"]["params"] = {"lr": 1e-3, "torch_adam": True}
    config["bf16"] = {"enabled": model.dtype == torch.bfloat16}
    config["expert_parallel"] |= {"use_grouped_mm": False, **keys}
    with fault(planted) if planted else parity.planted(same_function, "rank", same_function.rank) as more:
        config["expert_parallel"] |= more or {}
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    try:
        same_function.require_same_function(engine, question, "AutoEP")
    except RunError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def with_faults(dtype: str) -> dict[str, str]:
    """Fault -> what the check says; "" -> of the same families without one. On every rank."""
    from moe_models.engine.library_globals import forget_engines
    from moe_models.families.table import FAMILIES, moe_blocks
    from tests.support.tiny import make_model

    forget_engines()  # or the first model would be cut as the ZeRO-3 of an earlier test asked for
    found = {}
    for planted, model_type in [*FAULTS.items(), *((name, name) for name in FAULTS.values())]:
        model = make_model(model_type).to(getattr(torch, dtype))
        for _, module in model.named_modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.data = module.e_score_correction_bias.data.float() * 3
        paths = list(moe_blocks(FAMILIES[model_type], model.config.to_dict()))
        found[planted] = told(model, paths, {}, planted if planted in FAULTS else "")
    return found


def by_keys() -> dict[str, str]:
    """Family -> what the check says of AutoEP by JSON keys alone. On every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_models.engine.library_globals import forget_engines

    forget_engines()
    found = {}
    for model_type, (config, keys) in WRONG_BY_KEYS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).float()
        with torch.no_grad():  # biases start at zero, and would hide that they are lost
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("bias", "_bias")) and "norm" not in name:
                    tensor.copy_(torch.randn(tensor.shape) * 0.3)
        paths = [name for name, module in model.named_modules() if hasattr(module, "experts")]
        try:
            with parity.planted(autoep, "OTHER_BIASES", ()):
                found[model_type] = told(model, paths, keys)
        except Exception as error:
            found[model_type] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.conformance)])
def test_planted_faults_are_seen(dtype: str, clusters: Callable[[int], Cluster]) -> None:
    for found in clusters(2).run(with_faults, dtype):
        for planted, family in FAULTS.items():
            assert "AutoEP made another function of this block" in found[planted], (planted, found[planted])
            assert found[planted].startswith("model.layers."), planted
            assert found[family] == "", (family, found[family])
        assert "layers.1.mlp: " in found["router bias dropped"], "layer 0 has no experts there"


def test_families_that_json_keys_convert_wrongly_are_seen(clusters: Callable[[int], Cluster]) -> None:
    for found in clusters(2).run(by_keys):
        for family in WRONG_BY_KEYS:
            if family == "afmoe":  # AutoEP looks for a weight of `router`; it is in `router.gate`
                assert "Error: " in found[family], found[family]
                continue
            assert "made another function of this block" in found[family], (family, found[family])


def run_recipe_like(source: str, out: str, config: dict[str, Any], check: str, resume: bool) -> list[Any]:
    """A trainer whose AutoEP exchanges gate and up; what it says, with the check and without."""
    with fault("gate and up exchanged"):
        trainer = parity.build_trainer(source, out, config, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.check_conversion = check
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            return [type(error).__name__, str(error), trainer.state.global_step]
    return ["", "", trainer.state.global_step]


@pytest.mark.conformance
@pytest.mark.daily
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=[pytest.mark.conformance])])
def test_a_run_ends_before_its_first_step(
    stage: int, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """With the check nothing is trained, when it resumes too; `none` trains."""
    config = parity.ds_config(stage, 2)
    arguments = (run_recipe_like, str(tiny_checkpoints("mixtral")), str(tmp_path / "run"), config)
    kind, message, steps = clusters(2).run(*arguments, "auto", False)[1]
    assert (kind, steps) == ("RunError", 0)
    assert message.startswith("model.layers.0.mlp: AutoEP made another function of this block")
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert clusters(2).run(*arguments, "none", False)[1] == ["", "", 2]
    kind, message, _ = clusters(2).run(*arguments, "all", True)[1]
    assert kind == "RunError", message


def with_an_adapter(source: str, out: str, stage: int, ep_size: int, planted: str) -> str:
    """What the check says of a run that goes on from an adapter; on every rank."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from moe_models.engine.library_globals import forget_engines
    from moe_models.engine.lora_experts import AdaptedExperts
    from moe_models.errors import RunError

    forget_engines()  # or from_pretrained would still build for the ZeRO-3 of an earlier test
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), adapters.lora("qwen2_moe", "shared"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # a new one's B is zero, and would hide all that is wrong
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    add, delta = AdaptedExperts.add, AdaptedExperts._delta

    def unscaled(self: Any, name: str, A: Any, B: Any, scaling: float, key: str, **options: Any) -> None:
        add(self, name, A, B, 1.0, key, **options)

    def nothing(self: Any, name: str, x: Any, product: Any) -> Any:
        return delta(self, name, x, product) * 0

    owner, name, wrong = {
        "": (AdaptedExperts, "add", add),
        "scaling forgotten": (AdaptedExperts, "add", unscaled),
        "not applied": (AdaptedExperts, "_delta", nothing),
    }[planted]
    trainer = parity.build_trainer(source, out, parity.ds_config(stage, ep_size), model=model, max_steps=1)
    with parity.planted(owner, name, wrong):
        try:
            trainer.train()
        except RunError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.conformance)])
def test_adapters_are_part_of_the_function(
    stage: int, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's wrappers answer before, AutoEP's experts with their factors after; of attention nothing is asked."""
    case = (with_an_adapter, str(tiny_checkpoints("qwen2_moe")), str(tmp_path), stage, 2)
    assert clusters(2).run(*case, "") == ["", ""]
    for planted in ("scaling forgotten", "not applied"):
        for found in clusters(2).run(*case, planted):
            assert "AutoEP made another function of this block" in found, (planted, found)


def with_fused_layers(source: str, out: str, planted: bool) -> str:
    """What the check says of fused layers, one expert of which is lost; on every rank."""
    from moe_models.engine.fused import rows
    from moe_models.errors import RunError
    from tests.training.test_fused import fused_config, without_an_expert

    wrong = partial(without_an_expert, rows.order) if planted else rows.order
    trainer = parity.build_trainer(source, out, fused_config(1, 2), max_steps=1)
    with parity.planted(rows, "order", wrong):
        try:
            trainer.train()
        except RunError as error:
            return str(error)
    return ""


def test_fused_layers_are_asked(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    case = (with_fused_layers, str(tiny_checkpoints("mixtral")), str(tmp_path))
    assert clusters(2).run(*case, False) == ["", ""]
    for found in clusters(2).run(*case, True):
        assert "AutoEP with fused kernels made another function of this block" in found


# ----------------------------------------------------------------------------------------------- without processes


def test_a_large_model_is_asked_in_some_layers() -> None:
    paths = [f"model.layers.{layer}.mlp" for layer in range(32)]
    mixtral = [2_800_000_000] * 32
    asked = same_function.chosen(paths, mixtral, "auto")
    assert len(asked) == 11
    assert (asked[0], asked[-1]) == (paths[0], paths[-1])
    assert same_function.chosen(paths, mixtral, "all") == paths
    assert same_function.chosen(paths, mixtral, "none") == []
    assert same_function.chosen(paths, [1] * 32, "auto") == paths
    assert same_function.chosen(paths, [10**12] * 32, "auto") == [paths[0], paths[-1]]
    assert same_function.chosen([], [], "auto") == []


def test_a_token_that_ties_is_left_out_and_no_other() -> None:
    before = torch.ones(5, 16, 4)
    before[3, 0] = -1.0  # with a rounding error token 0 takes another expert
    after = torch.ones(5, 16, 4)
    after[:, 0] = -1.0
    assert same_function.departure(before, after, 5e-2) == 0.0
    after[:, 1] = 1.1
    assert same_function.departure(before, after, 5e-2) == pytest.approx(0.1)
    assert same_function.departure(before, after, 5e-2, coarse=True) == pytest.approx(0.1), "steady, and another answer"
    after[2, 1] = -1.0  # the converted router ties here
    assert same_function.departure(before, after, 5e-2, coarse=True) == 0.0
    assert same_function.departure(before, after, 5e-2) == pytest.approx(2.0), "in fp32 that is no reason"
    after[2] = -1.0  # as for every token
    assert same_function.departure(before, after, 5e-2, coarse=True) == pytest.approx(2.0)
    after[:, 1] = float("nan")
    assert not same_function.departure(before, after, 5e-2, coarse=True) <= 5e-2  # type: ignore[operator]
    assert not same_function.departure(before, after, 5e-2) <= 5e-2  # type: ignore[operator]
    before[3] = -1.0
    assert same_function.departure(before, after, 5e-2) is None


def test_tiny_models_have_what_the_faults_need() -> None:
    assert set(FAULTS.values()) <= set(TINY)
    assert TINY["qwen3_moe"]["norm_topk_prob"]
