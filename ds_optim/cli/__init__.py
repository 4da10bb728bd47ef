"""The command line, a file a command."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (``ds_optim.cli.app``), for which typer has to be installed."""
    try:
        from ds_optim.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        from ds_optim.cli.failing import fail
        from ds_optim.zero.versions import missing

        fail(f"{missing(error.name, 'report', 'the command line')}; 'ds-optim[all]' is for every command")
    app.main(argv)
