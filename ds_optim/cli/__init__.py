"""The command line, a file a command."""

from ds_optim.cli.app import main

__all__ = ["main"]
