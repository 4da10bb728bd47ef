"""What tells a user whether a rule is doing anything: counted while ``diagnostics`` is on, and only then.

For every parameter group, as ``group/name``: ``update rms / weight rms``, of the last step; ``zero updates``, the
fraction of weights that the rule left as decay had made them (sign 0, a closed gate, or an update below the
weight's last bit); and what the rule itself has to say (saturated trust ratios, smallest sigma, open gates).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import NARROW, wide
from ds_optim.optimizers.local import Local, run
from ds_optim.optimizers.updates import Decision, MatrixUpdate, ParameterUpdate, Update

logger = logging.getLogger("ds_optim.diagnostics")

_SMALLEST = "min "

Outcome = Mapping[int, Decision] | Mapping[int, bool]
"""By parameter: what was decided, or whether its gate was open."""


class Diagnostics:
    """Collects the units of a step; ``latest`` is the last complete picture."""

    def __init__(self) -> None:
        if not logger.hasHandlers():  # who asks for diagnostics and sets no logging up wants to see them
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.INFO)
        self._counts: dict[int, tuple[str, list[float]]] = {}
        self._shown: dict[int, list[Mapping[str, float]]] = {}
        self._step = 0

    @staticmethod
    def before(local: Local) -> list[Tensor]:
        """The weights of a unit: one copy of the partition, for the time of its step."""
        return [p.clone() for p in local.p]

    def after(self, unit: int, group: str, local: Local, old: list[Tensor], update: Update, own: Outcome) -> None:
        """Count what a unit's step has done: one all-reduce of four numbers, for gates another one of one a parameter.

        own: the rule's decisions, or its open gates.
        """
        counts = torch.zeros(4, dtype=torch.float64, device="cpu")
        decay = update.decay
        for held in local.slices():
            if local.is_counted_elsewhere(held.param):
                continue
            was, now = (run(values[held.tensor], held) for values in (old, local.p))
            # Weights that are rounded without bias do not say what decay alone had made of them: they moved or not.
            rates = [0.0] if was.dtype in NARROW else _decay_rates(update, own.get(held.param))
            was, now = was.to(wide(was.dtype)), now.to(wide(now.dtype))
            still = torch.zeros(was.shape, dtype=torch.bool, device=was.device)
            for lr in rates:
                # A step of zero is not away from zero: cautious decay is done then, as Local does it.
                left = was - was * (lr * local.cautious_decay) if local.cautious_decay else was * (1 - lr * decay)
                still |= now == left
            change = (now - was).double()
            sums = torch.stack([still.sum().double(), change.square().sum(), was.double().square().sum()])
            counts[:3] += sums.cpu()
            counts[3] += held.numel
        counts = local.comm.all_reduce(counts.to(local.comm.device(counts.device)))
        if local.tensor is not None:
            counts = local.tensor.all_reduce(counts)
        self._counts[unit] = group, counts.tolist()
        self._step = local.step
        self._shown[unit] = [value.shown for value in own.values() if isinstance(value, Decision)]
        if isinstance(update, MatrixUpdate) and update.gate is not None:
            self._shown[unit] = [{"open gates": flag} for flag in _joined(local, own) if math.isfinite(flag)]

    def forget(self, unit: int) -> None:
        """The unit took no part in this step."""
        self._counts.pop(unit, None)
        self._shown.pop(unit, None)

    @property
    def latest(self) -> dict[str, float]:
        """``group/name`` -> number."""
        found: dict[str, float] = {}
        for group in dict.fromkeys(name for name, _ in self._counts.values()):
            units = [unit for unit, (name, _) in self._counts.items() if name == group]
            still, change, weight, elements = (sum(self._counts[u][1][i] for u in units) for i in range(4))
            found[f"{group}/zero updates"] = still / max(elements, 1.0)
            found[f"{group}/update rms / weight rms"] = math.sqrt(change / weight) if weight else math.inf
            shown = [entry for unit in units for entry in self._shown[unit]]
            for name in dict.fromkeys(name for entry in shown for name in entry):
                values = [entry[name] for entry in shown if name in entry]
                joined = min(values) if name.startswith(_SMALLEST) else sum(values) / len(values)
                found[f"{group}/{name}"] = joined
        return found

    def log(self, rank: int) -> None:
        """One line on rank 0."""
        if rank == 0:
            logger.info("step %d: %s", self._step, ", ".join(f"{name} {v:.4g}" for name, v in self.latest.items()))


def _joined(local: Local, opened: Outcome) -> list[float]:
    """For each parameter of the unit whether its gate was open, as some rank has it; infinity where none has."""
    flags = torch.full((len(local.unit.params),), math.inf, dtype=torch.float64, device="cpu")
    for param, flag in opened.items():
        flags[param] = float(bool(flag))
    flags = flags.to(local.comm.device(flags.device))
    return [float(flag) for flag in local.comm.all_reduce(flags, "min").tolist()]


def _decay_rates(update: Update, own: Decision | bool | None) -> list[float]:
    """The step sizes by which a parameter may have decayed."""
    if isinstance(update, ParameterUpdate):
        assert isinstance(own, Decision)
        return [own.lr]
    gated = [update.gate.lr] if isinstance(update, MatrixUpdate) and update.gate is not None else []
    return [update.lr, *gated]
