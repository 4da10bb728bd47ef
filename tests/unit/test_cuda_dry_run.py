"""Steps on a pretended CUDA (``tests/fake_cuda.py``): waits of the host, crossings, messages, fp64 and launches."""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_optim.elementwise import fused
from ds_optim.elementwise.native import library
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import ZeroSettings, chunk_scratch
from ds_optim.optimizers import steps
from ds_optim.optimizers.steps import finite
from ds_optim.optimizers.updates import MatrixUpdate, ParameterUpdate, SignUpdate
from ds_optim.sharding import returns
from ds_optim.sharding.selection import add_row_sums
from tests import cuda_counts, fake_streams
from tests.cases import CASES, NARROW, WITH_VARIANTS, Case, one_of_each_kind, update_of
from tests.fake_cuda import CUDA, Counts, dry_cuda, dry_steps, module_of, small
from tests.tiers import cells

MEMORY_PAGE = cuda_counts.PAGE.with_name("memory.md")
GROUPS = 3
"""Of the model: matrices, embeddings and head, vectors. ZeRO steps them one by one."""
#: What goes to the device in a step without offload: a table of slices for each launch.
TABLES = ("cpu -> cuda elementwise/gpu/launch.py:_start_rule", "cpu -> cuda elementwise/gpu/row_launch.py:_start_rows")
#: Launches a group at most for a step that measures first: tables, passes, what joins their numbers, and the message.
LAUNCHES = 8
#: Where a step may wait for the device, and how often: the numbers of a unit's parameters, decided on by the host ...
WAITS = {"optimizers/parameters.py:measured": GROUPS}
#: ... and at stage 0 whether all gradients are finite.
WAITS_UNSHARDED = {"optimizers/steps.py:<genexpr>": 1}
#: Copies to the host within a step: Dion2's chosen rows, which decide what travels.
CROSSINGS = {"Dion2": {"cuda -> cpu sharding/selection.py:choose_rows": 1}}


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels take addresses of memory, which these tensors have not."""
    monkeypatch.setattr(library, "library", lambda: None)


def second_step(case: Case, stage: int, **more: Any) -> Counts:
    params = {**case.params, **more.pop("params", {})}
    if case.has_matrices:
        params["exchange"] = {"costs": "modelled"}
    return dry_steps(case.type, small(), stage=stage, **more, **params)[1]


def is_measured(case: Case) -> bool:
    update = update_of(case, 1)
    return isinstance(update, ParameterUpdate) and update.measure is not None


def without_tables(counts: Counts) -> dict[str, int]:
    """Copies between devices, but for the tables that launches need, which are one each."""
    crossings = dict(counts.crossings)
    assert sum(crossings.pop(line, 0) for line in TABLES) == sum(
        counts.kernels[f"triton::{name}"] for name in counts.slices
    )
    return crossings


def in_kernels(counts: Counts) -> dict[str, int]:
    """Launches by Triton's kernel."""
    return {name: number for name, number in counts.kernels.items() if name.startswith("triton::")}


PLACES = cells(product(CASES, [3]), product(one_of_each_kind(), [0, 1]), product(CASES, [0, 1]))


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_the_host_waits_where_it_is_written_and_nowhere_else(name: str, stage: int) -> None:
    case = CASES[name]
    counts = second_step(case, stage)
    update = update_of(case, 1)
    gated = isinstance(update, MatrixUpdate) and update.gate is not None
    allowed = dict(WAITS_UNSHARDED) if stage == 0 else {}
    if is_measured(case) or gated:
        allowed |= WAITS
    assert {line for line in counts.syncs if counts.syncs[line] > allowed.get(line, 0)} == set(), counts.syncs
    assert without_tables(counts) == CROSSINGS.get(case.type, {})
    assert all(kind.split()[1:] in (["cuda"], ["cuda", "cuda"]) for kind in counts.messages)


