"""Steps of single elements: on whole flat tensors, padding included, where the parameter does not matter."""

from __future__ import annotations

from torch import Tensor

from ds_optim.elementwise.momentum import Stored
from ds_optim.elementwise.steps import adamw_step, sign_step
from ds_optim.optimizers.local import Local, flat, run
from ds_optim.optimizers.rules import MOMENTUM, SECOND_MOMENT, AdamWUpdate, SignUpdate


def step_elements(local: Local, update: SignUpdate | AdamWUpdate) -> None:
    """Step every tensor of a unit that has a gradient, in one pass over memory."""
    if isinstance(update, SignUpdate) and _rounds_by_parameter(local):
        for held in local.slices():
            gradient = local.g[held.tensor]
            assert gradient is not None
            _sign(local, update, run(local.p[held.tensor], held), local.momentum(held), run(gradient, held))
        return
    for p, g, state in zip(local.p, local.g, local.states, strict=True):
        if g is None:
            continue
        if isinstance(update, SignUpdate):
            _sign(local, update, p, flat(state[MOMENTUM]) if MOMENTUM in state else None, g)
        else:
            _adamw(local, update, p, flat(state[MOMENTUM]), flat(state[SECOND_MOMENT]), g)


def _rounds_by_parameter(local: Local) -> bool:
    """Momentum in fewer bits is rounded with noise that is a function of the parameter."""
    state = local.states[0]
    return MOMENTUM in state and state[MOMENTUM].dtype != local.p[0].dtype


def _sign(local: Local, update: SignUpdate, p: Tensor, m: Tensor | Stored | None, g: Tensor) -> None:
    sign_step(p, m, g, blend=update.blend, lr=update.lr, decay=update.decay, scratch=local.scratch)


def _adamw(local: Local, update: AdamWUpdate, p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> None:
    adamw_step(
        p,
        m,
        v,
        g,
        lr=update.lr,
        betas=update.betas,
        eps=update.eps,
        decay=update.decay,
        step=update.step,
        scratch=local.scratch,
    )
