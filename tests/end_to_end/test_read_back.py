"""What stands around a run's checkpoints when it resumes: files of other places, damaged notes, links that lead out."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.errors import UserError
from ds_optim.job.settings import make_settings
from ds_optim.survival import manifest
from ds_optim.survival.resume import newest_complete
from ds_optim.train.loop import train
from tests.distributed.harness import run_ranks

from .survival import log_of, tiny

pytestmark = pytest.mark.full

SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


# ---- a manifest over files that are not its own


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("it ran"),)


def sealed_anew(folder: Path) -> None:
    """Let the manifest say of each file what it is now, as somebody who mends checksums would."""
    notes = manifest.read(folder).notes
    (folder / manifest.NAME).unlink()
    manifest.seal_folder(folder, notes)


def swapped(folder: Path) -> str:
    one, other = (folder / SHARD.format(rank) for rank in (0, 1))
    one.rename(folder / "third")
    other.rename(one)
    (folder / "third").rename(other)
    sealed_anew(folder)
    return f"{other.name} was written as {one.name}"


def of_another_step(folder: Path) -> str:
    for rank in (0, 1):
        shutil.copy(folder.parent / "step-4" / SHARD.format(rank), folder)
    sealed_anew(folder)
    return f"{SHARD.format(1)} is of step 4"


def of_another_run(folder: Path) -> str:
    shutil.copy(Path("other/checkpoints/step-6") / SHARD.format(1), folder)
    sealed_anew(folder)
    return f"{SHARD.format(1)} is of another run"


def of_other_settings(folder: Path) -> str:
    notes = manifest.read(folder).notes
    notes["trajectory"]["optimizer_params"]["period"] = 3
    (folder / manifest.NAME).unlink()
    manifest.seal_folder(folder, notes)
    return f"{MODEL} is of another save: other settings, optimizer, ranks or layout than the manifest notes"


def downgraded(folder: Path) -> str:
    notes = manifest.read(folder).notes
    (folder / manifest.NAME).unlink()
    manifest.seal_folder(folder, notes, bound=False)
    return f"{MODEL} is of a later release than its manifest"


def with_a_payload(folder: Path) -> str:
    content = torch.load(folder / SHARD.format(1), weights_only=False)
    torch.save({**content, "ds_config": Payload()}, folder / SHARD.format(1))
    sealed_anew(folder)
    return f"{SHARD.format(1)} is refused, and nothing in it was run: "


def deflated(folder: Path) -> str:
    path = folder / MODEL
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(folder / "small", "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    (folder / "small").rename(path)
    sealed_anew(folder)
    return f"{MODEL} is refused: parts of it are compressed"


def without_files(folder: Path) -> str:
    record = json.loads((folder / manifest.NAME).read_text())
    body = {"format": record["format"], "notes": record["notes"], "files": {}}
    (folder / manifest.NAME).write_text(json.dumps({**body, "crc32": manifest._crc(body)}))
    return "manifest.json is damaged (files: "


def without_a_rank(folder: Path) -> str:
    (folder / SHARD.format(1)).unlink()
    sealed_anew(folder)
    return "1 of 2 *_optim_states.pt are there"


def notes_of_null(folder: Path) -> str:
    (folder / manifest.NAME).unlink()
    manifest.seal_folder(folder, {"step": None, "world_size": [2], "trajectory": "none"})
    return "manifest.json is damaged (step: "


def a_pipe(folder: Path) -> str:
    (folder / manifest.NAME).unlink()
    os.mkfifo(folder / manifest.NAME)
    return "manifest.json is no regular file"


def a_link(folder: Path) -> str:
    (folder / manifest.NAME).rename("elsewhere.json")
    (folder / manifest.NAME).symlink_to(Path("elsewhere.json").resolve())
    return "manifest.json is a symbolic link"


def an_old_seal_of_a_list(folder: Path) -> str:
    (folder / manifest.NAME).unlink()
    (folder / "whole.json").write_text("[1, 2]")
    return "whole.json is damaged ("


def an_old_seal_nested_deep(folder: Path) -> str:
    (folder / manifest.NAME).unlink()
    (folder / "whole.json").write_text('{"step": ' * 100_000)
    return "whole.json is damaged ("


HARMS: tuple[Callable[[Path], str], ...] = (
    *(swapped, of_another_step, of_another_run, of_other_settings, downgraded, with_a_payload, deflated, without_files),
    *(without_a_rank, notes_of_null, a_pipe, a_link, an_old_seal_of_a_list, an_old_seal_nested_deep),
)


def harmed(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """A run's newest checkpoint, harmed in each way; and what all ranks go on from, and why."""
    os.chdir(folder)
    whole = train(make_settings(**tiny(out="out", save_every=2)))
    train(make_settings(**tiny(out="other", save_every=6, seed=1)))
    found: dict[str, Any] = {}
    for harm in HARMS:
        expected = ""
        if rank == 0:
            shutil.copytree("out", harm.__name__)
            expected = harm(Path(harm.__name__) / "checkpoints/step-6")
        torch.distributed.barrier()
        chosen, skipped = newest_complete(Path(harm.__name__) / "checkpoints")
        found[harm.__name__] = (expected, chosen.step if chosen else None, skipped)
    resumed = train(make_settings(**tiny(out="swapped", save_every=2, resume=True)))
    found["losses"] = (whole.losses[4:], resumed.losses)
    return found


