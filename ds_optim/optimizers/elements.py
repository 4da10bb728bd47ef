"""Steps of single elements: on whole flat tensors, padding included, where the parameter does not matter."""

from __future__ import annotations

from torch import Tensor

from ds_optim.elementwise.fused import together
from ds_optim.elementwise.momentum import Flat
from ds_optim.elementwise.steps import adamw_step, sign_step
from ds_optim.optimizers import at_once
from ds_optim.optimizers.local import Local, flat
from ds_optim.optimizers.rules import MOMENTUM, SECOND_MOMENT
from ds_optim.optimizers.updates import AdamWUpdate, SignUpdate


def step_elements(local: Local, update: SignUpdate | AdamWUpdate) -> None:
    """Step every tensor of a unit that has a gradient, in one pass over memory."""
    with together():
        if local.rounds and at_once.step(local, update):
            return
        if local.rounds or local.cautious_decay:
            for held in local.slices():
                for piece in map(local.piece, local.parts(held)):
                    with local.decaying(piece.p, update.lr):
                        _step(local, update, piece.p, piece.momentum, piece.second, piece.g)
            return
        for p, g, state in zip(local.p, local.g, local.states, strict=True):
            if g is not None:
                m, v = (flat(state[key]) if key in state else None for key in (MOMENTUM, SECOND_MOMENT))
                _step(local, update, p, m, v, g)


def _step(local: Local, update: SignUpdate | AdamWUpdate, p: Flat, m: Flat | None, v: Tensor | None, g: Flat) -> None:
    lr, decay, scratch = update.lr, update.decay, local.scratch
    if isinstance(update, SignUpdate):
        sign_step(p, m, g, blend=update.blend, lr=lr, decay=decay, scratch=scratch)
        return
    assert isinstance(m, Tensor)
    assert v is not None
    rates = {"lr": lr, "decay": decay, "eps": update.eps}
    adamw_step(p, m, v, g, **rates, betas=update.betas, step=update.step, scratch=scratch)
