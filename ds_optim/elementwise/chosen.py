"""Where the chosen rows of a parameter's matrices stand, for kernels that measure, take or step rows of many slices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A slice of a parameter as rows of (stacked) matrices, and which of them are chosen.

    start: the slice's first element in the parameter. columns, rows: of each matrix; turned: a stored line has an
    element of each row. flags: of each of the parameter's rows, whether it is chosen, and before: how many are before
    it, one number more; None where nothing is chosen yet. offset: where what is chosen of the slice begins, counted as
    ``before`` does.
    """

    start: int
    columns: int
    rows: int
    turned: bool
    flags: Tensor | None = None
    before: Tensor | None = None
    offset: int = 0
