"""Pipeline stages beside expert parallelism: the function, the norm and the weights of single-process Hugging Face.

The ranks of a lane hold the stages of one replica and read the same rows, so the reference sees the batches of the
first stage's ranks. Bounds as in tests/training/test_parity.py. The models have as many layers as it takes for each
stage to have one with experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from recipes.export import export_checkpoint
from tests.checkpoint.test_resume import LOGGED, flags
from tests.support import parity
from tests.support.cluster import ChildError, Cluster
from tests.support.recipe import curve, largest_difference, save_model, text_rows, train_in_cluster, write_jsonl
from tests.support.tiny import TINY, four_layers, save_tiny
from tests.training import test_parity
from tests.training.test_parity import LOSS_TOLERANCE, check_case, relative

Clusters = Callable[[int], Cluster]
Deep = Callable[..., Path]
references = test_parity.references

FAMILIES = tuple(sorted(TINY))


def staged(stages: int, ep_size: int | None = None, native: int | None = None, **extra: Any) -> dict[str, Any]:
    """The smallest ds_config of a pipeline; ``ep_size`` by AutoEP, ``native`` by native layers."""
    if native is not None:
        extra["moe"] = {"layer": {"ep_size": native}}
    return parity.ds_config(1, ep_size, pipeline={"stages": stages}, **extra)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    """A random checkpoint of four layers, made once; the first of DeepSeek's and Qwen3's has no experts."""
    made: dict[str, Path] = {}

    def get(model_type: str, **changes: Any) -> Path:
        key = f"{model_type}{changes}"
        if key not in made:
            options = {**four_layers(model_type), **changes}
            made[key] = save_tiny(tmp_path_factory.mktemp(model_type), model_type, **options)
        return made[key]

    return get


Case = tuple[str, dict[str, Any], int, dict[str, Any], int]
"""(family, changes of its config.json, ranks, ds_config, accumulation)"""


def cases() -> list[Case]:
    found: list[Case] = []
    # 1. Every family: plain blocks on two stages, and EP 2 in each of two stages.
    for number, model_type in enumerate(FAMILIES):
        found.append((model_type, {}, 2, staged(2), 1 + number % 2))
        for accumulation in (1, 2, 4):
            found.append((model_type, {}, 4, staged(2, 2), accumulation))
    # 2. Native layers where they can express the model.
    for model_type in ("mixtral", "qwen3_moe"):
        found.append((model_type, {}, 2, staged(2, native=1), 2))
        found.append((model_type, {}, 4, staged(2, native=2), 2))
    # 3. Tied embeddings, which are on the first and the last stage.
    for config in (staged(2, 2), staged(2, native=2), staged(4)):
        found.append(("mixtral", {"tie_word_embeddings": True}, 4, config, 2))
    # 4. Four stages.
    found.append(("mixtral", {}, 4, staged(4, 1), 4))
    found.append(("deepseek_v3", {"num_hidden_layers": 5}, 4, staged(4, 1), 2))
    # 5. Optimizer states in host memory.
    offload = staged(2, 2)
    offload["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    offload["zero_force_ds_cpu_optimizer"] = False
    found.append(("mixtral", {"tie_word_embeddings": True}, 4, offload, 2))
    return found


CASES = cases()


def name_of(case: Case) -> str:
    model_type, changes, ranks, config, accumulation = case
    spread = "plain"
    if "moe" in config:
        spread = f"native{config['moe']['layer']['ep_size']}"
    elif "expert_parallel" in config:
        spread = f"ep{config['expert_parallel']['autoep_size']}"
    tied = "-tied" if "tie_word_embeddings" in changes else ""
    offload = "-offload" if "offload_optimizer" in config["zero_optimization"] else ""
    return f"{model_type}{tied}-{ranks}ranks-pp{config['pipeline']['stages']}-{spread}-acc{accumulation}{offload}"


DAILY = {
    "mixtral-4ranks-pp2-ep2-acc2",
    "mixtral-tied-4ranks-pp2-native2-acc2",
    "deepseek_v3-4ranks-pp2-ep2-acc1",
}


def marked(case: Case) -> Any:
    marks = [pytest.mark.conformance] + [pytest.mark.daily] * (name_of(case) in DAILY)
    return pytest.param(case, id=name_of(case), marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_training_equals_hugging_face(
    case: Case, clusters: Clusters, deep: Deep, references: Callable[..., Any], tmp_path: Path
) -> None:
    model_type, changes, ranks, config, accumulation = case
    check_case(clusters(ranks), references, deep(model_type, **changes), tmp_path, config, accumulation)


def test_the_daily_cases_exist() -> None:
    assert {name_of(case) for case in CASES} >= DAILY


@pytest.mark.conformance
def test_two_stages_of_two_groups_of_experts_twice(deep: Deep, references: Callable[..., Any], tmp_path: Path) -> None:
    """8 ranks: PP 2 x EP 2 x EDP 2."""
    cluster = Cluster(8)
    try:
        check_case(cluster, references, deep("mixtral"), tmp_path, staged(2, 2), 2, timeout=500)
    finally:
        cluster.stop()


@pytest.mark.conformance
def test_recomputed_activations(clusters: Clusters, deep: Deep, references: Callable[..., Any], tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    check_case(clusters(4), references, deep("mixtral"), tmp_path, staged(2, 2), 2, **options)


# ------------------------------------------------------------------------------------------------- planted faults

FAULTS = (
    "aux loss of the first stage lost",
    "loss times micro-batches",
    "tied gradient not summed",
    "the other stage left out of the norm",
    "groups of experts of another grid",
)


def train_with_fault(fault: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`parity.train_case` on a rank where one thing is wrong."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    from moe_models import trainer
    from moe_models.engine.pipeline.engine import StagesEngine
    from moe_models.engine.pipeline.stages import Stages
    from moe_models.routing.losses import AuxLoss

    carried = AuxLoss.carried
    train_passage = StagesEngine.train_passage
    norm_over_stages = trainer.norm_over_stages

    def nothing_on_the_first(self: Any, inputs: Any) -> Any:
        own = carried(self, inputs)
        return own * 0.0 if self._here.start == 0 else own

    def too_large(self: Any, passage: Any) -> Any:
        def finish(*given: Any) -> Any:
            return len(passage.batches) * passage.finish(*given)

        return train_passage(self, type(passage)(batches=passage.batches, finish=finish, carry=passage.carry))

    def own_stage_only(optimizer: Any) -> None:
        norm_over_stages(optimizer)
        whole = optimizer.scaled_global_norm
        all_reduce = dist.all_reduce

        def scaled_global_norm() -> Any:
            dist.all_reduce = lambda square: all_reduce(square, group=optimizer.dp_process_group)
            try:
                return whole()
            finally:
                dist.all_reduce = all_reduce

        optimizer.scaled_global_norm = scaled_global_norm

    def of_all_ranks(stages: int) -> None:
        """The groups that an engine without stages leaves behind."""
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            for store in (getattr(groups, name), getattr(groups, f"{name}_RANKS")):
                store.clear()
        rank = dist.get_rank()
        for start in (0, 2):
            pair = dist.new_group([start, start + 1])
            if rank in (start, start + 1):
                groups._EXPERT_PARALLEL_GROUP["ep_size_2"] = pair
                groups._EXPERT_PARALLEL_GROUP_RANKS["ep_size_2"] = [start, start + 1]
        for start in (0, 1):
            pair = dist.new_group([start, start + 2])
            if rank in (start, start + 2):
                groups._EXPERT_DATA_PARALLEL_GROUP["ep_size_2"] = pair
                groups._EXPERT_DATA_PARALLEL_GROUP_RANKS["ep_size_2"] = [start, start + 2]

    owner, name, wrong = {
        FAULTS[0]: (AuxLoss, "carried", nothing_on_the_first),
        FAULTS[1]: (StagesEngine, "train_passage", too_large),
        FAULTS[2]: (Stages, "get_tied_weights_and_groups", lambda self: []),
        FAULTS[3]: (trainer, "norm_over_stages", own_stage_only),
        FAULTS[4]: (trainer, "expert_groups_of", of_all_ranks),
    }[fault]
    try:
        with parity.planted(owner, name, wrong):
            return parity.train_case(*args, **kwargs)
    finally:
        if fault == FAULTS[4]:
            for store in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
                getattr(groups, store).clear()
                getattr(groups, f"{store}_RANKS").clear()
        torch.manual_seed(0)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=() if f in FAULTS[:1] else pytest.mark.conformance) for f in FAULTS],
)
def test_planted_faults_are_seen(
    fault: str, clusters: Clusters, deep: Deep, references: Callable[..., Any], tmp_path: Path
) -> None:
    source = deep("mixtral", tie_word_embeddings=True)
    message = r"assert .* < |differs from the trained one"
    if fault == FAULTS[4]:  # DeepSpeed gives the second stage the experts of the first, and the run does not start
        message = "model.layers.2.mlp: AutoEP made another function of this block"
    with pytest.raises(AssertionError, match=message):
        check_case(
            clusters(4), references, source, tmp_path, staged(2, 2), 2, run=partial(train_with_fault, fault), timeout=60
        )


def count_backward_passes(source: str, out: str, config: dict[str, Any]) -> list[int]:
    """On the ranks: how often autograd was started in each of two steps, with an auxiliary loss that travels."""
    import torch

    trainer = parity.build_trainer(source, out, config, accumulation=3, max_steps=2)
    run_backward = torch.autograd.graph._engine_run_backward
    counts = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return run_backward(*args, **kwargs)

    with parity.planted(torch.autograd, "_engine_run_backward", counted):
        trainer.train()
    return counts


def test_one_backward_pass_for_each_micro_batch(clusters: Clusters, deep: Deep, tmp_path: Path) -> None:
    """DeepSpeed's own code runs one for each tensor that a stage has sent: twice as many on the first stage."""
    counts = clusters(2).run(count_backward_passes, str(deep("mixtral")), str(tmp_path), staged(2))
    assert counts == [[6], [6]]


