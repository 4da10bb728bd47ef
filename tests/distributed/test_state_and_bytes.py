"""What an optimizer keeps, to the byte, and what it sends, to the byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_optim
from ds_optim.matrix.shapes import ELEMENTS, ROWS, Part
from ds_optim.memory.traffic import TrafficCounter
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.optimizers.rules import ELEMENT
from ds_optim.optimizers.updates import MatrixSignUpdate, MatrixUpdate, ParameterUpdate, RowsUpdate
from ds_optim.sharding.layout import Layout, Slice
from tests.cases import CASES, WITH_VARIANTS, Case, one_of_each_kind, update_of
from tests.tiers import cells

from .harness import run_ranks
from .training import ParityNet, Run, layout_of, start_engine, take_step

BF16 = {"dtype": "bfloat16"}
STEPS = 4
"""Counted, after a first one that is not: even, so that LionMuon's period of 2 fits."""
SUB_GROUPS = {"sub_group_size": 300}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ROUND_ROBIN = {"round_robin_gradients": True}


def _bf16(case: Case) -> dict[str, Any]:
    """Directions that travel in 16 bits, to owners that the clock does not choose: bytes of two runs are compared."""
    return {"polar": BF16, "exchange": {"costs": "modelled"}} if case.has_matrices else {}


CHOSEN = {name: WITH_VARIANTS[name] for name in (*CASES, "Muon-aux_adamw", "Lion-bfloat16")}
"""Every rule, an aux rule that keeps more, and (below) momentum of fewer bits."""
RUNS = {name: Run(type=case.type, params={**case.params, **_bf16(case)}) for name, case in CHOSEN.items()}
for _type, _dtype in (("Muon", "bfloat16"), ("Lion", "int8"), ("LionMuon", "int8")):
    CHOSEN[f"{_type}-{_dtype}"] = CASES[_type]
    RUNS[f"{_type}-{_dtype}"] = Run(type=_type, params={**RUNS[_type].params, "momentum_dtype": _dtype})
# place -> (settings of the run, world sizes).
PLACES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "z1": ({"stage": 1}, (2, 3, 4)),
    "z2": ({"stage": 2}, (3,)),
    "z1-round_robin": ({"stage": 1, "zero": ROUND_ROBIN}, (2, 4)),
    "z2-round_robin": ({"stage": 2, "zero": ROUND_ROBIN}, (3,)),
    "z3": ({"stage": 3}, (2, 3, 4)),
    "z3-sub_groups": ({"stage": 3, "zero": SUB_GROUPS}, (3,)),
    "z2-offload": ({"stage": 2, "zero": OFFLOAD}, (2,)),
    "z3-offload": ({"stage": 3, "zero": OFFLOAD}, (2,)),
}
# Every rule at stage 3 on two ranks; with --full all on three and those of each kind at every second place, the other
# half of them at the places between; all where DS_OPTIM_ALL_CELLS is set.
KINDS = list(dict.fromkeys((*one_of_each_kind(), *list(RUNS)[-3:])))
EVERYWHERE = [(place, size) for place, (_, sizes) in PLACES.items() for size in sizes]
CELLS = cells(
    product(CASES, ["z3"], [2]),
    [
        *((name, place, 3) for name, place in product(RUNS, ("z1", "z3"))),
        *(
            (name, place, size)
            for n, (place, size) in enumerate(EVERYWHERE)
            for name in ("Muon", "LionMuon", *KINDS[n % 2 :: 2])
        ),
    ],
    [(name, place, size) for place, size in EVERYWHERE for name in RUNS],
)


def element_bytes(name: str) -> tuple[int, int]:
    """Bytes of state for an element of a matrix, and of what is none."""
    case, params = CHOSEN[name], RUNS[name].params
    stored = {"bfloat16": 2, "int8": 1}.get(params.get("momentum_dtype", ""), 4)
    own = sum(stored if buffer.narrow else 4 for buffer in case.rule.buffers if buffer.kind == ELEMENT)
    return own, (8 if params.get("aux") == "adamw" else stored) if case.has_matrices else own


