"""What `mkdocs build` does beside rendering docs/: fill generated parts, add pages made elsewhere, mend links.

Pages are written to be read in the repository as well, so their links lead from file to file there. Some of those
files stand outside docs/; they become pages of the site here.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from docs import generated  # noqa: E402

#: Files of the repository that are pages here.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/README.md": "tests.md",
}
#: Links that lead to a page which says the same, or to a folder that a page is about.
_MEANT = {"README.md": "index.md", "benchmarks/results": "benchmarks.md", "configs": "configs.md"}
_FOLDERS = {
    "configs": "configs",
    "benchmarks/results": "results",
    "benchmarks/results/convergence": "results/convergence",
}
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that stand outside docs/, and a page of the API for each package."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for folder, target in _FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.json*")):
            files.append(File.generated(config, f"{target}/{path.name}", abs_src_path=str(path)))
    for name, text in generated.api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = next((key for key, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")
    return outside_code(generated.fill(markdown), lambda text: relink(text, source, page.file.src_uri))


def outside_code(markdown: str, change: Any) -> str:
    """The text with ``change`` applied to all but its fenced blocks."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def relink(markdown: str, source: str, page: str) -> str:
    """Links of the file ``source`` of the repository, as they lead from ``page`` of the site."""

    def mend(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        return f"{link[1]}{posixpath.relpath(place_of(target), posixpath.dirname(page) or '.')}{link[3]}"

    return _LINK.sub(mend, markdown)


def place_of(path: str) -> str:
    """Where a file of the repository stands in the site; what is no part of it keeps its path, and mkdocs complains."""
    if path in PAGES or path in _MEANT:
        return PAGES.get(path) or _MEANT[path]
    folder, _, name = path.rpartition("/")
    if folder in _FOLDERS:
        return f"{_FOLDERS[folder]}/{name}"
    return path.removeprefix("docs/")
