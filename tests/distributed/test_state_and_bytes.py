"""What an optimizer keeps, to the byte, and what it sends, to the byte."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_optim
from ds_optim.memory.traffic import TrafficCounter
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.sharding.layout import Layout, Slice

from .harness import run_ranks
from .training import ParityNet, Run, layout_of, start_engine, take_step

BF16 = {"dtype": "bfloat16"}
STEPS = 4
"""Counted, after a first one that is not: even, so that LionMuon's period of 2 fits."""
SUB_GROUPS = {"sub_group_size": 300}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

# name -> (run, state bytes per parameter, the same of what is no matrix). To add an optimizer, add a line.
OPTIMIZERS: dict[str, tuple[Run, int, int]] = {
    "Lion": (Run(type="Lion"), 4, 4),
    "SignSGD": (Run(type="SignSGD"), 0, 0),
    "Signum": (Run(type="Signum"), 4, 4),
    "Muon": (Run(type="Muon", params={"polar": BF16}), 4, 4),
    "Muon-aux_adamw": (Run(type="Muon", params={"polar": BF16, "aux": "adamw"}), 4, 8),
    "Muonlight": (Run(type="Muonlight", params={"polar": BF16, "aux": "signum"}), 4, 4),
    "LionMuon": (Run(type="LionMuon", params={"polar": BF16}), 4, 4),
    "SignMuon": (Run(type="SignMuon", params={"polar": BF16}), 4, 4),
    "Lion-bfloat16": (Run(type="Lion", params={"momentum_dtype": "bfloat16"}), 2, 2),
    "Lion-int8": (Run(type="Lion", params={"momentum_dtype": "int8"}), 1, 1),
    "LionMuon-int8": (Run(type="LionMuon", params={"polar": BF16, "momentum_dtype": "int8"}), 1, 1),
    "Muon-bfloat16": (Run(type="Muon", params={"polar": BF16, "momentum_dtype": "bfloat16"}), 2, 2),
    "CautiousLion": (Run(type="CautiousLion"), 4, 4),
    "CLion": (Run(type="CLion"), 4, 4),
    "CLion-tensor": (Run(type="CLion", params={"gate": "tensor"}), 4, 4),
    "StableLion": (Run(type="StableLion"), 4, 4),
    "LASM": (Run(type="LASM"), 4, 4),
    "LASM-element": (Run(type="LASM", params={"variance": "element"}), 8, 8),
    "StoSignSGD": (Run(type="StoSignSGD"), 4, 4),
    "StoSignSGD-element": (Run(type="StoSignSGD", params={"bound": "element"}), 8, 8),
    "MiMuon": (Run(type="MiMuon", params={"polar": BF16}), 4, 4),
    "SpectralLion": (Run(type="SpectralLion", params={"polar": BF16, "basis": "weight"}), 4, 4),
    "SpectralLion-momentum": (Run(type="SpectralLion", params={"polar": BF16, "basis": "momentum"}), 4, 4),
    "SpectralLion-gradient": (Run(type="SpectralLion", params={"polar": BF16, "basis": "gradient"}), 4, 4),
    "Lamb": (Run(type="Lamb"), 8, 8),
    "StableAdamW": (Run(type="StableAdamW"), 8, 8),
}
# Bytes a parameter tensor and step that a rule joins in its one all-reduce; of matrices alone, or of all parameters.
JOINED = {
    **dict.fromkeys(["CautiousLion", "CLion-tensor", "LASM", "StoSignSGD", "StableAdamW"], 8),
    **dict.fromkeys(["StableLion", "Lamb"], 16),
    "MiMuon": 8,
}
# How many of the counted steps of an optimizer send matrices; none of those not named here.
SENDING = {
    **dict.fromkeys(["Muon", "Muon-aux_adamw", "Muon-bfloat16", "Muonlight", "MiMuon"], STEPS),
    **dict.fromkeys(["SpectralLion", "SpectralLion-momentum", "SpectralLion-gradient"], STEPS),
    **dict.fromkeys(["LionMuon", "LionMuon-int8", "SignMuon"], STEPS // 2),
}
# Bytes of an element on its way to the owner and back, where it is not 2 and 2: a sign is one byte.
TRAVELLING = {"SpectralLion": (2 + 4, 1), "SpectralLion-momentum": (2, 1)}
# place -> (settings of the run, world sizes).
PLACES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "z1": ({"stage": 1}, (2, 3, 4)),
    "z2": ({"stage": 2}, (3,)),
    "z3": ({"stage": 3}, (2, 3, 4)),
    "z3-sub_groups": ({"stage": 3, "zero": SUB_GROUPS}, (3,)),
    "z2-offload": ({"stage": 2, "zero": OFFLOAD}, (2,)),
    "z3-offload": ({"stage": 3, "zero": OFFLOAD}, (2,)),
}
# On four ranks, one of each kind: what the others add is theirs on three too; all where DS_OPTIM_ALL_CELLS is set.
ON_FOUR = set(OPTIMIZERS) if os.environ.get("DS_OPTIM_ALL_CELLS") else {
    *("Lion", "Lion-int8", "Muon", "LionMuon", "SpectralLion", "LASM"),
}  # fmt: skip


