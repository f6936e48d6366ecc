"""The balancing losses against slow obvious code, and through MoETrainer against single-process Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_models.routing.losses import load_balancing_loss, token_sets, z_loss
from tests.support import parity
from tests.support.cluster import Cluster
from tests.training.test_parity import LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE, relative, weight_deviations

COEFFICIENTS = {"aux_loss_coef": 0.5, "z_loss_coef": 0.05}
"""Large, so that the terms make up a good part of every gradient."""


# ------------------------------------------------------------------------------------------------ the functions


def slow_loss(layers: list[list[list[float]]], choices: list[list[list[int]]], per_layer: bool) -> float:
    """E sum_e f_e P_e of one token set, from probabilities [L][T][E] and choices [L][T][K], token by token."""
    E = len(layers[0][0])
    pools = [[index] for index in range(len(layers))] if per_layer else [list(range(len(layers)))]
    losses = []
    for pool in pools:
        tokens = [(p, c) for index in pool for p, c in zip(layers[index], choices[index], strict=True)]
        loss = 0.0
        for expert in range(E):
            f = sum(expert in chosen for _, chosen in tokens) / len(tokens)
            mean = sum(p[expert] for p, _ in tokens) / len(tokens)
            loss += E * f * mean
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("per_layer", [False, True])
def test_loss_equals_slow_loop(per_layer: bool) -> None:
    torch.manual_seed(0)
    L, E, K, sizes = 3, 5, 2, [4, 7, 0]
    counts, sums = torch.zeros(3, L, E), torch.zeros(3, L, E)
    expected = []
    for index, T in enumerate(sizes):
        probabilities = torch.randn(L, T, E).softmax(-1)
        choices = probabilities.topk(K, -1).indices
        for layer in range(L):
            sums[index, layer] = probabilities[layer].sum(0)
            for token in range(T):
                for expert in choices[layer, token]:
                    counts[index, layer, expert] += 1
        if T:
            expected.append(slow_loss(probabilities.tolist(), choices.tolist(), per_layer))
    loss = load_balancing_loss(counts, sums, torch.tensor(sizes, dtype=torch.float32), per_layer)
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_pooling_hides_what_per_layer_sees() -> None:
    """Two layers that each use one expert only, and not the same: pooled that looks perfect."""
    counts = torch.tensor([[[8.0, 0.0], [0.0, 8.0]]])
    tokens = torch.tensor([8.0])
    assert load_balancing_loss(counts, counts, tokens, per_layer=False).item() == pytest.approx(1.0)
    assert load_balancing_loss(counts, counts, tokens, per_layer=True).item() == pytest.approx(2.0)


def test_z_loss_equals_slow_loop() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(6, 4) * 3 for _ in range(2)]
    weight = torch.tensor([1.0, 1, 0, 1, 0, 1])
    squares = [math.log(sum(math.exp(x) for x in row)) ** 2 for layer in logits for row in layer[weight > 0].tolist()]
    assert z_loss(logits, weight, weight.sum()).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_token_sets() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    sets, weights, number = token_sets({"input_ids": ids, "attention_mask": mask}, by_sequence=True)
    assert (sets.tolist(), weights.tolist(), number) == ([0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], 2)
    sets, weights, number = token_sets({"input_ids": ids, "attention_mask": mask}, by_sequence=False)
    assert (sets.tolist(), weights.tolist(), number) == ([0] * 6, [1, 1, 1, 1, 0, 0], 1)
    packed = {"input_ids": ids[:1].repeat(1, 2), "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])}
    sets, weights, number = token_sets(packed, by_sequence=True)
    assert (sets.tolist(), weights.tolist(), number) == ([0, 0, 1, 1, 1, 2], [1] * 6, 3)


# ------------------------------------------------------------------------------------------- against Hugging Face


def reference(
    source: Path, batches_by_rank: list[list[dict]], accumulation: int, out: Path, scope: str, per_layer: bool
) -> dict[str, Any]:
    """Single process, stock model, plain AdamW; every term from the definition, or by Hugging Face's own function."""
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    E, K = model.config.num_local_experts, model.config.num_experts_per_tok
    optimizer = parity.adamw(model)

    def hf(logits: tuple[Any, ...], mask: Any) -> Any:
        if per_layer:
            return sum(load_balancing_loss_func((one,), E, K, mask) for one in logits) / len(logits)
        return load_balancing_loss_func(logits, E, K, mask)

    result: dict[str, Any] = {"loss": [], "aux_loss": [], "z_loss": [], "grad_norm": []}
    model.train()
    for step in range(len(batches_by_rank[0]) // accumulation):
        # micro[m] is the m-th micro-batch of all ranks
        micro = [[per_rank[step * accumulation + m] for per_rank in batches_by_rank] for m in range(accumulation)]
        flat = [batch for ranks in micro for batch in ranks]
        targets = sum(label != -100 for b in flat for row in b["labels"] for label in row[1:])
        cross_entropy, aux_terms, z_terms, seen = 0.0, [], [], []
        for ranks in micro:
            gathered = []
            for batch in ranks:
                ids, mask, labels = (torch.tensor(batch[k]) for k in ("input_ids", "attention_mask", "labels"))
                output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
                cross_entropy += (
                    torch.nn.functional.cross_entropy(
                        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                    )
                    / targets
                )
                logits = output.router_logits
                valid = mask.flatten() > 0
                z_terms.append(torch.stack([one[valid].logsumexp(-1) ** 2 for one in logits]).mean())
                if scope == "micro_batch":
                    aux_terms.append(hf(logits, mask))
                elif scope == "sequence":
                    rows = [tuple(one.view(*ids.shape, E)[row] for one in logits) for row in range(len(ids))]
                    per_row = [hf(row, mask[index : index + 1]) for index, row in enumerate(rows)]
                    aux_terms.append(sum(per_row) / len(per_row))
                gathered.append([one[valid] for one in logits])
            if scope == "global_batch":
                whole = tuple(torch.cat([one[layer] for one in gathered]) for layer in range(len(gathered[0])))
                seen.append(whole)
                if len(seen) == 1:  # the whole batch so far: Hugging Face's own function says it
                    aux_terms.append(hf(whole, None))
                else:  # f over what was seen in this step, P over this micro-batch
                    assert not per_layer
                    past = torch.cat([one.detach() for layers in seen for one in layers])
                    f = torch.nn.functional.one_hot(past.topk(K, -1).indices, E).sum(1).float().mean(0)
                    aux_terms.append(E * (f * torch.cat(whole).softmax(-1).mean(0)).sum())
        aux, z = sum(aux_terms) / len(aux_terms), sum(z_terms) / len(z_terms)
        loss = cross_entropy + COEFFICIENTS["aux_loss_coef"] * aux + COEFFICIENTS["z_loss_coef"] * z
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), parity.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in (("loss", loss), ("aux_loss", aux), ("z_loss", z), ("grad_norm", norm)):
            result[name].append(value.item())
    model.save_pretrained(out)
    return {**result, "folder": str(out)}


