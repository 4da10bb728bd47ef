"""Steps of single elements, padding included: whose parameter they are does not matter."""

from __future__ import annotations

from torch import Tensor

from ds_optim.elementwise.steps import adamw_step, sign_step
from ds_optim.optimizers.local import Local, flat
from ds_optim.optimizers.rules import MOMENTUM, SECOND_MOMENT, AdamWUpdate, SignUpdate


def step_elements(local: Local, update: SignUpdate | AdamWUpdate) -> None:
    """Step every tensor of a unit that has a gradient, in one pass over memory."""
    for number, (p, g) in enumerate(zip(local.p, local.g, strict=True)):
        if g is None:
            continue
        state = local.states[number]
        m: Tensor | None = flat(state[MOMENTUM]) if MOMENTUM in state else None
        if isinstance(update, SignUpdate):
            sign_step(p, m, g, blend=update.blend, lr=update.lr, decay=update.decay, scratch=local.scratch)
            continue
        assert m is not None
        adamw_step(
            p,
            m,
            flat(state[SECOND_MOMENT]),
            g,
            lr=update.lr,
            betas=update.betas,
            eps=update.eps,
            decay=update.decay,
            step=update.step,
            scratch=local.scratch,
        )
