"""The versions of the libraries that this release was written against."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from ds_optim.errors import UserError

_CHECKED = ("torch", "deepspeed", "transformers", "datasets")


@cache
def check_versions() -> None:
    """Compare what is installed with the range that the package declares.

    Raises:
        UserError: one line that names the package, its version and the range.
    """
    try:
        declared = [Requirement(line) for line in requires("ds-optim") or []]
    except PackageNotFoundError:  # run from a source tree that was never installed
        return
    for requirement in declared:
        if requirement.name not in _CHECKED or requirement.marker is not None:
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            raise UserError(f"{requirement} is not installed: pip install '{requirement}'") from None
        if not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            raise UserError(
                f"{requirement.name} {installed} is outside the supported range {requirement.specifier}: "
                f"pip install '{requirement}'"
            )
