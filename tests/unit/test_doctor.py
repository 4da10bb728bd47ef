"""What the doctor concludes of what nodes say, and the command on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.cluster import trial as doctor_trial
from ds_optim.cluster.doctor import Examination, Finding, compare_nodes
from ds_optim.cluster.node import file_digest, network_problems, node_facts
from ds_optim.errors import UserError
from ds_optim.machine.reach import unreachable


def facts(node: str, torch: str = "2.13.0", code: str = "aa", config: str = "cc") -> dict[str, Any]:
    return {"node": node, "versions": {"torch": torch}, "digests": {"code": code, "config": config}}


def test_nodes_that_agree_are_fine() -> None:
    found = compare_nodes([facts("node1"), facts("node1"), facts("node2")])
    assert [(f.check, f.fine, f.line) for f in found] == [
        ("torch", True, "2.13.0 on every node"),
        ("code", True, "aa on every node"),
        ("config", True, "cc on every node"),
    ]


@pytest.mark.parametrize(
    ("other", "check", "line"),
    [
        ({"torch": "2.12.0"}, "torch", "2.13.0 on node1, but 2.12.0 on node2: install the same version on every node"),
        ({"code": "bb"}, "code", "aa on node1, but bb on node2: copy the same files to every node"),
        ({"config": "No such file"}, "config", "cc on node1, but No such file on node2: copy the same files"),
    ],
)
def test_a_node_that_differs_is_named_with_the_remedy(other: dict[str, str], check: str, line: str) -> None:
    found = compare_nodes([facts("node1"), facts("node2", **other), facts("node2", **other)])
    wrong = [f for f in found if not f.fine]
    assert [f.check for f in wrong] == [check]
    assert wrong[0].line.startswith(line)
    assert Examination(ranks=3, nodes=["node1", "node2"], findings=found, facts=[]).status == 1


def test_status() -> None:
    fine = Finding(check="a", fine=True, line="b")
    assert Examination(ranks=1, nodes=["n"], findings=[fine], facts=[]).status == 0


def test_an_interface_that_is_not_there() -> None:
    assert network_problems({}, "node1") == []
    assert network_problems({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo:1"}, "node1") == []
    ((check, line),) = network_problems({"GLOO_SOCKET_IFNAME": "nope0"}, "node1")
    assert check == "interface"
    assert line.startswith("GLOO_SOCKET_IFNAME=nope0, and node1 has only ")


def test_facts_of_this_machine(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text("{}")
    found = node_facts(tmp_path / "not" / "there", config)
    assert found["node"] == socket.gethostname()
    assert found["disk_gib"] > 0
    assert set(found["digests"]) == {"code", "config"}
    digest = file_digest(config)
    config.write_text("{ }")
    assert file_digest(config) != digest
    assert file_digest(tmp_path / "nowhere") == "No such file or directory"
    json.dumps(found)


def test_rank_0_that_is_not_there_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = unreachable(variables, 0.2)
    assert line is not None
    assert line.startswith(f"rank 0 at 127.0.0.1:{port} cannot be reached (Connection refused)")
    wrong = unreachable({**variables, "MASTER_ADDR": "no-such-host.invalid"}, 0.2)
    assert wrong is not None
    assert "'no-such-host.invalid', where rank 0 should be, is no known host" in wrong
    assert unreachable({**variables, "RANK": "0"}, 0.2) is None
    assert unreachable({}, 0.2) is None


@pytest.mark.parametrize("port", ["70000", "0", "http", "-1"])
def test_a_port_that_is_none_is_a_mistake(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"MASTER_PORT is '{port}': give the launcher a port from 1 to 65535"):
        doctor_trial.ranks.join()


def test_rank_0_may_come_later() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        threading.Timer(0.7, server.listen).start()
        variables = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        assert unreachable(variables, 20) is None


def doctor(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ds_optim", "doctor", *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.full
def test_the_command_names_the_optimizer_that_stepped(tmp_path: Path) -> None:
    """Of a config with all that is only DeepSpeed's: comments, words for switches, "auto", a scheduler."""
    config = tmp_path / "ds.json"
    config.write_text("""{ // a config
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "Muonlight", "params": {"lr": 1e-3}}, # ours
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 5}},
        "bf16": {"enabled": "true"}, "zero_optimization": {"stage": "1", "reduce_bucket_size": "auto"},
    }""")
    done = doctor("--config", str(config), "--out", str(tmp_path), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["status"] == 0, done.stdout + done.stderr
    by_check = {finding["check"]: finding for finding in found["findings"]}
    assert {"python", "torch", "deepspeed", "ds-optim", "driver", "code", "config", "disk", "trial"} <= set(by_check)
    assert "ds_optim.optimizers.muon.Muonlight stepped" in by_check["trial"]["line"]


class Engine:
    """What the trial asks of an engine."""

    module = torch.nn.Linear(2, 2)

    def train_micro_batch_size_per_gpu(self) -> int:
        return 100

    def gradient_accumulation_steps(self) -> int:
        return 3

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def destroy(self) -> None:
        pass


def test_the_trial_is_of_the_users_config_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[dict[str, Any]] = []

    def initialize(*, model: object, config: dict[str, Any]) -> tuple[Engine]:
        tried.append(config)
        return (Engine(),)

    windows: list[tuple[int, ...]] = []

    def losses(engine: Engine, given: torch.Tensor) -> torch.Tensor:
        windows.append(tuple(given.shape))
        return engine.module(torch.ones(1, 2)).square()

    monkeypatch.setattr(ds_optim, "initialize", initialize)
    monkeypatch.setattr(doctor_trial.models, "preset_config", lambda *size: None)
    monkeypatch.setattr(doctor_trial.models, "build_model", lambda shape, seed: Engine.module)
    monkeypatch.setattr(doctor_trial.models, "next_token_losses", losses)
    monkeypatch.setattr(doctor_trial.ranks, "device", lambda: torch.device("cpu"))
    given = {"bf16": {"enabled": "auto"}, "optimizer": {"type": "Lion"}, "scheduler": {"type": "WarmupLR"}}
    (tmp_path / "ds.json").write_text(json.dumps(given))
    doctor_trial.trial(tmp_path / "ds.json")
    assert tried == [given]
    assert windows == [(8, 17)] * 6, "two steps of three micro-batches, each of them cut short"
    (tmp_path / "ds.json").write_text('{"bf16": {}, "bf16": {}}')
    with pytest.raises(UserError, match="has the key 'bf16' twice"):
        doctor_trial.trial(tmp_path / "ds.json")
    doctor_trial.trial(None)
    assert tried[1]["optimizer"]["type"] == "LionMuon", "what train takes where nothing else is said"


@pytest.mark.full
def test_a_config_that_does_not_train_is_something_to_do(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    optimizer = {"type": "Lion", "params": {"lr": 1e-3, "btas": [0.9, 0.99]}}
    config.write_text(json.dumps({"train_batch_size": 2, "optimizer": optimizer}))
    done = doctor("--config", str(config), "--out", str(tmp_path))
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TODO")]
    assert "btas" in line
    assert done.stdout.splitlines()[-1].endswith("1 to do")


@pytest.mark.full
def test_a_mistake_in_the_command() -> None:
    done = doctor("--timeout", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("ds-optim: error: --timeout is 0")


@pytest.mark.full
def test_a_rank_that_cannot_join_says_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    lost = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = doctor("--timeout", "1", "--out", str(tmp_path), **lost)
    assert done.returncode == 1
    assert f"TODO  reach  rank 1 on {socket.gethostname()}: rank 0 at 127.0.0.1:{port} cannot be reached" in done.stdout
