"""What a training rank holds (``account``) and will hold (``estimate``), its peak (``measure``, ``tracker``) and what
it sends (``traffic``)."""

from ds_optim.memory.account import MemoryAccount, account
from ds_optim.memory.estimate import MemoryEstimate, estimate
from ds_optim.memory.estimate_model import ModelShape, Parameter, shape_of_count, shape_of_list, shape_of_module
from ds_optim.memory.estimate_optimizers import OptimizerPlan, plan_optimizer
from ds_optim.memory.estimate_passes import Batch, ModelPasses
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.measure import MemoryWatch, Peak, peak_resident_bytes
from ds_optim.memory.passes import Moment, Passes
from ds_optim.memory.rank import RankMemory
from ds_optim.memory.tracker import TensorTracker
from ds_optim.memory.traffic import TrafficCounter

__all__ = [
    "Batch",
    "MemoryAccount",
    "MemoryEstimate",
    "MemoryWatch",
    "ModelPasses",
    "ModelShape",
    "Moment",
    "OptimizerPlan",
    "Parameter",
    "Passes",
    "Peak",
    "RankMemory",
    "TensorTracker",
    "TrafficCounter",
    "ZeroSettings",
    "account",
    "estimate",
    "peak_resident_bytes",
    "plan_optimizer",
    "shape_of_count",
    "shape_of_list",
    "shape_of_module",
]
