"""What is installed, and in which versions, against what the package declares: its core, and its extras."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_CORE = ("torch", "deepspeed")
EXTRA_OF = {
    **dict.fromkeys(("transformers", "datasets", "tokenizers", "pyarrow", "tensorboard"), "train"),
    **dict.fromkeys(("typer", "rich", "matplotlib", "jinja2"), "report"),
    "mpi4py": "mpi",
}
"""By module that only some commands import, the extra that installs it."""


@cache
def check_versions() -> None:
    """Compare the torch and DeepSpeed that are installed with the range that the package declares.

    Raises:
        UserError: one line that names the package, its version and the range.
    """
    for requirement in _declared(""):
        if requirement.name in _CORE:
            _check(requirement, str(requirement))


def check_extra(extra: str, command: str) -> None:
    """See that what a command needs beside the core is installed, in a version that it was written for.

    Raises:
        UserError: one line that names the extra to install.
    """
    for requirement in _declared(extra):
        try:
            version(requirement.name)
        except PackageNotFoundError:
            raise UserError(missing(requirement.name, extra, command)) from None
        _check(requirement, f"ds-optim[{extra}]")


def missing(module: str, extra: str, command: str) -> str:
    """What to say where ``command`` needs a package that is not there."""
    return f"{command} needs {module}, which is not installed: pip install 'ds-optim[{extra}]'"


def _declared(extra: str) -> Iterator[Requirement]:
    """The core's requirements, or those that an extra adds; none in a source tree that was never installed."""
    from packaging.requirements import Requirement

    try:
        lines = requires("ds-optim") or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        if optional == bool(extra) and (not optional or (marker is not None and marker.evaluate({"extra": extra}))):
            yield requirement


def _check(requirement: Requirement, install: str) -> None:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        raise UserError(f"{requirement} is not installed: pip install '{install}'") from None
    if not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
        raise UserError(
            f"{requirement.name} {installed} is outside the supported range {requirement.specifier}: "
            f"pip install '{install}'"
        )
