"""Steps of some rows of each matrix: the ranks agree which, and these alone travel and are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ds_optim.elementwise import fused
from ds_optim.elementwise.chosen import Rows
from ds_optim.elementwise.sign_rules import move_momentum
from ds_optim.elementwise.steps import apply_update
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.matrices import scale_of, shaped
from ds_optim.optimizers.updates import Piece, RowsUpdate
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.selection import Sums, add_row_sums, choose_rows, chosen_of


def step_rows(local: Local, exchange: Exchange, update: RowsUpdate) -> None:
    """Carry out ``update`` on every matrix of a unit."""
    views, unit, rank = exchange.plan.views, local.unit, local.comm.rank
    chosen = choose_rows(exchange, _moved(local, exchange, update))
    smaller = chosen_of(exchange, chosen)

    def walk(run: Slice) -> Iterator[tuple[Piece, Rows, Slice]]:
        """The slice that a run of chosen rows is in, part by part."""
        held = unit.slice_of(run.param, rank)
        assert held is not None
        for part in local.chunks(held):
            yield local.piece(part), chosen[run.param].rows(part, run), part

    def elements(run: Slice, part: Slice) -> tuple[Tensor, slice]:
        """The numbers of a part's elements of chosen rows, and their place in the run. How many they are is known, so
        that nobody waits for the device to count them."""
        rows = chosen[run.param]
        first, last = rows.run(part)
        of_rows = rows.mask(part).nonzero_static(size=last - first).squeeze(1)
        return of_rows, slice(first - run.start, last - run.start)

    def fill(run: Slice, messages: Sequence[Tensor]) -> None:
        for piece, rows, part in walk(run):
            if not fused.step("gather_rows", (messages[0], piece.wide_m), (rows,)):
                numbers, place = elements(run, part)
                messages[0][place].copy_(piece.wide_m.index_select(0, numbers))

    def apply(run: Slice, results: Sequence[Tensor]) -> None:
        scale = scale_of(views[run.param], update.scale)
        for piece, rows, part in walk(run):
            with local.decaying(piece.p, update.lr):
                rates = update.lr * scale, 1 - update.lr * update.decay, update.kept
                if not fused.step("step_rows", (piece.p, piece.m, results[0]), (*rates, rows)):
                    step_eagerly(piece, scale, results[0], *elements(run, part))

    def step_eagerly(piece: Piece, scale: float, result: Tensor, numbers: Tensor, place: slice) -> None:
        rates = {"lr": update.lr, "decay": update.decay, "scale": scale}
        with local.scratch.lend(piece.wide_m, 1) as (change,):
            change.zero_().index_copy_(0, numbers, result[place].to(change))
            with fused.together():  # a step of its own: ``change`` is used again
                apply_update(piece.p, change, **rates, scratch=local.scratch)
            piece.wide_m.mul_(change.fill_(1.0).index_fill_(0, numbers, update.kept))

    smaller.run(fill, shaped(smaller.plan, update.scale), apply, local.absent)


def _moved(local: Local, exchange: Exchange, update: RowsUpdate) -> Sums:
    """What this rank holds of the sums of rows' magnitudes, once momentum has moved on."""
    device = local.tensors[0].device
    sums, after = Sums(exchange, device), fused.ready(device)

    def add(held: Slice, momentum: Tensor) -> None:
        add_row_sums(exchange.plan.views[held.param], held.start, momentum, sums.of[held.param])

    moved = []
    with fused.together():
        for held in local.slices():
            piece = local.piece(held)
            move_momentum(piece.m, piece.g, update.blend, local.scratch)
            if after:
                moved.append((held, piece.wide_m))
            else:  # while it is in the cache
                add(held, piece.wide_m)
    with fused.together():
        for held, momentum in moved:
            add(held, momentum)
    return sums
