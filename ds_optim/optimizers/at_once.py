"""Steps of all slices of a flat partition in one call of a compiled kernel, on a CPU: their bits are those of calls of
their own, and Python a step does not grow with their number.

Each says whether it could do the work; if not, nothing that is kept was touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.native import tables
from ds_optim.elementwise.steps import adamw_numbers
from ds_optim.matrix.shapes import Part
from ds_optim.optimizers.local import Local, as_stored
from ds_optim.optimizers.rules import Rule
from ds_optim.optimizers.updates import AdamWUpdate, MatrixSignUpdate, MatrixUpdate, SignUpdate
from ds_optim.sharding.lines import Lines

_ITSELF = (0.0, 1.0, 0.0, 1.0)
"""What is read, as a direction."""


def can(local: Local) -> bool:
    """Whether a unit is one flat partition on a CPU, stepped slice by slice with nothing around it."""
    return local.unit.cut != "none" and local.tensors[0].device.type == "cpu" and not local.cautious_decay


def step(local: Local, update: SignUpdate | AdamWUpdate) -> bool:
    """The step of single elements, of all slices."""
    if not can(local) or local.lines is None:
        return False
    table, whole, factor = local.lines.table(), local.whole, 1 - update.lr * update.decay
    if isinstance(update, SignUpdate):
        weights = update.blend.weights
        return tables.sign_steps(table, whole.p, whole.momentum, whole.g, weights, update.lr, factor)
    assert isinstance(whole.momentum, Tensor)
    assert whole.second is not None
    rates = {"lr": update.lr, "decay": update.decay, "eps": update.eps}
    numbers = adamw_numbers(**rates, betas=update.betas, step=update.step)
    return tables.adamw_steps(table, whole.p, whole.momentum, whole.second, whole.g, numbers)


def fill(local: Local, rule: Rule, lines: Lines, parts: Sequence[Part], blend: Blend, outs: Sequence[Tensor]) -> bool:
    """Directions of slices, the first of the parts that go to owners, and weights and rows behind them."""
    if not can(local):
        return False
    whole = local.whole
    for number, (part, out) in enumerate(zip(parts[1:], outs[1:], strict=True), 1):
        if part.per_row:
            torch._foreach_copy_(list(lines.cut(number, out)), [local.rows(held, rule) for held in lines.slices])
        elif not tables.blends(lines.table(number), out, None, whole.p, _ITSELF):
            return False
    return tables.blends(lines.table(), outs[0], whole.momentum, whole.g, blend.weights)


def fill_gradients(local: Local, lines: Lines, outs: Sequence[Tensor]) -> bool:
    return can(local) and tables.blends(lines.table(), outs[0], None, local.whole.g, _ITSELF)


def apply(
    local: Local,
    rule: Rule,
    lines: Lines,
    update: MatrixUpdate,
    scale_of: Callable[[int], float],
    results: Sequence[Tensor],
) -> bool:
    """Updates of slices by their owners' results, and rows that come back behind them."""
    if not can(local):
        return False
    for number, moved in enumerate(results[1:], 1):
        torch._foreach_copy_([local.rows(held, rule) for held in lines.slices], list(lines.cut(number, moved)))
    table = lines.table(scale=update.scale, scale_of=scale_of)
    return tables.apply_updates(table, local.whole.p, results[0], update.lr, 1 - update.lr * update.decay)


def apply_signs(local: Local, lines: Lines, update: MatrixSignUpdate, results: Sequence[Tensor]) -> bool:
    """Signs of blends of momentum and owners' results."""
    if not can(local):
        return False
    weights, factor, whole = update.blend.weights, 1 - update.lr * update.decay, local.whole
    gradient = as_stored(results[0], local.key)
    return tables.sign_steps(lines.table(), whole.p, whole.momentum, gradient, weights, update.lr, factor)
