"""Parts of ``ds-optim chaos`` and the soak: what is done to files, what ranks must end with, what counts as growth."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from benchmarks.soak import Look, grown
from ds_optim.chaos.damage import BY_FILES, NEXT, WHOLE, Damage, all_damages, contents, do_damage
from ds_optim.chaos.endings import ending_fault
from ds_optim.chaos.faults import Fault
from ds_optim.chaos.ranks import Attempt
from ds_optim.job.exits import PREEMPTED, RANK_LOST


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run's folder, some of its files not there."""
    (tmp_path / "out/checkpoints/step-2").mkdir(parents=True)
    (tmp_path / "out/checkpoints/step-2/manifest.json").write_text("{}")
    (tmp_path / "out/log.jsonl").write_text('{"step": 1}\n')
    return tmp_path / "out"


def test_what_is_linked_away_lies_outside_and_is_seen_to_change(out: Path) -> None:
    outside, random = out.parent / "outside", Random(1)
    for name in ("log.jsonl", "end.json", NEXT.replace("NEXT", "4")):
        do_damage(out, Damage(name=name, way="linked away", beside=True), random, outside)
        assert (out / name).is_symlink()
    do_damage(out / "checkpoints/step-2", Damage(name=WHOLE, way="linked away"), random, outside)
    before = contents(outside)
    assert len(before) == 4
    (out / "checkpoints/step-2/manifest.json").write_text("another")
    after = contents(outside)
    assert [name for name in after if after[name] != before[name]] == ["3 step-2/manifest.json"]


def test_every_file_by_a_checkpoint_is_damaged_in_every_way_but_a_lock_that_is_a_link(out: Path) -> None:
    damages = all_damages(out / "checkpoints/step-2")
    beside = [damage for damage in damages if damage.name in BY_FILES]
    assert len(beside) == 5 * len(BY_FILES) - 1
    assert sum(damage.is_within for damage in damages) == 3
    for damage in beside:
        if damage.way != "linked away":
            do_damage(out, damage, Random(2))


def test_ends_are_told_apart() -> None:
    def attempt(statuses: list[int], told: str) -> Attempt:
        return Attempt(statuses=statuses, fired=True, lines=[f"ds-optim: error: {told}" if told else "", ""])

    killed = Fault(kind="SIGKILL", place="start", rank=1, step=4, count=3)
    assert ending_fault(attempt([RANK_LOST, -9], "rank 1 died"), killed) is None
    assert "did not say 'rank 1 '" in str(ending_fault(attempt([RANK_LOST, -9], "rank 2 died"), killed))
    assert "[1, -9], not [69, -9]" in str(ending_fault(attempt([1, -9], "rank 1 died"), killed))
    alone = Fault(kind="SIGTERM", place="start", rank=1, step=4, count=0)
    assert ending_fault(attempt([RANK_LOST, PREEMPTED], "waited 10 s for rank 1 to join"), alone) is None
    together = Fault(kind="SIGTERM", place="start", rank=1, step=4, count=4)
    assert ending_fault(attempt([PREEMPTED, PREEMPTED], ""), together) is None
    assert ending_fault(Attempt(statuses=[PREEMPTED, PREEMPTED], lines=["", ""]), together) is not None


def test_growth_is_told_from_the_first_fifth_on() -> None:
    def look(step: int, rss: float = 556.0, descriptors: int = 42, threads: int = 13) -> Look:
        return Look(step=step, rss_mib=rss, descriptors=descriptors, threads=threads)

    flat = [look(0, 300.0, 20, 5), *(look(step) for step in range(1, 9))]
    assert grown([*flat, look(9)]) == []
    assert grown([*flat, look(9, descriptors=43)]) == ["descriptors grew from 42 to 43"]
    assert grown([*flat, look(9, rss=565.0, threads=14)]) == [
        "memory grew by 9.0 MiB from step 2 on",
        "threads grew from 13 to 14",
    ]
