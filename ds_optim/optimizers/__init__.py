"""What each paper says, one small file each over one driver."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.cautious_lion import CautiousLion
from ds_optim.optimizers.clion import CLion
from ds_optim.optimizers.dion2 import Dion2
from ds_optim.optimizers.lamb import Lamb
from ds_optim.optimizers.lasm import LASM
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.lion_muon import LionMuon, SignMuon
from ds_optim.optimizers.mimuon import MiMuon
from ds_optim.optimizers.momenta import full_momentum, set_full_momentum
from ds_optim.optimizers.muon import Muon, Muonlight
from ds_optim.optimizers.muon_h import MuonH
from ds_optim.optimizers.nor_muon import NorMuon
from ds_optim.optimizers.options import known_keys
from ds_optim.optimizers.qk_clip import QKClip
from ds_optim.optimizers.registry import OPTIMIZERS, canonical_type, register
from ds_optim.optimizers.routing import param_groups
from ds_optim.optimizers.signum import SignSGD, Signum
from ds_optim.optimizers.spectral_lion import SpectralLion
from ds_optim.optimizers.stable_adamw import StableAdamW
from ds_optim.optimizers.stable_lion import StableLion
from ds_optim.optimizers.sto_sign_sgd import StoSignSGD

# A file here that registers an optimizer needs no other line to be known; those above are for who types their names.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "LASM",
    "OPTIMIZERS",
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
    "ZeroOptimizer",
    "canonical_type",
    "full_momentum",
    "known_keys",
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
