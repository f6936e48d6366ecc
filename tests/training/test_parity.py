"""Expert-parallel training is the same function as single-process Hugging Face training.

Every case trains five AdamW steps with active clipping and compares each step's loss, auxiliary loss and gradient norm,
and the exported weights at the end. Everything is fp32, so what differs is the order of summation: 1e-7 relative per
sum. Measured deviations are 1e-7 (losses), 1e-6 (norms) and 1e-5 (weights after five steps); the bounds below leave a
factor of ten. A planted fault moves them by orders of magnitude (test_planted_faults_are_seen).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import parity, support_matrix
from tests.support.cluster import Cluster
from tests.support.tiny import TINY

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
"""Relative to the tensor's largest value, or to the farthest AdamW can move a weight, whichever is larger."""
FARTHEST_MOVE = parity.STEPS * parity.LEARNING_RATE

# (world size, EP); None is the plain HF model under the same ZeRO stage.
LIKE_DEEPSEEK = ("dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite")
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]


def weight_deviations(ours: str, reference: str) -> dict[str, float]:
    from safetensors.torch import load_file

    a, b = load_file(f"{ours}/model.safetensors"), load_file(f"{reference}/model.safetensors")
    assert list(a) == list(b), "the two folders hold different tensors"
    return {k: float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(FARTHEST_MOVE)) for k in a}


def relative(ours: list[float], reference: list[float]) -> float:
    assert all(abs(value) > 1e-3 for value in reference), "a reference near zero proves nothing"
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Single-process results, computed once per (checkpoint, batches, accumulation)."""
    made: dict[str, dict[str, Any]] = {}

    def get(source: Path, batches: list[list[dict]], accumulation: int) -> dict[str, Any]:
        key = f"{source}{accumulation}{batches}"
        if key not in made:
            made[key] = parity.reference(source, batches, accumulation, tmp_path_factory.mktemp("reference"))
        return made[key]

    return get


def check_case(
    cluster: Cluster, references: Callable[..., Any], source: Path, out: Path, config: dict, accumulation: int,
    run: Callable[..., Any] = parity.train_case, **options: Any
) -> dict[str, Any]:  # fmt: skip
    """Train on the ranks and in one process, compare, and return what rank 0 saw."""
    results = cluster.run(run, str(source), str(out), config, accumulation, **options)
    batches = [result["batches"] for result in results]
    assert all(len(per_rank) == parity.STEPS * accumulation for per_rank in batches)
    peers = (config.get("tensor_parallel") or {}).get("autotp_size", 1) * config.get("sequence_parallel_size", 1)
    replicas = batches[::peers]
    for peer in range(1, peers):
        assert batches[peer::peers] == replicas, "peers must train on the same data"
    assert len(replicas) == 1 or replicas[0] != replicas[1], "the ranks must train on different data"
    expected = references(source, replicas, accumulation)
    ours = results[0]
    found = {
        "loss": relative(ours["loss"], expected["loss"]),
        "gradient norm": relative(ours["grad_norm"], expected["grad_norm"]),
    }
    assert found["loss"] < LOSS_TOLERANCE
    assert found["gradient norm"] < NORM_TOLERANCE
    if expected["aux_loss"][0] is not None:
        found["auxiliary loss"] = relative(ours["aux_loss"], expected["aux_loss"])
        assert found["auxiliary loss"] < LOSS_TOLERANCE
    assert min(expected["grad_norm"]) > parity.CLIP, "clipping must be active"
    deviations = weight_deviations(ours["folder"], expected["folder"])
    # The bias of the keys shifts all scores of a query alike, so softmax cancels it: its gradient is rounding noise.
    worst = max((value, name) for name, value in deviations.items() if not name.endswith("k_proj.bias"))
    assert worst[0] < WEIGHT_TOLERANCE, worst
    if run is parity.train_case and set(options) <= {"timeout"}:
        model = json.loads((source / "config.json").read_text())
        support_matrix.note(config, model, cluster.world_size, {**found, "weights": worst[0]})
    return ours


def matrix() -> list[Any]:
    """Every family x ZeRO stage x layout x accumulation: 240 cases, of which the default run takes 31.

    Half of Mixtral (every stage with every layout), and one layout for each stage of each other family; for one stage
    of those that have DeepSeek-V3's block. `pytest -m conformance` runs all.
    """
    cases = []
    for number, model_type in enumerate(sorted(TINY)):
        for stage in (1, 2, 3):
            for index, (world_size, ep_size) in enumerate(LAYOUTS):
                for accumulation in (1, 2):
                    turn = number + stage
                    chosen = (turn % 4, 1 + (number // 2 + stage) % 2) == (index, accumulation)
                    half = ((turn + index + 2 * accumulation) // 2) % 2 == 0
                    default = half if model_type == "mixtral" else chosen
                    if model_type in LIKE_DEEPSEEK and stage != 1 + number % 3:
                        default = False
                    marks = [pytest.mark.conformance] + [pytest.mark.daily] * default
                    name = f"{model_type}-zero{stage}-{world_size}ranks-ep{ep_size}-acc{accumulation}"
                    values = (model_type, stage, world_size, ep_size, accumulation)
                    cases.append(pytest.param(*values, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("model_type", "stage", "world_size", "ep_size", "accumulation"), matrix())
def test_training_equals_hugging_face(
    model_type: str,
    stage: int,
    world_size: int,
    ep_size: int,
    accumulation: int,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = tiny_checkpoints(model_type)
    config = parity.ds_config(stage, ep_size)
    check_case(clusters(world_size), references, source, tmp_path, config, accumulation)


def test_the_same_command_with_each_json_gives_the_same_curve(
    clusters: Callable[[int], Cluster], tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Swapping the JSON changes the layout and nothing else: same batches, same losses, same norms, no EP included."""
    curves = {}
    for stage, ep_size in ((3, None), (1, 4), (2, 2), (3, 2)):
        config = parity.ds_config(stage, ep_size)
        out = tmp_path / f"{stage}-{ep_size}"
        result = clusters(4).run(parity.train_case, str(tiny_checkpoints("mixtral")), str(out), config)[0]
        curves[stage, ep_size] = result
    baseline = curves[3, None]
    for layout, result in curves.items():
        assert result["batches"] == baseline["batches"], layout
        assert relative(result["loss"], baseline["loss"]) < LOSS_TOLERANCE, layout
        assert relative(result["grad_norm"], baseline["grad_norm"]) < NORM_TOLERANCE, layout


