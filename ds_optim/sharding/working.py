"""What matrices in work hold beside each other: stacks, copies, temporaries and results, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import Part, Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.shards import ShardView


@dataclass(frozen=True, kw_only=True)
class Working:
    """What owners make of matrices, and what it holds. ``stacked``: equal matrices are worked on as one batch, as on
    CUDA, not one by one, as on a CPU."""

    shape: Shape
    polar: PolarSpec
    stacked: bool

    @cached_property
    def there(self) -> tuple[Part, ...]:
        """What travels to the owners, a message each."""
        return self.shape.there(self.polar)

    @cached_property
    def back(self) -> tuple[Part, ...]:
        """What travels back."""
        return self.shape.back(self.polar)

    def per_element(self, view: MatrixView, *, moved: int, overlap: bool) -> float:
        """Bytes for each element that a rank owns of a view's parameters in a bucket, ``moved`` of which it sends and
        receives: with overlap also those of the next bucket on its way in and of the last one on its way out."""
        there, back = (bytes_of([view], parts) / view.numel for parts in (self.there, self.back))
        arriving = (moved + 1) * there
        temporaries = max(self.scratch(view, m, n) / (m * n) for _, m, n in view.matrices())
        if isinstance(view, ShardView):  # its owner holds all of it
            temporaries *= view.times
        working = back + (temporaries + self._copied(view) / view.numel)
        return arriving + working + (arriving + moved * back if overlap and moved else 0)

    def scratch(self, view: MatrixView, m: int, n: int) -> int:
        """Bytes of temporaries of one (m, n) matrix of a view."""
        return self.shape.scratch(m, n, self.polar)

    def most(self, views: Iterable[MatrixView]) -> int:
        """The most bytes beside their stacks while parameters of these views are worked on, run by run of equal ones:
        results so far, and what the run in work holds."""
        most = done = 0
        for view, run in groupby(views):
            equal = len(list(run))
            most = max(most, done + self.held_by(view, equal))
            done += equal * bytes_of([view], self._new_parts(view))
        return max(most, done)

    def held_by(self, view: MatrixView, equal: int) -> int:
        """The most bytes beside its stack that a run of so many equal parameters holds in work, results among them."""
        blocks = [
            (count * equal, m, n, (count * equal if self.stacked else 1) * self.scratch(view, m, n))
            for count, m, n in view.matrices()
        ]
        packed = equal * bytes_of([view], self._new_parts(view))
        if isinstance(view, ShardView) or not view.is_cut_up:
            return packed + equal * self._copied(view) + max(scratch for *_, scratch in blocks)
        most = done = 0  # block by block: what was taken out of parameters, and what was made of it until it is packed
        for many, m, n, scratch in blocks:
            taken = many * _bytes_of_matrix(m, n, self.there)
            made = many * _bytes_of_matrix(m, n, [part for part in self.back if not part.per_row])
            most = max(most, done + taken + made + scratch)
            done += made + many * _bytes_of_matrix(m, n, [part for part in self.back if part.per_row])
        return max(most, done + packed)

    def _copied(self, view: MatrixView) -> int:
        """Bytes of the copies that take a parameter's matrices out of it and put results back into one."""
        if isinstance(view, ShardView):  # messages, the whole, its result and that of the shard
            here, whole = (bytes_of([seen], (*self.there, *self.back)) for seen in (view, view.whole))
            return 2 * here + 2 * whole + self._copied(view.whole)
        if not view.is_cut_up:
            return 0
        return bytes_of([view], self.there) + (bytes_of([view], self.back) if self.shape.result is not None else 0)

    def _new_parts(self, view: MatrixView) -> list[Part]:
        """Of what goes back, that for which there is no room in the stack that came: rows move on where they are, and
        so do matrices that are packed again."""
        if isinstance(view, ShardView):
            return list(self.back)
        in_stack = self.there if view.is_cut_up else [part for part in self.there if part.per_row]
        return [part for part in self.back if part not in in_stack]


def bytes_of(views: Iterable[MatrixView], parts: Sequence[Part]) -> int:
    """Of whole parameters, seen so."""
    return sum(values_of(view, part) * part.dtype.itemsize for view in views for part in parts)


def values_of(view: MatrixView, part: Part) -> int:
    """How many values a whole parameter has of a part."""
    first, last = part.place(view, 0, view.numel)
    return last - first


def _bytes_of_matrix(m: int, n: int, parts: Sequence[Part]) -> int:
    return sum((m if part.per_row else m * n) * part.dtype.itemsize for part in parts)
