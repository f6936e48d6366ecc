"""What the prose points at exists: paths, links, flags of recipes, names of Python. Planted mistakes are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pointers import prose_files, wrong_pointers

PAGES, MODULES = prose_files()

TRUE = {
    "page.md": "`moe_models/trainer.py`, `ds_configs/zero1_ep2*.json`, `zero3.json`, `runtime/zero/stage3.py`\n"
    "`./run.sh plan --gpus 8`, then `deepspeed --num_gpus 2 recipes/finetune.py --max_steps 3 --deepspeed x.json`\n"
    "`--calibration calibration.json` and `from moe_models.trainer import MoETrainer`\n",
    "module.py": '"""See :func:`~moe_models.errors.warn`, :class:`Here`, :meth:`Here.run` and :class:`Path`."""\n'
    "from pathlib import Path\n\n\nclass Here:\n    def run(self) -> None: ...  # as recipes/check.py\n",
}
FALSE = {
    "path": ("page.md", "look into `moe_models/nowhere.py`\n", "moe_models/nowhere.py: no such path"),
    "folder": ("page.md", "all of tests/nothing/ here\n", "tests/nothing/: no such path"),
    "glob": ("page.md", "as `ds_configs/zero9_*.json`\n", "zero9_"),
    "preset": ("page.md", "take `zero1_ep3.json`\n", "zero1_ep3.json: no such preset"),
    "file of no library": ("page.md", "as `stage_9.py` does\n", "stage_9.py: no such file"),
    "link": ("page.md", "[here](nowhere.md)\n", "nowhere.md: no such file"),
    "heading": ("page.md", "# One\n[here](#two)\n", "#two: no such heading"),
    "flag of a recipe": ("page.md", "`recipes/check.py --num_gpus 2 --gpus 2`\n", "--gpus: no flag of check"),
    "flag in the next line": ("page.md", "run.sh plan --gpus 8 \\\n  --steps 9\n", ":2: --steps: no flag of plan"),
    "flag of no recipe": ("page.md", "with `--learning_speed`\n", "--learning_speed: no flag of any recipe"),
    "calibration": ("page.md", "`--calibration bench.json`\n", "bench.json: is no calibration"),
    "not in the repository": ("page.md", "from the design\nnotes\n", "design notes: not in the repository"),
    "import in a page": ("page.md", "from moe_models.trainer import Gone\n", "trainer.Gone: does not resolve"),
    "dotted name": ("page.md", "moe_models.trainer.nothing\n", "moe_models.trainer.nothing: does not resolve"),
    "reference": ("module.py", '"""Uses :func:`gone`."""\n', "gone: does not resolve"),
    "reference to a module": ("module.py", '"""Uses :mod:`moe_models.gone`."""\n', "moe_models.gone: does not resolve"),
    "reference to a member": (
        "module.py", '"""Uses :meth:`Here.stop`."""\n\n\nclass Here:\n    def run(self) -> None: ...\n', "Here.stop",
    ),
    "path in a comment": ("module.py", "x = 1\n# recipes/nothing.py\n", ":2: recipes/nothing.py: no such path"),
    "flag in a message": ("module.py", 'x = "give --learning_speed"\n', "--learning_speed: no flag of any recipe"),
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_point_at_what_exists(page: Path) -> None:
    assert wrong_pointers(page) == []


def test_modules_point_at_what_exists() -> None:
    wrong = [line for module in MODULES for line in wrong_pointers(module)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", TRUE)
def test_true_pointers_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TRUE[name])
    assert wrong_pointers(tmp_path / name) == []


@pytest.mark.parametrize("what", FALSE)
def test_a_false_pointer_is_seen(what: str, tmp_path: Path) -> None:
    name, text, line = FALSE[what]
    (tmp_path / name).write_text(text)
    (found,) = wrong_pointers(tmp_path / name)
    assert line in found
