"""Two nodes with something wrong: each fault ends on both within a minute, with a line that names the node."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import INTERFACE, REPOSITORY, Cluster

pytestmark = pytest.mark.cluster

SCRIPT = str(REPOSITORY / "launch" / "hostfile.sh")
TRAIN = "--preset qwen3-tiny --seq-len 16 --micro-batch 2 --eval-batches 1 --dtype fp32 --optimizer lion --stage 1"
_MINUTE = 60


def launch(cluster: Cluster, *arguments: str, cwd: Path) -> tuple[int, str]:
    command = ["bash", SCRIPT, "--hostfile", str(cluster.hostfile(1)), *arguments]
    done = cluster.run(0, command, cwd)
    return done.returncode, done.stdout


def assert_nothing_left(cluster: Cluster) -> None:
    for node in (0, 1):
        left = cluster.run(node, ["pgrep", "-af", "[d]s_optim_run"])
        assert left.stdout == "", f"left on {cluster.names[node]}"


@contextmanager
def other_files(cluster: Cluster, node: int, real: Path, copy: Path) -> Iterator[None]:
    """Let ``node`` alone see ``copy`` where the others see ``real``."""
    done = cluster.run(node, ["mount", "--bind", str(copy), str(real)])
    assert done.returncode == 0, done.stdout
    try:
        yield
    finally:
        cluster.run(node, ["umount", "-l", str(real)])


def test_doctor_looks_at_every_node(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(
        json.dumps({"train_batch_size": 4, "optimizer": {"type": "LionMuon"}, "zero_optimization": {"stage": 2}})
    )
    status, output = launch(cluster, "doctor", "--config", str(config), "--out", str(tmp_path), "--json", cwd=tmp_path)
    assert status == 0, output
    (line,) = re.findall(r"\[rank 0 node1\] (\{.*\})$", output, re.MULTILINE)
    found = json.loads(line)
    assert found["nodes"] == ["node1", "node2"]
    assert found["status"] == 0
    assert {timed["collective"] for timed in found["collectives"]} == {"all-reduce", "all-gather", "all-to-all"}
    assert all(timed["seconds"] > 0 for timed in found["collectives"])
    lines = {finding["check"]: finding["line"] for finding in found["findings"]}
    assert lines["ranks"] == "2 joined: 1 on node1, 1 on node2"
    assert lines["code"].endswith("on every node")
    assert "LionMuon stepped" in lines["trial"]


def test_other_code_on_one_node(cluster: Cluster, tmp_path: Path) -> None:
    copy = tmp_path / "other_version"
    shutil.copytree(REPOSITORY / "ds_optim", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "errors.py").open("a") as file:
        file.write("# changed\n")
    with other_files(cluster, 1, REPOSITORY / "ds_optim", copy):
        status, output = launch(cluster, "doctor", "--out", str(tmp_path), cwd=tmp_path)
        assert status == 1, output
        assert re.search(r"TODO  code .* on node1, but \w+ on node2: copy the same files to every node", output), output
        begin = time.monotonic()
        status, output = launch(cluster, *TRAIN.split(), "--steps", "2", cwd=tmp_path)
    assert status == 2, output
    assert "rank 1 on node2 has other code of ds_optim than rank 0 on node1: copy the same version" in output
    assert time.monotonic() - begin < _MINUTE
    assert_nothing_left(cluster)


def test_a_package_missing_on_one_node(cluster: Cluster, tmp_path: Path) -> None:
    import datasets

    empty = tmp_path / "empty"
    empty.mkdir()
    begin = time.monotonic()
    # A folder without files is a package to Python, and has nothing in it.
    with other_files(cluster, 1, Path(datasets.__file__).parent, empty):
        status, output = launch(cluster, *TRAIN.split(), "--steps", "2", cwd=tmp_path)
    assert status != 0
    assert re.search(r"\[rank 1 node2\] ds-optim: error: \S+ has no datasets: install it on node2 too", output), output
    assert "ranks on node2 ended with status 2: ending the run on the other nodes" in output
    assert time.monotonic() - begin < _MINUTE
    assert_nothing_left(cluster)


def test_a_port_in_use(cluster: Cluster, tmp_path: Path) -> None:
    listen = "import socket, time; s = socket.socket(); s.bind(('', 15555)); s.listen(); time.sleep(120)"
    taken = cluster.start(0, [sys.executable, "-c", listen], tmp_path)
    begin = time.monotonic()
    try:
        status, output = launch(cluster, "--port", "15555", *TRAIN.split(), "--steps", "2", cwd=tmp_path)
    finally:
        cluster.run(0, ["pkill", "-f", "bind.*15555"])
        taken.communicate(timeout=20)
    assert status == 2, output
    assert "port 15555 of node1 is in use: give the launcher another (--port N)" in output
    assert time.monotonic() - begin < _MINUTE
    assert_nothing_left(cluster)


def test_a_host_that_cannot_be_reached(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode9 slots=1\n")
    begin = time.monotonic()
    done = cluster.run(0, ["bash", SCRIPT, "--hostfile", str(hostfile), *TRAIN.split()], tmp_path)
    assert done.returncode == 2
    assert "node9 cannot be reached: 'ssh node9 true' must work without a password" in done.stdout
    assert time.monotonic() - begin < _MINUTE


def test_a_link_that_goes_down_mid_step(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bash", SCRIPT, "--hostfile", str(cluster.hostfile(1)), "--tries", "1", *TRAIN.split()]
    run = cluster.start(0, [*command, "--steps", "100000", "--out", str(out)], tmp_path)
    deadline = time.monotonic() + 100
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    begin = time.monotonic()
    cluster.run(1, ["ip", "link", "set", INTERFACE, "down"])
    try:
        output, _ = run.communicate(timeout=2 * _MINUTE)
        seconds = time.monotonic() - begin
        # The node that is cut off hears of nothing: its ranks miss the heartbeat of rank 0.
        alone = begin + _MINUTE
        while cluster.run(1, ["pgrep", "-f", "[d]s_optim_run"]).stdout and time.monotonic() < alone:
            time.sleep(0.5)
        left_there = cluster.run(1, ["pgrep", "-af", "[d]s_optim_run"]).stdout
    finally:
        run.kill()
        cluster.run(1, ["ip", "link", "set", INTERFACE, "up"])
        cluster.run(1, ["pkill", "-KILL", "-f", "[d]s_optim_run"])
    print(f"ended on node1 after {seconds:.0f} s, on node2 within {time.monotonic() - begin:.0f} s")
    assert run.returncode != 0
    assert "node2 is lost (ssh could not reach it, or its link is down)" in output, output[-3000:]
    assert seconds < _MINUTE
    assert left_there == "", "ranks on the node that was cut off"
    left = cluster.run(0, ["pgrep", "-af", "[d]s_optim_run"])
    assert left.stdout == ""


def test_compare_over_two_nodes_goes_on_after_a_cell_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    arguments = "compare --optimizers adamw,lion_muon --stages 2 --steps 4 --seq-len 16 --micro-batch 2 --dtype fp32"
    wrong = ["--optimizer-params", json.dumps({"adamw": {"lr": 1e-3, "betas": "none"}}), "--eval-batches", "1"]
    status, output = launch(cluster, *arguments.split(), *wrong, "--out", str(out), cwd=tmp_path)
    assert status == 1, output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["optimizer"], row["status"]) for row in rows] == [("adamw", "failed"), ("lion_muon", "ok")]
    assert re.search(r"rank \d on node\d: ", rows[0]["reason"]), rows[0]["reason"]
    assert rows[1]["extra"]["nodes"] == ["node1", "node2"]
    sent = rows[1]["extra"]["sent_by_node"]
    assert list(sent) == ["node1", "node2"]
    assert all(node["between"] > 1_000_000 > 10 * node["inside"] for node in sent.values()), sent
    logs = sorted(path.name for path in out.rglob("rank*.log"))
    assert logs.count("rank0.log") == logs.count("rank1.log") == 2
    assert (out / "report.md").exists()


@pytest.mark.parametrize("launcher", ["openmpi", "slurm"])
def test_compare_by_other_launchers(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    out = tmp_path / "compare"
    arguments = (
        "compare --optimizers lion --stages 1 --steps 4 --seq-len 16 --micro-batch 2 --dtype fp32 --eval-batches 1"
    )
    compare = [*arguments.split(), "--out", str(out)]
    if launcher == "openmpi":
        if importlib.util.find_spec("mpi4py") is None:
            pytest.skip("mpi4py is not installed: pip install mpi4py")
        script = str(REPOSITORY / "launch" / "openmpi.sh")
        command = ["bash", script, "--hostfile", str(cluster.hostfile(1)), *compare]
    else:
        script = str(REPOSITORY / "launch" / "slurm.sbatch")
        command = [
            "sbatch",
            "--wait",
            "--nodes=2",
            "--ntasks-per-node=1",
            f"--output={tmp_path / 'log'}",
            script,
            *compare,
        ]
    done = cluster.run(0, command, tmp_path)
    assert done.returncode == 0, done.stdout
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert row["status"] == "ok", row["reason"]
    assert row["extra"]["nodes"] == ["node1", "node2"]


def test_memory_over_two_nodes_names_the_node_of_each_rank(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "memory"
    arguments = "memory --optimizers adamw,lion --stages 3 --repeat 1 --steady 1 --seq-len 16 --micro-batch 2"
    status, output = launch(cluster, *arguments.split(), "--dtype", "fp32", "--out", str(out), cwd=tmp_path)
    assert status == 0, output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == ["adamw", "lion"]
    for row in rows:
        assert [peak["host"] for peak in row["extra"]["peaks"]] == ["node1", "node2"]
        (states,) = [line for line in row["extra"]["reconciliation"] if line["what"] == "model states"]
        assert abs(states["share"]) < 0.02
    assert "node2: 1" in (out / "report.html").read_text(), "the map over ranks names nodes"


def test_a_cell_out_of_memory_on_two_nodes_is_a_row(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "memory"
    bucket = json.dumps({"zero_optimization": {"reduce_bucket_size": 10**15}})  # stage 0 makes none
    arguments = "memory --optimizers lion --stages 2,0 --repeat 1 --steady 1 --seq-len 16 --micro-batch 2 --dtype fp32"
    status, output = launch(cluster, *arguments.split(), "--deepspeed", bucket, "--out", str(out), cwd=tmp_path)
    assert status == 1, output
    failed, ran = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert failed["extra"]["out_of_memory"], failed["reason"]
    assert re.search(r"rank \d on node\d: ", failed["reason"]), failed["reason"]
    assert ran["status"] == "ok"
