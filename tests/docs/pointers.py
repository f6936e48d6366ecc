"""Reads what the prose of this repository points at: paths, flags of recipes, names of Python, links of markdown.

Prose is the text of every ``.md`` file, the comments of shell scripts, and in Python files the comments and docstrings.
Outside ``tests/`` it is every string, because messages name paths and flags. Nothing is imported: names are looked up
in the sources. Each check takes one passage and returns one line for each thing that does not exist.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("moe_models", "tests", "recipes", "docs", "benchmarks", "ds_configs", "model_configs")
LIBRARIES = ("deepspeed", "transformers", "trl", "accelerate", "torch", "datasets", "safetensors")
HISTORY = "benchmarks/history/"
"""Older measurements stay as they were written, with the paths of their day."""

PATH = re.compile(rf"(?<![\w/.*-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
QUOTED_FILE = re.compile(r"`([\w./-]+\.(?:py|md|sh|sbatch))`")
PRESET = re.compile(r"(?<![\w/-])(?:zero[0-3]\w*|bench-\w+|\w+-tiny)\.json")
LINK = re.compile(r"\]\(([^)\s]+)\)")
DOTTED = re.compile(r"(?<![\w./])moe_models(?:\.[a-z_]\w*)+(?![\w/*])")
IMPORT = re.compile(r"from (moe_models[\w.]*) import ([\w, ]+)")
REFERENCE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`(?:[^`<]*<)?~?([\w.]+)>?`")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
RECIPE = re.compile(r"recipes/(\w+)\.py|(?:\./)?run\.sh (\w+)|python -m benchmarks\.(\w+)|\b(bench_alltoall)\b")
NOT_IN_THE_REPOSITORY = ("design notes", "design.md")
"""What readers of the repository cannot open."""

OTHER_FLAGS = {
    "num_gpus", "include", "hostfile", "node_rank", "nnodes", "local_rank", "no_ssh",  # deepspeed
    "master_addr", "master_port", "quiet", "module",
    "nproc_per_node", "use_deepspeed", "num_processes",  # torchrun, accelerate
    "nodes", "gpus_per_node", "kill_on_bad_exit", "signal",  # sbatch, srun
    "no_deps", "help", "name",  # pip; everything; a placeholder
}  # fmt: skip
"""Flags of other programs that the prose may name."""

TRAINING_CLASSES = {
    "trl/trainer": {"SFTConfig", "ModelConfig", "_BaseConfig"},
    "trl/scripts": {"ScriptArguments"},
    "transformers": {"TrainingArguments"},
}
"""The dataclasses from which TRL's parser makes the flags of finetune and pretrain."""


@dataclass(frozen=True)
class Passage:
    """A piece of prose, and where it stands."""

    file: Path
    line: int
    text: str

    def where(self, position: int = 0) -> str:
        """``file:line`` of a position in the text."""
        line = self.line + self.text.count("\n", 0, position)
        return f"{self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file.name}:{line}"


# --- what is read


def prose_files() -> tuple[list[Path], list[Path]]:
    """(pages, Python files) of the repository."""
    pages = [ROOT / "run.sh", ROOT / "recipes" / "slurm.sbatch", *ROOT.glob("*.md")]
    modules = []
    for folder in FOLDERS:
        pages += (ROOT / folder).rglob("*.md")
        modules += (ROOT / folder).rglob("*.py")
    pages = [page for page in pages if not str(page.relative_to(ROOT)).startswith(HISTORY)]
    own = {Path(__file__).name, "test_pointers.py"}
    return sorted(pages), sorted(module for module in modules if module.name not in own)


def passages(file: Path) -> Iterator[Passage]:
    """The prose of a file."""
    source = file.read_text()
    if file.suffix == ".md":
        yield Passage(file, 1, source)
        return
    if file.suffix != ".py":
        kept = [line if re.match(r"#+ ", line) else "" for line in source.splitlines()]
        yield Passage(file, 1, "\n".join(kept))
        return
    yield from comments(file, source)
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    data = "tests" in file.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (id(node) in docstrings or not data):
            yield Passage(file, node.lineno, node.value)


def comments(file: Path, source: str) -> Iterator[Passage]:
    """Comments, those of neighbouring lines together: a sentence may go on in the next line."""
    kept: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and kept:
            yield Passage(file, first, "\n".join(kept))
            kept = []
        if not kept:
            first = token.start[0]
        last = token.start[0]
        kept.append(token.string.lstrip("# "))
    if kept:
        yield Passage(file, first, "\n".join(kept))


