"""Memory by the allocator against the estimate, and short forms of ``ds-optim bench``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_optim.accept.checks import AcceptSettings, Check, within
from ds_optim.bench import elementwise as elementwise_bench
from ds_optim.bench import polar as polar_bench
from ds_optim.bench import step as step_bench
from ds_optim.bench import wire as wire_bench
from ds_optim.bench.engines import ADAMW, DEEPSPEED_MUON, ModelShape
from ds_optim.machine.kept_results import RESULTS
from ds_optim.report.schema import Row, read_rows
from ds_optim.sweep.memory import MemorySettings, run_memory

_TOLERATED = {"model states": 0.02, "activations": 0.5, "peak": 0.25, "": 0.1}
"""Shares that a figure may be off: state is counted, activations and transients of backward are estimated."""
_WORKSPACE = 96 << 20
"""Bytes that cuBLAS and others take of torch's allocator for themselves."""
_FILLING: dict[str, Any] = {"micro_batch": 32, "seq_len": 512}
"""What makes a tiny model fill so much of a GPU that workspaces are not most of it."""
_OFF_THE_WIRE, _AGREEING = 0.02, 64
"""A share of the formula, and bytes with which ranks agree now and then."""
_OTHERS = (
    *(ADAMW, DEEPSPEED_MUON, elementwise_bench.TORCH_ADAMW, elementwise_bench.DEEPSPEED_ADAMW),
    *(polar_bench.DEEPSPEED, polar_bench.DEEPSPEED_EAGER),
)
"""Yardsticks: where a machine cannot run one, nothing of ours is amiss."""
_SMALL = ModelShape(width=64, layers=2, vocabulary=128)


def memory(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """``ds-optim memory``: of each cell what is estimated, accounted and measured."""
    out = folder / "memory"
    sweep = MemorySettings(
        optimizers=["lion"] if settings.quick else ["lion", "lion_muon"],
        momentum_dtypes=["float32"] if settings.quick else ["float32", "int8"],
        stages=[3] if settings.quick else [1, 2, 3],
        **(_FILLING if settings.gpus else {}),
        ranks=settings.ranks,
        out=out,
        repeat=1,
        steady=1,
        force=True,
    )
    run_memory(sweep)
    for row in read_rows(out / RESULTS):
        where = f"stage {row.stage}, {row.momentum_dtype} momentum, {row.ranks} ranks"
        if row.status != "ok":
            yield Check(name=row.optimizer, where=where, ok=False, note=row.reason or "")
            continue
        for line in row.extra["reconciliation"]:
            left, right = line["sides"]
            limit = _TOLERATED.get(line["what"], _TOLERATED[""]) * line[right]
            limit += _WORKSPACE * (settings.gpus > 0 and right == "measured")
            note = f"{line[left]:,} against {line[right]:,}" + (f"; {line['cause']}" if line["cause"] else "")
            name, off = f"{line['what']}: {left} against {right}", abs(line["difference"])
            yield within(name, off, limit, where=f"{row.optimizer}, {where}", unit="bytes off", note=note)


def step(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """``ds-optim bench step``: milliseconds of the optimizer's part, and its ratio to AdamW's whole step."""
    quick = settings.quick
    asked = step_bench.StepSettings(
        ranks=settings.ranks,
        stages=(3,) if quick else (1, 3),
        cases=("Lion",) if quick else (ADAMW, DEEPSPEED_MUON, "Lion", "Muon", "LionMuon"),
        shape=_SMALL if quick else ModelShape(width=1024, layers=8) if settings.gpus else ModelShape(layers=4),
        tokens=32 if quick else 64,
        rounds=1 if quick else 3,
    )
    for row in step_bench.rows(asked, {}):
        where = f"stage {row.stage}, {row.ranks} ranks"
        ratio = (row.extra.get("ratios") or {}).get(f"step / {ADAMW}")
        note = "" if ratio is None else f"the whole step is {ratio:g} of AdamW's"
        yield _timed(row, row.optimizer, where, row.extra.get("optimizer_ms"), "ms in step()", note)


def polar(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """``ds-optim bench polar``: milliseconds a matrix, and its share of the device's matrix rate."""
    device, quick = torch.device(settings.device), settings.quick
    asked = polar_bench.PolarSettings(
        device=device,
        shapes=((64, 128),) if quick else ((768, 768), (768, 3072)) if device.type == "cpu" else polar_bench.SHAPES,
        max_elements=polar_bench.MAX_ELEMENTS[device.type],
        dtypes=("bf16",),
        rounds=2 if quick else 5,
        seconds=5.0,
        compiled=False,
        matrix_sizes=(512,) if quick else (1024, 4096) if device.type == "cuda" else (1024,),
        copy_bytes=1 << 24 if quick else None,
    )
    for row in polar_bench.rows(asked, {}):
        share = (row.extra.get("ratios") or {}).get("rate / matrix rate")
        note = "" if share is None else f"{100 * share:.0f} % of the matrix rate"
        yield _timed(row, row.optimizer, str(row.extra["shape"]), row.ms_per_step, "ms", note)


def elementwise(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """``ds-optim bench elementwise``: milliseconds a pass, and its share of the rate of a copy."""
    elements = 1 << (14 if settings.quick else 26 if settings.gpus else 22)
    device = torch.device(settings.device)
    asked = elementwise_bench.ElementwiseSettings(device=device, elements=elements, rounds=2 if settings.quick else 5)
    for row in elementwise_bench.rows(asked, {}):
        share = (row.extra.get("ratios") or {}).get("rate / copy rate")
        note = "" if share is None else f"{100 * share:.0f} % of a copy's rate"
        where = f"{row.extra['path'] or 'library'}, {elements:,} elements"
        yield _timed(row, row.optimizer, where, row.ms_per_step, "ms", note)


def wire(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """``ds-optim bench wire``: bytes handed to collectives beyond AdamW's, against the formula."""
    asked = wire_bench.WireSettings(
        ranks=settings.ranks,
        stages=(3,) if settings.quick else (1, 2, 3),
        cases=(ADAMW, "Lion") if settings.quick else (ADAMW, "Lion", "Muon", "LionMuon"),
        shape=_SMALL,
    )
    for row in wire_bench.rows(asked, {}):
        where = f"stage {row.stage}, {row.ranks} ranks"
        if "formula" not in row.extra:
            yield _timed(row, row.optimizer, where, None, "", "")
            continue
        formula, handed = float(row.extra["formula"]), float(row.extra["handed_over_adamw"])
        note = f"{handed:,.0f} bytes beyond AdamW's, by the formula {formula:,.0f}"
        limit = _OFF_THE_WIRE * formula + _AGREEING
        yield within(row.optimizer, abs(handed - formula), limit, where=where, unit="bytes off", note=note)


def _timed(row: Row, name: str, where: str, figure: float | None, unit: str, note: str) -> Check:
    """A figure that has no limit: the check is that there is one."""
    reason = row.extra.get("not_measured")
    if reason is not None:
        return Check(name=name, where=where, ok=name in _OTHERS, note=f"not measured: {reason}")
    return Check(name=name, where=where, ok=True, figure=figure, unit=unit, note=note)
