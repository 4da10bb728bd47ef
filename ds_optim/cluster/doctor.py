"""``ds-optim doctor``: what would go wrong in a run on these nodes, told before it starts.

Each finding is fine, or says what to do. Run under any launcher it looks at every node; alone, at this machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_optim.cluster import network as doctor_network
from ds_optim.cluster import node as doctor_node
from ds_optim.cluster.network import Timed
from ds_optim.errors import UserError
from ds_optim.machine import ranks
from ds_optim.machine.reach import unreachable

FINE = 0
TO_DO = 1
_MUST_AGREE = ("code", "config")
_HELD_PER_SENT = 15


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check and its outcome. ``line`` says what was found and, unless ``fine``, what to do."""

    check: str
    fine: bool
    line: str


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What is looked at. ``timeout_s``: how long ranks wait for each other. ``trial``: take two steps as well."""

    config: Path | None = None
    out: Path = field(default_factory=lambda: Path("runs"))
    timeout_s: float = 60.0
    trial: bool = True


@dataclass(kw_only=True)
class Examination:
    """All that was found, as ``--json`` prints it."""

    ranks: int
    nodes: list[str]
    findings: list[Finding]
    facts: list[dict[str, Any]]
    collectives: list[Timed] = field(default_factory=list)

    @property
    def status(self) -> int:
        return FINE if all(finding.fine for finding in self.findings) else TO_DO

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status}


def examine(settings: DoctorSettings) -> Examination:
    """Look at everything; collective. The same on every rank.

    A rank that cannot join the others returns what it found by itself.
    """
    doctor_network.join_timeout(settings.timeout_s)
    alone = _join(settings)
    if alone is not None:
        return alone
    facts = ranks.gather(doctor_node.node_facts(settings.out, settings.config))
    nodes = [fact["node"] for fact in facts]
    findings = [*compare_nodes(facts), *_own(facts)]
    collectives: list[Timed] = []
    if ranks.world_size() > 1:
        findings.append(Finding(check="ranks", fine=True, line=_places(nodes)))
        collectives = doctor_network.measure(_bucket_bytes(settings.config))
        findings += [_told(timed) for timed in collectives]
    # Ranks with other code, or another config, would wait for each other in a step.
    if settings.trial and all(f.fine or f.check not in (*_MUST_AGREE, "config file", "support") for f in findings):
        findings.append(_trial(settings.config))
    return Examination(
        ranks=len(facts), nodes=list(dict.fromkeys(nodes)), findings=findings, facts=facts, collectives=collectives
    )


def compare_nodes(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What must be the same on every rank and is, or is not."""
    findings = []
    names = dict.fromkeys(name for fact in facts for name in fact["versions"])
    for name in names:
        findings.append(_agreement(name, [(f["node"], f["versions"].get(name, "none")) for f in facts], _SAME_VERSION))
    for name in dict.fromkeys(name for fact in facts for name in fact["digests"]):
        values = [(fact["node"], fact["digests"].get(name, "none")) for fact in facts]
        findings.append(_agreement(name, values, _SAME_FILES))
    return findings


_SAME_VERSION = "install the same version on every node"
_SAME_FILES = "copy the same files to every node, or start from a folder that they share"


def _agreement(name: str, values: Sequence[tuple[str, str]], remedy: str) -> Finding:
    first_node, first = values[0]
    others = dict.fromkeys((node, value) for node, value in values if value != first)
    if not others:
        where = "on every node" if len({node for node, _ in values}) > 1 else f"on {first_node}"
        return Finding(check=name, fine=True, line=f"{first} {where}")
    told = ", ".join(f"{value} on {node}" for node, value in others)
    return Finding(check=name, fine=False, line=f"{first} on {first_node}, but {told}: {remedy}")


