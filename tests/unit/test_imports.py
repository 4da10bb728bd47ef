"""Imports go one way: a room of the package knows only the rooms below it, and `import ds_optim` is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_optim"
LEVELS = (
    {"errors"},
    {"machine"},
    {"matrix", "elementwise"},
    {"sharding"},
    {"optimizers"},
    {"zero"},
    {"__init__"},
    {"hf"},
    {"job"},
    {"memory"},
    {"report"},
    {"data"},
    {"cluster"},
    {"survival"},
    {"train"},
    {"sweep"},
    {"bench", "chaos"},
    {"accept"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
TORCH_ALONE = {"matrix", "elementwise"}
WITHOUT_DEEPSPEED = {"errors", "matrix", "elementwise", "sharding", "optimizers"}
HEAVY = ("deepspeed", "transformers", "datasets", "matplotlib")

MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, anywhere in it, those for type checking included."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def complaints(path: Path) -> list[str]:
    """What a module imports and may not."""
    room = room_of(path)
    found = []
    for name in imports(path):
        top, *rest = name.split(".")
        if top == PACKAGE.name:
            target = rest[0] if rest else "__init__"
            # what is no room is a name that the package's face shows
            target = target if target in LEVEL else "__init__"
            wrong = target != room and LEVEL[target] >= LEVEL[room]
        elif room in TORCH_ALONE:
            known = {"torch", "triton"} if path.parent.name == "gpu" else {"torch"}
            wrong = top not in known and top not in sys.stdlib_module_names
        else:
            wrong = top == "deepspeed" and room in WITHOUT_DEEPSPEED
        if wrong:
            found.append(f"{room} imports {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert complaints(MODULES[module]) == []


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in MODULES.values()} <= set(LEVEL)


def test_the_check_sees_wrong_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ds_optim")
    wrong = {
        "matrix/a.py": ["import numpy", "from ds_optim.sharding import layout", "from ..elementwise import blend"],
        "optimizers/b.py": ["def f() -> None:\n    import deepspeed.comm", "from ds_optim import zero"],
        "report/c.py": ["import ds_optim.cli.app", "from ds_optim.train import loop"],
        "zero/d.py": ["from ds_optim import Lion", "import ds_optim"],
    }
    right = ["import math", "import torch", "from ds_optim.errors import UserError", "from . import other"]
    for name, lines in wrong.items():
        path = tmp_path / "ds_optim" / name
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines + right))
        assert len(complaints(path)) == len(lines), complaints(path)


def imported(code: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that a process of its own has imported after ``code``."""
    asked = f"import json, sys\n{code}\nprint(json.dumps([m for m in {names!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=120, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("ds_optim", (*HEAVY, "torch", "pydantic")), ("ds_optim.optimizers", HEAVY), ("ds_optim.hf", HEAVY)],
)
def test_import_is_light(module: str, heavy: Sequence[str]) -> None:
    assert imported(f"import {module}", heavy) == []


def test_no_help_imports_torch() -> None:
    code = """
from typer.main import get_command
from ds_optim.cli import main
from ds_optim.cli.app import app

def lines(command, path):
    yield [*path, "--help"]
    for name, inner in getattr(command, "commands", {}).items():
        yield from lines(inner, [*path, name])

shown = 0
for line in lines(get_command(app), []):
    try:
        main(line)
    except SystemExit as end:
        assert end.code == 0, line
        shown += 1
assert shown >= 20, shown
"""
    assert imported(code, (*HEAVY, "torch")) == []


def test_an_optimizer_finds_its_partitions_whatever_was_imported() -> None:
    """What knows ZeRO's partitions registers when first asked for, though an optimizer's file alone is imported."""
    one = "import torch\nfrom ds_optim.optimizers.lion import Lion\n"
    seam = ("ds_optim.zero.seam",)
    assert imported(one, seam) == []
    assert imported(f"{one}Lion([torch.nn.Parameter(torch.ones(4))])", seam) == [*seam]
