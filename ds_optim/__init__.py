"""One-momentum, matrix-aware optimizers that are right and cheap under every DeepSpeed ZeRO stage."""

from __future__ import annotations

from ds_optim.errors import UserError
from ds_optim.optimizers import (
    LASM,
    CautiousLion,
    CLion,
    Lamb,
    Lion,
    LionMuon,
    MiMuon,
    Muon,
    Muonlight,
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
from ds_optim.zero import from_config, initialize

__version__ = "0.1.0"

__all__ = [
    "LASM",
    "CLion",
    "CautiousLion",
    "Lamb",
    "Lion",
    "LionMuon",
    "MiMuon",
    "Muon",
    "Muonlight",
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
    "param_groups",
    "register",
    "set_full_momentum",
]
