"""What a run survives on the disk: old, damaged and unwritable checkpoints, and a change of optimizer."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.chaos.disk import NoFileSystem, small_file_system
from ds_optim.errors import UserError
from ds_optim.job.exits import SAVE_FAILED
from ds_optim.job.results import TrainResult
from ds_optim.job.settings import make_settings
from ds_optim.survival import manifest
from ds_optim.survival.checkpoint_files import CheckpointFiles
from ds_optim.train.loop import train
from tests.distributed.harness import run_ranks

from .survival import FIRST_RELEASE, STEPS, Watcher, log_of, tiny
from .test_train import ADAMW

# ---- checkpoints of the first release


def go_on(rank: int, world_size: int, folder: Path) -> TrainResult:
    os.chdir(folder)
    return train(make_settings(**tiny(out="out", resume=True, save_every=3)))


@pytest.mark.full
def test_a_checkpoint_of_the_first_release_resumes(place: Path) -> None:
    shutil.copytree(FIRST_RELEASE, place / "out")
    for result in run_ranks(2, go_on, place):
        then = [line["loss"] for line in log_of(FIRST_RELEASE) if "loss" in line]
        assert result.losses == pytest.approx(then[3:], rel=1e-5)
    # What it goes on to write is sealed the new way, and what it wrote is left alone.
    assert (place / "out/checkpoints/step-6" / manifest.NAME).exists()
    assert (place / "out/checkpoints/step-3/whole.json").exists()


def test_a_damaged_checkpoint_of_the_first_release_is_named(place: Path) -> None:
    for name in ("missing", "flipped"):
        shutil.copytree(FIRST_RELEASE, place / name)
    (place / "missing/checkpoints/step-3/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    path = place / "flipped/checkpoints/step-3/mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    missing, flipped = run_ranks(1, refusals, place, ["missing", "flipped"], init=False)[0]
    assert "1 of 2 *_optim_states.pt are there" in missing
    assert "mp_rank_00_model_states.pt is damaged" in flipped


def refusals(rank: int, world_size: int, folder: Path, outs: list[str]) -> list[str]:
    os.chdir(folder)
    lines = []
    for out in outs:
        with pytest.raises(UserError) as caught:
            train(make_settings(**tiny(out=out, resume=True)))
        lines.append(str(caught.value))
    return lines


# ---- what lies on the disk


def kept(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """A run that keeps two checkpoints, its newest damaged, resumed; and what stock DeepSpeed loads of it."""
    os.chdir(folder)
    given = tiny(out="out", save_every=1, keep=2, stage=3)
    whole = train(make_settings(**given))
    if rank == 0:
        os.truncate("out/checkpoints/step-6/zero_pp_rank_1_mp_rank_00_optim_states.pt", 100)
        (folder / "out/checkpoints/step-7").mkdir()  # the begin of a save that never ended
        shutil.copytree("out/checkpoints", "copy")
    torch.distributed.barrier()
    latest = (folder / "copy/latest").read_text()
    tags = []

    def load_stock(engine: Any) -> None:
        tags.append((folder / "out/checkpoints/latest").read_text())
        path, state = engine.load_checkpoint("out/checkpoints", load_lr_scheduler_states=False)
        tags.append(f"{Path(path).parent.name} {state['step']}")

    rest = train(make_settings(**{**given, "resume": True}), Watcher(started=load_stock))
    return {"whole": whole.losses, "rest": rest.losses, "latest": latest, "tags": tags}


@pytest.mark.full
def test_damage_is_skipped_and_named_and_old_checkpoints_go(place: Path) -> None:
    for found in run_ranks(2, kept, place):
        assert found["latest"] == "step-6"
        assert found["tags"] == ["step-5", "step-5 5"]
        assert found["rest"] == found["whole"][5:]
    folder = place / "out/checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-5", "step-6", "step-7"]
    assert sorted(path.name for path in (place / "copy").glob("step-*")) == ["step-5", "step-6", "step-7"]
    assert [step for step in (5, 6) if (folder / f"step-{step}" / manifest.NAME).exists()] == [5, 6]
    skipped = refused_newest(place)
    assert "skipped step-7: its save did not end" in skipped
    assert "skipped step-6: zero_pp_rank_1_mp_rank_00_optim_states.pt has 100 bytes of" in skipped


def refused_newest(place: Path) -> str:
    """Why none of the copied checkpoints is taken, once the last whole one is damaged too."""
    (place / "none").mkdir()
    (place / "copy").rename(place / "none/checkpoints")
    (place / "none/checkpoints/step-5" / manifest.NAME).write_text("{}")
    (line,) = run_ranks(1, refusals, place, ["none"], init=False)[0]
    assert "no complete checkpoint" in line
    assert "skipped step-5: manifest.json is damaged" in line
    return line


class FullDisk:
    """DeepSpeed's checkpoint engine on a disk that is full."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def save(self, state: Any, path: str) -> None:
        Path(path).write_bytes(b"the beginning")
        raise OSError(28, os.strerror(28))


