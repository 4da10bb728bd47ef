"""One-momentum, matrix-aware optimizers that are right and cheap under every DeepSpeed ZeRO stage."""

from __future__ import annotations

from ds_optim.errors import UserError
from ds_optim.optimizers import Lion, LionMuon, Muon, Muonlight, SignMuon, SignSGD, Signum, param_groups
from ds_optim.zero import from_config, initialize

__version__ = "0.1.0"

__all__ = [
    "Lion",
    "LionMuon",
    "Muon",
    "Muonlight",
    "SignMuon",
    "SignSGD",
    "Signum",
    "UserError",
    "from_config",
    "initialize",
    "param_groups",
]
