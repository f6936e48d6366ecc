"""``"moe": {"kernels": "fused"}`` trains the function of single-process Hugging Face, in every layout of AutoEP.

The layers run the torch versions of their kernels here (``moe_models/engine/fused/rows.py``), the autograd node and the
exchanges as on GPUs. Bounds are those of test_parity.py. Rows are of unequal length, so ranks hold unequal numbers of
tokens, and what is gathered has to be filled up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planner.test_traffic import check_live_run, write_config
from tests.routing.test_load_stats import PLAIN, REENTRANT
from tests.routing.test_load_stats import check as check_counters
from tests.support import parity
from tests.support.cluster import Cluster
from tests.training import test_parity
from tests.training.test_compile import AROUND, ROWS, train_compiled
from tests.training.test_parity import check_case

Clusters = Callable[[int], Cluster]
Tiny = Callable[[str], Path]
references = test_parity.references


def fused_config(stage: int, ep_size: int, dispatch: str = "auto", **extra: Any) -> dict[str, Any]:
    moe = {"kernels": "fused", **({} if dispatch == "auto" else {"dispatch": dispatch})}
    return parity.ds_config(stage, ep_size, moe=moe, **extra)


def layers_of(trainer: Any) -> list[Any]:
    from moe_models.engine.blocks import find_blocks

    return [block.module for block in find_blocks(trainer.model)]


def train_fused(*args: Any, gathers: bool, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank that looks which layers it trained."""
    from moe_models.engine.fused.layer import FusedLayer
    from moe_models.trainer import MoETrainer

    class Looking(MoETrainer):
        def train(self, *a: Any, **k: Any) -> Any:
            done = super().train(*a, **k)
            layers = layers_of(self)
            assert layers
            assert all(type(layer) is FusedLayer for layer in layers)
            assert {layer.lengths is not None for layer in layers} == {gathers}
            assert [layer.tells_lengths for layer in layers] == [gathers] + [False] * (len(layers) - 1)
            return done

    return parity.train_case(*args, trainer_class=Looking, **kwargs)


CASES = [
    # family, ZeRO, ranks, EP, dispatch, whether tokens are gathered, accumulation, recomputation
    ("mixtral", 1, 2, 2, "auto", False, 2, None),
    ("qwen3_moe", 2, 2, 2, "auto", True, 1, PLAIN),
    ("qwen3_moe", 3, 4, 2, "auto", True, 2, None),
    ("mixtral", 2, 2, 1, "auto", False, 1, None),
    ("mixtral", 3, 2, 2, "auto", False, 1, PLAIN),
    ("mixtral", 3, 2, 1, "auto", False, 2, PLAIN),
    ("qwen3_moe", 1, 4, 4, "all_gather", True, 1, None),
    ("qwen3_moe", 2, 4, 4, "auto", False, 1, PLAIN),
    ("mixtral", 1, 4, 2, "all_gather", True, 1, PLAIN),
    ("qwen2_moe", 2, 4, 2, "all_gather", True, 2, PLAIN),
    ("qwen2_moe", 3, 2, 2, "auto", False, 1, None),
    ("olmoe", 1, 4, 2, "auto", False, 1, None),
    ("olmoe", 3, 2, 2, "all_gather", True, 1, PLAIN),
    ("deepseek_v2", 2, 2, 2, "auto", False, 1, None),
    ("deepseek_v3", 1, 4, 2, "all_gather", True, 1, REENTRANT),
    ("deepseek_v3", 3, 4, 4, "auto", False, 1, REENTRANT),
    ("deepseek_v3", 3, 2, 2, "all_gather", True, 2, PLAIN),
]


@pytest.mark.parametrize(
    ("model_type", "stage", "world", "ep_size", "dispatch", "gathers", "accumulation", "kind"),
    parity.daily(CASES, {0, 1, 2}),
)
def test_training_equals_hugging_face(
    model_type: str, stage: int, world: int, ep_size: int, dispatch: str, gathers: bool, accumulation: int,
    kind: dict[str, bool] | None, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    again: dict[str, Any] = {}
    if kind is not None:
        again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kind}
    check_case(
        clusters(world), references, tiny_checkpoints(model_type), tmp_path, fused_config(stage, ep_size, dispatch),
        accumulation, run=partial(train_fused, gathers=gathers), **again,
    )  # fmt: skip


