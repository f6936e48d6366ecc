"""A full disk, on file systems of a few megabytes: one line, exit code 1, nothing half left, what was complete whole.

Marker ``tmpfs``: needs root that may mount. What is checked before writing is switched off where the writing itself is
to fail, as it does when other programs fill the disk meanwhile.
"""

from __future__ import annotations

import errno
import os
import runpy
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_models import disk
from moe_models.checkpoint.space import room_warnings
from tests.support import stops
from tests.support.cluster import Cluster, free_port
from tests.support.recipe import (
    ROOT,
    ForkedRecipe,
    command,
    curve,
    end_of,
    largest_difference,
    run_alone,
    save_model,
    start_in_cluster,
    start_launcher,
    text_rows,
    train_in_cluster,
    write_jsonl,
)
from tests.support.stops import Point
from tests.support.stops.sitecustomize import FILLER

Clusters = Callable[[int], Cluster]


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own at ``folder``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def arguments(folder: Path, out: Path, **more: Any) -> list[str]:
    flags = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "report_to": "none", **more}
    return command(folder / "model", folder / "train.jsonl", ROOT / "ds_configs" / "zero1_ep2.json", out, **flags)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    save_model(folder / "model", hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "train.jsonl", text_rows(20))
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run is that has room."""
    words = arguments(inputs, tmp_path_factory.mktemp("undisturbed") / "out", logging_steps=1)
    result: dict[str, Any] = clusters(2).run(train_in_cluster, words)[0]
    return result


# ---------------------------------------------------------------------------------------------------- on small disks


def train_unchecked(words: list[str]) -> tuple[str, str]:
    """(type, message) of what this rank raises when nothing looks at the disk beforehand."""
    from moe_models.checkpoint import export, whole_checkpoints

    before = whole_checkpoints.checkpoint_bytes, export.free_bytes
    whole_checkpoints.checkpoint_bytes = lambda engine: 1
    export.free_bytes = lambda path: 10**15
    try:
        trainer, *_ = start_in_cluster(words)
        trainer.train(resume_from_checkpoint="true" in words or None)
        trainer.save_model()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        whole_checkpoints.checkpoint_bytes, export.free_bytes = before
    return "", ""


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))


@pytest.mark.tmpfs
@pytest.mark.conformance
@pytest.mark.timeout(900)
def test_the_disk_fills_while_something_is_written(
    inputs: Path, undisturbed: dict[str, Any], clusters: Clusters, tmp_path: Path
) -> None:
    """At ten points, from the first file to the export: all ranks end with one line; the rest is whole and goes on."""
    model_folder = Path(undisturbed["folder"])
    one = folder_bytes(model_folder.with_name("checkpoint-2"))
    model = folder_bytes(model_folder)
    # In parts of what is written: three in the first checkpoint, four in the second, three in the export.
    points = [0.05 * one, 0.5 * one, 0.99 * one, *(one + part * one for part in (0.03, 0.3, 0.7, 0.99))]
    points += [2 * one + part * model for part in (0.2, 0.6, 0.97)]
    for number, point in enumerate(points):
        with small_disk(tmp_path / f"disk{number}", int(point) // 1024 + 8) as folder:
            out = folder / "out"
            told = clusters(2).run(train_unchecked, arguments(inputs, out))
            complete = int(point // one)
            kind = "CheckpointError" if complete < 2 else "ExportError"
            assert [rank[0] for rank in told] == [kind, kind], (number, told)
            assert told[0] == told[1]
            assert disk.FULL in told[0][1], (number, told)
            assert "\n" not in told[0][1]
            there = sorted(path.name for path in out.iterdir() if path.name not in LOGS)
            assert there == ["checkpoint-2", "checkpoint-4"][:complete], number
            assert folder_bytes(out) <= complete * one * 1.02 + 8192, "what was not complete must leave the disk"
            # What is complete exports, elsewhere, and the run goes on from it where there is room.
            if complete:
                last = out / there[-1]
                offline = tmp_path / f"offline{number}"
                runpy.run_path(str(ROOT / "recipes" / "export.py"))["export_checkpoint"](last, offline, "5GB")
                more = {"resume_from_checkpoint": last}
                elsewhere = tmp_path / f"resumed{number}"
                result = clusters(2).run(train_in_cluster, arguments(inputs, elsewhere, **more))[0]
                assert largest_difference(result["folder"], model_folder) == 0.0


@dataclass(frozen=True)
class Fills:
    """A kind of file, the moment before it is written, and what is whole then."""

    point: Point
    saved: list[str]
    error: str = "CheckpointError"
    has_model: bool = False


def saving(at: str, who: str, call: int, text: str = "") -> Fills:
    """A file of checkpoint-4."""
    return Fills(Point(at, who, call, text), ["checkpoint-2"])


def exporting(at: str, who: str = "rank 0", call: int = 1, text: str = "", **more: Any) -> Fills:
    return Fills(Point(at, who, call, text), ["checkpoint-2", "checkpoint-4"], **{"error": "ExportError", **more})


HF_FOLDER = "moe_models.checkpoint.hf_folder"
WHOLE = "moe_models.checkpoint.whole_checkpoints"
KINDS = {
    "weights": saving("torch:save", "rank 0", 1, "global_step4/mp_rank_00_model_states"),
    "experts": saving("torch:save", "rank 1", 1, "global_step4/layer_1_expert_"),
    "optimizer": saving("torch:save", "rank 0", 1, "global_step4/.*optim_states"),
    "script": saving("deepspeed.runtime.engine:DeepSpeedEngine._copy_recovery_script", "rank 0", 2),
    "random state": saving("torch:save", "rank 1", 1, "checkpoint-4/rng_state"),
    "config": saving("moe_models.trainer:save_companions", "rank 0", 2),
    "layout.json": saving(f"{WHOLE}:describe_engine", "rank 0", 2),
    "export: experts": exporting(f"{HF_FOLDER}:TensorWriter.add", "rank 1", 10),
    "export: index": exporting(f"{HF_FOLDER}:HFFolderWriter.close_weights"),
    "export: config": exporting("moe_models.checkpoint.export:save_companions"),
    "summary": exporting("moe_models.files:write", error="RunError", has_model=True),
}
"""Files that the ranks write one after the other; each fills the disk for all that follow."""


def train_and_fill(words: list[str], fills: Fills, small: Path) -> tuple[str, str]:
    """(type, message) of what this rank raises when the disk of ``small`` is full from there on."""
    from importlib import import_module

    from moe_models.errors import RunError
    from moe_models.ranks import rank
    from tests.support.stops.sitecustomize import act_before, fill

    trainer, ds, eval_rows, script = start_in_cluster(words)
    undo = None
    if fills.point.who == f"rank {rank()}":
        module, _, path = fills.point.at.partition(":")
        owner = import_module(module)
        if path == "write":  # the recipe has taken the name already
            owner = SimpleNamespace(write=script["write"])
        undo = act_before(owner, path, fills.point.call, fills.point.text, lambda: fill(str(small)))
        if path == "write":
            script["evaluate_and_export"].__globals__["write"] = owner.write
    try:
        with disk.ends_if_full(small, RunError):
            trainer.train()
            script["evaluate_and_export"](trainer, SimpleNamespace(export_merged=False), ds, eval_rows)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        if undo is not None:
            undo()
    return "", ""


@pytest.mark.tmpfs
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", KINDS)
def test_the_disk_fills_before_a_kind_of_file(
    name: str, inputs: Path, undisturbed: dict[str, Any], clusters: Clusters, tmp_path: Path
) -> None:
    """Both ranks end with one line; nothing half is left; what was whole is, and the run goes on from it."""
    fills = KINDS[name]
    with small_disk(tmp_path / "disk", 64 * 1024) as small:
        out = small / "out"
        told = clusters(2).run(
            train_and_fill, arguments(inputs, out, logging_steps=1, export_max_shard_size="100KB"), fills, small
        )
        assert (small / FILLER).exists(), f"no such point: {told}"
        failed = [rank for rank in told if rank != ("", "")]
        assert [kind for kind, _ in failed] == [fills.error] * (1 if fills.has_model else 2), told
        assert len(set(failed)) == 1
        assert disk.FULL in failed[0][1], told
        assert "\n" not in failed[0][1]
        (small / FILLER).unlink()
        there = sorted(path.name for path in out.iterdir() if path.name not in LOGS)
        assert there == fills.saved + (["model"] if fills.has_model else [])
        again = arguments(inputs, out, logging_steps=1, resume_from_checkpoint="true")
        result = clusters(2).run(train_in_cluster, again)[0]
        assert result["steps"] == 4
        losses = curve(result, "loss", "grad_norm")
        assert list(losses) == [1, 2, 3, 4]
        assert losses == curve(undisturbed, "loss", "grad_norm")
        assert largest_difference(result["folder"], undisturbed["folder"]) == 0.0


LOGS = ("expert_load.jsonl", "log.jsonl")
AT_ONCE = {
    "optimizer": KINDS["optimizer"],
    "expert_load.jsonl": Fills(Point("moe_models.routing.callback:asdict"), []),
    "summary": KINDS["summary"],
}
"""Where the disk fills in runs under a launcher."""


@pytest.mark.tmpfs
@pytest.mark.conformance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", AT_ONCE)
def test_a_run_whose_disk_fills_ends_with_one_line(name: str, inputs: Path, tmp_path: Path) -> None:
    """Exit code 1 and one error, also where rank 0 alone has written."""
    fills = AT_ONCE[name]
    with small_disk(tmp_path / "disk", 64 * 1024) as small:
        out = small / "out"
        words = arguments(inputs, out, logging_steps=1)
        log = tmp_path / "run.log"
        started = start_launcher(words, log, name="run.sh", **stops.environment(fills.point, small, "full"))
        ended = end_of(started, log, 240)
        assert ended.code == 1, ended
        (line,) = ended.errors
        assert disk.FULL in line
        assert str(small) in line
        assert "Traceback" not in ended.stderr, ended
        assert ("the load of the experts is not logged" in ended.stderr) is (name == "expert_load.jsonl"), ended
        there = sorted(path.name for path in out.iterdir() if path.name not in (*LOGS, ".held"))
        assert there == fills.saved + (["model"] if fills.has_model else [])


@pytest.mark.tmpfs
def test_room_is_looked_for_before_it_is_needed(inputs: Path, clusters: Clusters, tmp_path: Path) -> None:
    """Nothing of a checkpoint or an export is written that cannot fit, and the size that is said is the size."""
    reference = clusters(2).run(train_in_cluster, arguments(inputs, tmp_path / "reference", save_steps=4))
    assert reference[0]["steps"] == 4
    one = folder_bytes(tmp_path / "reference" / "checkpoint-4")
    with small_disk(tmp_path / "disk", int(one * 1.5) // 1024) as folder:
        told = clusters(2).run(train_and_tell, arguments(inputs, folder / "out"))
        assert told[0][:2] == told[1][:2]
        kind, message, needed = told[0]
        assert kind == "CheckpointError"
        assert message.startswith(f"{folder}/out: the disk is full: {disk.size(needed)} needed, "), message
        assert message.endswith(f"the last complete checkpoint is {folder}/out/checkpoint-2")
        assert 0.9 < needed / one <= 1.0, "a lower bound, and close"
        assert not (folder / "out" / ".writing").exists()


def train_and_tell(words: list[str]) -> tuple[str, str, int]:
    from moe_models.checkpoint.space import checkpoint_bytes

    trainer, *_ = start_in_cluster(words)
    try:
        trainer.train()
    except Exception as error:
        return type(error).__name__, str(error), checkpoint_bytes(trainer.model_wrapped)
    return "", "", 0


@pytest.mark.conformance
@pytest.mark.parametrize("layout", ["zero1_ep2", "zero2_ep2", "zero3_ep2", "zero3", "zero1_ep2_native"])
def test_the_size_of_a_checkpoint(layout: str, inputs: Path, clusters: Clusters, tmp_path: Path) -> None:
    """The estimate is a lower bound within a tenth; pickles and scripts are the rest, here of a small model."""
    words = arguments(inputs, tmp_path / "out", deepspeed=ROOT / "ds_configs" / f"{layout}.json")
    estimated = clusters(2).run(size_after_training, words)
    assert estimated[0] == estimated[1]
    size = folder_bytes(tmp_path / "out" / "checkpoint-4")
    assert 0.8 < estimated[0] / size <= 1.0, (estimated, size)


def size_after_training(words: list[str]) -> int:
    from moe_models.checkpoint.space import checkpoint_bytes

    trainer, *_ = start_in_cluster(words)
    trainer.train()
    return checkpoint_bytes(trainer.model_wrapped)


@pytest.mark.tmpfs
@pytest.mark.parametrize("kib", [64, 1400])
def test_the_cache_of_the_data(inputs: Path, kib: int, tmp_path: Path) -> None:
    """datasets and pyarrow report it in their own ways; the line names the cache, not the data."""
    data = write_jsonl(tmp_path / "train.jsonl", text_rows(4000))
    one_rank = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # In kB: in the table that datasets makes of the file, and in the tokens that TRL makes of that.
    with small_disk(tmp_path / "cache", kib) as cache:
        words = arguments(inputs, tmp_path / "out", deepspeed=ROOT / "ds_configs" / "zero3.json", dataset_name=data)
        ended = run_alone(words, HF_DATASETS_CACHE=str(cache / "datasets"), **one_rank)
        assert ended.code == 1, ended
        (line,) = ended.errors
        assert f"{disk.FULL}: " in line, line
        assert str(cache) in line, line
        assert "Traceback" not in ended.stderr


@pytest.mark.tmpfs
def test_a_log_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It alone does not end a run: a warning, no half line, and it goes on where there is room again."""
    from moe_models.files import RunLog
    from tests.support.stops.sitecustomize import fill

    lines = RunLog("the load of the experts is not logged")
    with small_disk(tmp_path / "disk", 64) as small:
        file = small / "expert_load.jsonl"
        lines.add(file, "first\n")
        fill(str(small))
        for _ in range(2):
            lines.add(file, "x" * 10_000 + "\n")
        assert file.read_text() == "first\n"
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1
        assert f"{file}: {disk.FULL}: " in said
        (small / FILLER).unlink()
        lines.add(file, "last\n")
        assert file.read_text() == "first\nlast\n"