@pytest.mark.parametrize("layers", [2, 6])
def test_the_host_asks_once_for_all_gates_of_a_unit(layers: int) -> None:
    case = WITH_VARIANTS["MiMuon-gap"]
    counts = dry_steps(case.type, small(layers), stage=1, **case.params, **cuda_counts.MODELLED)[1]
    assert dict(counts.syncs) == {"optimizers/matrices.py:flags": 1}


@pytest.mark.parametrize(
    ("name", "stage"),
    cells([("CautiousLion", 3), ("Muon", 1)], [("Lamb", 1), ("Dion2", 3), ("MiMuon", 3), ("NorMuon", 1)]),
)
def test_ranks_without_a_matrix_or_an_element_send_as_often_as_the_others_and_wait_no_more(
    name: str, stage: int
) -> None:
    few = [("a.weight", (8, 4)), ("b.weight", (6,)), ("c.weight", (4, 4))]
    more = {} if name in ("CautiousLion", "Lamb") else cuda_counts.MODELLED  # those exchange no matrices
    with cuda_counts.no_addresses():
        steps = [dry_steps(name, few, stage=stage, ranks=8, rank=rank, **more)[1] for rank in range(8)]
    assert all(step.messages == steps[0].messages for step in steps)
    assert sum(steps[0].messages.values()) > 0
    assert max(sum(step.syncs.values()) for step in steps) == sum(steps[0].syncs.values())
    assert min(step.launches for step in steps) < steps[0].launches, "no rank has less to do than the first"


def test_the_host_asks_once_for_all_gradients_of_a_device() -> None:
    with dry_cuda() as dry:
        made = [
            torch.empty(n, device=CUDA, dtype=dtype) for n in range(1, 30) for dtype in (torch.float32, torch.bfloat16)
        ]
        for p in made:
            p.grad = torch.empty_like(p)
        assert finite([{"params": made[:20]}, {"params": made[20:]}])
        assert dict(dry.counts.syncs) == {"optimizers/steps.py:<genexpr>": 1}


@pytest.mark.parametrize("name", cells(["StableLion", "NorMuon", "Dion2"], one_of_each_kind(), CASES))
@pytest.mark.parametrize("stage", cells([3], [1]))
def test_offloaded_slices_cross_all_of_a_message_at_once(name: str, stage: int) -> None:
    """Whatever the number of parameters, here 53; a unit's numbers cross to be joined, once."""
    case = CASES[name]
    exchange: dict[str, Any] = {"exchange": {"costs": "modelled"}} if case.has_matrices else {}
    counts = dry_steps(case.type, small(10), stage=stage, offload=True, **case.params, **exchange)[1]
    crossings = without_tables(counts)
    # For two parts of a message at most: three views that lie whole, a message, and what the owner itself holds.
    assert sum(crossings.values()) <= 2 * 2 * (3 + 2) + GROUPS
    assert {line.split()[-1].split(":")[0] for line in crossings} <= {
        "sharding/exchange.py", "sharding/returns.py", "sharding/sums.py", "sharding/selection.py",
    }  # fmt: skip


@pytest.mark.parametrize("stage", cells([1], [3]))
def test_offloaded_results_return_while_the_next_matrices_are_worked_on(stage: int) -> None:
    """Each by one copy a part, for whose event the host waits when the next one has been recorded."""
    counts = offloaded("NorMuon", stage)
    asked = counts.asked
    assert asked["events"] == asked["waits of the host"] == asked["waits of the stream"] > 1
    assert asked["copies"] == 2 * asked["events"]
    assert counts.late == 2


@pytest.mark.parametrize(
    ("place", "attribute", "instead", "complaint"),
    [
        (fake_streams.Event, "synchronize", lambda event: None, "nobody has waited"),
        (fake_streams.Stream, "wait_stream", lambda stream, other: None, "still be at work"),
        (returns, "_UnderWay", lambda lines, results, copies, done: (lines, None, copies, done), "freed too early"),
    ],
)
def test_the_dry_run_sees_copies_that_are_touched_too_early(
    place: Any, attribute: str, instead: Any, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, attribute, instead)
    with pytest.raises(AssertionError, match=complaint):
        offloaded("Muon", 3)


