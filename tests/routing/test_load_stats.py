"""The counters equal a plain-Python recount of the routers' choices by single-process Hugging Face, same batches.

The learning rate is 0, so that every step routes with the weights of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_models.routing.load import LOGGED, LayerLoad, layer_load, overall
from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.tiny import TINY

STEPS = 3
REENTRANT, PLAIN = {"use_reentrant": True}, {"use_reentrant": False}


def train(
    source: str, out: str, config: dict[str, Any], accumulation: int, checkpointing: Any, train_rows: Any = None
) -> dict[str, Any]:
    """Three steps with an evaluation after each; runs on every rank."""
    from datasets import Dataset

    from moe_models.trainer import MoETrainer

    class Recorder(MoETrainer):
        """Keeps the batches of training and evaluation apart."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "eval_dataset": Dataset.from_list(parity.rows(8, seed=1))})
            self.trained, self.evaluated = [], []

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.evaluated.append([{k: v.tolist() for k, v in inputs.items() if k in ("input_ids", "attention_mask")}])
            return super().prediction_step(model, inputs, *args, **kwargs)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.trained.append({k: v.tolist() for k, v in inputs.items() if k in ("input_ids", "attention_mask")})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = parity.build_trainer(
        source, out, config, accumulation=accumulation, trainer_class=Recorder, learning_rate=0.0, max_steps=STEPS,
        gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=checkpointing,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, train_rows=train_rows,
        router_aux_loss_coef=0.0 if checkpointing == REENTRANT else None,  # refused with it
    )  # fmt: skip
    trainer.train()
    return {"trained": trainer.trained, "evaluated": trainer.evaluated, "history": trainer.state.log_history}


def recount(source: Path, model_type: str, batches: list[dict]) -> tuple[list[list[int]], list[float]]:
    """Tokens per expert and mean entropy over log E, per layer: slow, obvious, single process."""
    import math

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    E = TINY[model_type].get("num_local_experts") or TINY[model_type].get("num_experts") or 8
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    seen: dict[int, list[Any]] = {index: [] for index in range(len(gates))}
    for index, gate in enumerate(gates):
        gate.register_forward_hook(
            lambda module, inputs, output, index=index: seen[index].append((output[0].tolist(), output[2].tolist()))
        )
    with torch.no_grad():
        for batch in batches:
            model(**{key: torch.tensor(value) for key, value in batch.items()})
    counts = [[0] * E for _ in gates]
    entropies = []
    for index in range(len(gates)):
        per_token = []
        for logits, choices in seen[index]:
            for token in choices:
                for expert in token:
                    counts[index][expert] += 1
            for row in logits:
                weights = [1 / (1 + math.exp(-x)) if model_type == "deepseek_v3" else math.exp(x) for x in row]
                shares = [weight / sum(weights) for weight in weights]
                per_token.append(-sum(p * math.log(p) for p in shares if p > 0) / math.log(E))
        entropies.append(sum(per_token) / len(per_token))
    return counts, entropies


