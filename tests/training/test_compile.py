"""``--torch_compile``: the function of single-process Hugging Face where it is allowed, and refused where it is not.

The backend is ``aot_eager``: it traces and differentiates as inductor does, and leaves out the code generation. Rows
are of one length, because each other length is compiled anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.preflight.torch_compile import compile_problems
from tests.support import parity
from tests.support.cluster import Cluster
from tests.training import test_parity
from tests.training.test_native import native_config
from tests.training.test_parity import check_case

references = test_parity.references
ROWS = [{"input_ids": [3 + (7 * i * j + j) % 60 for j in range(20)]} for i in range(1, 65)]
AROUND = {"compile": {"autoep_non_moe": True}}


def train_compiled(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` with how many graphs were made; runs on every rank."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result = parity.train_case(*args, **kwargs)
    torch._dynamo.reset()
    return {**result, "graphs": counters["stats"]["unique_graphs"]}


CASES = [
    # family, ds_config, flags
    ("mixtral", parity.ds_config(1, 2, **AROUND), {}),
    ("mixtral", native_config(2, 2), {}),
    ("qwen3_moe", parity.ds_config(2, 2, **AROUND), {"gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("model_type", "config", "flags"), parity.daily(CASES, {0}))
def test_training_equals_hugging_face(
    model_type: str, config: dict[str, Any], flags: dict[str, Any], clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path], references: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    ours = check_case(
        clusters(2), references, tiny_checkpoints(model_type), tmp_path, config, 1, run=train_compiled,
        train_rows=ROWS, torch_compile=True, torch_compile_backend="aot_eager", timeout=300, **flags,
    )  # fmt: skip
    assert ours["graphs"] > 2


@pytest.mark.parametrize(
    ("config", "flag", "words"),
    [
        (parity.ds_config(1, 2), False, None),
        (parity.ds_config(1, 2, **AROUND), True, None),
        (native_config(1, 2), True, None),
        (
            parity.ds_config(1, 2, **AROUND),
            False,
            "compile.autoep_non_moe = true: does nothing without --torch_compile",
        ),
        (parity.ds_config(1, None, **AROUND), True, "compile.autoep_non_moe = true: there are no AutoEP layers"),
        (
            parity.ds_config(1, 2),
            True,
            "--torch_compile with expert_parallel: the experts' grouped product cannot be traced",
        ),
        (parity.ds_config(3, None), True, "--torch_compile with ZeRO stage 3: weights are freed"),
        (parity.ds_config(3, 2), True, "--torch_compile with ZeRO stage 3: weights are freed"),
    ],
)
def test_refused(config: dict[str, Any], flag: bool, words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    problems = list(compile_problems(load_ds_config(path), flag))
    assert problems == [] if words is None else len(problems) == 1 and problems[0].startswith(words)


def test_refused_with_liger_s_kernels(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(parity.ds_config(1, 2, **AROUND)))
    ds = load_ds_config(path)
    (problem,) = compile_problems(ds, torch_compile=True, liger=True)
    assert problem.startswith("--torch_compile with --use_liger_kernel: ")
    assert not list(compile_problems(ds, torch_compile=True))