def offloaded(name: str, stage: int) -> Counts:
    return second_step(CASES[name], stage, offload=True)


OF_ELEMENTS = [name for name, case in CASES.items() if not case.has_matrices]
OF_MATRICES = [name for name, case in CASES.items() if case.has_matrices]
DTYPES = [(name, dtype) for name in CASES for dtype in ("float32", "bfloat16", "int8")
          if dtype == "float32" or CASES[name].rule.narrow]  # fmt: skip
GROWING = cells(
    [("StableLion", "bfloat16", 3), ("Lamb", "float32", 3), ("Muon", "int8", 3)],
    [*((name, "int8" if CASES[name].rule.narrow else "float32", 3) for name in OF_ELEMENTS + OF_MATRICES),
     *((name, "float32", 0) for name in one_of_each_kind())],
    [(*cell, stage) for cell in DTYPES for stage in (0, 3)],
)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "stage"), GROWING)
def test_launches_do_not_grow_with_the_number_of_parameters(name: str, dtype: str, stage: int) -> None:
    """23 parameters and 103, whose matrices rank 0 owns in as many shapes: as many launches.

    At stages 1 and 2 a border cuts another matrix for each number of layers; copies and steps are the same code.
    """
    case = CASES[name]
    params = {**case.params, "momentum_dtype": dtype}
    if case.has_matrices:
        params["exchange"] = {"costs": "modelled"}
    few, many = (dry_steps(case.type, small(layers), stage=stage, **params)[1] for layers in (4, 20))
    assert in_kernels(few) == in_kernels(many)
    assert in_kernels(few)
    whole = stage and dtype == "float32" and isinstance(update_of(case, 1), SignUpdate)
    assert sum(many.slices.values()) == GROUPS if whole else sum(many.slices.values()) >= 103
    assert few.launches == many.launches
    if not case.has_matrices and stage:
        assert many.launches <= LAUNCHES * GROUPS


CAUTIOUS = [name for name, case in CASES.items() if case.rule.decoupled]


@pytest.mark.parametrize("name", cells(["Lion", "LASM", "Muon"], one_of_each_kind(), CAUTIOUS))
def test_cautious_decay_is_done_by_the_launch_that_steps(name: str) -> None:
    """As many launches as without, and nothing kept of the weights."""
    case = CASES[name]
    if not case.rule.decoupled:
        pytest.skip("it decays otherwise, and refuses the option")
    plain, cautious = (
        second_step(case, 3, params={"weight_decay": 0.1, **more}) for more in ({}, {"cautious_decay": True})
    )
    assert cautious.launches == plain.launches
    assert any("::cautious " in name for name in in_kernels(cautious))
    assert not cautious.kernels["aten::sub.out"]
    assert cautious.peak - plain.peak < 1 << 14


@pytest.mark.parametrize("name", ["Lion", "Signum", "SignSGD"])
def test_one_pass_is_one_launch_for_a_partition_of_fp32(name: str) -> None:
    _, counts = dry_steps(name, small(2), stage=3)
    assert in_kernels(counts) == {"triton::sign_step": GROUPS}
    assert counts.launches <= 2 * GROUPS
    assert not counts.doubles


LONG, SHORT = 1 << 26, 1 << 16
SCRATCH = [
    (name, dtype, masters, numel)
    for (name, dtype), masters, numel in product(DTYPES, (torch.float32, torch.bfloat16), (LONG, SHORT))
    if not CASES[name].has_matrices
]


