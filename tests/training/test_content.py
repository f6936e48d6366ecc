"""Content that breaks training stacks: experts without tokens, batches without labels, odd ends of epochs, NaN.

Parity with single-process Hugging Face stays within the bounds of test_parity.py in all of them; nothing hangs; and
what must not change training (evaluation, gradient checkpointing) does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support import parity
from tests.support.cluster import Cluster
from tests.support.recipe import (
    ROOT,
    command,
    curve,
    largest_difference,
    launch,
    save_model,
    text_rows,
    train_in_cluster,
    write_jsonl,
)
from tests.training.test_parity import LOSS_TOLERANCE, NORM_TOLERANCE, check_case, references, relative

__all__ = ["references"]  # the session's fixture


# ----------------------------------------------------------------------------------------------- experts without tokens


def idle_experts(folder: Path, idle: tuple[int, ...]) -> Path:
    """A Mixtral with 8 experts, top-2, whose router can never choose the experts of ``idle`` (four of them).

    The others' rows are v, -v, w, -w: two of these four scores are positive for every token, and the idle ones are 0.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tests.support.tiny import save_tiny

    save_tiny(folder, "mixtral", num_local_experts=8)
    tensors = load_file(folder / "model.safetensors")
    busy = [expert for expert in range(8) if expert not in idle]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            directions = torch.randn(2, tensor.shape[1], generator=generator)
            tensor.zero_()
            tensor[busy] = torch.stack([directions[0], -directions[0], directions[1], -directions[1]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_per_expert(folder: str | Path, batches: list[dict]) -> list[int]:
    """Tokens that each expert gets, over all layers, in plain Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counts = torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        for batch in batches:
            inputs = {key: torch.tensor(value) for key, value in batch.items() if key != "labels"}
            for scores in model(**inputs, output_router_logits=True).router_logits:
                counts += scores.topk(2, dim=-1).indices.flatten().bincount(minlength=8)
    return counts.tolist()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "idle",
    [
        pytest.param((4, 5, 6, 7), id="rank 1"),
        pytest.param((0, 1, 2, 3), id="rank 0", marks=pytest.mark.conformance),
        pytest.param((1, 2, 5, 6), id="half of each"),
    ],
)
def test_experts_that_get_no_token(
    stage: int,
    idle: tuple[int, ...],
    clusters: Callable[[int], Cluster],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A rank whose experts are idle for whole steps takes part in every collective, and the others do not wait."""
    source = idle_experts(tmp_path / "model", idle)
    config = parity.ds_config(stage, 2)
    ours = check_case(clusters(2), references, source, tmp_path / "out", config, 1, timeout=60)
    counts = tokens_per_expert(source, ours["batches"])
    assert [expert for expert in range(8) if counts[expert] == 0] == sorted(idle), counts
    # The router learns; five steps may bring single tokens over.
    counts = tokens_per_expert(ours["folder"], ours["batches"])
    assert sum(counts[expert] for expert in idle) < 0.02 * sum(counts), counts


# -------------------------------------------------------------------------------------------------- uneven batches


def test_rank_without_anything_to_learn(
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Micro-batches with no label at all on one rank: the mean is over the tokens of all ranks."""
    rows = parity.rows(64)
    for number, row in enumerate(rows):
        row["labels"] = list(row["input_ids"]) if number % 2 == 0 else [-100] * len(row["input_ids"])
    config = parity.ds_config(1, 2)
    seen: list[list[bool]] = []

    def note(source: Path, batches: list[list[dict]], accumulation: int) -> dict[str, Any]:
        seen.extend([any(x != -100 for row in b["labels"] for x in row[1:]) for b in rank] for rank in batches)
        return references(source, batches, accumulation)

    check_case(
        clusters(2), note, tiny_checkpoints("mixtral"), tmp_path, config, 1, train_rows=rows, max_length=None,
        timeout=60,
    )  # fmt: skip
    steps = list(zip(*seen, strict=True))
    assert any(a != b for a, b in steps), "no step had labels on one rank only"
    assert all(a or b for a, b in steps)


def test_unequal_token_counts(
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """One rank with ten times the tokens of the other, in each ZeRO stage."""
    rows = [{"input_ids": row["input_ids"][: 24 if n % 2 else 3]} for n, row in enumerate(parity.rows(64, seed=3))]
    ratios = []

    def note(source: Path, batches: list[list[dict]], accumulation: int) -> dict[str, Any]:
        sizes = [[sum(map(sum, batch["attention_mask"])) for batch in rank] for rank in batches]
        ratios.extend(max(pair) / min(pair) for pair in zip(*sizes, strict=True))
        return references(source, batches, accumulation)

    for stage in (1, 3):
        check_case(
            clusters(2), note, tiny_checkpoints("qwen3_moe"), tmp_path / str(stage), parity.ds_config(stage, 2), 1,
            train_rows=rows, per_device_train_batch_size=1, timeout=60,
        )  # fmt: skip
    assert max(ratios) > 3, ratios


def train_without_the_last_logged(*args: Any, **kwargs: Any) -> dict[str, Any]:
    result = parity.train_case(*args, **kwargs)
    return {**result, "aux_loss": result["aux_loss"][:4]}


@pytest.mark.parametrize("stage", [1, 3])
def test_epoch_with_an_incomplete_last_batch(
    stage: int,
    clusters: Callable[[int], Cluster],
    tiny_checkpoints: Callable[[str], Path],
    references: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """17 rows in batches of 2 on 2 ranks: five steps, of which the last has one row of its own.

    accelerate fills that batch up from the beginning of the data, and `gather_for_metrics` takes what the second rank
    adds to the *logs* for a repetition. So the fifth aux_loss in the log is rank 0's alone; training has both.
    """

    def without_the_last_logged(source: Path, batches: list[list[dict]], accumulation: int) -> dict[str, Any]:
        expected = references(source, batches, accumulation)
        return {**expected, "aux_loss": expected["aux_loss"][:4]}

    check_case(
        clusters(2), without_the_last_logged, tiny_checkpoints("mixtral"), tmp_path, parity.ds_config(stage, 2), 1,
        train_rows=parity.rows(17), max_steps=-1, num_train_epochs=1, dataloader_drop_last=False,
        run=train_without_the_last_logged, timeout=60,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- what must not change training


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(24))


def flags(model: Path, data: Path, preset: str, out: Path, **more: Any) -> list[str]:
    defaults = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 5, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    return command(model, data, ROOT / "ds_configs" / f"{preset}.json", out, **{**defaults, **more})


@pytest.mark.parametrize("preset", [pytest.param("zero1_ep2", marks=pytest.mark.conformance), "zero3_ep2"])
def test_evaluation_does_not_change_training(
    preset: str, clusters: Callable[[int], Cluster], with_dropout: Path, data: Path, tmp_path: Path
) -> None:
    """Bit for bit, with dropout, evaluating before the first step and after each."""
    without = clusters(2).run(train_in_cluster, flags(with_dropout, data, preset, tmp_path / "without"))[0]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", text_rows(7, seed=5))
    evaluating = flags(
        with_dropout, data, preset, tmp_path / "with", eval_dataset=held_out, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    evaluated = clusters(2).run(train_in_cluster, evaluating)[0]
    assert sum("eval_loss" in entry for entry in evaluated["history"]) == 7  # before, five times, at the end
    keys = ("loss", "aux_loss", "grad_norm")
    assert curve(evaluated, *keys) == curve(without, *keys)
    assert largest_difference(evaluated["folder"], without["folder"]) == 0.0


@pytest.mark.parametrize("preset", ["zero1_ep2", pytest.param("zero3_ep2", marks=pytest.mark.conformance)])
def test_gradient_checkpointing_does_not_change_training(
    preset: str, clusters: Callable[[int], Cluster], with_dropout: Path, data: Path, tmp_path: Path
) -> None:
    """It is on by default. The recomputed forward routes every token as the first one did."""
    on, off = (
        clusters(2).run(
            train_in_cluster, flags(with_dropout, data, preset, tmp_path / str(value), gradient_checkpointing=value)
        )[0]
        for value in (True, False)
    )
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("aux_loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        with_it, without = ([values[0] for values in curve(result, key).values()] for result in (on, off))
        assert relative(with_it, without) < tolerance, key
    assert largest_difference(on["folder"], off["folder"]) < 1e-5


# ------------------------------------------------------------------------------------------------------------------ NaN


class PlantNan(TrainerCallback):  # type: ignore[misc]
    """Makes one weight of one rank NaN before step 5, as a broken GPU or a broken row might."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        import torch.distributed as dist

        if state.global_step == 4 and dist.get_rank() == 1:
            model.get_parameter("model.norm.weight").data[0] = float("nan")


def stopped_by(arguments: list[str], callbacks: tuple[Any, ...] = ()) -> str:
    """The message with which training stopped itself on this rank."""
    from moe_models.trainer import TrainingStoppedError

    try:
        train_in_cluster(arguments, callbacks)
    except TrainingStoppedError as error:
        return str(error)
    return "trained to the end"


def test_nan_on_one_rank_stops_all(
    clusters: Callable[[int], Cluster], with_dropout: Path, data: Path, tmp_path: Path
) -> None:
    """Steps are logged every tenth only; the save at step 6 is what must not happen."""
    out = tmp_path / "out"
    arguments = flags(
        with_dropout, data, "zero1_ep2", out, save_strategy="steps", save_steps=3, max_steps=9, logging_steps=10
    )
    message = (
        "the loss, the gradient norm or a weight became NaN or infinite by step 6; nothing was saved from it, the "
        f"last good checkpoint is {out}/checkpoint-3. Lower --learning_rate or --max_grad_norm, or look for broken "
        "rows in the data"
    )
    assert clusters(2).run(stopped_by, arguments, (PlantNan(),)) == [message, message]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3"]


class PlantInfinity(TrainerCallback):  # type: ignore[misc]
    """Makes one weight of one rank infinite after step 6, whose loss and gradient were finite."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        import torch.distributed as dist

        if state.global_step == 6 and dist.get_rank() == 1:
            weight = model.get_parameter("model.norm.weight")
            getattr(weight, "ds_tensor", weight).data[0] = float("inf")


@pytest.mark.parametrize("preset", ["zero1_ep2", "zero3_ep2"])
def test_infinite_weights_are_not_saved(
    preset: str, clusters: Callable[[int], Cluster], with_dropout: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = flags(
        with_dropout, data, preset, out, save_strategy="steps", save_steps=3, max_steps=9, logging_steps=10
    )
    said = clusters(2).run(stopped_by, arguments, (PlantInfinity(),))
    assert said[0] == said[1]
    assert f"by step 6; nothing was saved from it, the last good checkpoint is {out}/checkpoint-3" in said[0]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3"]


@pytest.mark.conformance
def test_absurd_learning_rate_under_the_launcher(with_dropout: Path, data: Path, tmp_path: Path) -> None:
    """One line from rank 0, exit code 1, no traceback, and nothing exported (a logged load may be there)."""
    out = tmp_path / "out"
    ended = launch(flags(with_dropout, data, "zero2_ep2", out, learning_rate=1e30), tmp_path)
    assert ended.code == 1, ended
    assert len(ended.errors) == 1, ended
    assert ended.errors[0].startswith("the loss, the gradient norm or a weight became NaN or infinite by step "), ended
    assert "Traceback" not in ended.stdout + ended.stderr, ended
    assert {path.name for path in out.iterdir()} <= {"expert_load.jsonl", "log.jsonl"}