@pytest.mark.conformance
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_with_sequence_parallelism(
    dispatch: str, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    config = fused_config(2, 2, dispatch, sequence_parallel_size=2)
    check_case(
        clusters(4), references, tiny_checkpoints("mixtral"), tmp_path, config, 2,
        run=partial(train_fused, gathers=dispatch == "all_gather"),
    )  # fmt: skip


@pytest.mark.conformance
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_with_the_layers_around_them_compiled(
    dispatch: str, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    ours = check_case(
        clusters(2), references, tiny_checkpoints("mixtral"), tmp_path, fused_config(1, 2, dispatch, **AROUND), 1,
        run=train_compiled, train_rows=ROWS, torch_compile=True, torch_compile_backend="aot_eager", timeout=300,
    )  # fmt: skip
    assert ours["graphs"] > 2


@pytest.mark.parametrize(
    ("model_type", "ranks", "dispatch", "kind"),
    parity.daily([("qwen3_moe", 2, "all_gather", PLAIN), ("deepseek_v3", 4, "all_to_all", None)], {0}),
)
def test_load_counters(
    model_type: str, ranks: int, dispatch: str, kind: Any, clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path
) -> None:
    moe = {"kernels": "fused", "dispatch": dispatch}
    check_counters(clusters(ranks), tiny_checkpoints(model_type), model_type, tmp_path, 1, 2, 2, kind, moe=moe)


def biased(source: str, out: str, config: dict[str, Any]) -> list[Any]:
    """Runs on every rank: losses and selection bias of five steps."""
    trainer = parity.build_trainer(source, out, config, balance={"bias_update_rate": 0.02})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [losses, trainer.routing.bias.state()]


@pytest.mark.conformance
def test_selection_bias(clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path) -> None:
    """It moves as under DeepSpeed's own layers, which test_selection_bias.py compares with plain Python."""
    source = str(tiny_checkpoints("mixtral"))
    found = []
    for config in (parity.ds_config(1, 2), fused_config(1, 2), fused_config(2, 2, "all_gather")):
        losses, bias = clusters(2).run(biased, source, str(tmp_path), config)[0]
        found.append((losses, {name: torch.as_tensor(value).tolist() for name, value in bias.items()}))
    for losses, bias in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=test_parity.LOSS_TOLERANCE)
        assert bias == found[0][1]


@pytest.mark.parametrize(
    ("model_type", "stage", "ep_size", "dispatch", "recompute"),
    parity.daily(
        [
            ("qwen3_moe", 1, 2, "all_gather", True),
            ("deepseek_v3", 2, 4, "all_gather", True),
            ("mixtral", 2, 2, "all_to_all", False),
            ("mixtral", 1, 2, "all_to_all", True),
        ],
        {0},
    ),
)
def test_bytes_of_a_live_run(
    model_type: str, stage: int, ep_size: int, dispatch: str, recompute: bool, clusters: Clusters,
    tiny_checkpoints: Tiny, tmp_path: Path,
) -> None:  # fmt: skip
    path = write_config(tmp_path, stage, ep_size, moe={"kernels": "fused", "dispatch": dispatch})
    check_live_run(clusters(4), tiny_checkpoints(model_type), path, tmp_path, 2, recompute)


def wrong_scores(right: Any, *args: Any) -> Any:
    *others, dscores_TK = right(*args)
    return *others, 1.5 * dscores_TK


def one_row_off(right: Any, ids_TK: torch.Tensor, E: int) -> Any:
    order = right(ids_TK, E)
    return order._replace(token_R=order.token_R.roll(1))


def without_an_expert(right: Any, ids_TK: torch.Tensor, E: int) -> Any:
    return right(torch.where(ids_TK == 1, -1, ids_TK), E)


FAULTS = {
    "scores' gradient": ("swiglu_backward", wrong_scores),
    "rows off by one": ("order", one_row_off),
    "an expert dropped": ("order", without_an_expert),
}


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank whose fused layers have a fault, which no check of the conversion looks for."""
    from moe_models.engine.fused import rows

    name, wrong = FAULTS[fault]
    with parity.planted(rows, name, partial(wrong, getattr(rows, name))):
        return parity.train_case(*args, check_conversion="none", **kwargs)


@pytest.mark.parametrize("fault", parity.daily([(name,) for name in FAULTS], {0}))
def test_planted_faults_are_seen(
    fault: str, clusters: Clusters, tiny_checkpoints: Tiny, references: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"assert .* < |differs from the trained one"):
        check_case(
            clusters(2), references, tiny_checkpoints("mixtral"), tmp_path, fused_config(1, 2), 1,
            run=partial(train_with_fault, fault), timeout=60,
        )  # fmt: skip


def resumed(source: str, out: str, config: dict[str, Any], resume: str | None) -> list[float]:
    """Runs on every rank: four steps with a checkpoint after two, or the last two from there."""
    trainer = parity.build_trainer(
        source, out, config, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.conformance
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_deepspeeds_layers_is_resumed_by_fused_ones(
    stage: int, clusters: Clusters, tiny_checkpoints: Tiny, tmp_path: Path
) -> None:
    """Names, shapes and buffers are the same; and the other way round."""
    source = str(tiny_checkpoints("qwen3_moe"))
    plain = parity.ds_config(stage, 2)
    fused = fused_config(stage, 2)
    for first, second in ((plain, fused), (fused, plain)):
        out = tmp_path / json.dumps(first is plain)
        straight = clusters(2).run(resumed, source, str(out), first, None)[0]
        again = clusters(2).run(resumed, source, str(out), second, str(out / "checkpoint-2"))[0]
        assert again[-2:] == pytest.approx(straight[-2:], rel=1e-5)
