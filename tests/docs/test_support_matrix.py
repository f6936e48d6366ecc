"""What the support matrix says is refused is refused, in these words; and the page on disk is of these tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.errors import UserError
from moe_models.preflight.run import check_run
from tests.support import parity, support_matrix
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
PLAN = json.loads((ROOT / "ds_configs" / "zero1_ep2_tp2.json").read_text())["tensor_parallel"]


def native(stage: int = 1, **layer: Any) -> dict[str, Any]:
    return parity.ds_config(stage, None, moe={"layer": {"ep_size": 2, **layer}})


def tensor_parallel(stage: int = 1, **more: Any) -> dict[str, Any]:
    return parity.ds_config(stage, 2, tensor_parallel=PLAN, **more)


def sequence_parallel(stage: int = 1, **more: Any) -> dict[str, Any]:
    return parity.ds_config(stage, 2, **{"sequence_parallel_size": 2, **more})


AWAITED = {"dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite"}
"""Families that were added since the last conformance run, which alone writes the page."""

# what: (ds_config, family, changes of its config.json, words of the refusal)
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "ZeRO-0 with AutoEP": (parity.ds_config(0, 2), "mixtral", {}, "stage"),
    "EP that does not divide the experts": (parity.ds_config(1, 4), "mixtral", {"num_local_experts": 6}, "6 experts"),
    "AutoEP on a dense model": (parity.ds_config(1, 2), "llama", {}, "llama"),
    "AutoEP on a PR-MoE": (parity.ds_config(1, 2), "prmoe", {"num_local_experts": [2, 4]}, "prmoe"),
    "AutoEP beside native layers": ({**native(), **parity.ds_config(1, 2)}, "mixtral", {}, "expert_parallel"),
    "native layers at ZeRO-3": (native(3), "mixtral", {}, "stage"),
    "native layers, top-k not normalised": (native(), "qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "native layers, normalised top-1": (native(), "mixtral", {"num_experts_per_tok": 1}, "1 expert per token"),
    "native layers, DeepSeek's scores": (native(), "deepseek_v3", {}, "deepseek_v3"),
    "native layers, split experts": (
        native(enable_expert_tensor_parallelism=True), "mixtral", {}, "enable_expert_tensor_parallelism",
    ),
    "native layers, selection bias": (
        parity.ds_config(1, None, moe={"layer": {"ep_size": 2}, "balance": {"bias_update_rate": 0.01}}), "mixtral", {},
        "bias_update_rate",
    ),
    "tensor parallelism at ZeRO-3": (tensor_parallel(3), "mixtral", {}, "tensor_parallel"),
    "tensor parallelism, olmoe": (tensor_parallel(), "olmoe", {}, "olmoe"),
    "tensor parallelism, deepseek_v3": (tensor_parallel(), "deepseek_v3", {}, "deepseek_v3"),
    "tensor parallelism with moe.balance": (tensor_parallel(moe={"balance": {}}), "mixtral", {}, "balance"),
    "sequence parallelism at ZeRO-3": (sequence_parallel(3), "mixtral", {}, "sequence_parallel_size"),
    "sequence parallelism with tensor parallelism": (
        sequence_parallel(tensor_parallel=PLAN), "mixtral", {}, "tensor or sequence parallelism",
    ),
    "sequence parallelism, latent attention": (sequence_parallel(), "deepseek_v3", {}, "latent attention"),
    "sequence parallelism, sliding window": (sequence_parallel(), "mixtral", {"sliding_window": 32}, "sliding_window"),
    "sequence parallelism, too few heads": (
        sequence_parallel(sequence_parallel_size=4), "mixtral",
        {"num_attention_heads": 2}, "attention heads",
    ),
    "sequence parallelism without AutoEP": (
        parity.ds_config(1, None, sequence_parallel_size=2), "mixtral", {}, "without expert_parallel",
    ),
    "sequence parallelism, native layers": (
        {**native(), "sequence_parallel_size": 2}, "mixtral", {}, "sequence_parallel_size",
    ),
    "fused kernels without AutoEP": (parity.ds_config(1, None, moe={"kernels": "fused"}), "mixtral", {}, "moe.kernels"),
    "fused kernels with tensor parallelism": (tensor_parallel(moe={"kernels": "fused"}), "mixtral", {}, "moe.kernels"),
    "fused kernels with DeepEP": (
        {
            **parity.ds_config(1, 2, moe={"kernels": "fused"}),
            "expert_parallel": {
                "enabled": True, "autoep_size": 2, "comm_backend": "deepep", "comm_max_tokens_per_rank": 64,
            },
        },
        "mixtral", {}, "moe.kernels",
    ),
    "Muon with clipping": (
        parity.ds_config(1, 2, gradient_clipping=1.0, optimizer={"type": "Muon", "params": {"lr": 1e-3}}), "mixtral",
        {}, "Muon",
    ),
    "a family that AutoEP would convert wrongly": (parity.ds_config(1, 2), "gpt_oss", {}, "gpt_oss"),
}  # fmt: skip


@pytest.mark.conformance
@pytest.mark.daily
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_a_weight_is_read(what: str, tmp_path: Path) -> None:
    config, model_type, changes, words = REFUSED[what]
    model = {**TINY.get(model_type, TINY["mixtral"]), "model_type": model_type, **changes}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    try:
        problems = check_run(load_ds_config(str(path)), model, 4)
    except UserError as error:
        problems = error.problems
    line = next((problem for problem in problems if words in problem), None)
    assert line is not None, problems
    support_matrix.REFUSED[what] = line.replace(f"{path}: ", "")


def test_the_page_is_of_these_tests() -> None:
    """Every family with its aux loss or without, every way to spread experts, every refusal; numbers within bounds."""
    page = (ROOT / "docs" / "support-matrix.md").read_text()
    for family in TINY:
        written = re.search(rf"^\| {family} \| \d+ \| AutoEP \| 3 \| 4 \| 4 \|", page, re.MULTILINE)
        if family in AWAITED:
            assert not written, f"{family} is in the page now: take it out of AWAITED"
        else:
            assert written, family
    assert "| native |" in page
    for what in REFUSED:
        assert f"| {what} |" in page, f"{what}: write the page anew: python -m pytest -m conformance"
    figures = [float(number) for number in re.findall(r"\d\.?\d*e[-+]\d\d", page)]
    assert figures
    assert max(figures) <= 1e-4


def test_readme_has_the_table_of_the_page() -> None:
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "support-matrix.md").read_text()
    assert readme == support_matrix.in_readme(readme, page)
    assert readme.count("| AutoEP | 1, 2, 3 | 1, 2, 4 |") == len(set(TINY) - AWAITED)