def _run(name: str, place: str) -> Run:
    run = Run(type="AdamW") if name == "AdamW" else OPTIMIZERS[name][0]
    return Run(type=run.type, params=run.params, **PLACES[place][0])


@dataclass
class Seen:
    """One rank's count.

    state: bytes of the optimizer's state tensors, padding included, a storage once. keys: of the state.
    strangers: tensors that the optimizer can reach besides parameters, partitions and state. claimed: bytes sent
    as the optimizer counts them in the counted steps; handed: the same seen at ``all_to_all_single``;
    total: all that the rank sent in these steps, DeepSpeed's own included. planned: elements that one
    exchange of every unit sends to owners, and back, says the plan.
    """

    state: int
    keys: set[str]
    strangers: list[tuple[int, ...]]
    claimed: int = 0
    handed: int = 0
    total: float = 0.0
    planned: tuple[int, int] = (0, 0)
    unknown: set[str] = field(default_factory=set)


def count_all(rank: int, world_size: int, cells: dict[str, Run]) -> dict[str, Seen]:
    return {name: _count(run, rank, world_size) for name, run in cells.items()}


def _count(run: Run, rank: int, world_size: int) -> Seen:
    engine, model = start_engine(run, world_size)
    optimizer = engine.basic_optimizer
    comm = None
    counter = TrafficCounter()
    with _AllToAll() as wire:
        for step in range(1 + STEPS):
            if step == 1:
                comm = getattr(getattr(optimizer, "_binding", None), "comm", None)
                before, wire.sent = (comm.sent_bytes if comm else 0), 0
                counter.start()
            take_step(engine, run, rank, world_size, step)
        counter.stop()
    seen = Seen(
        state=sum(_storages(t for state in optimizer.state.values() for t in state.values()).values()),
        keys={key for state in optimizer.state.values() for key, value in state.items() if torch.is_tensor(value)},
        strangers=_strangers(optimizer, model),
        claimed=comm.sent_bytes - before if comm else 0,
        handed=wire.sent,
        total=counter.sent_bytes,
        planned=_planned(optimizer, rank),
        unknown=counter.unknown,
    )
    engine.destroy()
    return seen


def _planned(optimizer: torch.optim.Optimizer, rank: int) -> tuple[int, int]:
    """Elements of slices that a rank sends to owners, and those of results that it sends back."""
    plans = [exchange.plan for exchange in getattr(optimizer, "exchanges", {}).values()]
    buckets = [(plan, bucket) for plan in plans for bucket in plan.buckets]
    there = sum(sum(plan.sent_counts(bucket, rank)) for plan, bucket in buckets)
    return there, sum(sum(plan.received_counts(bucket, rank)) for plan, bucket in buckets)


