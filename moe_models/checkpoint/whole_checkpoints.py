"""Checkpoints during training that are whole or absent.

transformers writes into ``OUTPUT_DIR/checkpoint-N`` file by file. Here it writes into ``OUTPUT_DIR/.writing`` instead,
and the finished folder gets its name only when every rank has finished. What a killed run leaves under ``.writing`` is
removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from moe_models.checkpoint.resume import LAYOUT_FILE, describe_engine
from moe_models.checkpoint.source import is_writer

STAGING_FOLDER = ".writing"
"""Where a checkpoint grows, inside ``output_dir``, until it gets its name."""


class WholeCheckpoints:
    """Moves a Trainer's checkpoints to a staging folder while they grow, and gives them their names."""

    def __init__(self) -> None:
        self._growing = False
        self.last_step: int | None = None
        """The step of the last checkpoint that got its name."""

    def clear(self, output_dir: str | Path) -> None:
        """Remove what a killed run left behind. Any rank may call it; the writer acts."""
        if is_writer():
            shutil.rmtree(Path(output_dir) / STAGING_FOLDER, ignore_errors=True)

    def place(self, run_dir: str) -> str:
        """The folder that HF's Trainer is told to write its ``checkpoint-N`` into."""
        return os.path.join(run_dir, STAGING_FOLDER) if self._growing else run_dir

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Inside, :meth:`place` answers with the staging folder."""
        self._growing = True
        try:
            yield
        finally:
            self._growing = False

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
        trainer.accelerator.wait_for_everyone()
        if is_writer():
            # 3. What HF and DeepSpeed do not write.
            trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            layout = describe_engine(trainer.model_wrapped)
            (staged / LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n")
            add_files(staged)

            # 4. The name; a resumed run passes a step again and replaces the folder of that step.
            if (run_dir / name).exists():
                os.replace(run_dir / name, run_dir / STAGING_FOLDER / "replaced")
            os.replace(staged, run_dir / name)
            shutil.rmtree(run_dir / STAGING_FOLDER)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )
        trainer.accelerator.wait_for_everyone()
        self.last_step = trainer.state.global_step


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the latest step in a run's folder, or None."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
