"""Whether a long run grows: memory, descriptors and threads of its ranks over thousands of steps and hundreds of saves.

    python -m benchmarks.soak [--ranks 2] [--steps 2500] [--save-every 10] [--out FILE]

The ranks are those of ``launch/local.sh`` on a CPU, and are looked at from outside. What is compared begins after a
fifth of the steps, when all that a run needs is there. Exits 1 where a rank grew by more than ``MORE_MIB`` from then
on, or by a descriptor or thread, or where /dev/shm has a name more than before the run that no process has mapped
(32-byte semaphores of other programs, ``sem.*``, left aside).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import psutil

from ds_optim.chaos.run import write_model
from ds_optim.job.run_log import LOG_NAME
from ds_optim.report.machine import describe_machine
from ds_optim.survival import manifest
from ds_optim.survival.resume import FOLDER

ROOT = Path(__file__).parents[1]
MORE_MIB = 8.0
_LOOKS = 25
_GLANCES = 5
_SHARED = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Look:
    """The ranks after ``step``, the largest of them each: resident MiB, open descriptors, threads."""

    step: int
    rss_mib: float
    descriptors: int
    threads: int


def soak(ranks: int, steps: int, save_every: int) -> tuple[list[Look], list[str], int]:
    """All looks, the names that the run left in /dev/shm, and how many saves were sealed."""
    before = _names()
    looks: list[Look] = []
    with tempfile.TemporaryDirectory(prefix="ds_optim-soak-") as name:
        out = Path(name) / "out"
        model = write_model(Path(name) / "model")
        arguments = f"--model {model} --optimizer lion_muon --stage 2 --dtype fp32 --seq-len 16 --micro-batch 2"
        arguments += f" --eval-batches 1 --steps {steps} --save-every {save_every} --keep 3 --out {out}"
        command = ["bash", str(ROOT / "launch" / "local.sh"), "--ranks", str(ranks), *arguments.split()]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        saves: set[int] = set()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
            while process.poll() is None:
                saves |= {int(path.parent.name[5:]) for path in (out / FOLDER).glob(f"step-*/{manifest.NAME}")}
                step = _step(out / LOG_NAME)
                if step >= (looks[-1].step if looks else 0) + steps // _LOOKS:
                    look = _look(out, step)
                    if look is not None:
                        looks.append(look)
                        print(look, file=sys.stderr, flush=True)
                time.sleep(0.02)
        if process.returncode != 0:
            raise RuntimeError(f"the run ended with {process.returncode}")
    return looks, sorted(_names() - before - _mapped()), len(saves)


def _names() -> set[str]:
    found = _SHARED.iterdir() if _SHARED.is_dir() else ()
    return {path.name for path in found if not path.name.startswith("sem.")}


def _mapped() -> set[str]:
    """Names in /dev/shm that some process has mapped: of what else runs on this machine."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
            names |= {line.partition(f"{_SHARED}/")[2] for line in lines if f"{_SHARED}/" in line}
    return names


def _step(log: Path) -> int:
    """The last step in a log."""
    with suppress(OSError, ValueError, IndexError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return 0


def _look(out: Path, step: int) -> Look | None:
    """The least of a few looks: a file that is open for a moment is no growth."""
    looks = [look for _ in range(_GLANCES) if (look := _glance(out, step)) is not None]
    if not looks:
        return None
    return Look(
        step=step,
        rss_mib=min(look.rss_mib for look in looks),
        descriptors=min(look.descriptors for look in looks),
        threads=min(look.threads for look in looks),
    )


def _glance(out: Path, step: int) -> Look | None:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if str(out) in words and any(word.startswith("ds_optim_run=") for word in words):
                rss = process.memory_info().rss / 2**20
                found.append((rss, process.num_fds(), process.num_threads()))
    if not found:
        return None
    rss, descriptors, threads = (max(column) for column in zip(*found, strict=True))
    return Look(step=step, rss_mib=round(rss, 1), descriptors=int(descriptors), threads=int(threads))


def grown(looks: list[Look]) -> list[str]:
    """What grew after the first fifth, a line each."""
    first, last = looks[len(looks) // 5], looks[-1]
    more = last.rss_mib - first.rss_mib
    found = [f"memory grew by {more:.1f} MiB from step {first.step} on"] if more > MORE_MIB else []
    for name in ("descriptors", "threads"):
        was, now = getattr(first, name), getattr(last, name)
        if now > was:
            found.append(f"{name} grew from {was} to {now}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to write all looks, as JSON lines")
    given = parser.parse_args()
    looks, left, saves = soak(given.ranks, given.steps, given.save_every)
    print("| step | resident, MiB | descriptors | threads |\n|---|---|---|---|")
    for look in looks:
        print(f"| {look.step} | {look.rss_mib} | {look.descriptors} | {look.threads} |")
    problems = [*grown(looks), *(f"/dev/shm has {name}" for name in left)]
    print(f"\n{saves} saves; {'; '.join(problems) or 'nothing grew, /dev/shm is as before'}")
    if given.out is not None:
        stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        lines = [json.dumps({**asdict(look), **stamp}) for look in looks]
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
