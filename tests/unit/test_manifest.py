"""A manifest vouches for each file of a folder, and for nothing outside of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_optim.chaos.damage import Damage, do_damage
from ds_optim.machine import files
from ds_optim.survival import manifest
from ds_optim.survival.manifest import Entry, ManifestError

NOTES = {"step": 3, "world_size": 2}
FILES = {"a.pt": b"weights" * 1000, "deep/er/b.pt": b"momentum", "empty.pt": b""}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "step-3"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.seal_folder(folder, NOTES)
    return folder


def faults(folder: Path) -> list[str]:
    """What is wrong with it, by the manifest or with a file."""
    try:
        found = manifest.read(folder)
    except ManifestError as error:
        return [str(error)]
    return [line for name, entry in found.files.items() if (line := manifest.fault(folder, name, entry)) is not None]


def test_a_sealed_folder_is_whole(sealed: Path) -> None:
    found = manifest.read(sealed)
    assert found.notes == NOTES
    assert {name: entry.size for name, entry in found.files.items()} == {n: len(c) for n, c in FILES.items()}
    assert faults(sealed) == []
    assert not list(sealed.rglob("*.partial"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "a.pt is missing"),
        (lambda path: os.truncate(path, 17), "a.pt has 17 bytes of 7000"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "a.pt has grown"),
        (flip, "a.pt has other bits"),
        (link, "a.pt is a symbolic link"),
        (pipe, "a.pt is no regular file"),
    ],
)
def test_a_harmed_file_is_named(sealed: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(sealed / "a.pt")
    (line,) = faults(sealed)
    assert said in line


def test_a_folder_that_became_a_link_is_refused(sealed: Path, tmp_path: Path) -> None:
    (sealed / "deep").rename(tmp_path / "outside")
    (sealed / "deep").symlink_to(tmp_path / "outside")
    with pytest.raises(ManifestError, match="symbolic link"):
        manifest.read(sealed)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../step-2/a.pt", "deep/../../a.pt", "..", "", ".", "a\\b", "C:x", "a\0b"]
)
def test_names_cannot_leave_the_folder(sealed: Path, name: str) -> None:
    with pytest.raises(ManifestError):
        manifest.inside(sealed, name)
    # Not even where the manifest itself is sound.
    manifest.seal(sealed, NOTES, {})
    record = json.loads((sealed / manifest.NAME).read_text())
    body = {"format": record["format"], "notes": NOTES, "files": {name: {"size": 0, "crc32": 0}}}
    (sealed / manifest.NAME).write_text(json.dumps({**body, "crc32": manifest._crc(body)}))
    with pytest.raises(ManifestError):
        manifest.read(sealed)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_flipped_or_cut_manifest_says_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A byte changed anywhere, or an end cut off: the manifest is refused, or says what it said."""
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "a.pt").write_bytes(b"abc")
    manifest.seal_folder(folder, NOTES)
    before = manifest.read(folder)
    path = folder / manifest.NAME
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with suppress(ManifestError):
        assert manifest.read(folder) == before


def test_a_manifest_of_nonsense_is_damaged(sealed: Path) -> None:
    for text in ("", "[]", "null", "{}", '{"files": 3}', "[" * 100_000):
        (sealed / manifest.NAME).write_text(text)
        with pytest.raises(ManifestError, match="damaged"):
            manifest.read(sealed)


def test_a_checkpoint_that_is_half_deleted_has_no_manifest(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killed(path: object) -> None:
        raise Killed

    monkeypatch.setattr(manifest.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        manifest.remove(sealed)
    assert (sealed / "a.pt").exists()
    assert not (sealed / manifest.NAME).exists()
    monkeypatch.undo()
    manifest.remove(sealed)
    assert not sealed.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_atomic(tmp_path / "latest", "step-1")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(tmp_path / "latest", "step-2")
    assert (tmp_path / "latest").read_text() == "step-1"


def test_every_way_of_damage_is_found(sealed: Path) -> None:
    from random import Random

    random = Random(0)
    whole = manifest.read(sealed).files
    for way in ("truncated", "flipped", "removed"):
        do_damage(sealed, Damage(name="a.pt", way=way), random)  # type: ignore[arg-type]
        assert manifest.fault(sealed, "a.pt", whole["a.pt"]) is not None
        (sealed / "a.pt").write_bytes(FILES["a.pt"])
        assert manifest.measure(sealed / "a.pt") == whole["a.pt"] == Entry(size=7000, crc32=whole["a.pt"].crc32)
