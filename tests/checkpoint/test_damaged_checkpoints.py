"""Damaged DeepSpeed checkpoints: refused by the export, with the file's name, and no code in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from recipes.export import export_checkpoint
from tests.checkpoint.test_export_faults import Clusters
from tests.support import roundtrip


@pytest.fixture(scope="module")
def checkpoints(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """ZeRO stage -> a checkpoint-2 folder of two ranks with EP 2."""
    found = {}
    for stage in (1, 3):
        out = tmp_path_factory.mktemp(f"zero{stage}")
        source = roundtrip.save_source(out / "source", "mixtral")
        clusters(2).run(roundtrip.train_and_export, str(source), str(out), roundtrip.ds_config(stage, 2))
        found[stage] = out / "checkpoint-2"
    return found


EXPERT_FILE = "layer_1_expert_2_mp_rank_00_model_states.pt"
MODEL_FILE = {1: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}
PIECE_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def delete(name: str) -> Callable[[Path], None]:
    return lambda step: (step / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / name, (step / name).stat().st_size // 2)


def replace_by(name: str, value: Any) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        import torch

        torch.save(value, step / name)

    return apply


class Evil:
    """Unpickling this writes a file: code execution."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def forget_layer(step: Path) -> None:
    """config.json knows fewer layers than were trained."""
    path = step.parent / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 1
    path.write_text(json.dumps(config))


def invent_layer(step: Path) -> None:
    path = step.parent / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))


DAMAGE: list[tuple[str, int, Callable[[Path], None], str]] = [
    ("expert file missing", 1, delete(EXPERT_FILE), f"1 of 8 files are missing ({EXPERT_FILE})"),
    ("expert file cut", 1, truncate(EXPERT_FILE), f"{EXPERT_FILE}: cannot be read as plain tensors"),
    ("expert file of another", 1, replace_by(EXPERT_FILE, {"x": 1}), f"{EXPERT_FILE}: holds no tensor"),
    ("model states missing", 1, delete(MODEL_FILE[1]), "holds no model states; the checkpoint is incomplete"),
    ("model states cut", 1, truncate(MODEL_FILE[1]), f"{MODEL_FILE[1]}: cannot be read as plain tensors"),
    ("model states empty", 1, replace_by(MODEL_FILE[1], {}), f"{MODEL_FILE[1]}: holds no module"),
    ("model states a list", 1, replace_by(MODEL_FILE[1], [1]), f"{MODEL_FILE[1]}: holds a list"),
    ("latest missing", 1, lambda step: (step.parent / "latest").unlink(), "no file named latest"),
    ("step folder missing", 1, shutil.rmtree, "which does not exist; the checkpoint is incomplete"),
    ("fewer layers in config", 1, forget_layer, "trained tensors have no place in this model's checkpoint"),
    ("more layers in config", 1, invent_layer, "model.layers.2"),
    ("rank's weights missing", 3, delete(PIECE_FILE), f"1 of 4 files are missing ({PIECE_FILE})"),
    ("rank's weights cut", 3, truncate(PIECE_FILE), f"{PIECE_FILE}: cannot be read as plain tensors"),
    ("rank's weights empty", 3, replace_by(PIECE_FILE, {}), f"{PIECE_FILE}: holds no optimizer_state_dict"),
    ("rank 0's states missing", 3, delete(MODEL_FILE[3]), "the checkpoint is incomplete"),
    ("fewer layers in config", 3, forget_layer, "trained tensors have no place in this model's checkpoint"),
    ("more layers in config", 3, invent_layer, "model.layers.2"),
]


def assert_refused(checkpoint: Path, out: Path, words: str) -> None:
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export_checkpoint(checkpoint, out, "5GB")
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert words in caught.value.problems[0]
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("stage", "damage", "words"), [case[1:] for case in DAMAGE], ids=[f"zero{case[1]} {case[0]}" for case in DAMAGE]
)
def test_damaged_checkpoints_are_refused(
    stage: int, damage: Callable[[Path], None], words: str, checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints[stage], checkpoint)
    damage(next(checkpoint.glob("global_step*")))
    assert_refused(checkpoint, tmp_path / "out", words)


@pytest.mark.parametrize("name", [MODEL_FILE[1], EXPERT_FILE])
@pytest.mark.parametrize("form", ["zip", "bare pickle"])
def test_code_in_a_checkpoint_is_not_run(name: str, form: str, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    import torch

    checkpoint, target = tmp_path / "checkpoint-2", tmp_path / "executed"
    shutil.copytree(checkpoints[1], checkpoint)
    file = next(checkpoint.glob("global_step*")) / name
    states = torch.load(file, weights_only=False)
    states["module" if "module" in states else "x"] = Evil(target)
    if form == "zip":
        torch.save(states, file)
        assert zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps({"module": Evil(target)}))
    assert_refused(checkpoint, tmp_path / "out", "cannot be read as plain tensors")
    assert not target.exists(), "the code in the file was executed"


def test_a_run_folder_gets_a_hint(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    from moe_models.checkpoint.from_folder import find_step_folder

    with pytest.raises(UserError, match="did you mean one of checkpoint-2 in it"):
        find_step_folder(checkpoints[1].parent)
    with pytest.raises(UserError, match="no such folder"):
        find_step_folder(tmp_path / "nowhere")
