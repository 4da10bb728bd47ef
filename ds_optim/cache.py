"""Where this package keeps what it has made or measured on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$DS_OPTIM_CACHE``, else ``ds_optim`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet."""
    own = os.environ.get("DS_OPTIM_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ds_optim"
