"""Every file that is read back, with single bits turned and with its structure changed; one process, seeded.

    python -m tests.fuzz_read_back --flips 20000 --changes 500 --seed 0

A reader must take what it is given as it was, or refuse it in one line, or drop what it cannot read, within seconds:
no other exception, no wait, and nothing taken that differs from what was written where a checksum stands for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from ds_optim.data.tokens import cached_bpe
from ds_optim.errors import UserError
from ds_optim.job.run_log import keep_until
from ds_optim.machine import run_lock
from ds_optim.report.compare import compare_summary, table_spec
from ds_optim.report.memory_csv import write_csv
from ds_optim.report.merge import read_info
from ds_optim.report.repeats import merge_repeats
from ds_optim.report.schema import Row, RunInfo, read_rows, write_rows
from ds_optim.report.table import build_table, to_markdown, to_rich
from ds_optim.survival import checkpoint, manifest, resume
from ds_optim.survival.identity import misplaced
from ds_optim.survival.reshard_seal import seal_like
from ds_optim.zero.checkpoints import open_checkpoint, reshard
from ds_optim.zero.checkpoints.folder import find_folder

from .unit.checkpoint_files import Tangle, own, save_unsharded, trained

HANG_S = 20
LINE = 1100
STEP = 3
TEXT = ["some text to train a tokenizer on, " * 3]
NOTES: dict[str, Any] = {"step": STEP, "world_size": 2, "trajectory": {"stage": 0, "seed": 1, "lr": 1e-3, "name": "ü"}}


class Wrong(Exception):
    """What a reader did that it must not."""


@dataclass(frozen=True)
class Target:
    """A file, and what reads it: ``read`` returns the line that refuses it or None, and raises for all else."""

    path: Path
    read: Callable[[], str | None]


def checkpoint_of(folder: Path) -> Path:
    """A sealed, stamped checkpoint of two ranks at stage 2, as reshard makes it."""
    model = Tangle()
    optimizer = own("LionMuon", model)
    trained(model, optimizer)
    made = save_unsharded(folder / "made", model, optimizer, position={"document": 0, "offset": 3}, step=STEP)
    reshard(made, folder / "sealed", ranks=2, stage=2, seal=seal_like(NOTES))
    return folder / "sealed" / f"step-{STEP}"


def targets(folder: Path) -> list[Target]:
    """Each kind of file that is read back, under ``folder``."""
    sealed = checkpoint_of(folder)
    whole = resume._open(STEP, sealed)
    assert isinstance(whole, resume.Checkpoint), whole
    assert whole.files is not None
    found = [Target(sealed / manifest.NAME, lambda: _manifest(sealed, whole))]
    for name in whole.files:
        found.append(Target(sealed / name, partial(_shard, whole, name)))
    found.append(Target(sealed.parent / "latest", lambda: _latest(sealed)))
    first = folder / "first" / f"step-{STEP}"
    first.mkdir(parents=True)
    for name in whole.files:
        os.link(sealed / name, first / name)
    trajectory = {**NOTES["trajectory"], "stage": 2}
    (first / resume.FIRST_RELEASE).write_text(json.dumps({**NOTES, "trajectory": trajectory}))
    found.append(Target(first / resume.FIRST_RELEASE, lambda: _first_release(first)))
    log = folder / "log.jsonl"
    lines = [{"step": n, "loss": 2.5 / n, "lr": 1e-3, "skipped": False} for n in range(1, 5)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found.append(Target(log, lambda: _log(log)))
    lock = folder / run_lock.LOCK_NAME
    lock.write_text(run_lock._this_process().model_dump_json() + "\n")
    found.append(Target(lock, lambda: _lock(lock)))
    return [*found, *_results(folder), _tokenizer(folder)]


def _results(folder: Path) -> list[Target]:
    results = folder / "results.jsonl"
    row = Row(optimizer="adamw", stage=1, val_loss=1.5, ms_per_step=3.25, peak_bytes=1 << 20, train_loss=[2.0, 1.5])
    write_rows(results, [row, row.model_copy(update={"optimizer": "lion", "extra": {"sent_by_node": {}}})])
    info = folder / "run.json"
    info.write_text(RunInfo(title="A run", command="ds-optim compare", machine={"CPU": "x"}).model_dump_json(indent=2))
    return [Target(results, lambda: _rows(results)), Target(info, lambda: _said(lambda: read_info(folder)))]


def _tokenizer(folder: Path) -> Target:
    kept = cached_bpe(TEXT, 300, folder)
    (path,) = folder.glob("tokenizer-*.json")

    def read() -> None:
        if cached_bpe(TEXT, 300, folder) != kept:
            raise Wrong("another tokenizer is taken")

    return Target(path, read)


def _manifest(folder: Path, whole: resume.Checkpoint) -> str | None:
    found = resume._open(STEP, folder)
    if isinstance(found, str):
        return found
    if found != whole:
        raise Wrong("the manifest says something else")
    return None


def _shard(whole: resume.Checkpoint, name: str) -> str | None:
    assert whole.files is not None
    # What a load would meet whose manifest was made over the damage.
    said = misplaced(whole.folder, name, whole.notes, bound=True)
    for line in (said, _said(lambda: open_checkpoint(whole.folder))):
        _one_line(line)
    fault = manifest.fault(whole.folder, name, whole.files[name])
    if fault is None and said is not None:
        raise Wrong(f"a file that is as it was is refused: {said}")
    return fault


def _latest(sealed: Path) -> str | None:
    said = _said(lambda: find_folder(sealed.parent))
    _one_line(checkpoint._follow(sealed))
    latest = sealed.parent / "latest"
    if not latest.is_dir() and (latest.is_symlink() or latest.read_text() != sealed.name):
        raise Wrong("latest does not name the checkpoint")
    return said


def _first_release(folder: Path) -> str | None:
    found = resume._open(STEP, folder)
    return found if isinstance(found, str) else None


def _log(path: Path) -> str | None:
    try:
        said = keep_until(path, STEP)
    except OSError as error:
        return str(error.strerror)
    for line in path.read_bytes().splitlines():
        if json.loads(line)["step"] > STEP:
            raise Wrong("a later step is kept")
    return said


def _lock(path: Path) -> str | None:
    holder = run_lock._read(path)
    if holder is None:
        return "nobody"
    run_lock._is_running(holder.model_copy(update={"place": run_lock._place()}), path)
    return None


def _rows(path: Path) -> str | None:
    try:
        rows = merge_repeats(read_rows(path))
    except UserError as error:
        return str(error)
    table = build_table(rows, table_spec(rows))
    to_markdown(table)
    to_rich(table)
    compare_summary(rows)
    write_csv(rows, path.with_suffix(".csv"))
    return None


def _said(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def _one_line(said: str | None) -> None:
    if said is not None and (not said or "\n" in said or len(said) > LINE or not said.isprintable()):
        raise Wrong(f"no line: {said[:200]!r}")


def flipped(content: bytes, random: Random) -> bytes:
    """One bit turned; of a large file often near its ends, where what describes it lies."""
    near = min(len(content), 2000)
    place = random.choice((random.randrange(len(content)), random.randrange(near), -1 - random.randrange(near)))
    changed = bytearray(content)
    changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)


DEEP = "[" * 100_000
ODD: tuple[Any, ...] = (None, [], {}, True, -1, 0, 1.5, "", "x" * 1_000_000, "\ud800", int("9" * 400), int("9" * 4000))
TEXTS = ("", "null", "3", "{}", "[]", '"step"', DEEP, '{"a":' * 5000, "9" * 400, "9" * 5000, "1e999", "\x00", "\x1b[2J")
BYTES = (b"\xff", b"\xef\xbb\xbf{}", b"\x80\x81\n" * 100, b"PK\x03\x04", b"", b"\n" * 100)


def restructured(content: bytes, random: Random) -> bytes:
    """A text or JSON of another structure."""
    if random.random() < 0.3:
        return random.choice((*(text.encode() for text in TEXTS), *BYTES))
    lines = content.decode("utf-8").splitlines()
    number = random.randrange(len(lines)) if len(lines) > 1 and "crc32" not in lines[-2] else None
    with suppress(ValueError):
        value = json.loads(content if number is None else lines[number])
        _change(value, random)
        text = json.dumps(value)
        if number is None:
            return text.encode()
        lines[number] = text
        return ("\n".join(lines) + "\n").encode()
    cut = random.randrange(len(content) + 1)
    return content[:cut] + random.choice((b"", content, b"\xff", b"{", b"\x00"))


def _change(value: Any, random: Random) -> None:
    """Put something odd at a random place of a JSON value, or leave something out."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += [(item, key) for key in keys]
        todo += [item[key] for key in keys]
    if places:
        holder, key = random.choice(places)
        if random.random() < 0.3:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(random.choice(ODD))


