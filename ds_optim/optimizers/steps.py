"""From each kind of update to the code that carries it out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from ds_optim.optimizers.diagnostics import Outcome
from ds_optim.optimizers.elements import step_elements
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.matrix_steps import step_by_shaped_gradients, step_matrices
from ds_optim.optimizers.parameters import step_parameters
from ds_optim.optimizers.row_steps import step_rows
from ds_optim.optimizers.rules import Group, Rule
from ds_optim.optimizers.updates import MatrixSignUpdate, MatrixUpdate, ParameterUpdate, RowsUpdate, Update
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange


def carry_out(local: Local, rule: Rule, exchange: Exchange | None, update: Update) -> Outcome:
    """Step a unit; what was decided for its parameters. exchange: of a rule with a shape."""
    if isinstance(update, ParameterUpdate):
        return step_parameters(local, rule, update)
    if not isinstance(update, MatrixUpdate | MatrixSignUpdate | RowsUpdate):
        step_elements(local, update)
        return {}
    assert exchange is not None, f"{rule.name} was registered without a shape"
    if isinstance(update, MatrixUpdate):
        opened = step_matrices(local, rule, exchange, update)
        return opened if update.gate is not None else {}
    if isinstance(update, MatrixSignUpdate):
        step_by_shaped_gradients(local, exchange, update)
    else:
        step_rows(local, exchange, update)
    return {}


def finite(groups: Sequence[Group], peers: Comm | None = None) -> bool:
    """Whether every gradient is: the ranks hold the same bits here, so they agree without asking.

    peers: the ranks to ask, where each has shards or experts of its own. The host waits for a device once.
    """
    gradients = [t.grad for group in groups for t in group["params"] if t.grad is not None and t.grad.numel()]
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for g in gradients:
        alike[g.device, g.dtype].append(g.detach())
    flags: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for (device, _), tensors in alike.items():
        flags[device].append(torch.isfinite(torch.stack(_extremes(tensors, device))).all())
    own = all(bool(torch.stack(of_dtypes).all()) for of_dtypes in flags.values())
    if peers is None:
        return own
    flag = torch.tensor([float(own)], dtype=torch.float32, device=peers.device(torch.device("cpu")))
    return bool(peers.all_reduce(flag, "min") > 0)


def _extremes(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Numbers that are finite where all elements are, in one pass over memory."""
    if device.type == "cpu":  # a NaN is both of the extremes, an infinity one of them
        return [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    return list(torch._foreach_norm(tensors, math.inf))  # of many tensors a launch; on a CPU 20 times as slow
