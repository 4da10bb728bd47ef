"""Results of several runs, nodes or machines as one report: ``ds-optim report FOLDER...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable, read_json, short, write_atomic
from ds_optim.machine.kept_results import RESULTS, RUN_FILE
from ds_optim.report.compare import render_compare
from ds_optim.report.memory import render_memory
from ds_optim.report.render import Report
from ds_optim.report.schema import Row, RunInfo, read_rows, write_rows

_RENDERERS = {"memory": render_memory, "compare": render_compare}


def merge_runs(folders: Sequence[Path], out: Path) -> Report:
    """Write the rows and the report of ``folders`` into ``out``; of several, rows are named by their folder.

    Raises:
        UserError: a folder holds no results, or results of another kind than the first one's.
    """
    runs = [(folder, read_rows(folder / RESULTS), read_info(folder)) for folder in folders]
    kinds = {row.kind for _, rows, _ in runs for row in rows}
    if len(kinds) != 1:
        raise UserError(
            f"the folders hold results of {', '.join(sorted(kinds)) or 'nothing'}: give folders of one kind"
        )
    kind = kinds.pop()
    if kind not in _RENDERERS:
        raise UserError(f"there is no report of {kind!r} results: give folders of ds-optim compare or memory")
    names = _names(folders)
    merged: list[Row] = []
    for name, (_, rows, _) in zip(names, runs, strict=True):
        merged += [row.model_copy(update={"run": name}) if len(runs) > 1 else row for row in rows]
    info = _merged_info(names, [info for _, _, info in runs])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / RESULTS, merged)
        write_atomic(out / RUN_FILE, info.model_dump_json(indent=2) + "\n")
        return _RENDERERS[kind](merged, info, out)
    except OSError as error:
        raise UserError(f"cannot write to --out {str(out)!r}: {error.strerror}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # What only one kind of run knows stands in the rows' ``extra``, which has no types.
        what = short(f"{type(error).__name__}: {error}")
        raise UserError(f"the rows are none that ds-optim {kind} wrote ({what}): give folders of its runs") from None


def read_info(folder: Path) -> RunInfo:
    """What the run in ``folder`` was; raises ``UserError`` where that cannot be read."""
    try:
        return read_json(folder / RUN_FILE, RunInfo)
    except Unreadable as reason:
        raise UserError(
            f"{folder / RUN_FILE} {reason} and does not describe a run: give a folder of ds-optim compare or memory"
        ) from None


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with their parents' where names alone are not enough."""
    resolved = [folder.resolve() for folder in folders]
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in resolved]
    if len(set(names)) < len(names):
        raise UserError("a folder is given twice: give each once")
    return names


def _merged_info(names: Sequence[str], infos: Sequence[RunInfo]) -> RunInfo:
    """One description: what all runs share once, the rest under each run's name."""
    if len(infos) == 1:
        return infos[0]
    return RunInfo(
        title=f"{infos[0].title}, and {len(infos) - 1} more",
        command="\n".join(info.command for info in infos),
        started="; ".join(dict.fromkeys(info.started for info in infos if info.started)),
        machine=_shared(names, [info.machine for info in infos]),
        settings=_shared(names, [info.settings for info in infos]),
        notes=list(dict.fromkeys(note for info in infos for note in info.notes)),
    )


def _shared(names: Sequence[str], facts: Sequence[dict[str, str]]) -> dict[str, str]:
    keys = list(dict.fromkeys(key for each in facts for key in each))
    found = {}
    for key in keys:
        values = [each.get(key, "") for each in facts]
        if len(set(values)) == 1:
            found[key] = values[0]
        else:
            found.update({f"{key} ({name})": value for name, value in zip(names, values, strict=True) if value})
    return found