def rebuilt(path: Path, random: Random) -> None:
    """A file of torch's with another content."""
    content = torch.load(path, weights_only=False)
    _change(content, random)
    torch.save(content if random.random() < 0.9 else random.choice(ODD[:6]), path)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "pipe": lambda path, other: os.mkfifo(path),
    "link": lambda path, other: path.symlink_to(other),
    "link to a device": lambda path, other: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, other: path.symlink_to(path.name),
    "folder": lambda path, other: path.mkdir(),
    "socket": lambda path, other: _socket(path),
    "missing": lambda path, other: None,
}


def _change_bytes(path: Path, change: Callable[[bytes, Random], bytes], random: Random) -> None:
    put(path, change(path.read_bytes(), random))


def _replace(path: Path, make: Callable[[Path, Path], object], other: Path) -> None:
    clear(path)
    make(path, other)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def put(path: Path, content: bytes) -> None:
    """A file as it was, whatever stands there now."""
    clear(path)
    path.write_bytes(content)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _bounded() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Wrong(f"it hangs for {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(folder: Path, *, flips: int, changes: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each was refused or taken, by file and by what was done to it, and what went wrong."""
    random = Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    everything = targets(folder)
    other = folder / "elsewhere"

    def attempt(target: Target, what: str, do: Callable[[], object]) -> None:
        content = target.path.read_bytes()
        do()
        try:
            with _bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = target.read()
                _one_line(said)
            counts[f"{target.path.name}: {what}: {'taken' if said is None else 'refused'}"] += 1
        except Exception as error:
            wrong.append(f"{target.path.name}: {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            put(target.path, content)
        if other.exists() and other.read_bytes() != b"mine":
            wrong.append(f"{target.path.name}: {what}: written through a link")
            other.write_bytes(b"mine")

    other.write_bytes(b"mine")
    for target in everything:
        attempt(target, "untouched", lambda: None)
        for kind, make in KINDS.items():
            attempt(target, kind, partial(_replace, target.path, make, other))
    for number in range(flips + changes):
        target = everything[number % len(everything)]
        do = partial(_change_bytes, target.path, flipped if number < flips else restructured, random)
        if number >= flips and target.path.suffix == ".pt":
            do = partial(rebuilt, target.path, random)
        attempt(target, "flipped" if number < flips else "restructured", do)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--changes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(Path(folder), flips=given.flips, changes=given.changes, seed=given.seed)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    for line in wrong:
        print(f"WRONG {line}")
    print(f"{sum(counts.values())} as promised, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
