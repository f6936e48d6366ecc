"""PR-MoE: our Hugging Face class against DeepSpeed's layer and loops by hand, and its training against itself alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

import moe_models.prmoe  # noqa: F401 (for AutoModelForCausalLM)
from moe_models.config.ds_config import load_ds_config
from moe_models.config.moe_section import MoeLayer
from moe_models.engine.native import native_blocks, register_deepspeed_moe
from moe_models.errors import UserError
from moe_models.families.table import FAMILIES
from moe_models.preflight.run import check_run
from tests.checkpoint.test_roundtrip import assert_offline_equals_live
from tests.support import parity, roundtrip
from tests.support.cluster import Cluster
from tests.support.report import recipe
from tests.support.tiny import TINY
from tests.training.test_native import native_config
from tests.training.test_parity import check_case, references  # noqa: F401

IDS = torch.arange(3, 63).view(3, 20)
PRMOE = {**TINY["mixtral"], "model_type": "prmoe", "num_local_experts": [4, 8], "num_experts_per_tok": 1}
Clusters = Callable[[int], Cluster]


def make_prmoe(seed: int = 0, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**PRMOE, **changes}))
    for layer in model.model.layers if model.config.use_residual else ():
        torch.nn.init.uniform_(layer.mlp.coefficient.bias, -1, 1)  # zeros would hide a lost bias
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def get(k: int) -> Path:
        if k not in made:
            made[k] = tmp_path_factory.mktemp(f"prmoe-k{k}")
            make_prmoe(num_experts_per_tok=k).save_pretrained(made[k])
        return made[k]

    return get


def by_hand(block: Any, x_D: torch.Tensor, k: int) -> torch.Tensor:
    """The block's output for one token, expert by expert."""
    probability_E = linear(x_D, block.gate.weight).softmax(-1)
    chosen = sorted(range(len(probability_E)), key=lambda e: -probability_E[e].item())[:k]
    total = sum(probability_E[e] for e in chosen) if k > 1 else 1.0
    y_D = torch.zeros_like(x_D)
    for e in chosen:
        gate_FD, up_FD = block.experts.gate_up_proj[e].chunk(2)
        y_D += (
            probability_E[e]
            / total
            * linear(silu(linear(x_D, gate_FD)) * linear(x_D, up_FD), block.experts.down_proj[e])
        )
    dense = block.residual_mlp
    mlp_D = linear(
        silu(linear(x_D, dense.gate_proj.weight)) * linear(x_D, dense.up_proj.weight), dense.down_proj.weight
    )
    share = linear(x_D, block.coefficient.weight, block.coefficient.bias).softmax(-1)
    return share[0] * y_D + share[1] * mlp_D


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_block_equals_loops_by_hand(k: int) -> None:
    model = make_prmoe(num_experts_per_tok=k)
    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    for layer, experts in zip(model.model.layers, (4, 8), strict=True):
        assert layer.mlp.gate.weight.shape[0] == layer.mlp.experts.down_proj.shape[0] == experts
        expected = torch.stack([by_hand(layer.mlp, x_D, k) for x_D in x_TD])
        assert torch.allclose(layer.mlp(x_TD[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2}, {"use_residual": False}], ids=str)
