"""The site of docs/ builds without a warning, leads nowhere in vain, and loads nothing from elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import urlopen

import pytest

from docs.tools import site
from tests.support.cluster import free_port

ROOT = Path(__file__).parents[2]
LOADED = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
"""What a browser fetches when it shows a page. ``link`` also names pages (rel=prev and so on)."""


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """mkdocs makes the site; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Page(HTMLParser):
    """What a built page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        for name in ("href", "src", "data"):
            if (tag, name) in LOADED and values.get(name) and values.get("rel") not in ("canonical", "prev", "next"):
                self.loads.append(values[name])


@pytest.fixture(scope="module")
def read(built: Path) -> dict[Path, Page]:
    """Every page of the site."""
    return {file: Page(file.read_text()) for file in sorted(built.rglob("*.html"))}


def test_every_link_of_the_site_leads_somewhere(built: Path, read: dict[Path, Page]) -> None:
    there = {str(path) for path in built.rglob("*") if path.is_file()}
    anchors = {str(file): page.anchors for file, page in read.items()}
    wrong = []
    for file, page in read.items():
        if file.name == "404.html" or ("samples" in file.parts and file.name != "index.html"):
            continue
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = os.path.normpath(f"{file.parent}/{unquote(parts.path)}") if parts.path else str(file)
            if target not in there:
                wrong.append(f"{file.relative_to(built)}: {link}: no such file")
            elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, {unquote(parts.fragment)}):
                wrong.append(f"{file.relative_to(built)}: {link}: no such anchor")
    assert not wrong, "\n".join(wrong)
    assert len(read) > 60


def test_no_page_loads_anything_from_elsewhere(built: Path, read: dict[Path, Page]) -> None:
    for file, page in read.items():
        for loaded in page.loads:
            parts = urlparse(loaded)
            assert not parts.scheme or parts.scheme == "data", f"{file.relative_to(built)}: {loaded}"
            assert not parts.netloc, f"{file.relative_to(built)}: {loaded}"
            if file.name != "404.html" and not parts.scheme:
                assert (file.parent / unquote(parts.path)).is_file(), f"{file.relative_to(built)}: {loaded}"
    for style in built.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import )[\"']?(\w+:)?//", style.read_text())
        assert not addresses, style


def test_code_and_tools_are_not_copied(built: Path) -> None:
    assert not [path for path in built.rglob("*.py")]
    assert "class Layout" in re.sub("<[^>]+>", "", (built / "source/moe_models/config/layout.py.html").read_text())


def test_what_a_student_looks_for_is_two_clicks_from_readme() -> None:
    """The five dimensions, the 2D and 3D figures, the trade-off and the choice."""

    def led_to(page: Path) -> set[Path]:
        links = re.findall(r"\]\(([^)\s#:]+\.md)", page.read_text())
        return {(page.parent / link).resolve() for link in links}

    one = led_to(ROOT / "README.md")
    two = one | {target for page in one if page.exists() for target in led_to(page)}
    for name in ("five-dimensions", "communication", "choosing", "two-all-to-alls", "dense-and-moe", "load-balance"):
        assert ROOT / "docs" / "concepts" / f"{name}.md" in two, name
    text = (ROOT / "docs" / "concepts" / "five-dimensions.md").read_text()
    assert "grid-2d.svg" in text
    assert "grid-3d.svg" in text


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert written <= listed, f"{written - listed}: add it to nav in mkdocs.yml"


def test_run_sh_serves_the_site(tmp_path: Path) -> None:
    """On this machine only, and with nothing of requirements.txt installed."""
    # 1. A small repository, whose .venv has what the site needs (and no mark that says that it has torch).
    small_repository(tmp_path, "Hello.")
    for name in ("run.sh", "pyproject.toml", "requirements-docs.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    wanted = "".join((tmp_path / name).read_text() for name in ("requirements-docs.txt", "pyproject.toml"))
    mark = subprocess.run(["cksum"], input=wanted, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / ".venv" / ".installed-docs").write_text(mark + "\n")

    # 2. Serve and read.
    port = free_port()
    command = ["bash", str(tmp_path / "run.sh"), "docs", "--dev-addr", f"127.0.0.1:{port}", "--no-livereload"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert "Hello." in read_when_there(f"http://127.0.0.1:{port}/", served)
        finally:
            served.terminate()


def read_when_there(address: str, server: subprocess.Popen[str]) -> str:
    """The page, as soon as the server answers."""
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urlopen(address, timeout=5) as answer:
            return answer.read().decode()
        time.sleep(0.1)
    server.kill()
    raise AssertionError(server.communicate()[1])


# --- planted


def small_repository(folder: Path, text: str) -> None:
    """What mkdocs.yml needs, with two pages; ``text`` is in the first."""
    for name in ("docs", "ds_configs", "model_configs", "benchmarks"):
        (folder / name).mkdir()
    shutil.copytree(ROOT / "docs" / "tools", folder / "docs" / "tools")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/commands.md", "docs/site.css"):
        (folder / name).write_text("# Page\n")
    config = (ROOT / "mkdocs.yml").read_text()
    (folder / "mkdocs.yml").write_text(config[: config.index("nav:\n  - Home")] + "nav: [index.md, commands.md]\n")
    (folder / "docs" / "index.md").write_text(f"# Home\n\n{text}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](commands.md#no-such-heading)", "no-such-heading"),
        ("![x](figures/none.svg)", "none.svg"),
    ],
)
def test_a_broken_link_fails_the_build(text: str, said: str, tmp_path: Path) -> None:
    small_repository(tmp_path, text)
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("docs/layouts.md", "[a](../benchmarks/plan.md#x)", "[a](benchmarks/plan.md#x)"),
        ("docs/layouts.md", "[a](../ds_configs/README.md)", "[a](ds_configs/README.md)"),
        ("docs/concepts/choosing.md", "[a](../layouts.md)", "[a](../layouts.md)"),
        ("docs/concepts/choosing.md", "[a](../../recipes/plan.py)", "[a](../source/recipes/plan.py.md)"),
        ("benchmarks/speed.md", "[a](../docs/faster.md)", "[a](../faster.md)"),
        ("benchmarks/history/old.md", "[a](../speed.md)", "[a](../speed.md)"),
        ("CONTRIBUTING.md", "[a](README.md)", "[a](index.md)"),
        ("docs/index.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("docs/index.md", "[a](#here)", "[a](#here)"),
    ],
)
def test_links_follow(path: str, before: str, after: str) -> None:
    assert site.follow(before, path) == after


def test_anchors_are_those_of_github() -> None:
    assert site.slug('Load balance: `"moe": {"balance": {...}}`', "-") == "load-balance-moe-balance-"
