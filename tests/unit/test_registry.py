"""What is said once of a rule and an optimizer, and who reads it."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

import ds_optim
from ds_optim import optimizers
from ds_optim.cli.app import take_plugins
from ds_optim.errors import UserError
from ds_optim.job.presets import PRESETS, tuned_params
from ds_optim.machine.plugins import PLUGINS, load_plugins
from ds_optim.optimizers.options import known_keys
from ds_optim.optimizers.registry import DESCRIBED, OPTIMIZERS, register
from ds_optim.optimizers.rules import MEAN, PARAMETER, ROOT_SQUARES, ROW, RULES, Buffer, rule
from ds_optim.optimizers.saved import Identity, describe
from ds_optim.optimizers.table import COLUMNS, table
from ds_optim.optimizers.universal import check_universal
from ds_optim.optimizers.updates import SignUpdate, average
from tests.cases import CASES

PLUGIN = """
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import rule
from ds_optim.optimizers.updates import SignUpdate, average

@rule("halved")
def halved(group, step):
    return SignUpdate(blend=average(0.9), lr=group["lr"] / 2, decay=group["weight_decay"])

@register(rules="halved", step="half of it", moves="nothing", when="in this test")
class Halved(ZeroOptimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, **options):
        super().__init__(params, rule="halved", lr=lr, weight_decay=weight_decay, hyper={}, options=options)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PLUGINS, "")
    for names in (RULES, OPTIMIZERS, DESCRIBED):
        for name in ("halved", "Halved"):
            monkeypatch.delitem(names, name, raising=False)
    path = tmp_path / f"halved_{tmp_path.name}.py"
    path.write_text(PLUGIN, encoding="utf-8")
    yield path
    for names in (RULES, OPTIMIZERS, DESCRIBED):
        for name in ("halved", "Halved"):
            names.pop(name, None)


def shipped() -> list[str]:
    return [name for name, cls in OPTIMIZERS.items() if cls.__module__.startswith("ds_optim.")]


def test_every_shipped_optimizer_is_on_the_face_and_says_all_of_itself() -> None:
    for name in shipped():
        described = DESCRIBED[name]
        assert getattr(ds_optim, name) is getattr(optimizers, name) is described.cls
        assert described.step
        assert described.moves
        assert described.when
        for preset, tuned in described.tuned.items():
            assert preset in PRESETS
            assert set(tuned) <= known_keys(described.cls)
            assert tuned_params(preset, name) == tuned
        assert "lr" in inspect.signature(described.cls.__init__).parameters


def test_every_row_of_the_table_has_a_cell_for_each_column() -> None:
    rows = table().splitlines()
    assert len(rows) == 2 + len(DESCRIBED)
    for row in rows:
        assert row.replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_a_file_of_a_users_own_is_imported_once_and_by_ranks_too(plugin: Path) -> None:
    load_plugins([str(plugin)])
    load_plugins()
    assert os.environ[PLUGINS] == str(plugin)
    assert optimizers.canonical_type("halved") == "Halved"
    assert "`Halved`" in table()


def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS, "")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_that_there_is\n", encoding="utf-8")
    for name, fault in (
        (str(broken), "ModuleNotFoundError"),
        ("none.py", "FileNotFoundError"),
        ("no.module", "No module"),
    ):
        with pytest.raises(UserError, match=rf"the plugin .* cannot be imported .*{fault}.*--plugin"):
            load_plugins([name])
    assert os.environ[PLUGINS] == ""


def test_plugins_stand_anywhere_in_a_line() -> None:
    line = ["--plugin", "a.py", "train", "--steps", "4", "--plugin=b.py"]
    assert take_plugins(line) == (["train", "--steps", "4"], ["a.py", "b.py"])
    with pytest.raises(SystemExit):
        take_plugins(["train", "--plugin"])


def test_names_and_buffers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="the rule 'lion' is ds_optim"):
        rule("lion")(lambda group, step: SignUpdate(blend=average(0.9), lr=0.0, decay=0.0))
    for buffers in ((MEAN, ROOT_SQUARES), (Buffer("third"),), (MEAN, MEAN), (Buffer("x", "column"),)):
        with pytest.raises(ValueError, match="the rule 'new'"):
            rule("new", buffers=buffers)(lambda group, step: SignUpdate(blend=average(0.9), lr=0.0, decay=0.0))
    with pytest.raises(ValueError, match="which is not registered"):
        register(rules="unheard", step="", moves="", when="")(type("Unheard", (ds_optim.Lion,), {}))
    with pytest.raises(ValueError, match="the optimizer Lion is ds_optim"):
        register(rules="lion", step="", moves="", when="")(type("Lion", (ds_optim.Lion,), {}))


@pytest.mark.parametrize("name", CASES)
def test_what_ds_to_universal_leaves_behind_is_refused(name: str) -> None:
    """Whatever is kept by row or by parameter; state by element goes over, but for int8's scales."""
    case = CASES[name]
    lost = {ROW: "the values that it keeps for each row", PARAMETER: "the numbers that it keeps for each parameter"}
    lines = [lost[buffer.kind] for buffer in case.rule.buffers if buffer.kind in lost]
    for momentum_dtype in ("float32", "int8") if case.rule.narrow else ("float32",):
        own = Identity(
            optimizer=case.type, momentum_dtype=momentum_dtype, names=("a",), rules=(case.rule.name,), parameters=((),)
        )
        description = describe(own, [{"name": "a", "rule": case.rule.name}])
        expected = lines or (["the scales of its int8 momentum"] if momentum_dtype == "int8" else [])
        if not expected:
            check_universal(description, own)
            continue
        with pytest.raises(UserError, match=f"lacks {expected[0]}.* reshard SOURCE TARGET"):
            check_universal(description, own)