@pytest.mark.parametrize(
    ("name", "dtype", "masters", "numel"),
    cells(
        [cell for cell in SCRATCH if cell[:2] == ("StoSignSGD", "int8")],
        [cell for cell in SCRATCH if cell[2:] == (torch.bfloat16, LONG)],
        SCRATCH,
    ),
)
def test_a_step_holds_no_more_than_is_estimated(
    name: str, dtype: str, masters: torch.dtype, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length of a slice: without the kernels at most the estimate, with them next to nothing."""
    model = [("layers.0.mlp.up_proj.weight", (numel // 64, 64))]
    settings = {**CASES[name].params, "momentum_dtype": dtype, "masters": masters, "grads": masters}
    zero = SimpleNamespace(offload=False, device="cuda", bf16_masters=masters == torch.bfloat16)
    unit = SimpleNamespace(cut="flat", partition_numel=numel)
    unit.params = model
    estimated, in_kernels_ = (
        chunk_scratch([unit], zero, stored=dtype != "float32", kernels=kernels)  # type: ignore[list-item, arg-type]
        for kernels in (False, True)
    )
    _, counts = dry_steps(CASES[name].type, model, stage=3, ranks=1, **settings)
    assert counts.peak <= in_kernels_ <= estimated / 256
    monkeypatch.setattr(fused, "wanted", lambda: False)
    _, counts = dry_steps(CASES[name].type, model, stage=3, ranks=1, **settings)
    assert not in_kernels(counts)
    assert estimated / 32 < counts.peak <= estimated


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", cells(["Lion", "Muon"], NARROW))
def test_narrow_momentum_waits_no_more(name: str, dtype: str) -> None:
    counts = second_step(CASES[name], 3, params={"momentum_dtype": dtype})
    wide = second_step(CASES[name], 3)
    assert counts.syncs == wide.syncs
    assert without_tables(counts) == without_tables(wide)


@pytest.mark.parametrize("line", cuda_counts.LINES[:1] + cuda_counts.LINES[3:4] + cuda_counts.LINES[5:6], ids=str)
def test_the_table_in_the_docs_is_of_this_code(line: cuda_counts.Counted) -> None:
    """Of its smallest model; ``python -m tests.cuda_counts`` writes all of it anew."""
    row = cuda_counts.count(line, cuda_counts.LAYERS[0])
    text = cuda_counts.written(cuda_counts.PAGE.read_text(encoding="utf-8"))
    begins = f"| {line.title} | {line.stage} | {line.momentum_dtype} |"
    (shown,) = [cells for cells in text.splitlines() if cells.startswith(begins)]
    numbers = [cell.split("→")[-1].strip() for cell in shown.strip("| ").split("|")[3:]]
    assert numbers[:: len(cuda_counts.LAYERS)] == [
        f"{row.extra[name]:,}" for name in ("launches", "syncs", "crossings")
    ]


def test_the_dry_run_sees_what_it_is_there_for() -> None:
    """A wait, a crossing and fp64 that are put into a rule's step are counted."""
    with pytest.MonkeyPatch.context() as patch:
        plain = steps.step_elements

        def slow(local: Any, update: Any) -> None:
            plain(local, update)
            weights = local.p[0]
            float(weights.double().sum())
            weights.cpu()

        patch.setattr(steps, "step_elements", slow)
        _, counts = dry_steps("Lion", small(), stage=3)
    assert sum(counts.syncs.values()) == GROUPS
    assert sum(counts.doubles.values()) == 2 * GROUPS
    assert {line.split()[0:3:2] == ["cuda", "cpu"] for line in without_tables(counts)} == {True}


def test_sums_of_rows_take_few_launches_and_one_fp64_value_an_element() -> None:
    """A slice of 16 million elements was 128 pieces of five launches each."""
    rows, columns = 4096, 4096
    view = MatrixView(shape=(rows, columns))
    with dry_cuda() as dry:
        values = torch.empty(rows * columns - 100, device=CUDA)
        sums = torch.zeros(rows, dtype=torch.float64, device=CUDA)
        before = dry.counts.live
        dry.counts.peak = before
        dry.counts.kernels.clear()
        add_row_sums(view, 100, values, sums)
        assert dry.counts.launches <= 5 * (16 // 4 + 2)
        assert dry.counts.peak - before <= 8 * ((1 << 22) + rows)


ODD: dict[str, Any] = {
    "views": [
        {"match": "q_proj", "split": [32, 96]},
        {"match": "up_proj", "transpose": True},
        {"match": "down_proj", "split": [64, 64], "heads": 2},
    ]
}
"""Parameters that matrices are taken out of, and that are packed again."""
KINDS = one_of_each_kind()
PEAKS = cells(
    [("Muon", 1, "float32"), ("Dion2", 3, "float32")],
    [
        *((name, stage, "float32") for name, stage in product(KINDS, (0, 1, 3)) if CASES[name].has_matrices),
        *((name, 3, "float32") for name in KINDS if not CASES[name].has_matrices),
    ],
    [(name, stage, dtype) for name, dtype in DTYPES for stage in (0, 1, 3)],
)


@pytest.mark.parametrize(("name", "stage", "dtype"), PEAKS)
def test_a_step_holds_what_is_estimated(name: str, stage: int, dtype: str) -> None:
    """To the byte for matrices, but for numbers of a matrix and, of an SVD, flags of its singular values. What other
    steps hold are tables of slices and what was measured, below the estimate."""
    counted, estimated = peak_and_estimate(name, stage=stage, dtype=dtype)
    if CASES[name].has_matrices:
        assert 0 <= counted - estimated <= 4 * ((128 if name.startswith("Spectral") else 0) + 16)
        (shown,) = re.findall(rf"^\| {name} \|(.*)\|$", MEMORY_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        if dtype == "float32":
            assert shown.split("|")[(0, 1, 3).index(stage)].strip() == f"{counted:,}"
    else:
        assert 0 < counted <= estimated < 10_000


@pytest.mark.parametrize(
    ("name", "more"),
    cells(
        [("NorMuon", {**ODD, "polar": {"dtype": "bfloat16"}})],
        [("SpectralLion", ODD), ("MuonH", {"polar": {"dtype": "bfloat16"}}), ("Dion2", {"offload": True})],
        [
            (name, more)
            for name, more in product(
                (name for name, case in CASES.items() if case.has_matrices and name != "Dion2"),
                (ODD, {"polar": {"dtype": "bfloat16"}}, {"offload": True}, {"exchange": {"bucket_mb": 0.5}}),
            )
        ],
    ),
)
@pytest.mark.parametrize("stage", cells([3], [], [1]))
def test_what_is_held_follows_the_settings(name: str, more: dict[str, Any], stage: int) -> None:
    counted, estimated = peak_and_estimate(name, stage=stage, **more)
    assert 0 <= counted - estimated <= 4 * (128 + 16)


def test_of_turned_matrices_a_rank_cannot_hold_all_chosen_rows() -> None:
    """The estimate is then of more than any choice asks for."""
    counted, estimated = peak_and_estimate("Dion2", stage=3, **ODD)
    assert estimated / 2 < counted < estimated


def peak_and_estimate(
    name: str, *, stage: int, dtype: str = "float32", offload: bool = False, **more: Any
) -> tuple[int, int]:
    """Bytes that a step of rank 0 of four holds at once, and what is estimated: of exchanges, where a rule has them."""
    case, model = CASES[name], small(4, 128)
    routing = {key: more.pop(key) for key in ("views",) if key in more}
    params = {**case.params, **more, "momentum_dtype": dtype}
    if case.has_matrices:
        params["exchange"] = {**more.get("exchange", {}), "costs": "modelled"}
    if "period" in case.rule.hyper:
        params["period"] = 1
    counts = dry_steps(case.type, model, stage=stage, offload=offload, routing=routing, **params)[1]
    with torch.device("meta"):
        shape = shape_of_module("small", module_of(model))
    plan = plan_optimizer(shape, case.type, {**params, **routing}, momentum_dtype=dtype, weights=torch.float32)
    zero = ZeroSettings(stage=stage, ranks=4, dtype="fp32", device="cuda", offload=offload)
    expected = estimate(shape, plan, zero).ranks[0]
    return counts.peak, expected.exchange if case.has_matrices else expected.chunks