def full_disk(rank: int, world_size: int, folder: Path, stage: int, full: tuple[int, ...]) -> TrainResult:
    """A run whose saves of steps ``full`` find a full disk on rank 1."""
    os.chdir(folder)
    engines: dict[str, Any] = {}

    def swap(engine: Any, step: int) -> None:
        own = engines.setdefault("own", engine.checkpoint_engine)
        engine.checkpoint_engine = FullDisk(own) if rank == 1 and step in full else own

    return train(make_settings(**tiny(out="out", save_every=2, stage=stage)), Watcher(swap))


@pytest.mark.full
@pytest.mark.parametrize(("stage", "full", "status"), [(1, (4,), 0), (3, (4, 6), SAVE_FAILED)])
def test_a_full_disk_on_one_rank_costs_that_checkpoint_alone(
    place: Path, stage: int, full: tuple[int, ...], status: int
) -> None:
    results = run_ranks(2, full_disk, place, stage, full)
    assert [result.status for result in results] == [status, status]
    assert results[0].steps == STEPS
    folder = place / "out/checkpoints"
    sealed = [step for step in (2, 4, 6) if (folder / f"step-{step}" / manifest.NAME).exists()]
    assert sealed == [step for step in (2, 4, 6) if step not in full]
    # Nothing is left to fill the disk, and `latest` names what is whole.
    assert not any((folder / f"step-{step}").exists() for step in full)
    assert (folder / "latest").read_text() == f"step-{sealed[-1]}"
    warnings = [line["warning"] for line in log_of(place / "out") if "warning" in line]
    assert len(warnings) == len(full)
    for step, line in zip(full, warnings, strict=True):
        assert f"the checkpoint of step {step} was not saved: rank 1: No space left on device (zero_pp" in line


def spoiled(rank: int, world_size: int, folder: Path, how: str, stage: int) -> TrainResult:
    """A run with checkpoints of steps 2, 4 and 6, before the first of which something happens to their folder."""
    os.chdir(folder)
    checkpoints = Path("disk/out/checkpoints")

    def spoil(engine: Any, step: int) -> None:
        if rank == 0 and step == 1:
            if how == "full":
                with contextlib.suppress(OSError), Path("disk/ballast").open("wb", buffering=0) as file:
                    while file.write(bytes(512)):
                        pass
            elif how == "immutable":
                checkpoints.mkdir()
                subprocess.run(["chattr", "+i", str(checkpoints)], check=True)
            else:
                (checkpoints / "zero_to_fp32.py").mkdir(parents=True)

    return train(make_settings(**tiny(out="disk/out", save_every=2, stage=stage)), Watcher(spoil))


@pytest.fixture
def changed_attributes(place: Path) -> Iterator[Callable[[], None]]:
    """Skips where no folder can be made immutable; makes what was mutable again."""

    def change(sign: str, folder: Path) -> bool:
        return subprocess.run(["chattr", f"{sign}i", str(folder)], capture_output=True, check=False).returncode == 0

    def needed() -> None:
        probe = place / "probe"
        probe.mkdir()
        if not (shutil.which("chattr") and change("+", probe) and change("-", probe)):
            pytest.skip("no folder can be made immutable here")

    yield needed
    if (place / "disk/out/checkpoints").exists() and shutil.which("chattr"):
        change("-", place / "disk/out/checkpoints")


@pytest.mark.full
@pytest.mark.parametrize(("how", "stage"), [("full", 3), ("immutable", 1)])
def test_a_first_save_that_finds_no_place_costs_checkpoints_and_not_the_run(
    place: Path, how: str, stage: int, changed_attributes: Callable[[], None]
) -> None:
    """DeepSpeed's copy of its recovery script fails too, on rank 0 alone, and not in a file that is guarded."""
    if how == "immutable":
        changed_attributes()
    try:
        with small_file_system(place / "disk") if how == "full" else contextlib.nullcontext():
            results = run_ranks(2, spoiled, place, how, stage, timeout=60)
    except NoFileSystem as reason:
        pytest.skip(str(reason))
    assert [(result.status, result.steps) for result in results] == [(SAVE_FAILED, STEPS)] * 2
    assert not list(place.glob("disk/out/checkpoints/*"))
    if how == "immutable":  # on a full disk there is no log either
        warnings = [line["warning"] for line in log_of(place / "disk/out") if "warning" in line]
        assert warnings == [
            f"the checkpoint of step {step} was not saved: rank 0: Operation not permitted (step-{step});"
            " earlier ones are as they were"
            for step in (2, 4, 6)
        ]


@pytest.mark.full
def test_a_recovery_script_that_cannot_be_copied_costs_nothing(place: Path) -> None:
    results = run_ranks(2, spoiled, place, "script", 3, timeout=60)
    assert [(result.status, result.steps) for result in results] == [(0, STEPS)] * 2
    assert (place / "disk/out/checkpoints/latest").read_text() == "step-6"
    warnings = [line["warning"] for line in log_of(place / "disk/out") if "warning" in line]
    assert len(warnings) == 3
    line = "after the checkpoint of step 2: rank 0: zero_to_fp32.py could not be written: Is a directory"
    assert warnings[0] == line


