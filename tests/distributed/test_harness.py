"""The harness itself: values in order, errors told apart, hangs shown, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .harness import RankError, RankTimeout, assert_all_raised, device, run_ranks
from .server import WARM_UP_SECONDS

ROOT = Path(__file__).parents[2]


def summed(rank: int, world_size: int, values: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    mine = values[rank].to(device())
    dist.all_reduce(mine)
    return rank, world_size, mine.cpu()


def environment(rank: int, world_size: int) -> dict[str, str | None]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DS_ACCELERATOR", "OMP_NUM_THREADS", "EXTRA")
    return {name: os.environ.get(name) for name in names}


def ancestry(rank: int, world_size: int) -> tuple[int, int, int, int]:
    from . import preload

    parent = os.getppid()
    return os.getpid(), parent, preload.PRELOADED_BY, len(os.listdir(f"/proc/{parent}/task"))


def joined(rank: int, world_size: int) -> bool:
    return dist.is_initialized()


def rank_one_fails(rank: int, world_size: int) -> None:
    print(f"output of rank {rank}")
    if rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def all_fail(rank: int, world_size: int, alike: bool) -> None:
    raise ValueError("write period >= 1" if alike else f"no good at rank {rank}")


def killed(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), 9)
    dist.barrier()


def hang_here(rank: int, world_size: int, folder: Path) -> None:
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"part{rank}").write_text(str(child.pid))
    (folder / f"part{rank}").rename(folder / f"child{rank}")
    time.sleep(600)


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def started(folder: Path, count: int) -> list[int]:
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert len(pids) == count
    return pids


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_come_back_in_order_of_rank(world_size: int) -> None:
    values = torch.arange(world_size * 2, dtype=torch.float32).view(world_size, 2)
    results = run_ranks(world_size, summed, values)
    assert [(rank, size) for rank, size, _ in results] == [(r, world_size) for r in range(world_size)]
    for _, _, total in results:
        assert torch.equal(total, values.sum(0))


def test_environment_is_a_launchers() -> None:
    first, second = run_ranks(2, environment, env={"EXTRA": "yes", "OMP_NUM_THREADS": None}, init=False)
    assert second["DS_ACCELERATOR"] in ("cpu", "cuda")
    assert first == {**second, "RANK": "0", "LOCAL_RANK": "0"}
    assert second["RANK"] == second["LOCAL_RANK"] == "1"
    assert second["WORLD_SIZE"] == "2"
    assert second["EXTRA"] == "yes"
    assert second["OMP_NUM_THREADS"] is None


def test_ranks_are_forked_from_one_parent_with_one_thread() -> None:
    first, second = run_ranks(2, ancestry, init=False), run_ranks(2, ancestry, init=False)
    pids, parents, importers, threads = (set(column) for column in zip(*first, *second, strict=True))
    assert len(pids) == 4
    assert parents == importers
    assert len(parents) == 1
    assert threads == {1}, "forking a process with threads can leave a lock held for ever"


def test_process_group_only_when_asked() -> None:
    assert run_ranks(1, joined, init=False) == [False]
    assert run_ranks(1, joined) == [True]


def test_first_error_is_raised_and_names_its_rank() -> None:
    with pytest.raises(RankError, match="rank one gives up") as caught:
        run_ranks(2, rank_one_fails)
    assert caught.value.rank == 1
    assert caught.value.error_type == "ValueError"
    assert "in rank_one_fails" in caught.value.text
    assert "output of rank 1" in caught.value.text
    assert "output of rank 0" not in caught.value.text


def test_outcomes_of_all_ranks() -> None:
    outcomes = run_ranks(2, all_fail, True, expect_error=True)
    assert assert_all_raised(outcomes, "ValueError", "period") == "write period >= 1"
    with pytest.raises(AssertionError, match="rank 1: ValueError: no good at rank 1"):
        assert_all_raised(run_ranks(2, all_fail, False, expect_error=True), "ValueError")
    mixed = run_ranks(2, rank_one_fails, expect_error=True)
    assert [o.ok for o in mixed] == [False, False]
    assert [o.message == "rank one gives up" for o in mixed] == [False, True]
    with pytest.raises(AssertionError):
        assert_all_raised(mixed, "ValueError")


def test_a_rank_that_dies_is_an_error() -> None:
    with pytest.raises(RankError, match="exit code -9") as caught:
        run_ranks(2, killed)
    assert caught.value.rank == 0


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankError, match="pickle"):
        run_ranks(1, unpicklable, init=False)


@pytest.mark.full
def test_a_hang_shows_stacks_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] still ran after 3 s") as caught:
        run_ranks(2, hang_here, tmp_path, timeout=3, init=False)
    assert caught.value.text.count("in hang_here") == 2
    assert gone(started(tmp_path, 4))


@pytest.mark.full
def test_ranks_end_when_the_test_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib; from tests.distributed import harness, test_harness;"
        f"harness.run_ranks(1, test_harness.hang_here, pathlib.Path({str(tmp_path)!r}), init=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + WARM_UP_SECONDS
        while len(list(tmp_path.glob("child*"))) < 1:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert gone(started(tmp_path, 2))
