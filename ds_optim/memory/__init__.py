"""What a training rank holds (``account``), its peak (``measure``, ``tracker``) and what it sends (``traffic``)."""

from ds_optim.memory.account import MemoryAccount, account
from ds_optim.memory.measure import PeakMemory, peak_resident_bytes
from ds_optim.memory.tracker import TensorTracker
from ds_optim.memory.traffic import TrafficCounter

__all__ = ["MemoryAccount", "PeakMemory", "TensorTracker", "TrafficCounter", "account", "peak_resident_bytes"]