class Payload:
    """What a pickle of it does: leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.full
def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"step": Payload(tmp_path / "it ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt is refused, and nothing in it was run"):
        CheckpointFiles(None, lambda: None).load(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "it ran").exists()


# ---- another optimizer


def reset(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What a run that changes its optimizer starts from, beside what the one before it had."""
    from deepspeed.utils import safe_get_full_fp32_param

    def weights(engine: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name, p in engine.module.named_parameters():
            # Stage 0 in fp32 has no masters but the weights.
            master = safe_get_full_fp32_param(p)
            found[name] = (p if master is None else master).detach().float().clone()
        return found

    os.chdir(folder)
    found = {}
    for stage, dtype, to in RESETS:
        given = tiny(stage=stage, dtype=dtype, out=f"{stage}-{dtype}-{to['optimizer']}", save_every=3, steps=4)
        before: list[dict[str, torch.Tensor]] = []
        after: list[Any] = []

        def at_save(engine: Any, step: int, before: list[Any] = before) -> None:
            if step == 3:
                before.append(weights(engine))

        def at_start(engine: Any, after: list[Any] = after) -> None:
            after.append((weights(engine), engine.global_steps, len(engine.basic_optimizer.state)))

        train(make_settings(**given), Watcher(at_save))
        resumed = {**given, **to, "resume": True}
        if rank == 0:
            shutil.rmtree(f"{given['out']}/checkpoints/step-4")
        torch.distributed.barrier()
        with pytest.raises(UserError, match="or --reset-optimizer"):
            train(make_settings(**resumed))
        result = train(make_settings(**resumed, reset_optimizer=True), Watcher(started=at_start))
        (held, steps, states) = after[0]
        found[given["out"]] = {
            "differ": [name for name in held if not torch.equal(held[name], before[0][name])],
            "steps": (steps, states, result.steps, len(result.losses)),
            "finite": result.val_loss < 10,
        }
    return found


RESETS: list[tuple[int, str, dict[str, Any]]] = [
    (0, "fp32", ADAMW),
    (1, "bf16", ADAMW),
    (2, "fp32", {"optimizer": "lion", "optimizer_params": {"lr": 1e-3}}),
    (3, "bf16", ADAMW),
]


@pytest.mark.full
def test_another_optimizer_starts_from_the_same_weights_and_place(place: Path) -> None:
    for found in run_ranks(2, reset, place):
        assert len(found) == len(RESETS)
        for label, facts in found.items():
            assert facts == {"differ": [], "steps": (3, 0, 4, 1), "finite": True}, label
    for stage, dtype, to in RESETS:
        lines = [line for line in log_of(place / f"{stage}-{dtype}-{to['optimizer']}") if "lr" in line]
        # The schedule goes on: the cosine of step 4 of 4.
        assert lines[3]["lr"] == pytest.approx(to["optimizer_params"]["lr"] * 0.1464466, rel=1e-5)


# ---- a checkpoint that one rank's node has otherwise


def on_own_disks(rank: int, world_size: int, folder: Path, outs: list[str]) -> list[tuple[str, str]]:
    """Each rank resumes from a folder of its own, as on nodes without a common disk: (error, line)."""
    found = []
    for out in outs:
        os.chdir(folder / str(rank))
        try:
            train(make_settings(**tiny(out=out, resume=True)))
        except UserError as error:
            found.append(("UserError", str(error)))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def write_runs(rank: int, world_size: int, folder: Path) -> None:
    os.chdir(folder)
    train(make_settings(**tiny(out="out", steps=2, save_every=1)))
    train(make_settings(**tiny(out="muon", steps=2, save_every=2, optimizer="muon", optimizer_params={"lr": 1e-3})))


@pytest.mark.full
def test_a_checkpoint_that_is_damaged_on_one_node_is_loaded_by_no_rank(place: Path) -> None:
    """Rank 0 looks at the file that rank 1 loads, and finds its own copy whole."""
    run_ranks(2, write_runs, place)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damages = {
        "missing": f"{name} is missing",
        "cut off": name,
        "of another optimizer": "rank 1 cannot load the checkpoint, and no rank has: ",
        "of another step": "the ranks disagree on the checkpoint to be loaded",
    }
    for rank in range(2):
        shutil.copytree(place / "model", place / str(rank) / "model")
        for damage in damages:
            shutil.copytree(place / "out", place / str(rank) / damage)
    steps = {damage: place / "1" / damage / "checkpoints" for damage in damages}
    (steps["missing"] / "step-2" / name).unlink()
    os.truncate(steps["cut off"] / "step-2" / name, 100)
    shutil.copy(place / "muon/checkpoints/step-2" / name, steps["of another optimizer"] / "step-2" / name)
    other = steps["of another step"]
    shutil.copy(other / "step-1" / name, other / "step-2" / name)
    first, second = run_ranks(2, on_own_disks, place, list(damages), timeout=60)
    assert first == second
    for (error, line), says in zip(first, damages.values(), strict=True):
        assert error == "UserError", (says, line)
        assert says in line
        assert "\n" not in line
