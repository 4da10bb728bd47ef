"""A disk that is full is said in one line, whoever writes: ds-optim's tools, torch, or DeepSpeed by itself."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_optim.chaos.disk import NoFileSystem, small_file_system
from ds_optim.cli import app as cli
from ds_optim.survival.checkpoint_files import CheckpointFiles

from .checkpoint_files import Tangle, own, save_unsharded, trained


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_file_system(tmp_path / "disk") as folder:
            yield folder
    except NoFileSystem as reason:
        pytest.skip(str(reason))


def leave_room(disk: Path, size: int) -> None:
    """Fill the disk but for ``size`` bytes."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - size))


@pytest.mark.parametrize("room", [0, 8 << 10, 64 << 10], ids=["no folder", "torch's file", "DeepSpeed's script"])
def test_reshard_on_a_full_disk_is_one_line(
    room: int, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Tangle()
    optimizer = own("Lion", model)
    trained(model, optimizer)
    source = save_unsharded(tmp_path / "original", model, optimizer)
    leave_room(disk, room)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(source), str(disk / "out"), "--ranks", "2", "--stage", "2"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [f"ds-optim: error: cannot write {disk / 'out'}: No space left on device"]
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_script_of_deepspeeds_costs_no_checkpoint_and_a_torn_one_does_not_stay(tmp_path: Path) -> None:
    script, reason = tmp_path / "zero_to_fp32.py", os.strerror(errno.ENOSPC)
    script.write_text("import argp")
    files = CheckpointFiles(None, lambda: None)
    files.fail_beside(OSError(errno.ENOSPC, reason, "its source", None, str(script)), tmp_path / "step-2")
    assert (files.problem, files.note) == (None, f"zero_to_fp32.py could not be written: {reason}")
    assert not script.exists()
    script.write_text("whole")
    files.fail_beside(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(script)), tmp_path / "step-2")
    assert script.read_text() == "whole"
    assert files.problem is None


def test_what_else_deepspeed_cannot_write_costs_the_checkpoint(tmp_path: Path) -> None:
    """Such as the copy of what is offloaded to NVMe, whose error names no file."""
    files = CheckpointFiles(None, lambda: None)
    files.fail_beside(shutil.Error([("a", "b", "No space left on device")]), tmp_path / "step-2")
    assert files.problem is not None
    assert files.problem.endswith("No space left on device')] (step-2)")
    assert files.note is None