class _AllToAll:
    """Counts the bytes that are handed to ``all_to_all_single`` for other ranks, without asking Comm."""

    def __init__(self) -> None:
        self.sent = 0

    def __enter__(self) -> _AllToAll:
        self._original = dist.all_to_all_single
        dist.all_to_all_single = self._counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._original

    def _counting(self, out: Any, message: Any, out_counts: Any, counts: list[int], **kwargs: Any) -> Any:
        others = sum(counts) - counts[dist.get_rank(kwargs.get("group"))]
        self.sent += others * message.element_size()
        return self._original(out, message, out_counts, counts, **kwargs)


def _storages(values: Any) -> dict[int, int]:
    """Bytes by storage; a step count is no vector."""
    found = [v.untyped_storage() for v in values if torch.is_tensor(v) and v.dim()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _strangers(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Shapes of tensors that an optimizer keeps and nobody knows of."""
    if not isinstance(optimizer, ds_optim.optimizers.ZeroOptimizer):
        return []
    known = {id(p) for p in model.parameters()} | {id(t) for t in optimizer.state}
    known |= {id(v) for state in optimizer.state.values() for v in state.values()}
    return [tuple(t.shape) for t in _reachable(optimizer, set()) if id(t) not in known]


def _reachable(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in containers and in this package's own objects."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if torch.is_tensor(thing):
        yield thing
    elif isinstance(thing, dict):
        for item in [*thing.keys(), *thing.values()]:
            yield from _reachable(item, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for item in thing:
            yield from _reachable(item, seen)
    elif type(thing).__module__.startswith("ds_optim"):
        yield from _reachable(vars(thing) if hasattr(thing, "__dict__") else {}, seen)


@cache
def counted(world_size: int) -> dict[str, list[Seen]]:
    """For each cell what every rank counted."""
    places = [place for place, (_, sizes) in PLACES.items() if world_size in sizes]
    cells = {f"{name} {place}": _run(name, place) for place in places for name in [*_named(world_size), "AdamW"]}
    ranks = run_ranks(world_size, count_all, cells, timeout=400)
    return {name: [rank[name] for rank in ranks] for name in cells}


def _named(world_size: int) -> list[str]:
    return [name for name in OPTIMIZERS if world_size < 4 or name in ON_FOUR]


def layout(world_size: int, place: str) -> Layout:
    return layout_of(_run("Lion", place), world_size)


def matrix_numels() -> list[int]:
    groups = ds_optim.param_groups(ParityNet())
    return [member.spec.numel for group in groups if group["name"] == "matrix" for member in group[MEMBERS]]


def at_places(*stages: int) -> Any:
    """Parametrize by the places of these stages, and their world sizes."""
    cells = [(p, w) for p, (settings, sizes) in PLACES.items() if settings["stage"] in stages for w in sizes]
    return pytest.mark.parametrize(("place", "world_size"), cells)


def at_all_places() -> Any:
    """Parametrize by optimizers, places and world sizes."""
    cells = [(name, p, w) for p, (_, sizes) in PLACES.items() for w in sizes for name in _named(w)]
    return pytest.mark.parametrize(("name", "place", "world_size"), cells)


def scale_bytes(slices: list[Slice]) -> int:
    return 4 * sum(-(-(piece.start + piece.numel) // 256) - piece.start // 256 for piece in slices)


def test_int8_takes_1_016_bytes_where_slices_are_long() -> None:
    whole = [Slice(param=0, start=0, numel=2**20, tensor=0, offset=0)]
    assert (2**20 + scale_bytes(whole)) / 2**20 == 1 + 4 / 256


@at_all_places()
def test_state_is_what_the_rule_says_to_the_byte(name: str, place: str, world_size: int) -> None:
    """Summed over ranks, padding apart: 4 bytes a parameter for one fp32 buffer."""
    seen = counted(world_size)[f"{name} {place}"]
    _, on_matrices, elsewhere = OPTIMIZERS[name]
    expected = 0
    for unit in layout(world_size, place).units:
        elements = sum(spec.numel for spec in unit.params) + sum(unit.padding(rank) for rank in range(world_size))
        expected += elements * (on_matrices if unit.group == 0 else elsewhere)
        if name.endswith("int8"):  # a scale for every 256 elements of a parameter, or what a border leaves of them
            slices = [piece for rank in range(world_size) for piece in unit.slices(rank)]
            expected += scale_bytes(slices)
    assert sum(rank.state for rank in seen) == expected
    parameters = sum(p.numel() for p in ParityNet().parameters())
    padding = sum(u.padding(r) for u in layout(world_size, place).units for r in range(world_size))
    if on_matrices == elsewhere and not name.endswith("int8"):
        assert sum(rank.state for rank in seen) - on_matrices * padding == on_matrices * parameters
    kept: dict[int, set[str]] = {0: set(), 8: {"exp_avg", "exp_avg_sq"}}
    int8 = {"exp_avg_codes", "exp_avg_scale"}
    buffers = int8 | kept.get(elsewhere, set()) if name.endswith("int8") else kept.get(elsewhere, {"exp_avg"})
    assert {key for rank in seen for key in rank.keys} == buffers
    assert [rank.strangers for rank in seen] == [[]] * world_size


@at_all_places()
def test_bytes_sent_are_those_of_the_plan(name: str, place: str, world_size: int) -> None:
    """As the optimizer claims, as the collective sees, and as the dispatcher sees beside AdamW's run."""
    cells = counted(world_size)
    there, back = TRAVELLING.get(name, (2, 2))
    units = layout(world_size, place).units
    tensors = sum(len(unit.params) for unit in units if name != "MiMuon" or unit.group == 0)
    joined = JOINED.get(name, 0) * tensors * STEPS
    for rank, beside in zip(cells[f"{name} {place}"], cells[f"AdamW {place}"], strict=True):
        assert rank.handed == SENDING.get(name, 0) * (rank.planned[0] * there + rank.planned[1] * back)
        assert rank.claimed == rank.handed + joined
        assert not rank.unknown
        # An all-reduce hands each byte over 2 (N-1)/N times.
        expected = rank.handed + joined * 2 * (world_size - 1) / world_size
        assert rank.total - beside.total == pytest.approx(expected, abs=1e-3)


@at_places(3)
def test_stage_3_sends_two_in_n_of_the_matrices(place: str, world_size: int) -> None:
    """2 (N-1)/N^2 elements a matrix element, mean over ranks; slices that are one longer or shorter make up
    the rest."""
    sent = [rank.handed / 2 / STEPS for rank in counted(world_size)[f"Muon {place}"]]
    exact = sum(2 * n * (world_size - 1) / world_size**2 for n in matrix_numels())
    slices = [math.ceil(n / world_size) for n in matrix_numels()]
    least = sum(2 * (n - width) / world_size for n, width in zip(matrix_numels(), slices, strict=True))
    most = sum(2 * (world_size - 1) * width / world_size for width in slices)
    assert least <= exact <= most < 1.01 * exact
    assert least <= sum(sent) / world_size <= most
    half = [rank.handed / 2 / STEPS for rank in counted(world_size)[f"LionMuon {place}"]]
    assert half == [count / 2 for count in sent]


@at_places(1, 2)
def test_stages_1_and_2_send_only_what_a_border_cuts(place: str, world_size: int) -> None:
    unit = layout(world_size, place).units[0]
    cut = [param for param in range(len(unit.params)) if len(unit.holders(param)) > 1]
    assert 0 < len(cut) <= world_size - 1
    total = sum(rank.handed / 2 / STEPS for rank in counted(world_size)[f"Muon {place}"])
    # A matrix travels to its owner and back, all but what the owner holds; at best the owner holds the most.
    least = sum(2 * (unit.params[p].numel - max(s.numel for _, s in unit.holders(p))) for p in cut)
    most = sum(2 * unit.params[p].numel for p in cut)
    assert least <= total <= most