def check(
    cluster: Cluster, source: Path, model_type: str, out: Path, stage: int, ep_size: int | None, accumulation: int,
    checkpointing: dict[str, bool] | None, run: Callable[..., Any] = train, peers: int = 1, train_rows: Any = None,
    **layout: Any,
) -> None:  # fmt: skip
    config = parity.ds_config(stage, ep_size, **layout)
    more = {} if train_rows is None else {"train_rows": train_rows}
    results = cluster.run(run, str(source), str(out), config, accumulation, checkpointing, **more)[::peers]
    rows = [json.loads(line) for line in (out / "expert_load.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [(s, x) for s in (1, 2, 3) for x in ("train", "eval")]
    history = results[0]["history"]
    for step in range(STEPS):
        micro = [b for r in results for b in r["trained"][step * accumulation : (step + 1) * accumulation]]
        per_rank = len(results[0]["evaluated"]) // STEPS
        held = [b for r in results for bs in r["evaluated"][step * per_rank : (step + 1) * per_rank] for b in bs]
        for batches, row, prefix in ((micro, rows[2 * step], ""), (held, rows[2 * step + 1], "eval_")):
            counts, entropies = recount(source, model_type, batches)
            assert [layer["tokens"] for layer in row["layers"]] == counts, (step, prefix)
            assert [layer["entropy"] for layer in row["layers"]] == pytest.approx(entropies, rel=1e-5)
            expected = [layer_load("", c, e, ep_size or 1) for c, e in zip(counts, entropies, strict=True)]
            logged = [entry for entry in history if prefix + "expert_load_max" in entry][step]
            for name, value in overall(expected).items():
                assert logged[prefix + name] == pytest.approx(value, rel=1e-5), (step, prefix + name)


CASES = [
    # ranks, EP, ZeRO, accumulation, checkpointing
    (2, None, 2, 1, None),
    (2, None, 3, 2, PLAIN),
    (2, 1, 1, 2, None),
    (2, 1, 2, 1, REENTRANT),
    (2, 2, 1, 1, None),
    (2, 2, 1, 2, PLAIN),
    (2, 2, 2, 1, PLAIN),
    (2, 2, 2, 2, REENTRANT),
    (2, 2, 3, 1, None),
    (2, 2, 3, 2, PLAIN),
    (4, 2, 1, 2, PLAIN),
    (4, 2, 3, 1, PLAIN),
    (4, 4, 1, 1, PLAIN),
    (4, 4, 2, 2, None),
    (4, 4, 3, 2, None),
]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "stage", "accumulation", "checkpointing"), parity.daily(CASES, {1, 4, 7, 9, 12})
)
def test_counters_equal_a_recount(
    world_size: int, ep_size: int | None, stage: int, accumulation: int, checkpointing: dict[str, bool] | None,
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = tiny_checkpoints("mixtral")
    check(clusters(world_size), source, "mixtral", tmp_path, stage, ep_size, accumulation, checkpointing)


LIKE_DEEPSEEK = {"dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite"}


@pytest.mark.parametrize(
    "model_type",
    [
        *sorted(set(TINY) - LIKE_DEEPSEEK - {"mixtral"}),
        *(pytest.param(name, marks=pytest.mark.conformance) for name in sorted(LIKE_DEEPSEEK)),
    ],
)
@pytest.mark.parametrize("ep_size", [pytest.param(None, marks=pytest.mark.conformance), 2])
def test_every_family(
    model_type: str, ep_size: int | None, clusters: Callable[[int], Cluster], tiny_checkpoints: Any, tmp_path: Path
) -> None:
    check(clusters(2), tiny_checkpoints(model_type), model_type, tmp_path, 1, ep_size, 1, PLAIN)


FAULTS = ("recomputation counted", "no reset", "evaluation counted in", "not reduced")


def train_with_fault(fault: str, *args: Any) -> Any:
    from moe_models.routing.load import LoadStats
    from moe_models.routing.tap import RouterTap

    def always(self: Any, layer: int, training: bool, *rest: Any) -> None:
        return observe(self, layer, True, *rest)

    observe = LoadStats.observe
    owner, name, wrong = {
        FAULTS[0]: (RouterTap, "_counts", lambda self: self._training is not None),
        FAULTS[1]: (LoadStats, "reset", lambda self, training: None),
        FAULTS[2]: (LoadStats, "observe", always),
        FAULTS[3]: (LoadStats, "_reduced", lambda self, training, group: self._sums[training].clone()),
    }[fault]
    with parity.planted(owner, name, wrong):
        return train(*args)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoints("mixtral")
    with pytest.raises(AssertionError):
        check(clusters(2), source, "mixtral", tmp_path, 1, 2, 1, PLAIN, run=partial(train_with_fault, fault))
    assert (tmp_path / "expert_load.jsonl").exists(), "the run itself must have worked"


def test_figures() -> None:
    skewed = layer_load("a", [6, 0, 1, 1], 0.5, ep_size=2)
    assert skewed == LayerLoad(
        layer="a", tokens=[6, 0, 1, 1], max_mean=3.0, rank_max_mean=1.5, cv=pytest.approx(5.5**0.5 / 2), dead=1,
        entropy=0.5,
    )  # fmt: skip
    even = layer_load("b", [2, 2, 2, 2], 1.0, ep_size=2)
    assert (even.max_mean, even.rank_max_mean, even.cv, even.dead) == (1.0, 1.0, 0.0, 0)
    silent = layer_load("c", [0, 0, 0, 0], 0.0, ep_size=4)
    assert (silent.max_mean, silent.rank_max_mean, silent.cv, silent.dead) == (1.0, 1.0, 0.0, 4)
    figures = overall([skewed, even])
    assert list(figures) == list(LOGGED)
    assert figures == pytest.approx(
        {
            "expert_load_max": 2.0, "expert_load_worst": 3.0, "rank_load_max": 1.25,
            "expert_load_cv": 5.5**0.5 / 4, "dead_experts": 1, "router_entropy": 0.75,
        }
    )  # fmt: skip
