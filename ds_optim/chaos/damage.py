"""What happens on the disk between two attempts: to a file of the newest checkpoint, or to one that stands beside."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

Way = Literal["truncated", "flipped", "removed", "made noise", "linked away"]
WAYS: tuple[Way, ...] = ("truncated", "flipped", "removed")
#: Files by the checkpoints, by their path in the run's folder: advice that no resume depends on.
BY_FILES = ("checkpoints/latest", "log.jsonl", "settings.json", "end.json", "run.lock")
BY_WAYS: tuple[Way, ...] = (*WAYS, "made noise", "linked away")
WHOLE = "."
"""The name of the newest checkpoint's folder as a whole."""
NEXT = "checkpoints/step-NEXT"
"""The name of the folder that the next save makes, ``NEXT`` standing for its step."""
_NOISE_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file and what is done to it: by its name in the newest checkpoint, or with ``beside`` in the run's folder."""

    name: str
    way: Way
    beside: bool = False

    @property
    def is_within(self) -> bool:
        """Whether it is of one file of the checkpoint, whose seal then tells."""
        return not self.beside and self.name != WHOLE

    @property
    def where(self) -> str:
        if self.beside:
            return "the place of the next save" if self.name.startswith("checkpoints/step-") else Path(self.name).name
        if self.name == WHOLE:
            return "the newest checkpoint"
        return f"{'manifest' if self.name.endswith('.json') else 'shard'} of the newest checkpoint"


def do_damage(folder: Path, damage: Damage, random: Random, outside: Path | None = None) -> None:
    """Damage a file in ``folder``: cut at a random length, one random bit turned, gone, or other bytes in its place.

    What is linked away lies in the folder ``outside`` from then on. A file that is not there, or empty, becomes noise
    first.
    """
    path = folder / damage.name
    if damage.beside and (damage.way == "made noise" or not path.exists() or not path.stat().st_size):
        path.unlink(missing_ok=True)
        if path.name.startswith("step-"):
            path.mkdir()
        noisy = path / "manifest.json" if path.is_dir() else path
        noisy.write_bytes(random.randbytes(_NOISE_BYTES))
    if damage.way == "linked away":
        assert outside is not None
        outside.mkdir(parents=True, exist_ok=True)
        target = outside / f"{len(list(outside.iterdir()))} {path.name}"
        path.rename(target)
        path.symlink_to(target)
    elif damage.way == "removed":
        path.unlink()
    elif damage.way == "truncated":
        os.truncate(path, random.randrange(path.stat().st_size))
    elif damage.way == "flipped":
        place = random.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << random.randrange(8))]))


def all_damages(folder: Path) -> list[Damage]:
    """Every way to damage every file of a checkpoint and beside it, and folders that are moved away."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    within = [Damage(name=name, way=way) for name in names for way in WAYS]
    # A lock that is a link is refused: it cannot be told what stands behind it.
    beside = [
        Damage(name=name, way=way, beside=True)
        for name in BY_FILES
        for way in BY_WAYS
        if (name, way) != ("run.lock", "linked away")
    ]
    folders = [Damage(name=WHOLE, way="linked away"), Damage(name=NEXT, way="linked away", beside=True)]
    return [*within, *beside, *folders]


def contents(folder: Path) -> dict[str, bytes]:
    """All files under a folder and what they hold."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
