"""What ``auto`` goes by: the aspect from which the Gram form wins, and the strips of symmetric products.

Here are the defaults, and the table that a user has measured, which goes before them. ``ds-optim bench polar
--store`` writes it, one JSON file in the user's cache folder for all devices:

    {"version": 2, "devices": {NAME: {"bfloat16": {"gram_from": 1.6, "strips": {"512": 2, "1024": 8}, ...}}}}

``gram_from`` is the long side / short side above which the Gram form is the faster one; null where it never is.
``strips`` says for each short side how many strips a symmetric product is cut into from there on, below the first
one none (symmetric.py); an entry may lack it.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_optim.machine.cache import cache_folder, read_table, write_table

logger = logging.getLogger("ds_optim")

VERSION = 2
"""Tables of version 1 were measured with another Gram form, which crosses elsewhere: they count as none."""

Strips = tuple[tuple[int, int], ...]
"""(short side, strips from there on) pairs, short sides ascending; () cuts nothing."""

# Short side and strips on a CPU: time against whole products of the standard form, keller x5, square and bfloat16, one
# thread / two threads of a processor with AVX512-BF16:
#   strips        2            3            4            6            8           16
#    256     1.04 / 1.12  1.15 / 1.39  1.25 / 1.50
#    384      .95 / 1.01   .93 / 1.06   .96 / 1.09  1.03 / 1.24  1.02 / 1.29
#    512      .89 / .93    .89 / .96    .88 / .99    .91 / 1.09   .95 / 1.16
#    768      .88 / .84    .85 / .77    .85 / .80    .82 / .81    .85 / .86
#   1024                                .79 / .84    .78 / .80    .76 / .82    .79 / .89
#   2048                                .77 / .77    .76 / .78    .75 / .78    .75 / .75
# In the Gram form, 768x3072 and one thread, 6 strips take .95 of the time of 4, and 8 and 16 no less than 6. float32,
# whose products take twice as long, gains from smaller sides on.
_STRIPS_CPU: Mapping[str, Strips] = {
    "float32": ((384, 3), (512, 4), (768, 6), (1024, 8)),
    "bfloat16": ((384, 2), (768, 6), (1024, 8), (2048, 16)),
    "float16": ((384, 2), (768, 6), (1024, 8), (2048, 16)),
}
# With AMX, whose rate small blocks do not reach, one thread (least processor time of two to four turns):
#   strips        2            4            6
#    256     1.38         2.30         2.48
#    512     1.19         1.48         1.60
#    768      .91         1.10         1.18
#   1024     1.00          .99         1.13
#   2048      .90          .90          .89
# In the Gram form 768x2304 takes .97, .85, 1.05 and 1024x4096 .95, .87, .89.
_STRIPS_AMX: Strips = ((768, 2), (1024, 4))
_THREADS = 2
# CUDA: not measured here. Published symmetric kernels lose at 1024 and win from 4096 on.
_STRIPS_CUDA: Strips = ((4096, 2),)

# Where gram / standard crosses 1. CPU, bfloat16, where every two steps that go together gain alike: one thread of the
# processor above, keller x5 at aspects 1.25, 1.5, 2, 3, 4: 256 wide, whole, 1.12, .98, .99, .89, .83; 768 wide, cut,
# 1.02, .97, .91, .81, .76. By operations float32 crosses there, too. CUDA: not measured; 1.5 is where the operations of
# whole products cross. With AMX, strips as above:
#    256     1.12, 1.00, 1.07,  .89, 1.00
#    512     1.14, 1.18, 1.06,  .91,  .80
#    768     1.07, 1.12, 1.03,  .92,  .87
#   1024     1.17, 1.10,  .91,  .90,  .81
_GRAM_FROM_CPU = 1.5
_GRAM_FROM_AMX = 2.0
_GRAM_FROM_CUDA = 1.5


def default_gram_from(device: torch.device, dtype: str) -> float:
    """The aspect above which ``auto`` takes the Gram form where nobody has measured."""
    if device.type != "cpu":
        return _GRAM_FROM_CUDA
    return _GRAM_FROM_AMX if _on_amx(dtype) else _GRAM_FROM_CPU


def default_strips(device: torch.device, dtype: str) -> Strips:
    """The strips that ``auto`` takes where nobody has measured.

    More threads than were measured leave each less of a block: matrices must be so much larger, in area.
    """
    if device.type != "cpu":
        return _STRIPS_CUDA
    larger = max(1.0, torch.get_num_threads() / _THREADS) ** 0.5
    found = _STRIPS_AMX if _on_amx(dtype) else _STRIPS_CPU[dtype]
    return tuple((round(side * larger), strips) for side, strips in found)


def _on_amx(dtype: str) -> bool:
    """Whether the processor's matrix unit takes products of ``dtype``."""
    return dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()  # torch has no public name for it


def table_path() -> Path:
    """Where the table lies: ``polar.json`` in the package's cache folder."""
    return cache_folder() / "polar.json"


def device_name(device: torch.device) -> str:
    """The name that a device's measurements stand under: the GPU's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def gram_from(device: torch.device, dtype: str) -> float | None:
    """The measured aspect for ``device`` and ``dtype`` (float32, bfloat16, float16), infinity where the Gram form
    never wins; None where nothing was measured. A table that cannot be read counts as none, and a line says so.
    """
    return _measured(device, dtype)[0]


def strips(device: torch.device, dtype: str) -> Strips | None:
    """The measured strips for ``device`` and ``dtype``; None where nothing was measured, as with ``gram_from``."""
    return _measured(device, dtype)[1]


def _measured(device: torch.device, dtype: str) -> tuple[float | None, Strips | None]:
    path = table_path()
    try:
        entry = read_table(path, VERSION)["devices"].get(device_name(device), {}).get(dtype)
        if entry is None:
            return None, None
        return _aspect_of(entry["gram_from"]), _strips_of(entry["strips"]) if "strips" in entry else None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        logger.warning("ds_optim: the dispatch table %s cannot be read (%s); remove it or measure anew", path, problem)
        return None, None


def _aspect_of(stored: Any) -> float:
    """A table's ``gram_from``; ValueError where it is none."""
    if stored is None:
        return math.inf
    if type(stored) not in (int, float) or not 0 <= stored < math.inf:
        raise ValueError(f"gram_from {stored!r:.40} is no aspect")
    return float(stored)


def _strips_of(stored: Mapping[str, Any]) -> Strips:
    """The pairs of a table's ``strips``; ValueError where they are none: a side has no more strips than rows."""
    pairs = tuple(sorted((int(side), count) for side, count in stored.items()))
    if any(type(count) is not int or not 1 <= count <= side for side, count in pairs):
        raise ValueError(f"strips {dict(stored)!s:.80} are not whole numbers from 1 to the side")
    return pairs


def store(device: torch.device, measured: Mapping[str, Mapping[str, Any]]) -> Path:
    """Keep what was measured for ``device``, by dtype; other devices and dtypes stay. Returns the table's path.

    The file changes in one move: a reader sees the old table or the new one. OSError where it cannot be written.
    """
    path = table_path()
    try:
        table = read_table(path, VERSION)
    except (OSError, ValueError):
        table = {"version": VERSION, "devices": {}}
    own = table["devices"].get(device_name(device))
    own = own if isinstance(own, dict) else {}
    table["devices"][device_name(device)] = {**own, **{dtype: dict(e) for dtype, e in measured.items()}}
    write_table(path, table)
    return path
