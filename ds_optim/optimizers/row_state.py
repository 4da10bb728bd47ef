"""State that is a value for each row of a parameter's matrices: ``state[key] = {name of the parameter: its values}``.

A rank keeps those of the rows that begin in its slice, so that each is kept once, wherever borders lie.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView, row_range
from ds_optim.optimizers.rules import Rule
from ds_optim.sharding.layout import Unit


def init_rows(
    state: dict[str, Any],
    rule: Rule,
    device: torch.device,
    unit: Unit,
    views: Sequence[MatrixView | None],
    rank: int,
    params: Collection[int],
) -> None:
    """Make the rows of those of ``params`` of which a tensor holds a slice, zeros where no checkpoint brought them.

    Raises:
        UserError: a checkpoint brought another number of them.
    """
    for key in rule.rows:
        kept = state.setdefault(key, {})
        for held in unit.slices(rank):
            view = views[held.param]
            assert view is not None, f"{rule.name} keeps rows of matrices only"
            if held.param not in params:
                continue
            name = unit.params[held.param].name
            first, last = row_range(view.columns, held.start, held.numel)
            found = kept.setdefault(name, torch.zeros(last - first, dtype=torch.float32, device=device))
            if len(found) != last - first:
                raise UserError(
                    f"the checkpoint holds {len(found)} rows of {name} here, and as it is seen now there are "
                    f"{last - first}: write the views with which it was saved"
                )
