"""Checkpoints during training that are whole or absent.

transformers writes into ``OUTPUT_DIR/checkpoint-N`` file by file. Here it writes into ``OUTPUT_DIR/.writing`` instead,
and the finished folder gets its name only when every rank has finished. What a killed run leaves under ``.writing`` is
removed by the next one.

A file that cannot be written (a full disk, above all) fails on one rank, while the others wait for it in a collective.
So the rank notes the failure and goes on. When all have tried, they compare notes, remove what there is of the
checkpoint, and all raise the same error. What was complete before is complete still.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from moe_models.checkpoint.resume import describe_engine
from moe_models.checkpoint.source import is_writer
from moe_models.checkpoint.space import checkpoint_bytes
from moe_models.disk import free_bytes, full_line, is_failed_write, is_full
from moe_models.errors import RunError, one_line
from moe_models.preflight.adapters import LAYOUT_FILE

STAGING_FOLDER = ".writing"
"""Where a checkpoint grows, inside ``output_dir``, until it gets its name."""


REPLACED = ".replaced"
"""Ending of an earlier checkpoint of the same step, in the staging folder, between two renames."""


BESIDE_TENSORS = 2**20
"""More than torch.save writes beside the tensors of a file: names, padding, and all of a file of random states."""


class CheckpointError(RunError):
    """A checkpoint could not be written. Nothing of it is left, and what was complete before is untouched."""


class WholeCheckpoints:
    """Moves a Trainer's checkpoints to a staging folder while they grow, and gives them their names."""

    def __init__(self) -> None:
        self._growing = False
        self._needed = 0
        self._run_dir = Path()
        # What this rank could not write of the checkpoint that grows: one line.
        self._failure: str | None = None
        self.last_step: int | None = None
        """The step of the last checkpoint that got its name."""

    def clear(self, output_dir: str | Path) -> None:
        """Remove what a killed run left behind. Any rank may call it; the writer acts."""
        if not is_writer():
            return
        staging = Path(output_dir) / STAGING_FOLDER
        _put_back(staging)
        shutil.rmtree(staging, ignore_errors=True)

    def place(self, run_dir: str) -> str:
        """The folder that HF's Trainer is told to write its ``checkpoint-N`` into."""
        return os.path.join(run_dir, STAGING_FOLDER) if self._growing else run_dir

    @contextmanager
    def growing(self, engine: Any, run_dir: Path) -> Iterator[None]:
        """Inside, :meth:`place` answers with the staging folder, and failed writes are noted. Every rank calls it.

        Raises CheckpointError on every rank if the disk has not the room, before anything is written.
        """
        # 1. Is there room? Its size does not change during a run.
        if not self._needed:
            self._needed = checkpoint_bytes(engine)
        self._run_dir = run_dir
        self._failure = None
        if is_writer() and free_bytes(run_dir) < self._needed:
            self._failure = full_line(run_dir, self._needed)
        self._compare_notes(run_dir)

        # 2. Write. After DeepSpeed's part, which has collectives, each rank writes on its own.
        self._growing = True
        try:
            with self.noting(), _deepspeed_notes(engine, self.noting):
                yield
        finally:
            self._growing = False

    @contextmanager
    def noting(self, file: str | Path | None = None, needed: int = 0) -> Iterator[None]:
        """Note that a file cannot be written, and go on after the block, where the other ranks will be.

        ``needed``: bytes of the file's tensors; torch does not say why it could not write.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not is_failed_write(error):
                raise
            where = file or getattr(error, "filename", None) or self._run_dir
            full = is_full(error)
            if not isinstance(error, OSError):
                full = full or free_bytes(where) + _on_disk(where) < needed + BESIDE_TENSORS
            line = f"{where}: cannot be written: {one_line(error)}"
            if full:
                line = full_line(where, self._needed)
            self._failure = self._failure or line
            if file is not None:
                Path(file).unlink(missing_ok=True)  # what follows, and the other ranks, may have the room

    def _compare_notes(self, run_dir: Path) -> None:
        """Wait for every rank. Raise on all if one has noted a failure, with nothing of the checkpoint left."""
        notes: list[str | None] = [self._failure]
        if dist.is_initialized() and dist.get_world_size() > 1:
            notes = [None] * dist.get_world_size()
            dist.all_gather_object(notes, self._failure)
        failures = [note for note in notes if note is not None]
        if not failures:
            return
        self.clear(run_dir)
        if dist.is_initialized():
            dist.barrier()
        last = last_checkpoint(run_dir)
        kept = f"the last complete checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise CheckpointError(f"{failures[0]}. Nothing was saved from this step, {kept}")

    def finish(self, trainer: Any, run_dir: Path, add_files: Callable[[Path], None]) -> None:
        """Give the checkpoint of this step its name, and remove those beyond ``save_total_limit``; every rank calls it.

        Args:
            trainer: the Trainer that wrote it.
            run_dir: where its checkpoints have their final names.
            add_files: called with the staged folder on the writing rank, to put more files into it.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        staged = run_dir / STAGING_FOLDER / name

        # 1. HF noted the best checkpoint under its staging name.
        if trainer.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.best_global_step}"
            if best.exists() or best.name == name:
                trainer.state.best_model_checkpoint = str(best)

        # 2. Every rank has written its part.
        self._compare_notes(run_dir)
        if is_writer():
            with self.noting():
                self._name(trainer, run_dir, staged, add_files)
        self._compare_notes(run_dir)
        self.last_step = trainer.state.global_step

    @staticmethod
    def _name(trainer: Any, run_dir: Path, staged: Path, add_files: Callable[[Path], None]) -> None:
        """The writer's part of :meth:`finish`."""
        # 1. What HF and DeepSpeed do not write, and DeepSpeed's pointer to its folder, which it writes unprotected.
        trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        layout = describe_engine(trainer.model_wrapped)
        (staged / LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n")
        if not trainer.args.save_only_model:
            (staged / "latest").write_text(f"global_step{trainer.model_wrapped.global_steps}")
        add_files(staged)

        # 2. The name; a resumed run passes a step again and replaces the folder of that step.
        final = run_dir / staged.name
        if final.exists():
            os.replace(final, staged.with_name(f"{staged.name}{REPLACED}"))
        os.replace(staged, final)

        # 3. Those beyond the limit lose their names before the first of their files. transformers' rotate_checkpoints
        #    removes them where they are, and a run that is killed meanwhile leaves half a checkpoint under its name.
        for folder in _beyond_the_limit(run_dir, trainer.args.save_total_limit, trainer.state.best_model_checkpoint):
            os.replace(folder, run_dir / STAGING_FOLDER / folder.name)
        shutil.rmtree(run_dir / STAGING_FOLDER, ignore_errors=True)


def _beyond_the_limit(run_dir: Path, limit: int | None, best: str | None) -> list[Path]:
    """The checkpoints that ``save_total_limit`` has no place for, as transformers chooses them.

    The oldest first; never the latest, nor the best one.
    """
    if limit is None or limit <= 0:
        return []
    folders = [Path(name) for name in sort_checkpoints(str(run_dir), use_mtime=True)]
    kept = {folders[-1]}
    if best is not None:
        kept.add(Path(best))
    too_many = max(len(folders) - max(limit, len(kept)), 0)
    removable = [folder for folder in folders if folder not in kept]
    return removable[:too_many]


# upstream: deepspeed 0.19.8: a rank that cannot write its part raises out of save_checkpoint, and the others wait in
# its barrier. Remove when: save_checkpoint raises on all ranks.
@contextmanager
def _deepspeed_notes(engine: Any, noting: Callable[..., Any]) -> Iterator[None]:
    """Inside, what ``engine.save_checkpoint`` cannot write is noted, and its collectives go on.

    DeepSpeed writes in three places: states, through its checkpoint engine; two scripts; and ``latest``, which
    :meth:`WholeCheckpoints.finish` writes instead.
    """
    writer = engine.checkpoint_engine
    replaced = ((writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script"), (engine, "save_checkpoint"))

    def save(state_dict: Any, path: str) -> Any:
        with noting(path, _tensor_bytes(state_dict)):
            return writer_save(state_dict, path)

    def makedirs(path: str, exist_ok: bool = False) -> None:
        with noting():
            os.makedirs(path, exist_ok=exist_ok)

    def copy_recovery_script(save_path: str) -> None:
        with noting():
            copy(save_path)

    writer_save = writer.save
    copy = engine._copy_recovery_script
    writer.save = save
    writer.makedirs = makedirs
    engine._copy_recovery_script = copy_recovery_script
    engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
    try:
        yield
    finally:
        for owner, name in replaced:
            delattr(owner, name)  # the class's own is seen again


def _tensor_bytes(states: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(states, torch.Tensor):
        return states.nbytes
    if isinstance(states, dict):
        return sum(_tensor_bytes(value) for value in states.values())
    if isinstance(states, list | tuple):
        return sum(_tensor_bytes(value) for value in states)
    return 0


def _on_disk(file: str | Path) -> int:
    """What of ``file`` has reached the disk."""
    try:
        return os.stat(file).st_blocks * 512
    except OSError:
        return 0


def _put_back(staging: Path) -> None:
    """Give an earlier checkpoint its name back that was moved away when a run ended between two renames."""
    for folder in staging.glob(f"{PREFIX_CHECKPOINT_DIR}-*{REPLACED}"):
        final = staging.parent / folder.name.removesuffix(REPLACED)
        if not final.exists():
            os.replace(folder, final)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the latest step in a run's folder, or None."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
