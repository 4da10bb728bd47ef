"""A run's start and end: ranks lost before the first step, folders in use, runs that are extended or cut short."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.job import run_log
from ds_optim.job.exits import PREEMPTED, RANK_LOST
from ds_optim.job.settings import make_settings
from ds_optim.machine import ranks
from ds_optim.machine.forked import free_port
from ds_optim.machine.meeting import Meeting
from ds_optim.train import loop
from ds_optim.train.loop import train
from tests.distributed.harness import run_ranks
from tests.distributed.worker import Outcome

from .survival import STEPS, Watcher, log_of, tiny

pytestmark = pytest.mark.full

# ---- a rank that is lost before the watching began, or before the first step


def dies_at(rank: int, world_size: int, folder: Path, where: str, who: int) -> None:
    import deepspeed

    def die(*arguments: Any, **options: Any) -> None:
        time.sleep(2.0 if where == "_count" else 0.0)  # the other rank is there, and waits to be told
        os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    if rank == who:
        within = {"init_distributed": deepspeed, "same_code": ranks, "_open": Meeting, "_count": Meeting}
        setattr(within.get(where, loop), where, die)
    train(make_settings(**tiny(out="out", hang_timeout=4)))


def says_when_left(place: Path, left: Outcome, line: str) -> None:
    """The rank that is left says it once, leaves it as the run's end, and holds the folder no longer."""
    end = json.loads((place / "out/end.json").read_text())
    assert end["status"] == RANK_LOST
    assert re.match(line, end["line"]), end
    if left.error_type == "RankLost":
        assert left.message == end["line"]
    else:
        assert left.message.endswith(f"exit code {RANK_LOST}"), left
        assert left.log.count(f"ds-optim: error: {end['line']}\n") == 1
    assert not (place / "out/run.lock").exists()


@pytest.mark.parametrize("where", ["init_distributed", "same_code", "to_resume", "load_data", "start_engine"])
def test_a_rank_lost_during_the_start_is_named_in_one_line(place: Path, where: str) -> None:
    left, _ = run_ranks(2, dies_at, place, where, 1, timeout=60, expect_error=True, init=False)
    says_when_left(place, left, "rank 1 died or was stopped: no pulse for ")


@pytest.mark.parametrize(
    ("where", "who", "line"),
    [
        (
            "_open",
            1,
            r"rank 0 of 2 on \S+ waited 5 s for rank 1 to join: see which of them did not start, or was l",
        ),
        ("_open", 0, r"rank 1 of 2 on \S+ waited 5 s for rank 0 to join: see"),
        ("_count", 0, r"rank 0 was lost while the ranks joined \(DistNetworkError: "),
    ],
)
def test_a_rank_that_does_not_join_is_named(place: Path, where: str, who: int, line: str) -> None:
    # Rank 0 serves the store here, as under the deepspeed launcher.
    own = {"TORCHELASTIC_USE_AGENT_STORE": None, "MASTER_PORT": str(free_port()), "DS_OPTIM_JOIN_TIMEOUT": "5"}
    outcomes = run_ranks(2, dies_at, place, where, who, env=own, timeout=60, expect_error=True, init=False)
    says_when_left(place, outcomes[1 - who], line)


def stuck(rank: int, world_size: int, folder: Path) -> None:
    """A read of rank 0 that does not return, as one of a file system whose server is gone."""

    def read(settings: Any) -> None:
        time.sleep(600)

    os.chdir(folder)
    if rank == 0:
        setattr(loop, "to_resume", read)  # noqa: B010
    train(make_settings(**tiny(out="out", hang_timeout=3)))


def test_a_read_that_never_returns_is_named(place: Path) -> None:
    for outcome in run_ranks(2, stuck, place, timeout=60, expect_error=True):
        assert outcome.message.endswith(f"exit code {RANK_LOST}"), outcome
        (line,) = (line for line in outcome.log.splitlines() if line.startswith("ds-optim: error: "))
        assert "rank 0 hangs: no progress for 3 s (--hang-timeout), rank 0 at the look at its checkpoints, in " in line


