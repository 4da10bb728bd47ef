"""Steps of some rows of each matrix: the ranks agree which, and these alone travel and are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_optim.elementwise.fused import together
from ds_optim.elementwise.sign_rules import move_momentum
from ds_optim.elementwise.steps import apply_update
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.matrices import scale_of, shaped
from ds_optim.optimizers.updates import Piece, RowsUpdate
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.selection import add_row_sums, choose_rows, chosen_of


def step_rows(local: Local, exchange: Exchange, update: RowsUpdate) -> None:
    """Carry out ``update`` on every matrix of a unit."""
    views, unit, rank = exchange.plan.views, local.unit, local.comm.rank
    chosen = choose_rows(exchange, _moved(local, exchange, update), local.tensors[0].device)
    smaller = chosen_of(exchange, chosen)

    def walk(run: Slice) -> Iterator[tuple[Piece, Tensor, slice]]:
        """The slice that a run of chosen rows is in, part by part: the numbers of its elements of such rows, and their
        place there. How many they are is known, so that nobody waits for the device to count them."""
        held = unit.slice_of(run.param, rank)
        assert held is not None
        rows = chosen[run.param]
        for part in local.chunks(held):
            first, last = rows.run(part)
            of_rows = rows.mask(part).nonzero_static(size=last - first).squeeze(1)
            yield local.piece(part), of_rows, slice(first - run.start, last - run.start)

    def fill(run: Slice, messages: Sequence[Tensor]) -> None:
        for piece, elements, place in walk(run):
            messages[0][place].copy_(piece.wide_m.index_select(0, elements))

    def apply(run: Slice, results: Sequence[Tensor]) -> None:
        scale = scale_of(views[run.param], update.scale)
        for piece, elements, place in walk(run):
            with local.scratch.lend(piece.wide_m, 1) as (change,):
                change.zero_().index_copy_(0, elements, results[0][place].to(change))
                with local.decaying(piece, update.lr), together():  # a step of its own: ``change`` is used again
                    apply_update(piece.p, change, lr=update.lr, decay=update.decay, scale=scale, scratch=local.scratch)
                piece.wide_m.mul_(change.fill_(1.0).index_fill_(0, elements, update.kept))

    smaller.run(fill, shaped(smaller.plan, update.scale), apply, local.absent)


def _moved(local: Local, exchange: Exchange, update: RowsUpdate) -> dict[int, Tensor]:
    """By parameter, what this rank holds of the sums of its rows' magnitudes, once momentum has moved on."""
    sums = {}
    for held in local.slices():
        piece, view = local.piece(held), exchange.plan.views[held.param]
        move_momentum(piece.m, piece.g, update.blend, local.scratch)
        momentum = piece.wide_m
        sums[held.param] = torch.zeros(view.of_rows.numel, dtype=torch.float64, device=momentum.device)
        add_row_sums(view, held.start, momentum, sums[held.param])
    return sums
