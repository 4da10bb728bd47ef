"""One-momentum, matrix-aware optimizers that are right and cheap under every DeepSpeed ZeRO stage.

Neither torch nor anything of this package that needs it is imported before one of the names below is asked for: the
command line shows its help without.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ds_optim.errors import UserError
from ds_optim.machine import held  # noqa: F401 (before torch: a signal may come while it is imported)
from ds_optim.sharding.later import register_later

if TYPE_CHECKING:
    from ds_optim.optimizers import (
        LASM,
        CautiousLion,
        CLion,
        Dion2,
        Lamb,
        Lion,
        LionMuon,
        MiMuon,
        Muon,
        MuonH,
        Muonlight,
        NorMuon,
        QKClip,
        SignMuon,
        SignSGD,
        Signum,
        SpectralLion,
        StableAdamW,
        StableLion,
        StoSignSGD,
        full_momentum,
        param_groups,
        register,
        set_full_momentum,
    )
    from ds_optim.zero.checkpoints.load import load_checkpoint
    from ds_optim.zero.config import from_config
    from ds_optim.zero.initialize import initialize

__version__ = "0.1.0"

__all__ = [
    "LASM",
    "CLion",
    "CautiousLion",
    "Dion2",
    "Lamb",
    "Lion",
    "LionMuon",
    "MiMuon",
    "Muon",
    "MuonH",
    "Muonlight",
    "NorMuon",
    "QKClip",
    "SignMuon",
    "SignSGD",
    "Signum",
    "SpectralLion",
    "StableAdamW",
    "StableLion",
    "StoSignSGD",
    "UserError",
    "from_config",
    "full_momentum",
    "initialize",
    "load_checkpoint",
    "param_groups",
    "register",
    "set_full_momentum",
]

_HOMES = {
    "from_config": "ds_optim.zero.config",
    "initialize": "ds_optim.zero.initialize",
    "load_checkpoint": "ds_optim.zero.checkpoints.load",
}
"""Of names that are not in ``ds_optim.optimizers``."""

register_later(lambda: import_module("ds_optim.zero.seam"))


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A name of ``__all__``, a room, or whatever else is registered: a user's own, and what no line above names."""
        if not name.startswith("_"):
            if find_spec(f"{__name__}.{name}") is not None:
                return import_module(f"{__name__}.{name}")
            home = import_module(_HOMES.get(name, "ds_optim.optimizers"))
            if hasattr(home, name):
                found = getattr(home, name)
                if name in __all__:  # a user's rule may be registered anew
                    globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
