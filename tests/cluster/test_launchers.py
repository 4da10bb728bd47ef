"""Each way to start ranks over two nodes trains to the losses of as many ranks on one node.

Minutes long: run with ``DS_OPTIM_CLUSTER=1``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster import REPOSITORY, Cluster

pytestmark = pytest.mark.cluster

STEPS = 3
TRAIN = "--preset qwen3-tiny --seq-len 16 --micro-batch 2 --eval-batches 1 --dtype fp32 --optimizer lion_muon --stage 3"
RANKS = pytest.mark.parametrize("per_node", [1, 2], ids=["2x1", "2x2"])
LAUNCH = REPOSITORY / "launch"


def arguments(out: Path) -> list[str]:
    return [*TRAIN.split(), "--steps", str(STEPS), "--out", str(out)]


def losses(out: Path) -> list[float]:
    """Of each step, then of the validation."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [record["loss" if "loss" in record else "val_loss"] for record in records]
    assert len(found) == STEPS + 1
    return found


@pytest.fixture(scope="module")
def one_node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    """The losses of so many ranks on one node."""
    known: dict[int, list[float]] = {}

    def run(ranks: int) -> list[float]:
        if ranks not in known:
            out = tmp_path_factory.mktemp("reference") / "out"
            done = cluster.run(0, ["bash", str(LAUNCH / "local.sh"), "--ranks", str(ranks), *arguments(out)])
            assert done.returncode == 0, done.stdout
            known[ranks] = losses(out)
        return known[ranks]

    return run


def check(out: Path, output: str, per_node: int, reference: list[float]) -> None:
    # Two ranks add in one order whatever carries it; four add in the order that their transport takes.
    tolerance = 0.0 if per_node == 1 else 1e-5
    assert losses(out) == pytest.approx(reference, rel=tolerance, abs=0)
    # pdsh puts the node's name before every line, too.
    assert re.search(r"^(node1: )?\[rank 0 node1\] .*validation loss", output, re.MULTILINE), output


@RANKS
def test_deepspeed_over_pdsh(
    cluster: Cluster, one_node: Callable[[int], list[float]], tmp_path: Path, per_node: int
) -> None:
    hostfile = str(cluster.hostfile(per_node))
    before = cluster.wire_bytes(1)
    done = cluster.run(
        0, ["bash", str(LAUNCH / "hostfile.sh"), "--hostfile", hostfile, *arguments(tmp_path / "out")], tmp_path
    )
    assert done.returncode == 0, done.stdout
    check(tmp_path / "out", done.stdout, per_node, one_node(2 * per_node))
    received = cluster.wire_bytes(1)[0] - before[0]
    assert received > 1_000_000, "the second node took no part"


@RANKS
def test_openmpi(cluster: Cluster, one_node: Callable[[int], list[float]], tmp_path: Path, per_node: int) -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: pip install mpi4py")
    hostfile = str(cluster.hostfile(per_node))
    done = cluster.run(
        0, ["bash", str(LAUNCH / "openmpi.sh"), "--hostfile", hostfile, *arguments(tmp_path / "out")], tmp_path
    )
    assert done.returncode == 0, done.stdout
    check(tmp_path / "out", done.stdout, per_node, one_node(2 * per_node))


@RANKS
def test_torchrun(cluster: Cluster, one_node: Callable[[int], list[float]], tmp_path: Path, per_node: int) -> None:
    command = ["bash", str(LAUNCH / "torchrun.sh"), "--nodes", "2", "--ranks", str(per_node), "--rendezvous"]
    command += ["node1:29517", *arguments(tmp_path / "out")]
    other = cluster.start(1, command, tmp_path)
    done = cluster.run(0, command, tmp_path)
    output, _ = other.communicate(timeout=60)
    assert done.returncode == 0, done.stdout
    assert other.returncode == 0, output
    check(tmp_path / "out", done.stdout + output, per_node, one_node(2 * per_node))


def wait_for_job(cluster: Cluster, number: str, seconds: float = 150) -> str:
    """What Slurm says of a job that has ended; ``sbatch --wait`` would look only now and then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = cluster.run(0, ["scontrol", "show", "job", "-o", number]).stdout
        if not re.search(r"JobState=(PENDING|RUNNING|COMPLETING|CONFIGURING)", state):
            return state
        time.sleep(0.5)
    cluster.run(0, ["scancel", number])
    raise AssertionError(f"job {number} ran past {seconds:g} s: {state}")


@RANKS
@pytest.mark.parametrize("launcher", ["srun", "slurm"])
def test_slurm(
    cluster: Cluster, one_node: Callable[[int], list[float]], tmp_path: Path, per_node: int, launcher: str
) -> None:
    log = tmp_path / "job.log"
    job = ["sbatch", "--parsable", "--nodes=2", f"--ntasks-per-node={per_node}", f"--output={log}"]
    command = [*job, str(LAUNCH / "slurm.sbatch"), "--launcher", launcher, *arguments(tmp_path / "out")]
    number = cluster.run(0, command, tmp_path).stdout.strip()
    state = wait_for_job(cluster, number)
    output = log.read_text() if log.exists() else ""
    assert "JobState=COMPLETED" in state, state + output
    check(tmp_path / "out", output, per_node, one_node(2 * per_node))
