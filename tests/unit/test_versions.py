"""What is installed, against the core's requirements and an extra's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ds_optim.cli.app import NEEDS, main
from ds_optim.errors import UserError
from ds_optim.zero import versions

DECLARED = [
    "torch<2.15,>=2.9",
    "deepspeed<0.20,>=0.19.8",
    'transformers<6,>=5; extra == "train"',
    'rich>=13; extra == "train"',
    'matplotlib>=3.8; extra == "report"',
    'ds-optim[report,train]; extra == "all"',
]
FINE = {"torch": "2.14.1+cpu", "deepspeed": "0.19.8", "transformers": "5.24.0", "rich": "15.0.0", "matplotlib": "3.11"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What seems to be installed; a test changes it."""
    found = dict(FINE)

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "requires", lambda name: DECLARED)
    monkeypatch.setattr(versions, "version", version)
    versions.check_versions.cache_clear()
    return found


CASES: Mapping[str, tuple[dict[str, str | None], str | None, str]] = {
    "old torch": (
        {"torch": "2.8.0"},
        None,
        "torch 2.8.0 is outside the supported range <2.15,>=2.9: pip install 'torch",
    ),
    "no DeepSpeed": ({"deepspeed": None}, None, "deepspeed<0.20,>=0.19.8 is not installed"),
    "no transformers": (
        {"transformers": None},
        "train",
        "ds-optim train needs transformers, which is not installed: pip install 'ds-optim[train]'",
    ),
    "transformers 4": (
        {"transformers": "4.57.0"},
        "train",
        "transformers 4.57.0 is outside the supported range <6,>=5",
    ),
    "no matplotlib": ({"matplotlib": None}, "report", "pip install 'ds-optim[report]'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_or_too_old_is_named(case: str, installed: dict[str, str]) -> None:
    changed, extra, line = CASES[case]
    for name, version in changed.items():
        installed.pop(name)
        if version is not None:
            installed[name] = version
    with pytest.raises(UserError, match=re.escape(line)):
        versions.check_versions() if extra is None else versions.check_extra(extra, "ds-optim train")
    # and nothing else asks for it
    for other in {"train", "report"} - {extra}:
        versions.check_extra(other, "ds-optim")
    if extra is not None:
        versions.check_versions()


def test_a_command_looks_before_it_begins(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    del installed["matplotlib"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--optimizers", "lion", "--steps", "1"])
    assert ended.value.code == 2
    assert "ds-optim compare needs matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert set(NEEDS) == {"train", "compare", "memory", "chaos", "report", "accept"}


def test_extras_are_those_that_the_messages_name() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in versions.EXTRA_OF.items():
        section = text.partition(f"\n{extra} = [")[2].partition("]")[0]
        assert module in section or module == "pyarrow", (module, extra)  # which datasets brings along
