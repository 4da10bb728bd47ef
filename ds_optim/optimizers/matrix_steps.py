"""Steps of whole matrices: directions go straight into the exchange's messages, updates are applied straight from them.

The gradient is never written, so that no direction can be taken for one later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_optim.elementwise.blend import Blend, blend_into, direction
from ds_optim.elementwise.chunks import chunks
from ds_optim.elementwise.momentum import Stored, read_only
from ds_optim.elementwise.sign_rules import move_momentum
from ds_optim.elementwise.steps import apply_update
from ds_optim.optimizers.local import Local, run
from ds_optim.optimizers.matrices import MatrixWorker
from ds_optim.optimizers.parameters import measured
from ds_optim.optimizers.rules import Gate, MatrixUpdate, Measure, Piece
from ds_optim.sharding.layout import Slice

Opened = Mapping[int, bool]
"""By parameter, whether its gate is open: of all, or of those that this rank holds a part of."""


def step_matrices(local: Local, worker: MatrixWorker, update: MatrixUpdate) -> Opened:
    """Carry out ``update`` on every matrix of a unit; says which gates were open (all, for rules without)."""
    opened = dict.fromkeys(_present(local), True)
    if update.gate is not None:
        opened = _gates(local, worker, update.blend, update.gate)
        if update.gate.figure == "frobenius" and not any(opened.values()):  # known alike on all ranks
            _step_raw(local, update)
            return opened
    parameters, gradients = local.p, local.g

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        gradient = gradients[held.tensor]
        assert gradient is not None
        blend_into(messages[0], local.momentum(held), run(gradient, held), update.blend, local.scratch)
        for weights in messages[1:]:
            weights.copy_(run(parameters[held.tensor], held))

    def apply(held: Slice, result: Tensor) -> None:
        weights = run(parameters[held.tensor], held)
        if opened[held.param]:
            scale = worker.scale(held.param, update.scale)
            apply_update(weights, result, lr=update.lr, decay=update.decay, scale=scale, scratch=local.scratch)
        else:
            _apply_raw(local, update, weights, local.momentum(held))

    worker.run(fill, apply, update.scale, local.absent)
    return opened


def _present(local: Local) -> list[int]:
    """The parameters that take part: unsharded, those with a gradient."""
    absent = local.absent if local.unit.cut == "none" else ()
    return [param for param in range(len(local.unit.params)) if param not in absent]


def _step_raw(local: Local, update: MatrixUpdate) -> None:
    """Every gate is closed: nothing needs to travel."""
    for held in local.slices():
        gradient, momentum = local.g[held.tensor], local.momentum(held)
        assert gradient is not None
        move_momentum(momentum, run(gradient, held), update.blend, local.scratch)
        _apply_raw(local, update, run(local.p[held.tensor], held), momentum)


def _apply_raw(local: Local, update: MatrixUpdate, weights: Tensor, momentum: Tensor | Stored) -> None:
    """By the momentum itself, which has moved on and is the direction of every rule with a gate."""
    assert update.gate is not None
    assert update.blend.direction == update.blend.momentum
    apply_update(weights, momentum, lr=update.gate.lr, decay=update.decay, scratch=local.scratch)


def _gates(local: Local, worker: MatrixWorker, blend: Blend, gate: Gate) -> dict[int, bool]:
    """Which gates this step's directions open; nothing moves."""
    if gate.figure == "frobenius":
        measure = Measure(op="sum", columns=1, partial=lambda piece: [_square_sum(piece, blend)])
        rows = measured(local, measure)
        norms = [math.sqrt(total / worker.matrices_of(param)) for param, (total,) in enumerate(rows)]
        return {param: norms[param] >= gate.threshold for param in _present(local)}

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        piece = local.piece(held)
        buffers = local.scratch.take(2, piece.g)
        for m, g, out, a, b in chunks(read_only(piece.m), piece.g, messages[0], buffers=buffers):
            out.copy_(direction(m, g, blend, a, b))

    return worker.flags(fill, lambda matrices: _smallest_gap(matrices) >= gate.threshold, local.absent)


def _smallest_gap(matrices: Tensor) -> Tensor:
    """The smallest gap between singular values: (B, m, n) -> (B,); infinity for matrices that have but one."""
    sigma = torch.linalg.svdvals(matrices.float())
    if sigma.shape[-1] == 1:
        return torch.full(sigma.shape[:1], math.inf, device=sigma.device)
    return (sigma[:, :-1] - sigma[:, 1:]).amin(dim=-1)


def _square_sum(piece: Piece, blend: Blend) -> Tensor:
    """The sum of squares of the direction in fp64; nothing moves."""
    buffers = [*piece.scratch.take(2, piece.g), *piece.scratch.take(1, piece.g, torch.float64)]
    total = torch.zeros((), dtype=torch.float64, device=piece.g.device)
    for g, m, a, b, d in chunks(piece.g, read_only(piece.m), buffers=buffers):
        d.copy_(direction(m, g, blend, a, b))
        total += d.mul_(d).sum()
    return total
