"""The hooks of ``mkdocs.yml``: the repository's Markdown as one site that needs no network.

Pages are written for the repository: their links lead to files beside them, to JSON, to code. A site has only what is
copied into it. So Markdown from other folders becomes pages too, a linked file of code becomes a page that shows it,
and links follow. Nothing of this package is imported, so that ``./run.sh docs`` needs no torch.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("ds_configs", "model_configs", "benchmarks")
"""Folders beside docs/ whose Markdown belongs to the site."""
PAGES_OF_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
"""A link to a file: the parts before, of and after its path."""
LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash", ".sbatch": "bash"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


# --- where a file of the repository is in the site


def page_of(path: str) -> str:
    """The page's source, as mkdocs names it, for a path from the repository's root."""
    if path in ("README.md", "docs"):
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/README.md"
    return path if path.endswith(".md") else f"source/{path}.md"


def path_of(page: str) -> str:
    """The inverse: a path from the repository's root."""
    if (ROOT / "docs" / page).exists():
        return f"docs/{page}"
    return page.removeprefix("source/").removesuffix(".md") if page.startswith("source/") else page


def target(path: str, link: str) -> str:
    """The path from the root to which a link in ``path`` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def follow(text: str, path: str) -> str:
    """The text of a page with its links leading to pages of the site."""
    here = posixpath.dirname(page_of(path))

    def moved(match: re.Match[str]) -> str:
        led_to = target(path, match[2])
        return match[1] + posixpath.relpath(page_of(led_to), here or ".") + match[3]

    return LINK.sub(moved, text)


def linked_code(texts: dict[str, str]) -> set[str]:
    """Paths of files that are no Markdown and to which pages link; ``texts`` is path -> text."""
    found = set()
    for path, text in texts.items():
        for match in LINK.finditer(text):
            led_to = target(path, match[2])
            inside = led_to.startswith("docs/") or led_to.endswith(".md")
            if not inside and (ROOT / led_to).is_file():
                found.add(led_to)
    return found


def code_page(path: str) -> str:
    """A page that shows a file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"{HIDDEN}# {path}\n\n`````{language}\n{source}`````\n"


def slug(title: str, separator: str) -> str:
    """The anchor that GitHub makes of a heading, so that one link works in both places."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


# --- what mkdocs calls


def on_config(config: Any) -> Any:
    """Headings have GitHub's anchors."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the Markdown of other folders, and the code that pages link to."""
    # 1. Markdown elsewhere.
    others = [ROOT / name for name in PAGES_OF_ROOT]
    for folder in ELSEWHERE:
        others += sorted((ROOT / folder).rglob("*.md"))
    texts = {}
    for file in others:
        path = str(file.relative_to(ROOT))
        texts[path] = file.read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=texts[path]))

    # 2. Code.
    for file in sorted((ROOT / "docs").rglob("*.md")):
        texts[str(file.relative_to(ROOT))] = file.read_text(encoding="utf-8")
    for path in sorted(linked_code(texts)):
        files.append(File.generated(config, page_of(path), content=code_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site needs them."""
    source: str = page.file.src_uri
    if source.startswith("source/"):
        return markdown
    return follow(markdown, path_of(source))