@pytest.mark.tmpfs
@pytest.mark.parametrize("at", [f"{HF_FOLDER}:TensorWriter.add", f"{HF_FOLDER}:HFFolderWriter.close_weights"])
def test_upcycling(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While weights are written, and before the files beside them: one line, and nothing is left."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from moe_models.checkpoint import hf_folder
    from moe_models.upcycle.upcycle import upcycle
    from tests.support.stops.sitecustomize import act_before, fill

    dense = tmp_path / "dense"
    small_model = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**small_model, num_attention_heads=4)).save_pretrained(dense)
    with small_disk(tmp_path / "disk", 16 * 1024) as small:
        undo = act_before(hf_folder, at.partition(":")[2], 1, "", lambda: fill(str(small)))
        try:
            with pytest.raises(hf_folder.ExportError) as failed:
                upcycle(dense, small / "moe")
        finally:
            undo()
        assert disk.FULL in str(failed.value)
        assert [path.name for path in small.iterdir()] == [FILLER]


@pytest.mark.tmpfs
def test_offline_export(inputs: Path, clusters: Clusters, tmp_path: Path) -> None:
    """recipes/export.py: exit code 1, and the folder that was there before is untouched."""
    clusters(2).run(train_in_cluster, arguments(inputs, tmp_path / "out"))
    recipe = ForkedRecipe(ROOT / "recipes" / "export.py")
    with small_disk(tmp_path / "disk", 64) as folder:
        ended = recipe(["--checkpoint", str(tmp_path / "out" / "checkpoint-4"), "--output_dir", str(folder / "model")])
        assert ended.code == 1, ended
        (line,) = ended.errors
        assert line.startswith(f"{folder}/model: {disk.FULL}: "), line
        assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- without a disk


def test_which_errors_mean_a_full_disk() -> None:
    """By errno, by what it was raised from, by the words that libraries copy; not by every failed write."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk.is_full(full)
    assert disk.is_full(OSError(errno.EDQUOT, "x"))
    wrapped = ValueError("An error occurred while generating the dataset")
    wrapped.__cause__ = full
    assert disk.is_full(wrapped)
    assert disk.is_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not disk.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk.is_full(RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 4544 vs 4436"))
    assert disk.is_failed_write(RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 4544 vs 4436"))
    assert not disk.is_failed_write(RuntimeError("Connection closed by peer"))


def test_the_warning_counts_what_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moe_models.checkpoint.space.free_bytes", lambda path: 1000)

    def warned(**more: Any) -> bool:
        given = {"checkpoint": 100, "export": 50, "limit": None, "planned": 5, "present": 0, **more}
        return bool(room_warnings(tmp_path, **given))

    assert not warned(planned=9)  # 9 x 100 + 50
    assert warned(planned=10)
    assert not warned(planned=1000, limit=9)  # 10 while the last one grows
    assert warned(planned=1000, limit=10)
    assert not warned(planned=1000, limit=12, present=4)  # these are on the disk already
    assert warned(planned=2, export=900)
