"""What happens to a checkpoint on the disk between two lives: each file truncated, flipped, removed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

Way = Literal["truncated", "flipped", "removed"]
WAYS: tuple[Way, ...] = ("truncated", "flipped", "removed")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file of the newest checkpoint, by its name there, and what is done to it."""

    name: str
    way: Way


def do_damage(folder: Path, damage: Damage, random: Random) -> None:
    """Damage a checkpoint's file: cut at a random length, one random bit turned, or gone."""
    path = folder / damage.name
    if damage.way == "removed":
        path.unlink()
    elif damage.way == "truncated":
        os.truncate(path, random.randrange(path.stat().st_size))
    else:
        place = random.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << random.randrange(8))]))


def all_damages(folder: Path) -> list[Damage]:
    """Every way to damage every file of a checkpoint."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [Damage(name=name, way=way) for name in names for way in WAYS]