def test_native_layers_compute_the_same_with_the_same_gradients(changes: dict[str, Any]) -> None:
    hf = make_prmoe(**changes)
    native = register_deepspeed_moe(make_prmoe(**changes), MoeLayer(), FAMILIES["prmoe"])
    ours, theirs = (m.train()(IDS, labels=IDS, output_router_logits=True, use_cache=False) for m in (native, hf))
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert torch.allclose(ours.aux_loss, theirs.aux_loss)
    ours.loss.backward()
    theirs.loss.backward()
    blocks = native_blocks(native)
    assert len(blocks) == 2
    for name, block in blocks.items():
        block_hf, moe = hf.get_submodule(name), block.moe
        assert moe.use_residual == hf.config.use_residual
        pairs = [(moe.deepspeed_moe.gate.wg.weight, block_hf.gate.weight)]
        if moe.use_residual:
            pairs += zip(moe.mlp.parameters(), block_hf.residual_mlp.parameters(), strict=True)
            pairs += zip(moe.coefficient.parameters(), block_hf.coefficient.parameters(), strict=True)
        for a, b in pairs:
            assert b.grad.abs().max() > 1e-5
            assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_a_folder_reloads_in_a_fresh_process_after_one_import(checkpoints: Callable[[int], Path]) -> None:
    folder = checkpoints(1)
    assert "import moe_models.prmoe" in json.loads((folder / "config.json").read_text())["how_to_load"]
    code = (
        "import sys, torch, moe_models.prmoe\nfrom transformers import AutoModelForCausalLM\n"
        "m, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "print(m(torch.arange(3, 63).view(3, 20)).logits.double().sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert float(said.stdout) == pytest.approx(make_prmoe().eval()(IDS).logits.double().sum().item(), rel=1e-5)


@pytest.mark.parametrize("experts", [[4], [4, 0], "many", [2, 4, 4]], ids=str)
def test_a_wrong_pyramid_is_refused(experts: Any) -> None:
    with pytest.raises(ValueError, match="num_local_experts"):
        make_prmoe(num_local_experts=experts)


# ------------------------------------------------------------------------------------------------------------ training

CASES = [(1, 1, 2, 1, 1), (1, 1, 2, 2, 2), (2, 1, 2, 2, 1), (1, 2, 2, 2, 1)]


@pytest.mark.conformance
@pytest.mark.daily
@pytest.mark.parametrize(("k", "stage", "world_size", "ep_size", "accumulation"), CASES)
def test_training_equals_one_process(
    k: int, stage: int, world_size: int, ep_size: int, accumulation: int, clusters: Clusters,
    checkpoints: Callable[[int], Path], references: Callable[..., Any], tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    config = native_config(stage, ep_size)
    check_case(clusters(world_size), references, checkpoints(k), tmp_path, config, accumulation)


@pytest.mark.conformance
@pytest.mark.daily
def test_training_of_the_plain_class_under_zero3_equals_one_process(
    clusters: Clusters, checkpoints: Callable[[int], Path], references: Callable[..., Any], tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    check_case(clusters(2), references, checkpoints(1), tmp_path, parity.ds_config(3, None), 1)


def groups_of_parameters(source: str, out: str, config: dict[str, Any]) -> dict[str, str | None]:
    """Name -> EP group of every parameter, from the optimizer that DeepSpeed built."""
    trainer = parity.build_trainer(source, out, config, max_steps=1)
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.model_wrapped.optimizer
    return {
        names[id(parameter)]: group["name"] if group.get("moe") else None
        for parameters, group in zip(optimizer.bit16_groups, optimizer.param_groups, strict=True)
        for parameter in parameters
    }


def test_parameter_groups(clusters: Clusters, checkpoints: Callable[[int], Path], tmp_path: Path) -> None:
    """Experts, and neither the residual MLP nor the router, are in the group whose gradients are reduced over EDP."""
    config = native_config(1, 2)
    for groups in clusters(2).run(groups_of_parameters, str(checkpoints(1)), str(tmp_path), config):
        assert groups == {name: "ep_size_2" if ".deepspeed_experts." in name else None for name in groups}
        assert sum(group is not None for group in groups.values()) == 3 * (2 + 4), "each rank has half of 4 and of 8"
        assert sum(".moe.mlp." in name or ".coefficient." in name for name in groups) == 2 * (3 + 2)


def train_without_bias(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """A fault: the bias of the coefficient is lost on the way into the native layer."""
    from torch import nn

    import moe_models.engine.native as native

    right = native.register_deepspeed_moe

    def wrong(model: Any, *rest: Any) -> Any:
        right(model, *rest)
        for block in native.native_blocks(model).values():
            nn.init.constant_(block.moe.coefficient.bias, 0.0)
        return model

    native.register_deepspeed_moe = wrong
    try:
        return parity.train_case(*args, check_conversion="none", **kwargs)  # which would see it before the first step
    finally:
        native.register_deepspeed_moe = right


def test_a_planted_fault_is_seen(
    clusters: Clusters, checkpoints: Callable[[int], Path], references: Callable[..., Any], tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(AssertionError, match=r"assert .* < "):
        check_case(clusters(2), references, checkpoints(1), tmp_path, native_config(1, 2), 1, run=train_without_bias)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_and_offline_exports_are_the_same_files(
    dtype: str, clusters: Clusters, checkpoints: Callable[[int], Path], tmp_path: Path
) -> None:
    out, source, bf16 = tmp_path / "out", checkpoints(1), dtype == "bfloat16"
    config = {**native_config(2, 2), "bf16": {"enabled": bf16}}
    proof = clusters(2).run(roundtrip.train_and_export, str(source), str(out), config, use_cpu=True, bf16=bf16)[0]
    assert proof.equal_tensors == len(roundtrip.load_tensors(source)) == len(roundtrip.load_tensors(out / "model"))
    assert_offline_equals_live(out)
    assert proof.same_top1 == 1.0


# ------------------------------------------------------------------------------------------------------------ refusals


def write_ds(folder: Path, **sections: Any) -> Path:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4}}
    config = {"zero_optimization": {"stage": 1}, "optimizer": optimizer, **sections}
    (folder / "ds.json").write_text(json.dumps(config))
    return folder / "ds.json"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"use_residual": True}, 'write "use_residual" into the config.json of a model of type prmoe (model_configs/'),
        ({"num_experts": [2, 4]}, 'write "num_local_experts" (a list is a pyramid) into the config.json of a model'),
        ({"enable_expert_tensor_parallelism": True}, "native layers run without tensor parallelism here"),
    ],
)
def test_what_moe_layer_does_not_take(layer: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_ds_config(write_ds(tmp_path, moe={"layer": {"ep_size": 2, **layer}}))
    (line,) = refused.value.problems
    ((key, value),) = layer.items()
    assert f"moe.layer.{key} = {json.dumps(value)}: " in line
    assert words in line


@pytest.mark.parametrize(
    ("sections", "changes", "words"),
    [
        ({"moe": {"layer": {"ep_size": 2}}}, {}, None),
        ({"moe": {"layer": {"ep_size": 2}, "balance": {"per_layer": True}}}, {}, None),
        ({}, {}, None),
        ({"moe": {"layer": {"ep_size": 4}}}, {"num_local_experts": [2, 4]}, "does not divide the model's 2 and 4 exp"),
        (
            {"moe": {"layer": {"ep_size": 2}}},
            {"num_local_experts": [4]},
            "must be whole numbers of at least 1 (the fir",
        ),
        ({"moe": {"layer": {"k": 5}}}, {}, "moe.layer.k = 5: must be 1 to 4"),
        ({"expert_parallel": {"enabled": True}}, {}, "AutoEP would leave out its residual MLP; use moe.layer instead"),
        ({"moe": {"layer": {}, "balance": {}}}, {}, "moe.balance.per_layer = false: the layers of this model have dif"),
    ],
)
def test_preflight(sections: dict[str, Any], changes: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    problems = check_run(load_ds_config(write_ds(tmp_path, **sections)), {**PRMOE, **changes}, 4)
    assert len(problems) == (words is not None), problems
    assert words is None or words in problems[0]


def test_the_routing_report_is_for_equal_layers(checkpoints: Callable[[int], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w5 w6")
    with pytest.raises(UserError, match="has layers of 4 to 8 experts"):
        recipe()["write_report"](checkpoints(1), tmp_path / "text.txt", tmp_path / "page.html")
