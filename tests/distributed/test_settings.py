"""Each setting of DeepSpeed's that works trains sanely: twenty losses beside the same run with torch's AdamW.

That its steps are right is shown elsewhere, by the bits of the unsharded optimizer on the same gradients
(test_same_gradients.py, test_parity.py). The docs' table of what works is made from the same rows.
"""

from __future__ import annotations

import pkgutil
from functools import cache

import pytest

from docs.listings import complaint
from tests.settings import SETTINGS, Setting
from tests.tiers import cells

from . import nvme
from .harness import run_ranks
from .losses import STEPS

BY_NAME = {setting.name: setting for setting in SETTINGS}
FALL = 0.5
"""Of what AdamW's loss falls by, ours falls by this part at the least."""
LEAST = 0.3
"""Nats that AdamW itself must gain: a run that learns nothing shows nothing."""


def works(setting: Setting, stage: int) -> bool:
    return complaint(setting, stage) is None


# (name, stage, ranks, ours): one in the default tier.
CELLS = cells(
    [("`round_robin_gradients`", 2, 2, "LionMuon")],
    [
        (setting.name, stage, ranks, type)
        for setting in SETTINGS
        for stage in setting.stages
        for ranks in setting.ranks_at(stage)
        for type in setting.types
        if works(setting, stage)
    ],
)


def train(rank: int, world_size: int, name: str, of: list[tuple[int, str]]) -> dict[tuple[int, str], list[float]]:
    """The losses of every stage and optimizer of a setting."""
    setting = BY_NAME[name]
    losses = pkgutil.resolve_name(setting.losses)
    return {(stage, type): losses(rank, world_size, setting, stage, type) for stage, type in of}


@cache
def trained(name: str, world_size: int) -> dict[tuple[int, str], list[float]]:
    """In processes of their own: some settings stay with a process for its life."""
    ours = [(stage, type) for n, stage, ranks, type in CELLS if (n, ranks) == (name, world_size)]
    theirs = dict.fromkeys((stage, "AdamW") for stage, _ in ours)
    return run_ranks(world_size, train, name, [*ours, *theirs], timeout=120)[0]


@pytest.mark.parametrize(("name", "stage", "world_size", "type"), CELLS)
def test_losses_fall_as_adamws_do(name: str, stage: int, world_size: int, type: str) -> None:
    if BY_NAME[name].losses.startswith(nvme.__name__):
        nvme.skip_without_aio()
    found = trained(name, world_size)
    ours, theirs = found[stage, type], found[stage, "AdamW"]
    assert len(ours) == len(theirs) == STEPS
    # The same weights, on the same data; products in 16 bits feel where in memory their factors lie.
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    gained, theirs_gained = ours[0] - ours[-1], theirs[0] - theirs[-1]
    assert theirs_gained > LEAST
    assert gained > FALL * theirs_gained, (ours, theirs)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_row_says_where_it_was_trained(setting: Setting) -> None:
    """Else the table would count what nothing holds."""
    assert set(setting.stages) <= {0, 1, 2, 3}
    assert set(setting.refused) <= set(setting.stages)
    trained_at = [stage for stage in setting.stages if works(setting, stage) and setting.ranks_at(stage)]
    assert trained_at or not setting.ranks or not any(works(setting, stage) for stage in setting.stages)
