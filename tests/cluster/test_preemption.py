"""A signal to a script reaches the ranks of both nodes: they save, and the run goes on from there."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.cluster import REPOSITORY, Cluster

pytestmark = pytest.mark.cluster

TRAIN = "--preset qwen3-tiny --seq-len 16 --micro-batch 2 --eval-batches 1 --dtype fp32 --optimizer lion --stage 1"
STEPS = 150
_STARTED_S = 100


def arguments(out: Path) -> list[str]:
    return [*TRAIN.split(), "--steps", str(STEPS), "--save-every", str(STEPS), "--out", str(out)]


def steps_done(out: Path) -> list[int]:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def wait_for_a_step(out: Path) -> None:
    deadline = time.monotonic() + _STARTED_S
    while not steps_done(out):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.1)


def test_hostfile(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bash", str(REPOSITORY / "launch" / "hostfile.sh"), "--hostfile", str(cluster.hostfile(1))]
    command += arguments(out)
    run = cluster.start(0, command, tmp_path)
    wait_for_a_step(out)
    (script,) = cluster.run(0, ["pgrep", "-f", "-o", "launch/hostfile.sh"]).stdout.split()
    cluster.run(0, ["kill", f"-{signal.SIGUSR1.value}", script])
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 75, output
    assert json.loads((out / "end.json").read_text())["status"] == 75
    stopped = steps_done(out)[-1]
    assert stopped < STEPS
    done = cluster.run(0, command, tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\[rank 0 node1\] resumed from .* after step {stopped}", done.stdout)
    assert steps_done(out) == list(range(1, STEPS + 1))


def test_slurm_requeues_the_job(cluster: Cluster, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    job = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    number = cluster.run(0, [*job, script, *arguments(out)], tmp_path).stdout.strip()
    wait_for_a_step(out)
    # What Slurm itself sends before the time is up: to the script alone.
    cluster.run(0, ["scancel", "--batch", "--signal=USR1", number])
    deadline = time.monotonic() + 60
    while "Restarts=1" not in (state := cluster.run(0, ["scontrol", "show", "job", "-o", number]).stdout):
        assert time.monotonic() < deadline, state + log.read_text()
        time.sleep(0.5)
    assert json.loads((out / "end.json").read_text())["status"] == 75
    # Slurm holds a requeued job back for two minutes; here it is enough that slurmd, which counts in seconds, does not
    # take the new start for the one that it has just ended ("already killed").
    time.sleep(2.5)
    cluster.run(0, ["scontrol", "update", f"JobId={number}", "StartTime=now"])
    deadline = time.monotonic() + 200
    while not re.search("JobState=(COMPLETED|FAILED|CANCELLED)", state):
        assert time.monotonic() < deadline, state + log.read_text()
        time.sleep(0.5)
        state = cluster.run(0, ["scontrol", "show", "job", "-o", number]).stdout
    assert "JobState=COMPLETED" in state, log.read_text()
    assert "resumed from" in log.read_text()
    assert steps_done(out) == list(range(1, STEPS + 1))
