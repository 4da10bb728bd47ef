"""What each paper says, one small file each over one driver."""

from __future__ import annotations

from ds_optim.optimizers import adamw as _adamw  # noqa: F401  (registers the aux rule)
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.cautious_lion import CautiousLion
from ds_optim.optimizers.clion import CLion
from ds_optim.optimizers.lamb import Lamb
from ds_optim.optimizers.lasm import LASM
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.lion_muon import LionMuon, SignMuon
from ds_optim.optimizers.mimuon import MiMuon
from ds_optim.optimizers.momenta import full_momentum, set_full_momentum
from ds_optim.optimizers.muon import Muon, Muonlight
from ds_optim.optimizers.options import known_keys
from ds_optim.optimizers.routing import param_groups
from ds_optim.optimizers.signum import SignSGD, Signum
from ds_optim.optimizers.spectral_lion import SpectralLion
from ds_optim.optimizers.stable_adamw import StableAdamW
from ds_optim.optimizers.stable_lion import StableLion
from ds_optim.optimizers.sto_sign_sgd import StoSignSGD

_CLASSES: tuple[type[ZeroOptimizer], ...] = (
    *(Lion, SignSGD, Signum, CautiousLion, CLion, StableLion, LASM, StoSignSGD),
    *(Muon, Muonlight, LionMuon, SignMuon, MiMuon, SpectralLion),
    *(Lamb, StableAdamW),
)

OPTIMIZERS = {cls.__name__: cls for cls in _CLASSES}
"""The JSON types that mean this package."""

__all__ = [
    "OPTIMIZERS",
    "ZeroOptimizer",
    "full_momentum",
    "known_keys",
    "param_groups",
    "set_full_momentum",
    *OPTIMIZERS,
]
