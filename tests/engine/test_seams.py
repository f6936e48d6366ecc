"""``engine/seams.py``: the table is whole, agrees with the installed libraries, and each kind of loss is seen.

The last test plants a rename in a real start of the recipe, one per library.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import transformers.trainer
import trl

from moe_models.engine.seams import SEAMS, Seam, _body, _source, _uses, check_seams, missing_seams, problem_of
from moe_models.errors import RunError
from moe_models.trainer import MoETrainer
from tests.support.recipe import ROOT, ForkedRecipe, command, run_alone, save_model, text_rows, write_jsonl

PACKAGE = ROOT / "moe_models"
NAMES = {seam.name.rpartition(":")[2].rpartition(".")[2] for seam in SEAMS}
ATTRIBUTES = {attribute for seam in SEAMS for attribute in seam.attributes}


def test_the_installed_libraries_have_them_all() -> None:
    assert missing_seams() == []
    check_seams()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_each_row_names_a_file_that_needs_it(seam: Seam) -> None:
    source = (PACKAGE / seam.ours).read_text()
    owner, _, last = seam.name.replace(":", ".").rpartition(".")
    names = {last, *seam.attributes}
    if last == "__init__":  # of a class that the file builds
        names = {owner.rpartition(".")[2]}
    assert [name for name in names if re.search(rf"\b{name}\b", source)], (seam.ours, names)


def test_every_attribute_of_a_row_is_used() -> None:
    source = "".join(file.read_text() for file in PACKAGE.rglob("*.py") if file.name != "seams.py")
    source += "".join(file.read_text() for file in (ROOT / "recipes").glob("*.py"))
    unused = [name for name in sorted(ATTRIBUTES) if not re.search(rf"\b{name}\b", source)]
    assert unused == []


def test_every_override_of_a_library_has_a_row() -> None:
    """A method of ours that a library's Trainer also has is an override: it must be in the table."""
    ours, libraries = {}, []
    for cls in MoETrainer.__mro__:
        if cls.__module__.startswith("moe_models."):
            ours.update(vars(cls))
        elif cls.__module__.startswith(("trl.", "transformers.")):
            libraries.append(cls)
    overrides = {name for name in ours if any(name in vars(library) for library in libraries)}
    overrides -= {"__init__", "__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__"}
    assert overrides
    assert overrides - NAMES == set()


LOUD = {"_foreach_mul_", "_grouped_mm", "_exit"}
"""Names whose loss raises an error where they are used: the first two in benches, the third is Python's."""


def private_names(source: str) -> set[str]:
    """Names with one leading underscore that are read from something other than self, cls or super()."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[A-Za-z]", node.attr):
            continue
        owner = ast.unparse(node.value)
        if owner in ("self", "cls") or owner.startswith("self."):
            continue
        found.add(node.attr)
    return found


def own_names() -> set[str]:
    """Private names that our own code defines."""
    own: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                own.add(node.attr)
    return own


def test_every_private_name_of_a_library_has_a_row() -> None:
    known = NAMES | ATTRIBUTES | LOUD | {"_C", "_attn_implementation"}  # the latter is a key of transformers' configs
    own = own_names() - NAMES
    unknown = {}
    for file in PACKAGE.rglob("*.py"):
        names = private_names(file.read_text()) - known - own
        if names:
            unknown[str(file.relative_to(PACKAGE))] = sorted(names)
    assert unknown == {}
    assert private_names("import torch\ntorch._made_up(1)") == {"_made_up"}  # planted


def test_a_name_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.trainer.Trainer, "_run_epoch")
    (line,) = missing_seams()
    assert line.startswith(
        f"transformers {transformers.__version__}: transformers.trainer.Trainer._run_epoch is gone; "
    )
    assert line.endswith("a finished run that is resumed trains one more step")
    with pytest.raises(RunError) as refused:
        check_seams()
    assert refused.value.problems == [line]


def test_a_parameter_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute_loss(self, model, inputs, return_outputs=False):  # type: ignore[no-untyped-def]
        """Without num_items_in_batch."""

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", compute_loss)
    (line,) = missing_seams()
    assert "SFTTrainer.compute_loss takes no num_items_in_batch any more" in line


def test_a_method_that_is_called_no_more() -> None:
    seam = Seam(name="json:loads", ours="trainer.py", lost="x", called_in="json.tool")
    assert problem_of(seam) is None or "does not call" in str(problem_of(seam))
    seam = Seam(name="json:dumps", ours="trainer.py", lost="x", called_in="json.decoder")
    assert "json.decoder does not call dumps any more" in str(problem_of(seam))


def test_an_attribute_that_is_gone() -> None:
    seam = Seam(name="trl.trainer.sft_trainer:SFTTrainer", ours="trainer.py", lost="x", attributes=("_made_up",))
    assert "SFTTrainer has no _made_up any more" in str(problem_of(seam))


ODD = """
class Odd:
    a = 1
    text = '''
not indented'''
    b = 2

    def method(
        self,
    ):
        return self.c


d = e = 0
"""


def test_the_quick_look_at_a_class_sees_less_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at a line that is not indented; then the exact look finds the rest, and nothing of what follows."""
    (tmp_path / "odd_module.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    odd = importlib.import_module("odd_module").Odd
    assert _body(odd) == ODD[1 : ODD.index("not indented")]
    for cls in (trl.SFTTrainer, transformers.trainer.Trainer):
        assert _source(cls).rstrip().endswith(_body(cls).rstrip()), "all but the decorators"
    assert all(_uses([odd], name) for name in "abc")
    assert not any(_uses([odd], name) for name in "de")


PLANTED = {
    "transformers": ("transformers.trainer", "Trainer._prepare_for_training"),
    "trl": ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss"),
    "accelerate": ("accelerate.state", "AcceleratorState._reset_state"),
    "deepspeed": ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer.scaled_global_norm"),
    "torch": ("torch", "_foreach_norm"),
}


@pytest.mark.parametrize("library", PLANTED)
def test_a_planted_rename_ends_the_start_with_one_line(library: str, tmp_path: Path) -> None:
    """Exit code 1, one line, no traceback, nothing written. One in an interpreter of its own, the others in forks."""
    module, path = PLANTED[library]
    owner, _, name = path.rpartition(".")
    target = f"importlib.import_module({module!r})" + (f".{owner}" if owner else "")
    plant = tmp_path / "plant.py"
    plant.write_text(
        "import importlib, runpy, sys\n"
        f"target = {target}\n"
        f"setattr(target, {name + '_renamed'!r}, getattr(target, {name!r}))\n"
        f"delattr(target, {name!r})\n"
        f"sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        f"sys.argv[0] = {str(ROOT / 'recipes' / 'finetune.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    model = save_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", text_rows(8))
    words = command(model, data, ROOT / "ds_configs" / "zero3.json", tmp_path / "out")
    ended = run_alone(words, timeout=240, script=plant) if library == "torch" else ForkedRecipe(plant)(words)
    assert ended.code == 1, ended
    (line,) = ended.errors
    assert f"{path} is gone" in line
    assert "a run would go on without: " in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