# ---- a folder of another run, or of this one before


def refusals(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    found: dict[str, Any] = {}

    def refused(name: str, **given: Any) -> None:
        before = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
        with pytest.raises(UserError) as caught:
            train(make_settings(**{**tiny(out="out"), **given}))
        found[name] = str(caught.value)
        after = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
        assert after == before, name

    def beside(engine: Any, step: int) -> None:
        """While the run lives, another process tries its folder."""
        if step == 2:
            child = os.fork()
            if child == 0:
                from ds_optim.machine.run_lock import RunLock

                try:
                    RunLock().take(Path("out"))
                    os._exit(0)
                except UserError as error:
                    found["never here"] = str(error)
                    os._exit(3)
            found["beside"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    train(make_settings(**tiny(out="out")), Watcher(beside))
    refused("log")
    found["forced"] = train(make_settings(**tiny(out="out", force=True, save_every=3))).steps
    found["lines"] = len(log_of(Path("out")))
    refused("checkpoints", force=True)
    refused("another", resume=True, seed=1)
    return found


def test_a_refused_start_changes_nothing(place: Path) -> None:
    (found,) = run_ranks(1, refusals, place)
    assert found["beside"] == 3
    assert found["log"] == (
        "out holds log.jsonl of an earlier run: add --resume to go on, --force to replace it, or give another --out"
    )
    assert (found["forced"], found["lines"]) == (STEPS, STEPS + 1)
    assert "holds checkpoints of an earlier run" in found["checkpoints"]
    assert "had seed = 0, this one has 1" in found["another"]


# ---- longer, and shorter


def extended(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    said: list[str] = []
    found: dict[str, Any] = {"said": said}
    run_log.RunLog.say = lambda self, line: said.append(line)  # type: ignore[method-assign]
    found["first"] = train(make_settings(**tiny(out="out", save_every=3, steps=20)))
    found["more"] = train(make_settings(**tiny(out="out", save_every=3, steps=40, resume=True)))
    # Neither its steps nor its warmup are those of the first start: they are known.
    found["again"] = train(make_settings(**tiny(out="out", save_every=3, steps=40, resume=True)))
    with pytest.raises(UserError) as caught:
        train(make_settings(**tiny(out="out", steps=30, resume=True)))
    found["fewer"] = str(caught.value)
    # Steps are a few ms: the clock of a run is read after each.
    limited = tiny(out="limited", steps=30, time_limit_s=0.2)
    found["limited"] = train(make_settings(**limited), Watcher(lambda engine, step: time.sleep(0.05)))
    found["rest"] = train(make_settings(**{**limited, "time_limit_s": None, "resume": True}))
    return found


def test_a_run_can_be_extended_and_a_time_limit_asks_for_the_rest(place: Path) -> None:
    found, _ = run_ranks(2, extended, place)
    said = " ".join(found["said"])
    assert "extended from 20 steps to 40: from here on the learning rate is that of a cosine over 40 steps" in said
    assert re.search(
        r"stopped by its time limit of 0\.2 s after step (\d+), the checkpoint of step \1 is complete", said
    )
    first, more, again = found["first"], found["more"], found["again"]
    assert (first.steps, more.steps, len(more.losses), again.losses) == (20, 40, 20, [])
    rates = {line["step"]: line["lr"] for line in log_of(place / "out") if "lr" in line}
    assert sorted(rates) == list(range(1, 41))
    assert rates[20] < 1e-4 < rates[21], "the cosine of 20 steps has ended, that of 40 has not"
    assert json.loads((place / "out/settings.json").read_text())["warmup"] == 2
    assert "had steps = 40, this one has 30" in found["fewer"]
    assert "or more of them to extend it" in found["fewer"]

    limited, rest = found["limited"], found["rest"]
    assert limited.status == PREEMPTED
    assert 0 < limited.steps < 30
    assert (rest.status, rest.steps, len(rest.losses)) == (0, 30, 30 - limited.steps)
