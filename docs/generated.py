"""The parts of README and docs that are made from the code, each between two marks in the file.

``python docs/generated.py`` writes them into the files that are read as they stand; the other pages of docs/ are filled
while the site is built.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import ds_optim  # noqa: E402
from docs import listings, reference  # noqa: E402
from ds_optim.optimizers.table import in_order, table  # noqa: E402

#: What stands between marks of each name.
PARTS: dict[str, Callable[[], str]] = {
    "optimizers in full": lambda: table(("name", "a step", "keeps", "moves", "choose it")),
    "claims": lambda: table(("name", "source", "the source's claim")),
    "options": reference.options,
    "matrix options": reference.matrix_options,
    "aux rules": reference.aux_rules,
    "polar": reference.polar,
    "exchange": reference.exchange,
    "arguments": reference.arguments,
    "settings": reference.settings,
    "tuned": reference.tuned,
    "commands": listings.commands,
    "works": listings.works,
    "pairs": listings.pairs,
    "refused": listings.refused,
    "messages": listings.messages,
}
#: Files that hold their parts in the repository too.
WRITTEN = ("docs/optimizers.md", "docs/support.md")
#: The packages inside ds_optim, from the ground up, as tests/unit/test_imports.py orders them.
PACKAGES = (
    *("matrix", "elementwise", "sharding", "optimizers", "zero", "hf", "machine", "job", "memory", "report", "data"),
    *("cluster", "survival", "train", "sweep", "bench", "chaos", "accept", "cli"),
)
_PART = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with what belongs between its marks.

    Raises:
        KeyError: a mark names no part.
    """
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n{part[3]}", text)


def api_pages() -> dict[str, str]:
    """Markdown by page: what ``import ds_optim`` gives, and each package inside it with all its modules."""
    names = {*ds_optim.__all__, *(described.cls.__name__ for described in in_order())}
    pages = {
        "index": "# API\n\n"
        "What `import ds_optim` gives. The packages inside it have a page each, for who works on them: "
        f"{', '.join(f'[{package}]({package}.md)' for package in PACKAGES)}.\n\n"
        + "".join(f"::: {reference.path_of(name)}\n\n" for name in _face(names))
    }
    for package in PACKAGES:
        modules = "".join(
            f"## {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n"
            "      show_root_toc_entry: false\n      heading_level: 3\n\n"
            for name in _modules(package)
        )
        pages[package] = f"# {package}\n\n::: ds_optim.{package}\n    options:\n      show_root_heading: false\n"
        pages[package] += f"      show_root_toc_entry: false\n      members: false\n\n{modules}"
    return pages


def _face(names: Iterable[str]) -> list[str]:
    """Functions first, then classes."""
    return sorted(names, key=lambda name: (name[0].isupper(), name))


def _modules(package: str) -> Iterator[str]:
    for path in sorted((ROOT / "ds_optim" / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            yield ".".join(parts)


def main() -> None:
    for name in WRITTEN:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
