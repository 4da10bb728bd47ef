"""How a parameter is seen as matrices: rows are the fan-out, columns the fan-in.

A view cuts in four steps, each optional, always in this order:

1. ``batch_dims``: leading dimensions that stack matrices (experts) are set aside;
2. what is left becomes two-dimensional: (out, in, ...) is flattened to out x (in * ...), as for a
   convolution; with ``transpose`` an (in, out) weight, GPT-2's Conv1D, is turned;
3. ``split``: fused matrices are cut apart along the rows (a fused QKV); with ``interleave`` their rows take turns
   (GPT-NeoX: queries, keys and values of one head, then of the next);
4. ``heads``: each part is cut into equal blocks along its rows, every block a matrix of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError, instead

OPTIONS = ("transpose", "split", "interleave", "heads", "batch_dims")


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """How a parameter's flat elements are seen as matrices.

    shape: the parameter's shape (d0, d1, ...).
    transpose: the matrix is stored (fan-in, fan-out).
    split: rows of each fused matrix, in order; () for one matrix.
    interleave: turns in which the parts of the split lie: an equal piece of each, and again; 0 for one after the other.
    heads: equal blocks along the rows of each part, one number a part; () for whole parts.
    batch_dims: leading dimensions that are a stack of matrices.
    of: the view of all rows, where it is one of some rows of each matrix.

    A *block* is what one part of the split gives: a batch of equal matrices, (count, m, n).
    """

    shape: tuple[int, ...]
    transpose: bool = False
    split: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    batch_dims: int = 0
    interleave: int = 0
    of: MatrixView | None = None

    def __post_init__(self) -> None:
        inner = len(self.shape) - self.batch_dims
        if inner < 2:
            raise UserError(
                "a matrix needs two dimensions"
                + (f" behind batch_dims {self.batch_dims}" if self.batch_dims else "")
                + "; lower batch_dims, or let the aux rule have it by matrix_exclude"
            )
        if math.prod(self.shape) == 0:
            raise UserError("it has no elements; let the aux rule have it by matrix_exclude")
        if self.transpose and inner > 2:
            raise UserError(f"transpose turns two dimensions, not {inner}; leave transpose out or set batch_dims")
        if self.split and sum(self.split) != self.rows:
            raise UserError(
                f"split {list(self.split)} sums to {sum(self.split)}, the matrix has {self.rows} rows (fan-out); "
                f"write sizes that sum to {self.rows}"
                + ("" if self.transpose else ", or transpose an (in, out) weight")
            )
        if self.interleave and (len(self.split) < 2 or any(rows % self.interleave for rows in self.split)):
            raise UserError(
                f"interleave {self.interleave} does not fit split {list(self.split)}; write two parts or more, "
                f"each a multiple of {self.interleave}"
            )
        parts = self.split or (self.rows,)
        if self.heads and len(self.heads) != len(parts):
            raise UserError(f"heads {list(self.heads)} does not fit {len(parts)} parts; write one number for each part")
        for rows, heads in zip(parts, self.heads, strict=False):
            if self.interleave and heads % self.interleave and self.interleave % heads:
                raise UserError(
                    f"heads {heads} and interleave {self.interleave}: none divides the other; write heads as many times"
                )
            if rows % heads:
                raise UserError(f"heads {heads} does not divide {rows} rows (fan-out); write a divisor of {rows}")

    @staticmethod
    def from_options(name: str, shape: Sequence[int], options: Mapping[str, Any]) -> MatrixView:
        """The view that JSON ``options`` ask for: :data:`OPTIONS`, all optional.

        ``heads`` is one number for all parts of a split, or a list with one for each. Raises UserError, with the
        parameter's name and shape and what to write instead, where the options are malformed or do not fit.
        """
        try:
            return MatrixView(shape=tuple(shape), **_parsed(options))
        except UserError as error:
            raise UserError(f"views: {name} {list(shape)}: {error}") from None

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows (fan-out) of the matrix before it is split."""
        return self.shape[-1] if self.transpose else self.shape[self.batch_dims]

    @property
    def columns(self) -> int:
        """Columns (fan-in)."""
        return self.shape[-2] if self.transpose else math.prod(self.shape[self.batch_dims + 1 :])

    @property
    def is_cut_up(self) -> bool:
        """Whether the matrices are taken out of the parameter by a copy; heads and experts that stack up need none."""
        return self.transpose or len(self._matrices) > 1

    @property
    def of_rows(self) -> MatrixView:
        """How one value for each row, (numel / columns,), is seen as matrices of one column."""
        shape = (*self.shape[: self.batch_dims], self.rows, 1)
        return replace(self, shape=shape, transpose=False)

    @property
    def in_a_row(self) -> MatrixView:
        """The view, but for rules that choose rows of each turn, one matrix where a turn has a single row of a part."""
        is_single = self.interleave > 0 and min(self.split) == self.interleave
        return replace(self, split=(), heads=(), interleave=0) if is_single else self

    def selected(self, fraction: float) -> MatrixView:
        """How so many rows of each matrix, one behind the other as they lie in the parameter, are seen as matrices."""
        groups = [
            part.shape for part in self.row_groups(torch.empty(self.of_rows.numel, dtype=torch.float32, device="meta"))
        ]
        kept = [math.prod(many) * selected_rows(rows, fraction) for _, *many, rows in groups]
        shape = list(self.shape)
        shape[-1 if self.transpose else self.batch_dims] = sum(kept)
        return replace(self, shape=tuple(shape), split=tuple(kept) if self.split else (), of=self)

    def row_groups(self, values: Tensor) -> list[Tensor]:
        """One value for each row, (rows,) or (B, rows), by part of the split: a strided view (stacked, groups, …, rows
        of a group).

        Rows of a group lie together, so that as many of each, in their order, are seen as the whole parameter is.
        """
        return [part[..., 0] for part in self.of_rows._cut(values)]

    def spread(self, values: Tensor, start: int, numel: int) -> Tensor:
        """Of ``numel`` elements of the parameter from ``start`` on each one's row's value, (numel,).

        values: of all rows, (rows,), as ``of_rows`` counts them.
        """
        length = self.rows if self.transpose else self.columns
        first, last = start // length, -(-(start + numel) // length)
        if self.transpose:  # a stored line has an element of each row of its matrix
            lines = torch.arange(first, last, dtype=torch.int64, device=values.device).div_(
                self.columns, rounding_mode="floor"
            )
            by_line = values.view(-1, self.rows)[lines]
        else:
            by_line = values[first:last, None].expand(-1, length)
        return by_line.reshape(-1)[start - first * length :][:numel]

    def matrices(self) -> list[tuple[int, int, int]]:
        """(count, m, n) of each block, in the order of ``unpack``: m rows (fan-out), n columns (fan-in)."""
        return list(self._matrices)

    @cached_property
    def _matrices(self) -> tuple[tuple[int, int, int], ...]:
        stacked = math.prod(self.shape[: self.batch_dims])
        return tuple((stacked * heads, rows // heads, self.columns) for rows, heads in self._parts())

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """The blocks (count, m, n) of ``flat`` (numel,), in the order of ``matrices``.

        Strided views of ``flat``, but for a copy where no strides say it: of parts that are interleaved, and of
        transposed stacks that are cut into heads.
        """
        return [part.reshape(block) for part, block in zip(self._cut(flat), self._matrices, strict=True)]

    def taken(self, stack: Tensor, number: int) -> Tensor:
        """Block ``number`` of each of ``stack`` (B, numel), one behind the other: a copy (B * count, m, n)."""
        count, m, n = self._matrices[number]
        out = stack.new_empty((len(stack) * count, m, n))
        part = self._cut(stack)[number]
        out.view(part.shape).copy_(part)
        return out

    def pack_into(self, blocks: Sequence[Tensor], flat: Tensor) -> None:
        """The inverse of ``unpack``, or of ``taken`` for all blocks: write each element of ``flat``, (numel,) or
        (B, numel), once, ``blocks`` in any dtype."""
        for part, block in zip(self._cut(flat), blocks, strict=True):
            part.copy_(block.reshape(part.shape))

    def describe(self) -> str:
        """A stable text, such as ``768x768``, ``3 x 768x768 (split)`` or ``8 x 64x512 (batch_dims)``."""
        how = [key for key in OPTIONS if getattr(self, key)]
        if len(self.shape) - self.batch_dims > 2:
            how.insert(0, "conv")
        sizes: dict[tuple[int, int], int] = {}
        for count, m, n in self.matrices():
            sizes[m, n] = sizes.get((m, n), 0) + count
        text = " + ".join((f"{k} x " if k > 1 else "") + f"{m}x{n}" for (m, n), k in sizes.items())
        return text + (f" ({', '.join(how)})" if how else "")

    def _parts(self) -> list[tuple[int, int]]:
        """(rows, heads) of each part."""
        parts = self.split or (self.rows,)
        return list(zip(parts, self.heads or (1,) * len(parts), strict=True))

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """Strided views of ``flat``, one a part: (stacked, heads, m, n), or with turns (stacked, turns, heads of a
        turn, rows of such a head, n); a turn may also be a part of a head. Of (B, numel) all parameters' are stacked.

        Elements are in the order of the part's block either way.
        """
        if flat.shape[-1:] != (self.numel,) or flat.dim() > 2:
            raise ValueError(f"a view of {list(self.shape)} takes {self.numel} flat elements, not {list(flat.shape)}")
        stored = (self.columns, self.rows) if self.transpose else (self.rows, self.columns)
        stack = flat.view(-1, *stored)
        if self.transpose:
            stack = stack.mT
        parts = self._parts()
        if self.interleave:
            turns = stack.unflatten(1, (self.interleave, -1))
            cuts = turns.split([rows // self.interleave for rows, _ in parts], dim=2)
            each = [max(1, heads // self.interleave) for _, heads in parts]
            return [cut.unflatten(2, (count, -1)) for cut, count in zip(cuts, each, strict=True)]
        cuts = stack.split([rows for rows, _ in parts], dim=1)
        return [cut.unflatten(1, (heads, -1)) for cut, (_, heads) in zip(cuts, parts, strict=True)]


def selected_rows(rows: int, fraction: float) -> int:
    """How many of a matrix's rows a fraction of them is: rounded up, but for what the fraction's last bits add."""
    return max(1, min(rows, math.ceil(rows * fraction - 1e-9)))


def row_range(columns: int, start: int, numel: int) -> tuple[int, int]:
    """Which rows' values, first and last + 1, go with so many elements of a parameter from ``start`` on.

    Rows are counted through the parameter as it is stored, so that each one's value goes with one slice, however it is
    cut: value k with element k x columns.
    """
    return -(-start // columns), -(-(start + numel) // columns)


def _parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a MatrixView from JSON options, types checked."""
    for key in options:
        if key not in OPTIONS:
            raise UserError(f"unknown key '{key}'; {instead(str(key), OPTIONS)}")
    transpose = options.get("transpose", False)
    batch_dims, interleave = options.get("batch_dims", 0), options.get("interleave", 0)
    if not isinstance(transpose, bool):
        raise UserError(f"transpose is {transpose!r}; write true or false")
    if not _is_count(batch_dims, least=0):
        raise UserError(f"batch_dims is {batch_dims!r}; write a whole number such as 1")
    if not _is_count(interleave, least=0):
        raise UserError(f"interleave is {interleave!r}; write a whole number such as the number of heads")
    split = _counts("split", options.get("split", ()))
    heads = options.get("heads", ())
    if not isinstance(heads, list | tuple):
        heads = (heads,) * max(1, len(split))
    found = {"transpose": transpose, "batch_dims": batch_dims, "split": split, "interleave": interleave}
    return {**found, "heads": _counts("heads", heads)}


def _counts(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(_is_count(item, least=1) for item in value):
        raise UserError(f"{key} is {value!r}; write whole numbers above 0, such as [768, 768, 768]")
    return tuple(value)


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