# --- paths


def wrong_paths(passage: Passage) -> list[str]:
    """Paths of this repository that do not exist."""
    wrong = []
    for match in PATH.finditer(passage.text):
        name = match[0].rstrip(".,-")
        cut = passage.text[match.end() : match.end() + 1] in ("{", "<", "$")  # goes on with a placeholder
        if passage.text[: match.start()].endswith("--write "):  # written, not read
            exists = True
        elif "*" in name:
            exists = any(ROOT.glob(name.rstrip("/")))
        elif cut:
            exists = (ROOT / name).parent.is_dir()
        else:
            exists = (ROOT / name).exists()
        if not exists:
            wrong.append(f"{passage.where(match.start())}: {name}: no such path")
    for match in QUOTED_FILE.finditer(passage.text):
        if match[1].split("/")[0] not in FOLDERS and not file_exists(match[1], passage.file):
            wrong.append(f"{passage.where(match.start())}: {match[1]}: no such file, here or in the libraries")
    for match in PRESET.finditer(passage.text):
        if not any((ROOT / folder / match[0]).exists() for folder in ("ds_configs", "model_configs")):
            wrong.append(f"{passage.where(match.start())}: {match[0]}: no such preset")
    return wrong


def file_exists(name: str, beside: Path) -> bool:
    """Whether a file named without its top folder is in the repository or in a library that we read."""
    if (beside.parent / name).exists() or (ROOT / name).exists():
        return True
    return any(path == name or path.endswith("/" + name) for path in our_files()) or any(
        path.endswith("/" + name) for path in library_files()
    )


@cache
def our_files() -> frozenset[str]:
    """Every file of the repository, as a path from the root."""
    found = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    return frozenset(found | {path.name for path in ROOT.iterdir()})


@cache
def library_files() -> frozenset[str]:
    """Every Python file of the libraries whose sources the prose names."""
    roots = [Path(library_root(name)) for name in ("deepspeed", "trl", "transformers", "accelerate")]
    return frozenset(str(path) for root in roots for path in root.rglob("*.py"))


def library_root(name: str) -> str:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    assert spec is not None, name
    assert spec.submodule_search_locations, name
    return next(iter(spec.submodule_search_locations))


def wrong_links(passage: Passage) -> list[str]:
    """Links of a page to files, or to headings of pages, that do not exist."""
    wrong = []
    for match in LINK.finditer(passage.text):
        if "://" in match[1] or passage.file.suffix != ".md":
            continue
        name, _, heading = match[1].partition("#")
        target = passage.file.parent / name if name else passage.file
        if not target.exists():
            wrong.append(f"{passage.where(match.start())}: {match[1]}: no such file")
        elif heading and heading not in headings(target.read_text()):
            wrong.append(f"{passage.where(match.start())}: {match[1]}: no such heading")
    return wrong


