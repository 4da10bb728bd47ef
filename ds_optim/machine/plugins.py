"""Files and modules of a user's own, imported for what they register: named by ``--plugin``, and in the environment."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_optim.errors import UserError

PLUGINS = "DS_OPTIM_PLUGINS"
"""Of the environment: files and modules with optimizers of a user's own, apart by os.pathsep; ranks inherit it."""


def plugins() -> list[str]:
    """Files and modules of a user's own that this process and its ranks import."""
    return [name for name in os.environ.get(PLUGINS, "").split(os.pathsep) if name]


def load_plugins(given: Sequence[str] = ()) -> None:
    """Import what the environment names, and then ``given``, which ranks started from here will import too.

    Raises:
        UserError: a file that is not there, or that fails.
    """
    named = dict.fromkeys([*plugins(), *(str(Path(n).resolve()) if n.endswith(".py") else n for n in given)])
    for name in named:
        _load(name)
    if named:
        os.environ[PLUGINS] = os.pathsep.join(named)


def _load(name: str) -> None:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        module = f"ds_optim_plugin_{path.stem}"
        loaded = sys.modules.get(module)
        if loaded is not None and loaded.__file__ == str(path):
            return
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    except Exception as problem:
        fault = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        raise UserError(
            f"the plugin {name} cannot be imported ({fault}): name a Python file or a module that calls "
            f"ds_optim.register, by --plugin or in {PLUGINS}"
        ) from problem
