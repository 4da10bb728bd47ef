"""The dispatch table of ``polar``, by dtype, on this device: the strips of symmetric products by short side, and from
which aspect on the Gram form is the faster one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from ds_optim.bench.limits import DTYPES
from ds_optim.bench.polar import NAMES, PolarSettings, random_matrix
from ds_optim.bench.timing import Case, NotMeasured, elapsed_ms, take_turns
from ds_optim.errors import UserError
from ds_optim.matrix import dispatch, symmetric
from ds_optim.matrix.polar import PolarSpec, polar

ASPECTS = (1.0, 1.5, 2.0, 3.0, 4.0)
SHORT_SIDES = {"cpu": (256, 768), "cuda": (1024, 2048, 4096)}
#: Short sides and strips of which symmetric products are timed.
STRIP_SIDES = {"cpu": (256, 384, 512, 768, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
STRIPS = (2, 3, 4, 6, 8, 16)
#: Cut products must be so much faster than whole ones, or than fewer strips, to be worth it.
_GAIN = 0.98
#: One call of the largest shape: a dtype that takes longer has no units here, and nobody will choose it.
_LONGEST_CALL_MS = 1500.0


def measure_and_store(settings: PolarSettings, short_sides: Sequence[int] | None = None) -> Iterator[str]:
    """Measure each dtype, keep what was measured, and say in a line each what it was."""
    if settings.missing is not None:
        yield f"no table was stored: {settings.missing}"
        return
    measured = {}
    for dtype in settings.dtypes:
        entry = measure_dtype(dtype, settings, short_sides or SHORT_SIDES[settings.device.type])
        if isinstance(entry, str):
            yield f"{dtype}: not stored: {entry}"
            continue
        measured[NAMES[dtype]] = entry
        found = entry["gram_from"]
        yield f"{dtype}: " + ("the Gram form never wins" if found is None else f"the Gram form wins above {found:g}")
        cut = ", ".join(f"{strips} from {side}" for side, strips in entry["strips"].items())
        yield f"{dtype}: strips of symmetric products: {cut or 'none'}"
    if not measured:
        yield "no table was stored"
        return
    try:
        yield f"stored: {dispatch.store(settings.device, measured)}"
    except OSError as problem:
        raise UserError(
            f"--store: cannot write {dispatch.table_path()} ({problem.strerror}); set DS_OPTIM_CACHE to a folder that "
            "you may write to"
        ) from None


def measure_dtype(dtype: str, settings: PolarSettings, short_sides: Sequence[int]) -> dict[str, Any] | str:
    """The table's entry for one dtype, or why there is none."""
    grid = {short: lengths(short, settings.max_elements) for short in short_sides}
    grid = {short: found for short, found in grid.items() if len(found) > 1}
    if not grid:
        return f"--max-elements {settings.max_elements} leaves no shape; write {2 * short_sides[0] ** 2} or more"
    short, long = max(((short, found[-1]) for short, found in grid.items()), key=lambda shape: shape[0] * shape[1])
    slowest = elapsed_ms(both_forms(short, long, dtype, settings, ())[0].run, settings.device)
    if slowest > _LONGEST_CALL_MS:
        return f"{short}x{long} takes {slowest:.0f} ms here, too long to be worth a table"
    cuts = measure_strips(dtype, settings)
    points: list[tuple[int, float, float]] = []
    crossings = []
    for short, found in grid.items():
        ratios: list[tuple[float, float]] = []
        for long in found:
            times = take_turns(both_forms(short, long, dtype, settings, cuts), settings.device, settings.rounds)
            gram, standard = times["gram"], times["standard"]
            if isinstance(gram, NotMeasured) or isinstance(standard, NotMeasured):
                return gram.reason if isinstance(gram, NotMeasured) else standard.reason  # type: ignore[union-attr]
            ratios.append((long / short, gram.median / standard.median))
            points.append((short, round(long / short, 3), round(ratios[-1][1], 3)))
        crossings.append(crossing(ratios))
    middle = statistics.median_high(crossings)
    return {
        "gram_from": round(middle, 2) if math.isfinite(middle) else None,
        "strips": {str(side): strips for side, strips in cuts},
        "points": points,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def lengths(short: int, max_elements: int) -> list[int]:
    """The long sides that are measured with a short one."""
    found = [round(short * aspect) for aspect in ASPECTS]
    return [long for long in found if short * long <= max_elements]


def both_forms(short: int, long: int, dtype: str, settings: PolarSettings, strips: dispatch.Strips) -> list[Case]:
    """The Gram form and the standard one on one (short, long) matrix, keller x5."""
    specs = {
        m: PolarSpec(method=m, dtype=NAMES[dtype], strips=strips).resolve(settings.device) for m in ("gram", "standard")
    }
    x = random_matrix(short, long, settings.device, specs["gram"].message_dtype).unsqueeze(0)
    return [Case(name=name, run=lambda spec=spec: polar(x, spec)) for name, spec in specs.items()]  # type: ignore[misc]


def measure_strips(dtype: str, settings: PolarSettings) -> dispatch.Strips:
    """For each short side the number of strips that wins, where it is another than that of the side before."""
    found: list[tuple[int, int]] = []
    for side in STRIP_SIDES[settings.device.type]:
        if side * side > settings.max_elements:
            break
        cases = symmetric_products(side, dtype, settings)
        times = take_turns(list(cases.values()), settings.device, settings.rounds)
        medians = {k: t.median for k, case in cases.items() if not isinstance(t := times[case.name], NotMeasured)}
        best = fewest(medians)
        if best != (found[-1][1] if found else 1):
            found.append((side, best))
    return tuple(found)


def symmetric_products(side: int, dtype: str, settings: PolarSettings) -> dict[int, Case]:
    """bA + cAA of one (side, side) matrix, in each number of strips that makes another cut."""
    kind = DTYPES[dtype]
    batch = (1,) if settings.device.type != "cpu" else ()
    source = random_matrix(side, side, settings.device, kind)
    symmetric_source = (source + source.mT).expand(*batch, side, side)
    cases: dict[int, Case] = {}
    cuts: set[tuple[int, ...]] = set()
    for strips in (1, *STRIPS):
        if symmetric.edges(side, strips) in cuts:
            continue
        cuts.add(symmetric.edges(side, strips))
        a, out = (symmetric.empty(symmetric_source, strips).copy_(symmetric_source) for _ in range(2))

        def run(a: Tensor = a, out: Tensor = out, strips: int = strips) -> None:
            symmetric.addmm(a, a, a, beta=1.0, alpha=1.0, out=out, strips=strips)

        cases[strips] = Case(name=str(strips), run=run)
    return cases


def fewest(medians: Mapping[int, float]) -> int:
    """The number of strips with the least time, fewer ones first where the difference is small; 1 of none."""
    best = 1
    for strips, milliseconds in sorted(medians.items()):
        if milliseconds < _GAIN * medians.get(best, math.inf):
            best = strips
    return best


def crossing(ratios: Sequence[tuple[float, float]]) -> float:
    """The aspect above which the ratio stays below 1, read between (aspect, ratio) pairs that ascend.

    0 where it is below 1 at all of them, so that square matrices count too; infinity where it is not at the last.
    """
    if ratios[-1][1] >= 1:
        return math.inf
    losing = max((i for i, (_, r) in enumerate(ratios) if r >= 1), default=None)
    if losing is None:
        return 0.0
    (left, above), (right, below) = ratios[losing], ratios[losing + 1]
    return left + (right - left) * (above - 1) / (above - below)