def joined_bytes(name: str) -> int:
    """Bytes of the numbers of a whole parameter that a step joins in its one all-reduce."""
    update = update_of(CHOSEN[name], 0)
    if isinstance(update, ParameterUpdate):
        return 8 * update.measure.columns if update.measure is not None else 0
    return 8 if isinstance(update, MatrixUpdate) and update.gate is not None else 0


def sending_steps(name: str) -> int:
    """How many of the counted steps send matrices."""
    updates = [update_of(CHOSEN[name], 1 + step) for step in range(STEPS)]
    return sum(isinstance(update, MatrixUpdate | MatrixSignUpdate) for update in updates)


def _run(name: str, place: str) -> Run:
    run = Run(type="AdamW") if name == "AdamW" else RUNS[name]
    return Run(type=run.type, params=run.params, **PLACES[place][0])


@dataclass
class Seen:
    """One rank's count.

    state: bytes of the optimizer's state tensors, padding included, a storage once. keys: of the state.
    strangers: tensors that the optimizer can reach besides parameters, partitions and state. claimed: bytes sent
    as the optimizer counts them in the counted steps; handed: the same seen at ``all_to_all_single``;
    total: all that the rank sent in these steps, DeepSpeed's own included. planned: elements that one
    exchange of every unit sends to owners, and back, says the plan; rows: values of rows, there and back together.
    """

    state: int
    keys: set[str]
    strangers: list[tuple[int, ...]]
    claimed: int = 0
    handed: int = 0
    total: float = 0.0
    planned: tuple[int, int] = (0, 0)
    rows: int = 0
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
        state=sum(_storages(t for state in optimizer.state.values() for t in _tensors(state)).values()),
        keys={key for state in optimizer.state.values() for key, value in state.items() if list(_tensors(value))},
        strangers=_strangers(optimizer, model),
        claimed=comm.sent_bytes - before if comm else 0,
        handed=wire.sent,
        total=counter.sent_bytes,
        planned=(_planned(optimizer, rank, ELEMENTS, True), _planned(optimizer, rank, ELEMENTS, False)),
        rows=_planned(optimizer, rank, ROWS, True) + _planned(optimizer, rank, ROWS, False),
        unknown=counter.unknown,
    )
    engine.destroy()
    return seen


def _planned(optimizer: torch.optim.Optimizer, rank: int, part: Part, there: bool) -> int:
    """Values of one kind that a rank sends to owners in an exchange of every unit, or back."""
    plans = [exchange.plan for exchange in getattr(optimizer, "exchanges", {}).values()]
    sent = [
        (plan.sent_counts if there else plan.received_counts)(bucket, rank, part)
        for plan in plans
        if part in (plan.there if there else plan.back) or part is ELEMENTS
        for bucket in plan.buckets
    ]
    return sum(map(sum, sent))


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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or those in a mapping: what is kept for rows is by parameter."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif torch.is_tensor(value):
        yield value


