"""``ds-optim chaos``: runs that are killed at random points, and whether anything was lost that was promised.

A few small runs of two ranks each, with different optimizers and ZeRO stages, go side by side. Each is one training
from its first step to its last, of which each attempt is ended again and again by a seeded random fault; between
attempts files of its newest checkpoint, and beside it, are damaged. Every loss of every attempt must be, bit for bit,
that of the same run left in peace. Then come stories of two runs in one folder and of a full disk, and runs under
launchers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ds_optim.chaos.disk import FULL_FROM, NoFileSystem, fill_disk
from ds_optim.chaos.killed_run import Attempts, KilledRun, Outcome
from ds_optim.chaos.launchers import LAUNCHERS, Launched
from ds_optim.chaos.pairs import come_apart, two_runs
from ds_optim.chaos.ranks import ForkServer
from ds_optim.optimizers.alike import EVERY

_FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
#: Of every run: optimizer, stage and dtype.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"optimizer": "lion_muon", "optimizer_params": {"lr": 1e-2, "period": 2, **_FP32}, "stage": 3, "dtype": "fp32"},
    {"optimizer": "muon", "optimizer_params": {"lr": 1e-2, **_FP32}, "stage": 2, "dtype": "bf16"},
    {"optimizer": "sto_sign_sgd", "optimizer_params": {"lr": 1e-3}, "stage": 1, "dtype": "fp32"},
)
_POLL_S = 0.03
_SMALL = {"seq_len": 16, "micro_batch": 2, "eval_batches": 1, "tuned": False}


@dataclass(frozen=True, kw_only=True)
class ChaosSettings:
    """``kills`` random faults in all, dealt to ``runs`` runs side by side."""

    kills: int = 100
    seed: int = 0
    runs: int = 3
    folder: Path | None = None

    @property
    def launches(self) -> int:
        """How many of the faults come to runs under a launcher, each of which imports all anew."""
        return self.kills // 10


def run_chaos(settings: ChaosSettings, tell: Callable[[str], None]) -> list[Outcome]:
    """All outcomes, in the order in which they were known; ``tell`` gets a line for each."""
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        tell(_line(len(outcomes), outcome))

    with tempfile.TemporaryDirectory(prefix="ds_optim-chaos-", dir=settings.folder) as name:
        folder = Path(name)
        server, model = ForkServer(), write_model(folder / "model")
        side_by_side(_killed_runs(settings, server, folder, model, note))
        small = {**_SMALL, **SETTINGS[0], "model": str(model)}
        side_by_side([two_runs(server, folder / "two", small, note)])
        if settings.launches:  # it takes a hundred steps: too long for a few faults
            side_by_side([come_apart(server, folder / "apart", small, EVERY, note)])
        try:
            side_by_side([fill_disk(server, folder / f"disk{step}", small, step, note) for step in FULL_FROM])
        except NoFileSystem as reason:
            tell(f"disk full: skipped, {reason}")
        for launched in _launched(settings, folder, model, tell):
            side_by_side([launched.attempts(note)])
    return outcomes


def _killed_runs(
    settings: ChaosSettings, server: ForkServer, folder: Path, model: Path, note: Callable[[Outcome], None]
) -> list[Attempts]:
    """The runs whose ranks are forked here, with their share of the faults."""
    runs = []
    kills = settings.kills - settings.launches
    for number in range(settings.runs):
        share = kills // settings.runs + (number < kills % settings.runs)
        chosen = {**_SMALL, **SETTINGS[number % len(SETTINGS)], "model": str(model)}
        random = Random(f"{settings.seed} {number}")
        runs.append(KilledRun(server, folder / f"run{number}", chosen, share, random).run(note))
    return runs


def _launched(settings: ChaosSettings, folder: Path, model: Path, tell: Callable[[str], None]) -> list[Launched]:
    """The runs under launchers, with theirs."""
    here = []
    for launcher in LAUNCHERS if settings.launches else ():
        missing = launcher.missing()
        if missing is None:
            here.append(launcher)
        else:
            tell(f"{launcher.name}: skipped, {missing}")
    runs = []
    for number, launcher in enumerate(here[: settings.launches]):
        share = settings.launches // len(here) + (number < settings.launches % len(here))
        random = Random(f"{settings.seed} {launcher.name}")
        runs.append(Launched(launcher, folder / launcher.name, model, share, random))
    return runs


def side_by_side(runs: list[Attempts]) -> None:
    """Let several runs live at once, each its next attempt when its last one ended."""
    under_way = {run: next(run) for run in runs}
    try:
        while under_way:
            for run, running in list(under_way.items()):
                attempt = running.poll()
                if attempt is None:
                    continue
                try:
                    under_way[run] = run.send(attempt)
                except StopIteration:
                    del under_way[run]
            time.sleep(_POLL_S)
    finally:
        for running in under_way.values():
            running.end()


def write_model(folder: Path) -> Path:
    """The config of a model of a few thousand parameters."""
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=257,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=12,
        tie_word_embeddings=False,
        attention_dropout=0.1,
    ).save_pretrained(folder)
    return folder


def table_of(outcomes: list[Outcome]) -> list[dict[str, str]]:
    """A row for each fault and place: how often, the worst of what it cost, and whether all was as promised."""
    rows = []
    for fault, where in sorted({(outcome.fault, outcome.where) for outcome in outcomes}):
        same = [outcome for outcome in outcomes if (outcome.fault, outcome.where) == (fault, where)]
        wrong = [outcome.wrong for outcome in same if outcome.wrong is not None]
        bound = max(outcome.bound_s for outcome in same)
        rows.append(
            {
                "fault": fault,
                "where": where,
                "times": str(len(same)),
                "steps lost": str(max(outcome.lost for outcome in same)),
                "since the last complete": str(max(outcome.allowed for outcome in same)),
                "all ended in": f"{max(outcome.end_s for outcome in same):.1f} s of {bound:g} s" if bound else "",
                "result": f"{len(wrong)} failed: {wrong[0]}" if wrong else "as promised",
            }
        )
    return rows


def _line(number: int, outcome: Outcome) -> str:
    result = "as promised" if outcome.wrong is None else f"FAILED: {outcome.wrong}"
    return f"{number}: {outcome.fault} in {outcome.where}, {outcome.lost} step(s) lost, {result}"
