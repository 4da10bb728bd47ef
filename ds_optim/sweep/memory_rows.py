"""A cell of ``ds-optim memory`` as a row: what was measured, and how it agrees with what was counted and estimated."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ds_optim.report.schema import Row
from ds_optim.report.units import size
from ds_optim.sweep.cells import Cell
from ds_optim.sweep.memory_estimate import CellEstimate, estimate_cell, model_states_over_ranks
from ds_optim.sweep.result import CellResult, RankMemory, largest

#: A difference beyond this share of what it is against is flagged.
TOLERATED = 0.02
BEFORE_STEP = "after backward"
_OF_ACTIVATIONS = "kernels that keep other tensors than the shapes say"
_OF_ALLOCATOR = "tensors that no owner is known of: batches, workspaces of libraries, rounding by the allocator"


def fill_row(row: Row, result: CellResult, cell: Cell) -> Row:
    """The row of a cell that ran; of each size the largest rank's, of each rank's steady steps the median."""
    ranks = result.memory
    peaks = [_peaks(index, rank) for index, rank in enumerate(ranks)]
    peak = max(peaks, key=lambda entry: entry["median"])
    expected = estimate_cell(cell, len(ranks), ranks[0].vocabulary, ranks[0].device)
    fullest = max(ranks, key=lambda rank: rank.model_state_bytes)
    return row.model_copy(
        update={
            "state_bytes_per_param": sum(rank.state_bytes for rank in ranks) / result.parameters,
            "model_state_bytes": fullest.model_state_bytes,
            "peak_bytes": peak["median"],
            "peak_kind": ranks[0].kind,
            "rss_peak_bytes": largest([rank.rss_peak_bytes for rank in ranks]),
            "extra": {
                **row.extra,
                "peaks": peaks,
                "peak_rank": peak["rank"],
                "first_step_peak": max(entry["first_step"] for entry in peaks),
                "optimizer_state_bytes": max(rank.moments[BEFORE_STEP].accounted["state"] for rank in ranks),
                "padding": [rank.padding for rank in ranks],
                "owners": fullest.moments[BEFORE_STEP].accounted,
                "moments": [{name: held.model_dump() for name, held in rank.moments.items()} for rank in ranks],
                "estimate": _estimated(expected),
                "model_states_over_ranks": model_states_over_ranks(cell, len(ranks), ranks[0].vocabulary),
                "reconciliation": reconcile(ranks, [entry["median"] for entry in peaks], expected),
            },
        }
    )


def reconcile(ranks: Sequence[RankMemory], peaks: Sequence[int], expected: CellEstimate) -> list[dict[str, Any]]:
    """What was estimated against what was counted, and that against what was measured.

    Each line is of the rank where the two lie farthest apart: ``left`` and ``right`` in bytes, ``difference`` their
    difference, ``share`` the same as a part of ``right``, ``cause`` only where ``share`` is over ``TOLERATED``.
    """
    lines = []
    memories = expected.memory.ranks
    of_activations = [rank.moments["after forward"].accounted["activations"] for rank in ranks]
    states = [(memory.model_states, rank.model_state_bytes) for memory, rank in zip(memories, ranks, strict=True)]
    lines.append(_line("model states", "estimated", "accounted", states, "unknown"))
    kept = [(expected.passes.kept, counted) for counted in of_activations]
    lines.append(_line("activations", "estimated", "accounted", kept, _OF_ACTIVATIONS))
    guessed = [memory.peak(expected.passes) for memory in memories]
    missing = max(zip(guessed, peaks, of_activations, strict=True), key=lambda entry: abs(entry[0] - entry[1]))
    cause = _cause_of_peak(*missing, expected.passes.kept)
    lines.append(_line("peak", "estimated", "measured", list(zip(guessed, peaks, strict=True)), cause))
    for moment in ranks[0].moments:
        pairs = [(rank.moments[moment].total, rank.moments[moment].measured) for rank in ranks]
        lines.append(_line(moment, "accounted", "measured", pairs, _OF_ALLOCATOR))
    return lines


def _line(what: str, left: str, right: str, pairs: Sequence[tuple[int, int]], cause: str) -> dict[str, Any]:
    index = max(range(len(pairs)), key=lambda rank: abs(pairs[rank][0] - pairs[rank][1]))
    estimated, found = pairs[index]
    share = (estimated - found) / found if found else 0.0
    flagged = abs(share) > TOLERATED
    return {
        "what": what,
        "sides": [left, right],
        "rank": index,
        left: estimated,
        right: found,
        "difference": estimated - found,
        "share": share,
        "flagged": flagged,
        "cause": cause if flagged else "",
    }


def _cause_of_peak(guessed: int, peak: int, activations: int, guessed_activations: int) -> str:
    """How much of a peak's difference is that of activations, and how much nobody has estimated."""
    of_activations = activations - guessed_activations
    rest = peak - guessed - of_activations
    return f"{size(of_activations)} by activations, {size(rest)} by transients of backward that are not estimated"


def _peaks(index: int, rank: RankMemory) -> dict[str, Any]:
    """One rank's peaks: of the first step, and of the steady ones the least, the median and the most."""
    steady = [step.allocated for step in rank.steady]
    last = rank.steady[-1]
    return {
        "rank": index,
        "host": rank.host,
        "first_step": rank.first_step.allocated,
        "min": min(steady),
        "median": int(median(steady)),
        "max": max(steady),
        "active": last.active,
        "reserved": last.reserved,
        "fragmentation": None if last.reserved is None else last.reserved - last.allocated,
        "outside_torch": last.outside,
        "resident": last.resident,
    }


def _estimated(expected: CellEstimate) -> dict[str, Any]:
    most = expected.memory.largest
    terms = ("weights", "gradients", "master", "optimizer_state", "buckets", "gathered", "step_gradients", "exchange")
    return {
        "model_states": most.model_states,
        "activations": expected.passes.kept,
        "peak": most.peak(expected.passes),
        "at_peak": most.at_peak(expected.passes),
        **{term: getattr(most, term) for term in terms},
    }
