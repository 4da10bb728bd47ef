"""Steps of whole matrices: directions go straight into the exchange's messages, updates are applied straight from them.

The gradient is never written, so that no direction can be taken for one later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

from torch import Tensor

from ds_optim.elementwise.blend import Blend, blend_into, direction_into, direction_squares
from ds_optim.elementwise.fused import together
from ds_optim.elementwise.sign_rules import move_momentum
from ds_optim.elementwise.steps import apply_update, copy_into, sign_step
from ds_optim.matrix.shapes import smallest_gap
from ds_optim.optimizers import at_once
from ds_optim.optimizers.local import Local, run
from ds_optim.optimizers.matrices import flags, scale_of, shaped
from ds_optim.optimizers.parameters import measured
from ds_optim.optimizers.rules import Rule
from ds_optim.optimizers.sharing import check_shared
from ds_optim.optimizers.updates import Gate, MatrixSignUpdate, MatrixUpdate, Measure, Piece
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.lines import Both, Lines

_GRADIENT = Blend((0.0, 1.0), (0.0, 1.0))
"""The gradient itself, as a direction."""

Opened = Mapping[int, bool]
"""By parameter, whether its gate is open: of all, or of those that this rank holds a part of."""


def step_matrices(local: Local, rule: Rule, exchange: Exchange, update: MatrixUpdate) -> Opened:
    """Carry out ``update`` on every matrix of a unit; says which gates were open (all, for rules without)."""
    check_shared(local, exchange, whole=update.gate is not None or update.finish is not None)
    opened = dict.fromkeys(local.params(), True)
    if update.gate is not None:
        opened = _gates(local, exchange, update.blend, update.gate)
        if update.gate.figure == "frobenius" and not any(opened.values()):  # known alike on all ranks
            _step_raw(local, update)
            return opened

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        piece = local.piece(held)
        blend_into(messages[0], piece.m, piece.g, update.blend, local.scratch)
        for message, part in zip(messages[1:], exchange.plan.there[1:], strict=True):
            copy_into(message, local.rows(held, rule) if part.per_row else run(local.p[held.tensor], held))

    views = exchange.plan.views
    scale_by = cache(partial(scale_of, name=update.scale))

    def apply(held: Slice, results: Sequence[Tensor]) -> None:
        for moved in results[1:]:
            copy_into(local.rows(held, rule), moved)
        rates = {"lr": update.lr, "decay": update.decay, "scale": scale_by(views[held.param])}
        for part, change in _parts(local, held, results[0]):
            if not opened[held.param]:
                _apply_raw(local, local.piece(part), update)
                continue
            weights = local.weights(part)
            with local.decaying(weights, update.lr):
                apply_update(weights, change, **rates, scratch=local.scratch)

    def fill_all(lines: Lines, messages: Sequence[Tensor]) -> bool:
        return at_once.fill(local, rule, lines, exchange.plan.there, update.blend, messages)

    def apply_all(lines: Lines, results: Sequence[Tensor]) -> bool:
        return all(opened.values()) and at_once.apply(local, rule, lines, update, lambda p: scale_by(views[p]), results)

    solve = shaped(exchange.plan, update.scale, update.finish)
    exchange.run(Both(fill, fill_all), solve, Both(apply, apply_all), local.absent)
    return opened


def step_by_shaped_gradients(local: Local, exchange: Exchange, update: MatrixSignUpdate) -> None:
    """Carry out ``update`` on every matrix of a unit; momentum moves when its matrix's result is there."""
    check_shared(local, exchange)

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        blend_into(messages[0], None, local.piece(held).g, _GRADIENT, local.scratch)

    def apply(held: Slice, results: Sequence[Tensor]) -> None:
        rates = {"lr": update.lr, "decay": update.decay}
        for part, shaped_gradient in _parts(local, held, results[0].to(local.p[held.tensor].device)):
            piece, gradient = local.piece(part), local.read(held, shaped_gradient)
            with local.decaying(piece.p, update.lr):
                sign_step(piece.p, piece.m, gradient, blend=update.blend, **rates, scratch=local.scratch)

    exchange.run(
        Both(fill, lambda lines, messages: at_once.fill_gradients(local, lines, messages)),
        shaped(exchange.plan, None),
        Both(apply, lambda lines, results: at_once.apply_signs(local, lines, update, results)),
        local.absent,
    )


def _step_raw(local: Local, update: MatrixUpdate) -> None:
    """Every gate is closed: nothing needs to travel."""
    with together():
        for held in local.slices():
            piece = local.piece(held)
            move_momentum(piece.m, piece.g, update.blend, local.scratch)
    with together():
        for held in local.slices():
            for piece in map(local.piece, local.parts(held)):
                _apply_raw(local, piece, update)


def _parts(local: Local, held: Slice, result: Tensor) -> Iterator[tuple[Slice, Tensor]]:
    """A slice in the parts that it is to be stepped in, each with its values of a result (n,) of the slice."""
    for part in local.parts(held):
        begin = part.start - held.start
        yield part, result if part is held else result[begin : begin + part.numel]


def _apply_raw(local: Local, piece: Piece, update: MatrixUpdate) -> None:
    """By the momentum itself, which has moved on and is the direction of every rule with a gate."""
    assert update.gate is not None
    assert update.blend.direction == update.blend.momentum
    with local.decaying(piece.p, update.gate.lr):
        apply_update(piece.p, piece.m, lr=update.gate.lr, decay=update.decay, scratch=piece.scratch)


def _gates(local: Local, exchange: Exchange, blend: Blend, gate: Gate) -> dict[int, bool]:
    """Which gates this step's directions open; nothing moves."""

    def partial(piece: Piece) -> list[Tensor]:
        return [direction_squares(piece.m, piece.g, blend, local.scratch)]

    if gate.figure == "frobenius":
        measure = Measure(op="sum", columns=1, partial=partial)
        rows = measured(local, measure)
        counts = [sum(count for count, _, _ in view.matrices()) for view in exchange.plan.views.values()]
        norms = [math.sqrt(total / count) for count, (total,) in zip(counts, rows, strict=True)]
        return {param: norms[param] >= gate.threshold for param in local.params()}

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        piece = local.piece(held)
        direction_into(messages[0], piece.m, piece.g, blend, local.scratch)

    return flags(exchange, fill, lambda matrices: smallest_gap(matrices) >= gate.threshold, local.absent)