def test_a_checkpoint_whose_files_are_not_its_own_is_skipped_with_its_reason(place: Path) -> None:
    first, second = run_ranks(2, harmed, place, timeout=120)
    assert not (place / "it ran").exists()
    for harm in HARMS:
        expected, step, (line,) = first[harm.__name__]
        assert step == 4, harm
        assert line.startswith(f"skipped step-6: {expected}"), line
        assert "\n" not in line
        assert second[harm.__name__][1:] == (4, (line,))
    assert first["losses"][0] == first["losses"][1]


# ---- what stands beside a checkpoint


LINES = (
    b"\xff\n",
    b"3\n",
    b"{}\n",
    b"null\n",
    b'{"step": "two"}\n',
    b"[" * 50_000 + b"\n",
    b'{"step": 1' + b"0" * 400 + b"}\n",
)


def beside(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Runs that resume with damaged and hostile files beside their checkpoint."""
    os.chdir(folder)
    given = tiny(out="out", save_every=3, keep=1)
    whole = train(make_settings(**given))
    run = json.loads(Path("out/settings.json").read_text())["run"]
    found: dict[str, Any] = {"whole": whole.losses, "run": run}
    for name, harm in BESIDE.items():
        if rank == 0:
            shutil.copytree("out", name)
            shutil.rmtree(f"{name}/checkpoints/step-6")
            shutil.copytree("three", f"{name}/checkpoints/step-3")
            harm(Path(name))
        torch.distributed.barrier()
        try:
            result = train(make_settings(**{**given, "out": name, "resume": True}))
            found[name] = result.losses
        except UserError as error:
            found[name] = str(error)
    return found


def keep_three(rank: int, world_size: int, folder: Path) -> None:
    os.chdir(folder)
    train(make_settings(**tiny(out="first", save_every=3)))
    if rank == 0:
        shutil.copytree("first/checkpoints/step-3", "three")


def harm_log(out: Path) -> None:
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out / "log.jsonl").write_bytes(b"".join([*LINES, *lines[:3]]))
    (out / "checkpoints/latest").write_bytes(b"ste\xf0-3")


def links(out: Path) -> None:
    archive = Path("archive")
    shutil.copytree("three", archive / "step-6")
    (out / "checkpoints/step-6").symlink_to(Path("archive/step-6").resolve())
    for name in ("settings.json", "log.jsonl", "end.json", "checkpoints/latest", "checkpoints/zero_to_fp32.py"):
        (out / name).unlink()
        (out / name).symlink_to((archive / Path(name).name).resolve())
        (archive / Path(name).name).write_text("mine")
    for name in ("checkpoints/latest.partial", "end.json.partial", "log.jsonl.partial"):
        (out / name).symlink_to((archive / Path(name).name).resolve())


def folders(out: Path) -> None:
    for name in ("log.jsonl", "checkpoints/latest"):
        (out / name).unlink()
        (out / name).mkdir()


def settings_folder(out: Path) -> None:
    (out / "settings.json").unlink()
    (out / "settings.json").mkdir()


BESIDE: dict[str, Callable[[Path], None]] = {
    "log": harm_log,
    "links": links,
    "folders": folders,
    "settings": settings_folder,
}


def test_what_stands_beside_a_checkpoint_is_advice_and_no_link_leads_out(place: Path) -> None:
    run_ranks(2, keep_three, place, timeout=60)
    first, _ = run_ranks(2, beside, place, timeout=120)
    for name in ("log", "links", "folders"):
        assert first[name] == first["whole"][3:], name
    assert [line["step"] for line in log_of(place / "log") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (place / "log/checkpoints/latest").read_text() == "step-6"
    assert (
        json.loads((place / "log/settings.json").read_text())["run"]
        == json.loads((place / "first/settings.json").read_text())["run"]
    )
    # What links led to is as it was; the links are replaced by what the run wrote.
    archive = place / "archive"
    assert {path.name for path in archive.iterdir()} == {
        *("step-6", "settings.json", "log.jsonl", "end.json", "latest", "zero_to_fp32.py")
    }
    assert all(path.read_text() == "mine" for path in archive.iterdir() if path.is_file())
    assert manifest.read(archive / "step-6") == manifest.read(place / "three")
    assert {path.name for path in (archive / "step-6").iterdir()} == {path.name for path in (place / "three").iterdir()}
    assert not (place / "links/checkpoints/step-6").is_symlink()
    assert "cannot write settings.json and end.json in --out 'settings': Is a directory" in first["settings"]