def _own(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What each node has to do for itself, and whether this release supports its libraries."""
    found = dict.fromkeys((check, line, fact["node"]) for fact in facts for check, line in fact["todo"])
    findings = [Finding(check=check, fine=False, line=f"{node}: {line}") for check, line, node in found]
    told = {finding.check for finding in findings}
    for check, key in (("disk", "disk_gib"), ("shared memory", "shm_gib")):
        free = [fact[key] for fact in facts if fact[key] is not None]
        if check not in told and free:
            findings.append(Finding(check=check, fine=True, line=f"{min(free):.1f} GiB free at least"))
    try:
        _check_support()
        findings.append(Finding(check="support", fine=True, line="these versions are supported"))
    except UserError as error:
        findings.append(Finding(check="support", fine=False, line=str(error)))
    return findings


def _check_support() -> None:
    from ds_optim.zero.versions import check_versions

    check_versions()


def _join(settings: DoctorSettings) -> Examination | None:
    """Join the ranks; where that fails, what this rank knows by itself."""
    node = socket.gethostname()
    problems = doctor_node.network_problems(os.environ, node)
    line = "; ".join(line for _, line in problems) or unreachable(os.environ, settings.timeout_s)
    if line is None:
        try:
            ranks.join(limit_s=settings.timeout_s, check_code=False)
            return None
        except UserError as error:
            line = str(error)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            late = f"the ranks did not find each other within {settings.timeout_s:g} s"
            line = f"{late} ({type(error).__name__}: {text}): look for a line of a rank that is missing here"
    finding = Finding(check="reach", fine=False, line=f"rank {ranks_variable()} on {node}: {line}")
    return Examination(ranks=1, nodes=[node], findings=[finding], facts=[])


def ranks_variable() -> str:
    """This rank's number as its launcher gave it."""
    return os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"


def _places(nodes: Sequence[str]) -> str:
    counts = {node: list(nodes).count(node) for node in dict.fromkeys(nodes)}
    return f"{len(nodes)} joined: " + ", ".join(f"{count} on {node}" for node, count in counts.items())


def _told(timed: Timed) -> Finding:
    from ds_optim.report.units import size

    line = f"{size(timed.bytes)}: {timed.seconds * 1e3:.3f} ms, {timed.mb_per_s:,.0f} MB/s sent by a rank"
    return Finding(check=timed.collective, fine=True, line=line)


def _bucket_bytes(config: Path | None) -> int:
    """About what a rank sends of the Exchange's bucket under this config, or by default: of each element 2 bytes, where
    messages, stacks, results and temporaries hold some 30."""
    from ds_optim.optimizers.options import EXCHANGE_DEFAULTS
    from ds_optim.zero.reading import load_config

    bucket: Any = EXCHANGE_DEFAULTS["bucket_mb"]
    section: Any = {}
    try:
        section = load_config(config).get("optimizer", {}) if config is not None else {}
        bucket = section.get("params", {}).get("exchange", {}).get("bucket_mb", bucket)
        return max(1, int(float(bucket) * 2**20) // _HELD_PER_SENT)
    except (UserError, AttributeError, TypeError, ValueError):  # the trial says what is wrong with it
        return int(EXCHANGE_DEFAULTS["bucket_mb"]) * 2**20 // _HELD_PER_SENT


def _trial(config: Path | None) -> Finding:
    from ds_optim.cluster.trial import trial

    name = "the default config" if config is None else str(config)
    try:
        outcome = trial(config)
    except UserError as error:
        line = str(error)
        return Finding(check="trial", fine=False, line=line if name in line else f"{name}: {line}")
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return Finding(check="trial", fine=False, line=f"{name} does not train: {type(error).__name__}: {text}")
    stepped = " and ".join(outcome["optimizers"]) or "no optimizer"
    losses = ", ".join(f"{loss:.3f}" for loss in outcome["loss"])
    healthy = bool(outcome["optimizers"]) and all(loss == loss for loss in outcome["loss"])
    remedy = "" if healthy else ": see the log of the trial above"
    return Finding(check="trial", fine=healthy, line=f"{name}: {stepped} stepped, losses {losses}{remedy}")
