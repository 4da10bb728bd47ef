"""What each paper says, one small file each over one driver."""

from __future__ import annotations

from ds_optim.optimizers import adamw as _adamw  # noqa: F401  (registers the aux rule)
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.lion_muon import LionMuon, SignMuon
from ds_optim.optimizers.muon import Muon, Muonlight
from ds_optim.optimizers.options import known_keys
from ds_optim.optimizers.routing import param_groups
from ds_optim.optimizers.signum import SignSGD, Signum

OPTIMIZERS: dict[str, type[ZeroOptimizer]] = {
    cls.__name__: cls for cls in (Lion, SignSGD, Signum, Muon, Muonlight, LionMuon, SignMuon)
}
"""The JSON types that mean this package."""

__all__ = ["OPTIMIZERS", "ZeroOptimizer", "known_keys", "param_groups", *OPTIMIZERS]
