"""Steps of whole matrices: directions go straight into the exchange's messages, updates are applied straight from them.

The gradient is never written, so that no direction can be taken for one later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_optim.elementwise.blend import Blend, blend_into, direction_into, direction_squares
from ds_optim.elementwise.momentum import Flat
from ds_optim.elementwise.sign_rules import move_momentum
from ds_optim.elementwise.steps import apply_update, sign_step
from ds_optim.matrix.shapes import smallest_gap
from ds_optim.optimizers.local import Local, run
from ds_optim.optimizers.matrices import MatrixWorker
from ds_optim.optimizers.parameters import measured
from ds_optim.optimizers.rules import Gate, MatrixSignUpdate, MatrixUpdate, Measure, Piece
from ds_optim.sharding.layout import Slice

_GRADIENT = Blend((0.0, 1.0), (0.0, 1.0))
"""The gradient itself, as a direction."""

Opened = Mapping[int, bool]
"""By parameter, whether its gate is open: of all, or of those that this rank holds a part of."""


def step_matrices(local: Local, worker: MatrixWorker, update: MatrixUpdate) -> Opened:
    """Carry out ``update`` on every matrix of a unit; says which gates were open (all, for rules without)."""
    opened = dict.fromkeys(local.params(), True)
    if update.gate is not None:
        opened = _gates(local, worker, update.blend, update.gate)
        if update.gate.figure == "frobenius" and not any(opened.values()):  # known alike on all ranks
            _step_raw(local, update)
            return opened

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        blend_into(messages[0], local.momentum(held), local.gradient(held), update.blend, local.scratch)
        for weights in messages[1:]:
            weights.copy_(run(local.p[held.tensor], held))

    def apply(held: Slice, result: Tensor) -> None:
        weights = local.weights(held)
        if opened[held.param]:
            scale = worker.scale(held.param, update.scale)
            apply_update(weights, result, lr=update.lr, decay=update.decay, scale=scale, scratch=local.scratch)
        else:
            _apply_raw(local, update, weights, local.momentum(held))

    worker.run(fill, apply, update.scale, local.absent)
    return opened


def step_by_shaped_gradients(local: Local, worker: MatrixWorker, update: MatrixSignUpdate) -> None:
    """Carry out ``update`` on every matrix of a unit; momentum moves when its matrix's result is there."""

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        blend_into(messages[0], None, local.gradient(held), _GRADIENT, local.scratch)

    def apply(held: Slice, result: Tensor) -> None:
        sign_step(
            local.weights(held),
            local.momentum(held),
            local.read(held, result.to(local.p[held.tensor].device)),
            blend=update.blend,
            lr=update.lr,
            decay=update.decay,
            scratch=local.scratch,
        )

    worker.run(fill, apply, None, local.absent)


def _step_raw(local: Local, update: MatrixUpdate) -> None:
    """Every gate is closed: nothing needs to travel."""
    for held in local.slices():
        piece = local.piece(held)
        move_momentum(piece.m, piece.g, update.blend, local.scratch)
        _apply_raw(local, update, piece.p, piece.m)


def _apply_raw(local: Local, update: MatrixUpdate, weights: Flat, momentum: Flat) -> None:
    """By the momentum itself, which has moved on and is the direction of every rule with a gate."""
    assert update.gate is not None
    assert update.blend.direction == update.blend.momentum
    apply_update(weights, momentum, lr=update.gate.lr, decay=update.decay, scratch=local.scratch)


def _gates(local: Local, worker: MatrixWorker, blend: Blend, gate: Gate) -> dict[int, bool]:
    """Which gates this step's directions open; nothing moves."""

    def partial(piece: Piece) -> list[Tensor]:
        return [direction_squares(piece.m, piece.g, blend, local.scratch)]

    if gate.figure == "frobenius":
        measure = Measure(op="sum", columns=1, partial=partial)
        rows = measured(local, measure)
        norms = [math.sqrt(total / worker.matrices_of(param)) for param, (total,) in enumerate(rows)]
        return {param: norms[param] >= gate.threshold for param in local.params()}

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        piece = local.piece(held)
        direction_into(messages[0], piece.m, piece.g, blend, local.scratch)

    return worker.flags(fill, lambda matrices: smallest_gap(matrices) >= gate.threshold, local.absent)