def headings(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_words(passage: Passage) -> list[str]:
    """Pointers at papers that are not in the repository; a calibration that is none."""
    wrong = []
    for words in NOT_IN_THE_REPOSITORY:
        for match in re.finditer(re.escape(words).replace(r"\ ", r"\s+"), passage.text):
            wrong.append(f"{passage.where(match.start())}: {words}: not in the repository")
    for match in re.finditer(r"--calibration ([\w./-]+\.json)", passage.text):
        if not Path(match[1]).name.startswith("calibration"):  # what bench and bench_alltoall write for the planner
            wrong.append(f"{passage.where(match.start())}: {match[1]}: is no calibration*.json")
    return wrong


# --- flags


def wrong_flags(passage: Passage) -> list[str]:
    """Flags in the command line of a recipe that it does not have; elsewhere, flags that no recipe has."""
    wrong = []
    text = passage.text.replace("\\\n", "  ")  # a continued command is one line; positions stay
    for match in FLAG.finditer(text):
        flag = match[1].replace("-", "_")
        recipe = recipe_before(text, match.start())
        known = flags_of(recipe) if recipe else all_flags()
        if flag not in known and flag not in OTHER_FLAGS:
            wrong.append(f"{passage.where(match.start())}: --{match[1]}: no flag of {recipe or 'any recipe'}")
    return wrong


def recipe_before(text: str, position: int) -> str | None:
    """The recipe whose command line a flag belongs to: the last one named before it, in its line and quotes."""
    start = max(text.rfind("\n", 0, position) + 1, text.rfind("`", 0, position) + 1)
    named = [next(filter(None, match.groups())) for match in RECIPE.finditer(text, start, position)]
    if not named:
        return None
    recipe = {"report": "routing_report"}.get(named[-1], named[-1])
    return recipe if flags_of(recipe) else None


@cache
def flags_of(recipe: str) -> frozenset[str]:
    """The flags of a recipe or of a script in ``benchmarks/``; empty for what is neither."""
    file = next(
        (path for folder in ("recipes", "benchmarks") if (path := ROOT / folder / f"{recipe}.py").exists()), None
    )
    if file is None:
        return frozenset()
    tree = ast.parse(file.read_text())
    found = argparse_flags(tree) | {"help"}
    if recipe in ("finetune", "pretrain"):
        for name in ("command_line", recipe):
            module = ast.parse((ROOT / "recipes" / f"{name}.py").read_text())
            found |= fields(module, {"RecipeArguments", "PretrainArguments"})
        found |= training_flags() | {"config"}
    return frozenset(found)


@cache
def all_flags() -> frozenset[str]:
    """The flags of all recipes and benchmarks."""
    files = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return frozenset().union(*(flags_of(file.stem) for file in files))


def argparse_flags(tree: ast.Module) -> set[str]:
    """First words of ``add_argument(...)`` and of ``add(...)``, its short name in the recipes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in ("add_argument", "add"):
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            found |= {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    return found


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@cache
def training_flags() -> frozenset[str]:
    """The fields of TRL's and transformers' dataclasses, read from their sources."""
    found: set[str] = set()
    for place, classes in TRAINING_CLASSES.items():
        library, *folder = place.split("/")
        for path in Path(library_root(library)).joinpath(*folder).glob("*.py"):
            found |= fields(ast.parse(path.read_text()), classes)
    return frozenset(found | {f"no_{name}" for name in found})


def fields(tree: ast.Module, classes: set[str]) -> set[str]:
    """The annotated fields of some dataclasses of a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            found |= {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
    return found


# --- names of Python


def wrong_references(passage: Passage) -> list[str]:
    """``:func:`` and its like, dotted names and imports of ``moe_models`` that do not resolve."""
    wrong = []
    for match in REFERENCE.finditer(passage.text):
        name = match[1]
        known = resolves(name) if name.split(".")[0] in FOLDERS else resolves_in(passage.file, name)
        if not known:
            wrong.append(f"{passage.where(match.start())}: {name}: does not resolve")
    others = REFERENCE.sub(lambda found: " " * len(found[0]), passage.text)
    for match in DOTTED.finditer(others):
        if not resolves(match[0]):
            wrong.append(f"{passage.where(match.start())}: {match[0]}: does not resolve")
    for match in IMPORT.finditer(passage.text):
        for name in match[2].split(","):
            if not resolves(f"{match[1]}.{name.split(' as ')[0].strip()}"):
                wrong.append(f"{passage.where(match.start())}: {match[1]}.{name.strip()}: does not resolve")
    return wrong


def resolves(name: str) -> bool:
    """Whether a dotted name from the root of the repository is a package, a module or something in a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        if place.with_suffix(".py").exists():
            return end == len(parts) or resolves_in(place.with_suffix(".py"), ".".join(parts[end:]))
        if (place / "__init__.py").exists():
            return end == len(parts)
    return False


def resolves_in(file: Path, name: str) -> bool:
    """Whether a module binds a name, by definition, assignment or import; for ``Class.member`` each part."""
    if file.suffix != ".py":
        return False
    here, elsewhere = bound_names(file)
    first, _, rest = name.partition(".")
    if first in LIBRARIES:
        return True
    if first in elsewhere and elsewhere[first].split(".")[0] in FOLDERS:
        return resolves(elsewhere[first] + ("." + rest if rest else ""))
    return (first in here or first in elsewhere) and all(part in here for part in rest.split(".") if part)


@cache
def bound_names(file: Path) -> tuple[frozenset[str], dict[str, str]]:
    """(names that a module defines or assigns at any depth, members included; imported name -> where from)."""
    here: set[str] = set()
    elsewhere: dict[str, str] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            here.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            here.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            here.add(node.attr)
        elif isinstance(node, ast.arg):
            here.add(node.arg)
        elif isinstance(node, ast.ImportFrom):
            elsewhere |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            elsewhere |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
    return frozenset(here), elsewhere


CHECKS = (wrong_paths, wrong_links, wrong_words, wrong_flags, wrong_references)


def wrong_pointers(file: Path) -> list[str]:
    """One line for everything that a file's prose points at and that does not exist."""
    found = []
    for passage in passages(file):
        for check in CHECKS:
            found += check(passage)
    return found