def deviations(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    found = {name: relative(ours[name], expected[name]) for name in ("loss", "aux_loss", "z_loss", "grad_norm")}
    found["weights"] = max(weight_deviations(ours["folder"], expected["folder"]).values())
    return found


BOUNDS = {
    "loss": LOSS_TOLERANCE, "aux_loss": LOSS_TOLERANCE, "z_loss": LOSS_TOLERANCE, "grad_norm": NORM_TOLERANCE,
    "weights": WEIGHT_TOLERANCE,
}  # fmt: skip

CASES = [
    # scope, per_layer, ranks, EP, ZeRO, accumulation, gradient checkpointing
    *[(s, False, 2, 2, stage, 1, False) for s in ("micro_batch", "global_batch", "sequence") for stage in (1, 2, 3)],
    ("micro_batch", True, 2, 2, 1, 2, True),
    ("global_batch", True, 2, 2, 2, 1, True),
    ("sequence", True, 2, 2, 3, 2, True),
    ("global_batch", False, 2, 2, 1, 2, False),
    ("global_batch", False, 2, 2, 3, 2, True),
    ("global_batch", False, 4, 2, 2, 1, False),
    ("global_batch", False, 2, None, 2, 1, False),
    ("global_batch", False, 2, None, 3, 2, True),
]  # fmt: skip


def train(
    source: Path, out: Path, scope: str, per_layer: bool, ep_size: int | None, stage: int, accumulation: int,
    checkpointing: bool, cluster: Cluster, run: Callable[..., Any] = parity.train_case,
) -> tuple[dict[str, Any], list[list[dict]]]:  # fmt: skip
    balance = {**COEFFICIENTS, "scope": scope, "per_layer": per_layer}
    results = cluster.run(
        run, str(source), str(out), parity.ds_config(stage, ep_size), accumulation, balance=balance,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return results[0], [result["batches"] for result in results]


@pytest.mark.parametrize(
    ("scope", "per_layer", "world_size", "ep_size", "stage", "accumulation", "checkpointing"),
    parity.daily(CASES, {0, 4, 8, 9, 11, 13, 14, 16}),
)
def test_training_equals_single_process(
    scope: str, per_layer: bool, world_size: int, ep_size: int | None, stage: int, accumulation: int,
    checkpointing: bool, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    source, cluster = tiny_checkpoints("mixtral"), clusters(world_size)
    ours, batches = train(source, tmp_path, scope, per_layer, ep_size, stage, accumulation, checkpointing, cluster)
    assert batches[0] != batches[1]
    expected = reference(source, batches, accumulation, tmp_path / "reference", scope, per_layer)
    found = deviations(ours, expected)
    assert all(found[name] < bound for name, bound in BOUNDS.items()), found


def test_only_the_global_loss_is_that_of_the_whole_batch(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same batches, both scopes, and single-process Hugging Face on the whole batch as the judge of both."""
    source, found = tiny_checkpoints("mixtral"), {}
    for scope in ("global_batch", "micro_batch"):
        ours, batches = train(source, tmp_path / scope, scope, False, 2, 1, 1, False, clusters(2))
        expected = reference(source, batches, 1, tmp_path / f"{scope}-reference", "global_batch", False)
        found[scope] = deviations(ours, expected)
    assert all(found["global_batch"][name] < bound for name, bound in BOUNDS.items()), found
    for name in ("aux_loss", "grad_norm", "weights"):
        assert found["micro_batch"][name] > 30 * BOUNDS[name], found


FAULTS = ("not multiplied by the ranks", "frequencies of this rank only", "term left out", "padding counted")


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    from moe_models.routing import callback as routing
    from moe_models.routing import losses as balance

    def this_rank_only(self: Any, counts: Any, sums: Any, tokens: Any) -> Any:
        return load_balancing_loss(counts, sums, tokens, False)

    def unscaled(self: Any, counts: Any, sums: Any, tokens: Any) -> Any:
        return right(self, counts, sums / 2, tokens)

    def with_padding(inputs: Any, by_sequence: bool) -> Any:
        sets, weights, number = token_sets(inputs, by_sequence)
        return sets, torch.ones_like(weights), number

    owner, name, wrong = {
        FAULTS[0]: (balance.AuxLoss, "_global", unscaled),
        FAULTS[1]: (balance.AuxLoss, "_global", this_rank_only),
        FAULTS[2]: (routing.Routing, "loss", lambda self, *_: 0.0),
        FAULTS[3]: (balance, "token_sets", with_padding),
    }[fault]
    right = getattr(owner, name)
    with parity.planted(owner, name, wrong):
        return parity.train_case(*args, **kwargs)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str, clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoints("mixtral")
    run = partial(train_with_fault, fault)
    ours, batches = train(source, tmp_path, "global_batch", False, 2, 1, 1, False, clusters(2), run=run)
    expected = reference(source, batches, 1, tmp_path / "reference", "global_batch", False)
    wrong = [name for name in ("loss", "grad_norm") if relative(ours[name], expected[name]) > 100 * BOUNDS[name]]
    assert wrong == ["loss", "grad_norm"]