def _storages(values: Any) -> dict[int, int]:
    """Bytes by storage; a step count is no vector."""
    found = [v.untyped_storage() for v in values if torch.is_tensor(v) and v.dim()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _strangers(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Shapes of tensors that an optimizer keeps and nobody knows of."""
    if not isinstance(optimizer, ds_optim.optimizers.ZeroOptimizer):
        return []
    known = {id(p) for p in model.parameters()} | {id(t) for t in optimizer.state}
    known |= {id(t) for state in optimizer.state.values() for t in _tensors(state)}
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
    """For each cell what every rank counted, and the same of AdamW's."""
    mine = [(name, place) for name, place, size in CELLS if size == world_size]
    runs = {f"{name} {place}": _run(name, place) for name, place in mine}
    runs |= {f"AdamW {place}": _run("AdamW", place) for _, place in mine}
    ranks = run_ranks(world_size, count_all, runs, timeout=400)
    return {name: [rank[name] for rank in ranks] for name in runs}


def layout(world_size: int, place: str) -> Layout:
    return layout_of(_run("Lion", place), world_size)


def matrix_numels() -> list[int]:
    groups = ds_optim.param_groups(ParityNet())
    return [member.spec.numel for group in groups if group["name"] == "matrix" for member in group[MEMBERS]]


def at_places(*stages: int) -> Any:
    """Parametrize by the places of these stages, and their world sizes."""
    places = [(p, w) for _, p, w in CELLS if PLACES[p][0]["stage"] in stages]
    return pytest.mark.parametrize(("place", "world_size"), list(dict.fromkeys(places)))


def scale_bytes(slices: list[Slice]) -> int:
    return 4 * sum(-(-(piece.start + piece.numel) // 256) - piece.start // 256 for piece in slices)


def test_int8_takes_1_016_bytes_where_slices_are_long() -> None:
    whole = [Slice(param=0, start=0, numel=2**20, tensor=0, offset=0)]
    assert (2**20 + scale_bytes(whole)) / 2**20 == 1 + 4 / 256


@pytest.mark.parametrize(("name", "place", "world_size"), CELLS)
def test_state_is_what_the_rule_says_to_the_byte(name: str, place: str, world_size: int) -> None:
    """Summed over ranks, padding apart: 4 bytes a parameter for one fp32 buffer."""
    seen = counted(world_size)[f"{name} {place}"]
    rule, (on_matrices, elsewhere) = CHOSEN[name].rule, element_bytes(name)
    expected = 0
    for unit in layout(world_size, place).units:
        elements = sum(spec.numel for spec in unit.params) + sum(unit.padding(rank) for rank in range(world_size))
        expected += elements * (on_matrices if unit.group == 0 else elsewhere)
        if name.endswith("int8"):  # a scale for every 256 elements of a parameter, or what a border leaves of them
            slices = [piece for rank in range(world_size) for piece in unit.slices(rank)]
            expected += scale_bytes(slices)
        if unit.group == 0:  # a row's value is with one rank
            expected += sum(4 * spec.shape[0] * len(rule.rows) for spec in unit.params)
    assert sum(rank.state for rank in seen) == expected
    kept = {key for rank in seen for key in rank.keys}
    int8 = {"exp_avg_codes", "exp_avg_scale"}
    assert kept >= (int8 if name.endswith("int8") else {*rule.elements, *rule.rows})
    assert kept <= {*rule.elements, *rule.rows, *(int8 if name.endswith("int8") else ()), *_of_aux(name)}
    assert [rank.strangers for rank in seen] == [[]] * world_size


def _of_aux(name: str) -> set[str]:
    if not CHOSEN[name].has_matrices:
        return set()
    return {"exp_avg", "exp_avg_sq"} if RUNS[name].params.get("aux") == "adamw" else {"exp_avg"}


@pytest.mark.parametrize(("name", "place", "world_size"), CELLS)
def test_bytes_sent_are_those_of_the_plan(name: str, place: str, world_size: int) -> None:
    """As the optimizer claims, as the collective sees, and as the dispatcher sees beside AdamW's run."""
    seen, case = counted(world_size), CHOSEN[name]
    shape = case.rule.shape
    # Directions are bfloat16, weights beside them fp32, and what comes back has a dtype of its own: a sign is one byte.
    there = 2 + 4 * (shape is not None and shape.weights)
    back = 2 if shape is None or shape.result is None else shape.result.itemsize
    units = layout(world_size, place).units
    tensors = sum(len(unit.params) for unit in units if not case.has_matrices or unit.group == 0)
    joined = joined_bytes(name) * tensors * STEPS
    by_rows = isinstance(update_of(case, 0), RowsUpdate)
    if by_rows:
        of_matrices = [unit for unit in units if unit.group == 0]
        cut = [spec for unit in of_matrices for p, spec in enumerate(unit.params) if len(unit.holders(p)) > 1]
        joined = sum(8 * spec.shape[0] for spec in cut) * STEPS
        most = sum(-(-spec.shape[0] // 4) * math.prod(spec.shape[1:]) for spec in cut) * (there + back) * STEPS
        handed = sum(rank.handed for rank in seen[f"{name} {place}"])
        assert handed <= most, "a quarter of the rows, there and back"
        # Of the one matrix that a border of stages 1 and 2 cuts, all that are chosen may lie with its owner.
        assert handed > 0 or not place.startswith("z3")
    for rank, beside in zip(seen[f"{name} {place}"], seen[f"AdamW {place}"], strict=True):
        planned = rank.planned[0] * there + rank.planned[1] * back + 4 * rank.rows
        assert by_rows or rank.handed == sending_steps(name) * planned
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


@pytest.mark.full
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
