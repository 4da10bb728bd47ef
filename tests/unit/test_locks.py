"""Locks that die with their holder: builds of DeepSpeed's ops that were killed, and two runs in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_optim.errors import UserError
from ds_optim.machine import extensions, run_lock
from ds_optim.machine.extensions import clear_left_overs, guarded
from ds_optim.machine.run_lock import LOCK_NAME, RunLock

pytestmark = pytest.mark.full

#: Builds as torch does, or holds our lock alone meanwhile, and says when it is in the middle of it.
BUILDS = """
import os, sys, time
from pathlib import Path
from ds_optim.machine.extensions import guarded
root = Path(sys.argv[1])
def load():
    (root / "op").mkdir(exist_ok=True)
    descriptor = os.open(root / "op" / "lock", os.O_CREAT | os.O_EXCL)
    print("under way", flush=True)
    sys.stdin.read()
    (root / "op" / "op.so").touch()
    os.remove(root / "op" / "lock")
guarded(root, "op", load) if sys.argv[2] == "ours" else load()
"""


def builder(root: Path, whose: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDS, str(root), whose], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def load_op(root: Path, limit_s: float = 20.0) -> list[bool]:
    """Whether each load found the op built."""
    found: list[bool] = []

    def load() -> None:
        assert not (root / "op" / "lock").exists()
        found.append((root / "op" / "op.so").exists())
        (root / "op").mkdir(exist_ok=True)
        (root / "op" / "op.so").touch()

    guarded(root, "op", load, limit_s)
    return found


@pytest.mark.parametrize("whose", ["ours", "plain torch's"])
def test_a_killed_build_stops_no_later_one(tmp_path: Path, capfd: pytest.CaptureFixture[str], whose: str) -> None:
    kill(builder(tmp_path, whose))
    assert (tmp_path / "op" / "lock").exists()
    assert load_op(tmp_path) == [False]
    told = capfd.readouterr().err
    assert f"removed {tmp_path / 'op' / 'lock'}, which a killed build left behind" in told
    assert "building DeepSpeed's op op in" in told
    assert load_op(tmp_path) == [True]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("whose", ["ours", "plain torch's"])
def test_a_build_that_lives_is_waited_for_within_a_bound_and_named(tmp_path: Path, whose: str) -> None:
    process = builder(tmp_path, whose)
    with pytest.raises(UserError, match=rf"process {process.pid} .*for more than 0\.3 s") as caught:
        load_op(tmp_path, 0.3)
    assert "\n" not in str(caught.value)
    threading.Timer(0.5, lambda: process.communicate()).start()
    # Who waited for its end finds it built, and builds nothing.
    assert load_op(tmp_path) == [True]


def test_all_locks_that_are_left_go_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("fused_adam", "somebody_elses"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    clear_left_overs()
    assert not list(tmp_path.glob("*/lock"))
    # On a file system of several machines another one may build: the file is named, and stays.
    monkeypatch.setattr(extensions, "_shared_by_machines", lambda path: True)
    (tmp_path / "fused_adam" / "lock").touch()
    with pytest.raises(UserError, match="fused_adam/lock is the lock of a build that this machine does not know"):
        clear_left_overs()
    assert (tmp_path / "fused_adam" / "lock").exists()


def test_a_home_that_is_only_read_holds_nobodys_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "/proc")  # in which root cannot make a folder either
    clear_left_overs()
    loaded = []
    guarded(extensions._root(), "op", lambda: loaded.append(True))
    assert loaded == [True]


def test_the_place_of_ops_is_the_users_own_by_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    extensions.use_own_folder()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.parent == tmp_path / "torch_extensions"
    assert "deepspeed0." in folder.name
    assert folder.stat().st_mode & 0o777 == 0o700
    # What others can write to holds no code.
    tmp_path.chmod(0o777)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    extensions.use_own_folder()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    assert f"built where torch builds: others can write to {tmp_path}" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "mine")
    extensions.use_own_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "mine"


# ---- one run a folder

HOLDS = """
import sys, time
from pathlib import Path
from ds_optim.machine.run_lock import RunLock
RunLock().take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_living_runs(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    held = (tmp_path / LOCK_NAME).read_text()
    with pytest.raises(UserError, match=rf"is written to by process {process.pid} on \S+, since 20\d\d-") as caught:
        RunLock().take(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / LOCK_NAME).read_text() == held
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lock = RunLock()
    lock.take(tmp_path)
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_run_of_another_machine_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"host": "node7", "place": "elsewhere", "pid": 1, "started": time.time()}))
    monkeypatch.setattr(run_lock, "WATCH_S", 0.6)
    threading.Timer(0.3, os.utime, [path]).start()
    with pytest.raises(UserError, match="is written to by process 1 on node7"):
        RunLock().take(tmp_path)
    # No sign any more: it is taken over. What is no lock at all is, too.
    for text in (path.read_text(), "[1, 2", '{"host": 3}', "[" * 5000):
        path.write_text(text)
        lock = RunLock()
        lock.take(tmp_path)
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.release()
