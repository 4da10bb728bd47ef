"""One rank of one attempt of a chaos run: it trains until it ends, or until its fault ends it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from ds_optim.machine.child import LOG_FILE, begin, leave

ATTEMPT_FILE = "attempt.json"


def work(environment: Mapping[str, str], folder: str, besides: Mapping[str, str]) -> None:
    """The attempt of a forked rank; it exits with what ``ds-optim train`` would."""
    begin({**environment, **besides}, Path(folder) / LOG_FILE.format(rank=environment["RANK"]))
    leave(_run_rank(Path(folder), int(environment["RANK"])))


def _run_rank(folder: Path, rank: int) -> int:
    import torch

    from ds_optim.chaos.faults import Fault, Saboteur
    from ds_optim.chaos.start import START_POINTS, at_start
    from ds_optim.errors import UserError
    from ds_optim.job.exits import USER_ERROR, RunStopped
    from ds_optim.job.settings import TrainSettings
    from ds_optim.train.loop import train

    torch.set_num_threads(1)
    attempt = json.loads((folder / ATTEMPT_FILE).read_text(encoding="utf-8"))
    settings = TrainSettings(**attempt["settings"])
    fault = None if attempt["fault"] is None else Fault(**attempt["fault"])
    saboteur = Saboteur(folder, settings.out, rank, fault)
    strikes = saboteur.fault is not None and saboteur.fault.place == "start" and saboteur.fault.kind != "differs"
    point = START_POINTS[saboteur.fault.count] if strikes and saboteur.fault is not None else None
    try:
        with at_start(point, saboteur.strike):
            return train(saboteur.changed(settings), saboteur).status
    except (UserError, RunStopped) as error:
        print(f"ds-optim: error: {error}", file=sys.stderr)
        return USER_ERROR if isinstance(error, UserError) else error.status
    except BaseException:
        traceback.print_exc()
        return 1
