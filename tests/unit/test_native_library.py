"""Where compiled kernels are kept, which are loaded, and what happens where there are none, or no place for them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ds_optim.chaos.disk import NoFileSystem, small_file_system
from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.native import kept
from ds_optim.elementwise.native import library as loading
from ds_optim.elementwise.steps import sign_step
from ds_optim.machine import cache

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler: there is the eager path alone")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
ANOTHER = 1000 + os.geteuid()


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_FLAGS", ("-std=c11", "-O0"))


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As on a machine that has never compiled the kernels."""
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path / "cache"))
    loading.library.cache_clear()
    yield tmp_path / "cache"
    loading.library.cache_clear()


def again() -> bool:
    """Whether a process that starts has kernels."""
    loading.library.cache_clear()
    return loading.library() is not None


def kernels(folder: Path) -> list[Path]:
    return sorted((folder / "kernels").iterdir())


def test_they_are_compiled_once_and_kept(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert again()
    (made,) = kernels(fresh_library)
    assert [path.stat().st_mode & 0o777 for path in (fresh_library, made.parent, made)] == [0o700, 0o700, 0o600]
    monkeypatch.setattr(loading, "_compile", lambda *_: pytest.fail("compiled again"))
    assert again()
    assert kernels(fresh_library) == [made]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_symbols(path: Path) -> None:
    """A library that is whole, and none of ours."""
    source = path.with_name("empty.c")
    source.write_text("int nothing;\n")
    other = path.with_name(f"{path.stem.rpartition('-')[0]}.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    kept.keep(other, path.parent)
    for done in (source, other, path):
        done.unlink()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "without symbols": without_symbols,
    "text": lambda path: path.write_text("#!/bin/sh"),
    "a pipe": a_pipe,
    "a link": a_link,
    "written by the group": lambda path: path.chmod(0o620),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_not_as_it_was_written_is_made_anew(
    damage: str, fresh_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert again()
    (made,) = kernels(fresh_library)
    whole = made.read_bytes()
    # Not the file that this process has mapped.
    made.unlink()
    made.write_bytes(whole)
    made.chmod(0o600)
    DAMAGE[damage](made)
    assert again()
    assert made.read_bytes() == whole
    assert not made.is_symlink()
    (record,) = caplog.records
    assert f"is compiled anew: it {'has no ds_optim_' if damage == 'without symbols' else ''}" in record.getMessage()
    caplog.clear()
    assert again()
    assert not caplog.records


@AS_ROOT
@pytest.mark.parametrize("whose", ["cache", "cache/kernels", "cache/kernels/*.so"])
def test_nothing_that_another_user_could_write_is_loaded(
    whose: str, fresh_library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert again()
    (planted,) = tmp_path.glob(whose)
    os.chown(planted, ANOTHER, ANOTHER)
    (library,) = kernels(fresh_library)
    opened: list[Path] = []
    real = kept.opened

    def noting(path: Path, symbols: list[str]) -> object:
        opened.append(path)
        return real(path, symbols)

    monkeypatch.setattr(kept, "opened", noting)
    stamp = library.stat().st_ino
    assert again(), "the kernels are not lost"
    assert len(caplog.records) == 1
    if planted == library:
        assert "may be another user's" in caplog.text
        assert library.stat().st_ino != stamp
        assert library.stat().st_uid == os.geteuid()
    else:
        assert f"{planted} belongs to another user" in caplog.text
        assert library not in opened


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_to_holds_no_code(
    mode: int, fresh_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_library.mkdir()
    fresh_library.chmod(mode)
    assert again()
    assert kernels(fresh_library) == []
    assert f"others can write to {fresh_library} (chmod go-w takes that away)" in caplog.text
    fresh_library.chmod(0o755)
    assert again()
    assert len(kernels(fresh_library)) == 1


def test_nor_one_in_a_place_where_everybody_can_replace_it(
    fresh_library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    assert again()
    assert f"others can write to {tmp_path}" in caplog.text
    tmp_path.chmod(0o1777)
    assert again()
    assert len(kernels(fresh_library)) == 1


@pytest.mark.parametrize("place", ["/proc/ds_optim", "a file"])
def test_a_cache_that_cannot_be_made_costs_a_line_and_not_the_kernels(
    place: str, fresh_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path / place))
    assert again()
    (record,) = caplog.records
    assert "compiled anew at each start, they cannot be kept" in record.getMessage()
    assert not list((tmp_path / "tmp").iterdir())


def test_nor_does_a_full_disk(fresh_library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try:
        with small_file_system(fresh_library) as disk:
            disk.chmod(0o700)
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
            assert again()
            assert kernels(fresh_library) == []
    except NoFileSystem as reason:
        pytest.skip(str(reason))
    assert "No space left on device" in caplog.text


def test_what_a_killed_build_left_goes(fresh_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    scratch = [tmp_path / "tmp" / f"{loading._SCRATCH}{age}" for age in ("old", "new")]
    for folder in scratch:
        folder.mkdir(parents=True)
        (folder / "half.so").touch()
    assert again()
    (made,) = kernels(fresh_library)
    half = [made.with_name(f"{made.name}.{age}") for age in ("old", "new")]
    for path in half:
        path.touch()
    long_ago = time.time() - 3600
    for path in (scratch[0], half[0]):
        os.utime(path, (long_ago, long_ago))
    assert again()
    assert [path.exists() for path in (*scratch, *half)] == [False, True, False, True]


@pytest.mark.parametrize("command", ["ccache gcc", "env gcc", "env -u DS_OPTIM_CACHE gcc"])
def test_the_compiler_may_be_several_words(
    command: str, fresh_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not all(shutil.which(name) for name in (command.split()[0], "gcc")):
        pytest.skip(f"no {command} here")
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    monkeypatch.setenv("CC", command)
    assert again()


def test_the_compiler_may_lie_in_a_folder_with_a_space(
    fresh_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which("cc")
    assert found is not None
    (tmp_path / "my tools").mkdir()
    (tmp_path / "my tools" / "cc").symlink_to(found)
    monkeypatch.setenv("CC", str(tmp_path / "my tools" / "cc"))
    assert again()


def test_without_a_compiler_one_line_says_so(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert loading.library() is None
        assert loading.library() is None
    assert len(caplog.records) == 1
    assert "no-such-compiler" in caplog.text
    p = torch.zeros(4)
    sign_step(p, None, torch.ones(4), blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.5, decay=0.0)
    assert p.tolist() == [-0.5] * 4


@pytest.mark.parametrize("command", ["false", "true", "env no-such-compiler", 'gcc "'])
def test_a_compiler_that_fails_is_no_error(
    command: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", command)
    assert loading.library() is None
    assert "eager" in caplog.text


def test_the_eager_path_can_be_asked_for(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_NATIVE", "0")
    assert loading.library() is None
    assert not fresh_library.exists()


# ---- a user without a home


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the user's cache would be, among the temporary files."""
    for name in ("DS_OPTIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._among_temporary_files.cache_clear()
    yield tmp_path / f"ds_optim-{os.geteuid()}"
    cache._among_temporary_files.cache_clear()


def test_a_user_without_a_home_has_a_cache(homeless: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.cache_folder() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert cache.private_folder("kernels") == homeless / "kernels"
    assert not caplog.records


@pytest.mark.parametrize("trap", ["writable", "a link", "a file", pytest.param("another's", marks=AS_ROOT)])
def test_what_somebody_else_put_there_is_not_used(
    trap: str, homeless: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if trap == "a link":
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs").chmod(0o777)
        homeless.symlink_to("theirs")
    elif trap == "a file":
        homeless.touch()
    else:
        homeless.mkdir()
        homeless.chmod(0o777 if trap == "writable" else 0o755)
        if trap == "another's":
            os.chown(homeless, ANOTHER, ANOTHER)
    own = cache.cache_folder()
    assert own != homeless
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache.cache_folder() == own, "one for the whole process"
    (record,) = caplog.records
    assert "set DS_OPTIM_CACHE to a folder of your own" in record.getMessage()
    assert cache.private_folder("kernels").parent == own