FAULTS = ("aux loss doubled", "experts left out of the norm", "only rank 0's experts exported", "norms decay")


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank where one thing is wrong, in the ways stacks of this field got it wrong."""
    import torch
    from trl import SFTTrainer

    from moe_models import trainer
    from moe_models.checkpoint.from_engine import EngineSource
    from moe_models.trainer import MoETrainer

    def double_aux_loss(self: Any, *a: Any, **k: Any) -> Any:
        self.router_aux_loss_coef *= 1.0 if hasattr(self, "doubled") else 2.0
        self.doubled = True
        return compute_loss(self, *a, **k)

    def norm_without_experts(optimizer: Any) -> None:
        norm_in_one_pass(optimizer)
        take_norm = optimizer.scaled_global_norm

        def scaled_global_norm() -> Any:
            whole = optimizer.averaged_gradients
            optimizer.averaged_gradients = {i: g for i, g in whole.items() if not optimizer.is_moe_param_group[i]}
            norm, optimizer.averaged_gradients = take_norm(), whole
            return norm

        optimizer.scaled_global_norm = scaled_global_norm

    def rank_0_twice(source: EngineSource, path: str, projection: str) -> Any:
        """Rank 1 writes rank 0's experts; with their fingerprints, so that the logits must tell."""
        held, which = experts(source, path, projection) or (None, None)
        assert held is not None
        held = held.clone()
        torch.distributed.broadcast(held, src=0)
        for expert in range(len(held)) if source.fingerprints else ():
            right = source.fingerprints[f"{path}.experts.{expert}.{projection}"]
            source.fingerprints[f"{path}.experts.{expert + len(held)}.{projection}"] = right
        return held, which

    compute_loss, norm_in_one_pass = MoETrainer.compute_loss, trainer.norm_in_one_pass
    experts = EngineSource.experts
    owner, name, wrong = {
        FAULTS[0]: (MoETrainer, "compute_loss", double_aux_loss),
        FAULTS[1]: (trainer, "norm_in_one_pass", norm_without_experts),
        FAULTS[2]: (EngineSource, "experts", rank_0_twice),
        FAULTS[3]: (MoETrainer, "create_optimizer", SFTTrainer.create_optimizer),
    }[fault]
    with parity.planted(owner, name, wrong):
        return parity.train_case(*args, **kwargs)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The bounds above are worth something: each of these faults, planted for one run, breaks them."""
    source, config = tiny_checkpoints("mixtral"), parity.ds_config(1, 2)
    message = "differs from the trained one" if fault == FAULTS[2] else "assert .* < "
    with pytest.raises(AssertionError, match=message):
        check_case(
            clusters(2), references, source, tmp_path, config, 1, run=partial(train_with_fault, fault), timeout=60
        )