# ------------------------------------------------------------------------------------------------- beside the loss

KEYS = (
    "loss", "grad_norm", "aux_loss", "z_loss", "expert_load_max", "expert_load_worst", "rank_load_max",
    "router_entropy", "entropy", "mean_token_accuracy", "num_tokens",
)  # fmt: skip


def log_of(source: str, out: str, config: dict[str, Any], accumulation: int, **options: Any) -> dict[str, Any]:
    """On the ranks: train, evaluate in between, and return what was logged."""
    trainer = parity.build_trainer(
        source, out, config, accumulation=accumulation, eval_rows=parity.rows(13, seed=5), eval_strategy="steps",
        eval_steps=2, **options,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    folder = Path(out)
    return {
        "train": [{key: entry.get(key) for key in KEYS} for entry in history if "loss" in entry],
        "eval": [entry for entry in history if "eval_loss" in entry],
        "flos": trainer.state.total_flos,
        "tokens": trainer._total_train_tokens,
        "load": (folder / "expert_load.jsonl").read_text(),
    }


BALANCES: dict[str, Any] = {
    "the model's own": None,
    "sequence": {"scope": "sequence", "z_loss_coef": 0.01, "per_layer": True},
    "global_batch": {"scope": "global_batch", "z_loss_coef": 0.01, "per_layer": True},
}


@pytest.mark.parametrize(
    "balance", [pytest.param(b, marks=() if b == "the model's own" else pytest.mark.conformance) for b in BALANCES]
)
def test_everything_logged_is_that_of_a_run_without_stages(
    balance: str, clusters: Clusters, deep: Deep, tmp_path: Path
) -> None:
    """Losses, TRL's figures, load, evaluation, FLOP and tokens; the last step of each epoch has one micro-batch of
    three."""
    source = str(deep("mixtral"))
    options: dict[str, Any] = {"max_steps": 7, "balance": BALANCES[balance]}
    results = clusters(4).run(log_of, source, str(tmp_path / "pp"), staged(2, 2), 3, **options)
    plain = clusters(2).run(log_of, source, str(tmp_path / "dp"), parity.ds_config(1, 2), 3, **options)[0]
    ours = results[0]
    assert len(ours["train"]) == len(plain["train"]) == 7
    for mine, other in zip(ours["train"], plain["train"], strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), key
    assert len(ours["eval"]) == len(plain["eval"]) == 4
    for mine, other in zip(ours["eval"], plain["eval"], strict=True):
        measured = {key for key in other if not key.endswith(("runtime", "per_second"))}
        assert measured <= set(mine)
        for key in measured:
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key
    assert ours["flos"] == pytest.approx(plain["flos"], rel=1e-6)
    assert [result["tokens"] for result in results] == [plain["tokens"]] * 4
    layers = [[layer["tokens"] for layer in json.loads(line)["layers"]] for line in ours["load"].splitlines()]
    assert layers == [[x["tokens"] for x in json.loads(line)["layers"]] for line in plain["load"].splitlines()]
    assert all(result["train"][-1] == ours["train"][-1] for result in results), "every rank has the same log"


def train_packed(source: str, out: str, config: dict[str, Any]) -> list[float]:
    """On the ranks: rows of one length, without padding."""
    rows = [{"input_ids": row["input_ids"] * 4} for row in parity.rows(64)]
    trainer = parity.build_trainer(
        source, out, config, accumulation=2, train_rows=rows, packing=True, packing_strategy="wrapped"
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.conformance
def test_packed_rows(clusters: Clusters, deep: Deep, tmp_path: Path) -> None:
    source = str(deep("mixtral"))
    ours = clusters(4).run(train_packed, source, str(tmp_path / "pp"), staged(2, 2))[0]
    plain = clusters(2).run(train_packed, source, str(tmp_path / "dp"), parity.ds_config(1, 2))[0]
    assert relative(ours, plain) < LOSS_TOLERANCE


def train_to_nan(source: str, out: str, config: dict[str, Any]) -> str:
    """On the ranks: a weight of the second stage becomes NaN before the third step."""
    import torch
    from transformers import TrainerCallback

    from moe_models.errors import RunError

    trainer = parity.build_trainer(source, out, config, save_strategy="steps", save_steps=1)

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and trainer.pipeline.stage.last:
                with torch.no_grad():
                    trainer.model.lm_head.weight[0, 0] = float("nan")

    trainer.add_callback(Break())
    try:
        trainer.train()
    except RunError as error:
        return str(error)
    return "went on"


@pytest.mark.conformance
def test_a_run_that_is_not_finite_ends_on_every_stage(clusters: Clusters, deep: Deep, tmp_path: Path) -> None:
    told = clusters(2).run(train_to_nan, str(deep("mixtral")), str(tmp_path), staged(2))
    assert all("became NaN or infinite by step 3" in line for line in told), told
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_a_trainer_refuses(clusters: Clusters, deep: Deep, tmp_path: Path) -> None:
    """Metrics of logits; nothing else reaches a trainer that the checks before it have not refused."""
    told = clusters(2).run(evaluate_with_metrics, str(deep("mixtral")), str(tmp_path), staged(2))
    assert told == ["compute_metrics: not with pipeline.stages; logits stay on the last stage"] * 2


def evaluate_with_metrics(source: str, out: str, config: dict[str, Any]) -> str:
    trainer = parity.build_trainer(source, out, config, max_steps=1, eval_rows=parity.rows(4))
    trainer.train()
    trainer.compute_metrics = lambda prediction: {}
    try:
        trainer.evaluate()
    except ValueError as error:
        return str(error)
    return "went on"


# ------------------------------------------------------------------------------------- the recipe, resume and export


def test_resumed_equals_uninterrupted_and_any_checkpoint_is_the_model(clusters: Clusters, tmp_path: Path) -> None:
    """With the recipe and its JSON: checkpoint, resume, and the same bytes out of the last checkpoint's folder."""
    model = save_model(tmp_path / "tiny", "qwen3_moe")
    data = write_jsonl(tmp_path / "train.jsonl", text_rows(16))

    def arguments(out: Path, **more: Any) -> list[str]:
        return flags(model, data, "zero1_pp2_ep2", out, 2, **more)

    # 1. A run, and an export from its last checkpoint.
    cluster = clusters(4)
    straight = cluster.run(train_in_cluster, arguments(tmp_path / "straight"))[0]
    last = tmp_path / "straight" / "checkpoint-6"
    export_checkpoint(last, tmp_path / "offline", "5GB")
    assert largest_difference(straight["folder"], tmp_path / "offline") == 0.0
    layout = json.loads((last / "layout.json").read_text())
    assert (layout["pp_size"], layout["pp_bounds"]) == (2, [0, 2, 3])
    # 2. Its second half once more.
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = cluster.run(train_in_cluster, arguments(tmp_path / "resumed", resume_from_checkpoint="true"))[0]
    expected = curve(straight, *LOGGED)
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert curve(resumed, *LOGGED) == expected
    assert largest_difference(resumed["folder"], straight["folder"]) == 0.0
    # 3. A stage that is missing is no model.
    (last / "global_step6" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files are missing \(mp_rank_01_model_states\.pt\)"):
        export_checkpoint(last, tmp_path / "again", "5GB")


def names_read(source: str, ds_config: str) -> tuple[list[str], int]:
    """On the ranks: the tensors of the model as a recipe reads it, and the bytes that were read."""
    import torch

    from moe_models.checkpoint import on_disk
    from moe_models.checkpoint.reading import read_model, unread_tensors
    from moe_models.config.ds_config import load_ds_config

    before = on_disk.TALLY.bytes
    model = read_model(source, load_ds_config(ds_config), dtype=torch.float32, device="cpu")
    unread = unread_tensors(model)
    return [name for name, _ in model.named_parameters() if name not in unread], on_disk.TALLY.bytes - before


def test_each_rank_reads_its_stage(clusters: Clusters, deep: Deep, tmp_path: Path) -> None:
    """Dense tensors of the own layers; experts wait for the layer that takes this rank's share of them."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(staged(2, 2)))
    source = deep("mixtral")
    read = clusters(4).run(names_read, str(source), str(path))
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for rank, (names, count) in enumerate(read):
        layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        assert layers == ({0, 1} if rank < 2 else {2, 3})
        assert ("model.embed_tokens.weight" in names) == (rank < 2)
        assert ("lm_head.weight" in names) == (rank >= 2)
        assert not [name for name in names if ".experts." in name]
        assert 0 < count < whole / 2


def kill_one_stage(source: str, out: str, config: dict[str, Any]) -> None:
    """On the ranks: the second stage is killed in the third step."""
    import os
    import signal

    from transformers import TrainerCallback

    trainer = parity.build_trainer(source, out, config, save_strategy="steps", save_steps=1)

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and trainer.pipeline.stage.last:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Kill())
    trainer.train()


@pytest.mark.conformance
def test_a_killed_stage_ends_all_and_the_last_checkpoint_is_whole(deep: Deep, tmp_path: Path) -> None:
    cluster = Cluster(2)
    source = deep("mixtral")
    with pytest.raises(ChildError, match="died with exit code -9"):
        cluster.run(kill_one_stage, str(source), str(tmp_path / "out"), staged(2), timeout=60)
    cluster.stop()
    for companion in source.glob("*.json"):
        if not (tmp_path / "out" / "checkpoint-2" / companion.name).exists():
            shutil.copy(companion, tmp_path / "out" / "checkpoint-2")
    export_checkpoint(tmp_path / "out" / "checkpoint-2", tmp_path / "exported", "5GB")
    assert (tmp_path / "exported" / "config.json").exists()
