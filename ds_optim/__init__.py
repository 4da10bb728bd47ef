"""One-momentum, matrix-aware optimizers that are right and cheap under every DeepSpeed ZeRO stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_optim.errors import UserError
from ds_optim.machine import held  # noqa: F401 (before torch: a signal may come while it is imported)
from ds_optim.optimizers import (
    LASM,
    OPTIMIZERS,
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
    ZeroOptimizer,
    full_momentum,
    param_groups,
    register,
    set_full_momentum,
)
from ds_optim.zero import from_config, initialize
from ds_optim.zero.checkpoints.load import load_checkpoint

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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[ZeroOptimizer]:
        """Whatever else is registered: a user's own, and those that no line above names."""
        if name in OPTIMIZERS:
            return OPTIMIZERS[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
