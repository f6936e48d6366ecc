"""Where ``"moe": {"kernels": "fused"}`` is refused, and what is said about how tokens travel."""

from __future__ import annotations

from typing import Any

import pytest

from moe_models.config.moe_section import resolve_dispatch, rows_sent
from moe_models.errors import UserError
from moe_models.preflight.fused import dispatch_line
from moe_models.preflight.run import check_run
from tests.preflight import test_preflight
from tests.preflight.test_preflight import MIXTRAL, TP, one
from tests.support.tiny import TINY

ds = test_preflight.ds
FUSED = {"kernels": "fused"}
QWEN = {"model_type": "qwen3_moe", **TINY["qwen3_moe"]}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dispatch", ["auto", "all_to_all", "all_gather"])
def test_good_runs(ds: Any, stage: int, dispatch: str) -> None:
    moe = {**FUSED, "dispatch": dispatch}
    assert check_run(ds({}, {"stage": stage}, moe=moe), MIXTRAL, 4) == []
    assert check_run(ds({"combine_impl": "fused_weighted_sum"}, moe=moe), MIXTRAL, 4) == []


@pytest.mark.parametrize(
    ("ep", "other", "words"),
    [
        (None, {}, 'moe.kernels = "fused": acts on the layers of expert_parallel, and there are none; remove the key'),
        (
            {"comm_backend": "deepep", "comm_max_tokens_per_rank": 8},
            {},
            'expert_parallel.comm_backend = "deepep" with moe.kernels = "fused": it has an exchange of its own',
        ),
        (
            {"async_split_plan": True},
            {},
            'expert_parallel.async_split_plan = true with moe.kernels = "fused": does not',
        ),
        ({"combine_impl": "legacy_bmm"}, {}, 'expert_parallel.combine_impl = "legacy_bmm" with moe.kernels = "fused"'),
        ({"gate_up_impl": "fused"}, {}, 'expert_parallel.gate_up_impl = "fused" with moe.kernels = "fused": does noth'),
        ({"use_grouped_mm": False}, {}, 'expert_parallel.use_grouped_mm = false with moe.kernels = "fused": does noth'),
        (
            {},
            {"compile": {"deepcompile": True}},
            'compile.deepcompile = true with moe.kernels = "fused": the compiler cannot trace it; set deepcompile to',
        ),
        (
            {},
            {"tensor_parallel": TP},
            'tensor_parallel.autotp_size = 2 with moe.kernels = "fused": tensor-parallel peers share the rows of a la',
        ),
        (
            {"autoep_size": 1},
            {"moe": {**FUSED, "dispatch": "all_gather"}},
            'moe.dispatch = "all_gather" with expert_parallel.autoep_size = 1: no token travels; remove the key, or',
        ),
    ],
)
def test_refused(ds: Any, ep: dict[str, Any] | None, other: dict[str, Any], words: str) -> None:
    line = one(check_run(ds(ep, **{"moe": FUSED, **other}), MIXTRAL, 4))
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"dispatch": "all_gather"}, 'moe.dispatch = "all_gather": does nothing without "kernels": "fused" beside it'),
        ({"dispatch": "auto"}, 'moe.dispatch = "auto": does nothing without "kernels": "fused" beside it'),
        ({"kernels": "quick"}, "moe.kernels = \"quick\": must be 'deepspeed' or 'fused'"),
        ({**FUSED, "dispatch": "ring"}, "moe.dispatch = \"ring\": must be 'auto', 'all_to_all' or 'all_gather'"),
    ],
)
def test_refused_by_the_json_alone(ds: Any, moe: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        ds({}, moe=moe)
    (line,) = refused.value.problems
    assert words in line


def test_native_layers(ds: Any) -> None:
    problems = check_run(ds(None, moe={**FUSED, "layer": {"ep_size": 2}}), MIXTRAL, 4)
    assert one(problems).startswith('moe.kernels = "fused": acts on the layers of expert_parallel, and there are none')


@pytest.mark.parametrize(
    ("ep_size", "top_k", "gathers", "rows"),
    [(1, 8, False, 0), (2, 8, True, 1), (4, 8, True, 3), (8, 8, False, 7), (2, 2, False, 1), (4, 2, False, 1.5)],
)
def test_auto_takes_what_sends_fewer_rows(ep_size: int, top_k: int, gathers: bool, rows: float) -> None:
    chosen = resolve_dispatch("auto", ep_size, top_k)
    assert chosen == ("all_gather" if gathers else "all_to_all")
    assert rows_sent("auto", ep_size, top_k) == rows
    others = [rows_sent("all_gather", ep_size, top_k), rows_sent("all_to_all", ep_size, top_k)]
    assert rows_sent("auto", ep_size, top_k) == min(others)


def test_the_line_says_which_and_why(ds: Any) -> None:
    assert dispatch_line(ds({}, moe=FUSED), QWEN) == (
        "dispatch: all_gather sends 1 rows for each token, all_to_all 2 (EP 2, top-4; auto takes the all-gather where "
        "it sends fewer)"
    )
    assert dispatch_line(ds({"autoep_size": 4}, moe={**FUSED, "dispatch": "all_gather"}), MIXTRAL) == (
        "dispatch: all_gather sends 3 rows for each token, all_to_all 1.5 (EP 4, top-2; as moe.dispatch says)"
    )
    assert dispatch_line(ds({}), QWEN) is None
    assert dispatch_line(ds({"autoep_size": 1}, moe=FUSED), QWEN) is None
