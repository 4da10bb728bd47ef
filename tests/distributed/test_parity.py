"""Every stage, world size, precision and accumulation gives the weights that unsharded training gives.

Each cell is judged twice. *Exactly*: the unsharded optimizer, handed the very gradients that ZeRO put into
the flat partitions, must reach the same weights, bit for bit; no tolerance enters. And *in the end*: the
weights must agree with those of plain torch training on the same global batch, as far as AdamW's own
gradients agree between the two (agreement.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.cases import CASES, one_of_each_kind
from tests.tiers import ALL, FULL

from .agreement import CHANCE, Noise, Verdict, disturbed, judge, measure_noise
from .harness import run_ranks
from .training import Run, Trained, Weights, layout_of, replay, train_plain, train_sharded

BF16 = {"dtype": "bfloat16"}

# One rule of each kind: that all rules give the unsharded bits is shown by test_same_gradients.py.
RATES = {"Muon": 1e-2, "LionMuon": 1e-2, "MiMuon": 1e-2, "Lamb": 1e-2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    name: {"lr": RATES.get(name, 1e-3), "weight_decay": 0.1, **CASES[name].params} for name in one_of_each_kind()
}
# One is run in every cell of up to two ranks: the one that orthogonalizes, takes signs of matrices and hands the rest
# to Lion. The others are run at every sharded stage and world size, precision and accumulation dealt as in a Latin
# square; in every cell too (three times as long) where DS_OPTIM_ALL_CELLS is set.
FOUNDATION = ("Lion", "SignSGD", "Muon", "LionMuon")
"""What the rest is built of; the others are dealt to two ranks in fp32, and to three at one stage."""
_SQUARE = (("fp32", 1), ("bf16", 3), ("fp32", 3), ("bf16", 1))

_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
_TINY_BUCKETS = {"exchange": {"bucket_mb": 0.01}}
_CLIPPED = {"clip": 0.1, "accumulation": 3, "zero": {"sub_group_size": 300}}
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

# What a setting of DeepSpeed or of the exchange changes:
# name -> (optimizers, stages, world sizes, changes of the run, changes of the optimizer's params).
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "sub_groups": (("Lion", "LionMuon"), (3,), (2, 3), {"zero": {"sub_group_size": 300}}, {}),
    "sub_groups-acc3": (("LionMuon",), (3,), (2, 4), {"zero": {"sub_group_size": 300}, "accumulation": 3}, {}),
    "one_parameter_sub_groups": (("Muon",), (3,), (2,), {"zero": {"sub_group_size": 1}}, {}),
    "bf16_optimizer": (("Lion", "Muon", "LionMuon"), (1,), (2,), {"dtype": "bf16", "config": _FP32_SUMS}, {}),
    "bf16_optimizer-acc3": (("LionMuon",), (1,), (3,), {"dtype": "bf16", "config": _FP32_SUMS, "accumulation": 3}, {}),
    "offload": (("LionMuon",), (1, 2, 3), (2,), {"zero": _OFFLOAD}, {}),
    "offload-bf16-acc3": (("Muon",), (1, 2, 3), (3,), {"zero": _OFFLOAD, "dtype": "bf16", "accumulation": 3}, {}),
    "overlap_comm": (("LionMuon",), (1, 2, 3), (2,), {"zero": {"overlap_comm": True}}, {}),
    "no_overlap_comm": (("LionMuon",), (3,), (2,), {"zero": {"overlap_comm": False}}, {}),
    "no_reduce_scatter": (("LionMuon",), (1, 2, 3), (2,), {"zero": {"reduce_scatter": False}}, {}),
    "no_contiguous_gradients": (("LionMuon",), (1, 2, 3), (2,), {"zero": {"contiguous_gradients": False}}, {}),
    "zero_init": (("LionMuon",), (3,), (2, 3), {"zero_init": True}, {}),
    "zero_init-bf16": (("Muon",), (3,), (2,), {"zero_init": True, "dtype": "bf16"}, {}),
    "all_partitioned": (("Muon",), (3,), (2,), {"zero": {"stage3_param_persistence_threshold": 0}}, {}),
    "tiny_buckets": (("LionMuon",), (1, 2, 3), (3, 4), {}, _TINY_BUCKETS),
    "tiny_buckets-in_turn": (("Muon",), (3,), (3,), {}, {"exchange": {"bucket_mb": 0.01, "overlap": False}}),
    "momentum_bf16": (("Lion", "LionMuon"), (1, 3), (2, 3), {}, {"momentum_dtype": "bfloat16"}),
    "momentum_bf16-offload": (("LionMuon",), (2,), (2,), {"zero": _OFFLOAD}, {"momentum_dtype": "bfloat16"}),
    "clipped": (("Muon",), (1, 2, 3), (2,), _CLIPPED, {}),
    "clipped-bf16": (("LionMuon",), (1, 2, 3), (3,), {**_CLIPPED, "dtype": "bf16"}, {}),
    "polar_bf16": (("Muon",), (1, 3), (2, 4), {}, {"polar": BF16}),
}


@dataclass(frozen=True)
class Cell:
    """A run at a world size."""

    world_size: int
    run: Run
    name: str

    @property
    def yardstick(self) -> Run:
        """The run of AdamW whose noise is the cell's: at the same precision, accumulation and clipping.

        A polar factor in 16 bits rounds the gradient to 16 bits, as training in 16 bits does.
        """
        in_16_bits = self.run.dtype == "bf16" or self.run.params.get("polar") == BF16
        return Run(
            type="AdamW",
            params={"lr": 1e-3},
            dtype="bf16" if in_16_bits else "fp32",
            accumulation=self.run.accumulation,
            clip=self.run.clip,
        )


def _cell(
    world_size: int, kind: str, stage: int, dtype: str, accumulation: int, variant: str = "", **other: Any
) -> Cell:
    params = dict(OPTIMIZERS[kind])
    # 16-bit training computes its polar factors in 16 bits.
    if dtype == "bf16" and "polar" in params:
        params["polar"] = BF16
    params |= other.pop("params", {})
    run = Run(type=CASES[kind].type, params=params, stage=stage, dtype=dtype, accumulation=accumulation)
    name = f"{kind}-z{stage}-{world_size}ranks-{dtype}-acc{accumulation}" + (f"-{variant}" if variant else "")
    return Cell(world_size, replace(run, **other), name)


def _cells() -> Iterator[Cell]:
    for kind in OPTIMIZERS:
        for world_size in (1, 2, 3, 4):
            for stage in (0, 1, 2, 3):
                for dtype in ("fp32", "bf16"):
                    for accumulation in (1, 3):
                        everywhere = ALL or (kind == "LionMuon" and world_size < 3)
                        if everywhere or _is_dealt(kind, world_size, stage, dtype, accumulation):
                            yield _cell(world_size, kind, stage, dtype, accumulation)
    for variant, (kinds, stages, world_sizes, changes, params) in VARIANTS.items():
        for kind in kinds:
            for stage in stages:
                for world_size in world_sizes:
                    settings = {"dtype": "fp32", "accumulation": 1, **changes}
                    yield _cell(world_size, kind, stage, variant=variant, params=params, **settings)


def _is_dealt(kind: str, world_size: int, stage: int, dtype: str, accumulation: int) -> bool:
    """One precision and accumulation for each stage and world size; and fp32 at 2 ranks, which stages must agree
    on to the bit."""
    if stage == 0 or world_size == 1:
        return False
    number = list(OPTIMIZERS).index(kind)
    dealt = (dtype, accumulation) == _SQUARE[(number + world_size + stage) % len(_SQUARE)]
    alike = (world_size, dtype, accumulation) == (2, "fp32", 1)
    if kind not in FOUNDATION:  # (test_same_gradients.py has all of them on three and four ranks)
        return alike or (dealt and world_size == 3 and stage == 1 + number % 3)
    return dealt or alike


# Of the default tier: stages 1 and 3, which must agree to the bit, of one rule, and a cell of each hard setting.
_FEW = (
    *(f"LionMuon-z{stage}-2ranks-fp32-acc1" for stage in (1, 3)),
    "Muon-z3-2ranks-fp32-acc3-clipped",
    "Lion-z1-2ranks-bf16-acc1-bf16_optimizer",
    "LionMuon-z2-2ranks-fp32-acc1-offload",
)
CELLS = {cell.name: cell for cell in _cells() if FULL or cell.name in _FEW}
STAGES_ALIKE = [
    (kind, stage, 1)
    for stage in (2, 3)
    for kind in OPTIMIZERS
    if {f"{kind}-z{s}-2ranks-fp32-acc1" for s in (stage, 1)} <= CELLS.keys()
]


def test_every_cell_has_a_name_of_its_own() -> None:
    assert len({cell.name for cell in _cells()}) == sum(1 for _ in _cells())
    assert CELLS.keys() >= set(_FEW)
    assert {kind for kind, _, _ in STAGES_ALIKE} == (set(OPTIMIZERS) if FULL else {"LionMuon"})


# --------------------------------------------------------------------------------------------- on the ranks


def train_cells(rank: int, world_size: int, cells: list[Cell]) -> dict[str, Verdict]:
    """All cells of a world size one after another; rank 0 judges them."""
    noises: dict[str, Noise] = {}
    plains: dict[str, tuple[Trained, Weights]] = {}
    verdicts = {}
    for cell in cells:
        if repr(cell.yardstick) not in noises:
            noises[repr(cell.yardstick)] = _noise(rank, world_size, cell.yardstick)
        trained = train_sharded(cell.run, rank, world_size)
        if rank == 0:
            noise = noises[repr(cell.yardstick)]
            # Neither stage nor settings of DeepSpeed mean anything to plain training.
            key = repr((cell.run.type, cell.run.params, cell.run.dtype, cell.yardstick))
            if key not in plains:
                plain = train_plain(cell.run)
                plains[key] = plain, replay(cell.run, disturbed(plain.gradients, noise))
            verdicts[cell.name] = judge(cell.run, trained, *plains[key], noise)
    return verdicts


def _noise(rank: int, world_size: int, run: Run) -> Noise:
    """The larger of two sharded stages: DeepSpeed's stage 0 in 16 bits counts a step of AdamW too many."""
    sharded = [train_sharded(replace(run, stage=stage), rank, world_size) for stage in (1, 3)]
    if rank != 0:
        return Noise([], {}, 0.0)
    plain = train_plain(run)
    return measure_noise([(trained, plain) for trained in sharded], run.dtype)


# ------------------------------------------------------------------------------------------------- the tests

Results = Callable[[str], Verdict]


@pytest.fixture(scope="module")
def verdict(request: pytest.FixtureRequest) -> Results:
    """A cell's verdict by name; the chosen tests' cells of one world size are run in one go."""
    chosen = [item for item in request.session.items if item.path == request.path]
    wanted = [CELLS[name] for name in dict.fromkeys(n for item in chosen for n in _names_in(item))]
    done: dict[int, dict[str, Verdict]] = {}

    def find(name: str) -> Verdict:
        size = CELLS[name].world_size
        if size not in done:
            cells = [cell for cell in wanted if cell.world_size == size]
            done[size] = run_ranks(size, train_cells, cells, timeout=120 + 15 * len(cells))[0]
        return done[size][name]

    return find


def _names_in(item: pytest.Item) -> list[str]:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "cell" in parameters:
        return [parameters["cell"]]
    if "other" in parameters:
        return [f"{parameters['kind']}-z{parameters[s]}-2ranks-fp32-acc1" for s in ("other", "stage")]
    return []


@pytest.mark.parametrize("cell", CELLS)
def test_same_gradients_give_the_unsharded_bits(verdict: Results, cell: str) -> None:
    assert verdict(cell).replay_differs == []


@pytest.mark.parametrize("cell", CELLS)
def test_weights_agree_with_unsharded_training(verdict: Results, cell: str) -> None:
    """As far as noise of the size of AdamW's would have let them, and bit for bit where there is none."""
    seen = verdict(cell)
    chance = CHANCE if seen.noisy else 0
    assert seen.changed <= CHANCE * seen.disturbed_changed + chance
    flipped = 2 * seen.sign_step * math.sqrt(chance)
    assert seen.apart <= CHANCE * seen.disturbed_apart + flipped


@pytest.mark.parametrize("cell", CELLS)
def test_signs_flip_only_within_the_difference_of_gradients(verdict: Results, cell: str) -> None:
    """And where weights under a sign rule differ, they do by whole steps."""
    seen = verdict(cell)
    assert seen.farthest <= 1
    assert seen.off_multiple <= 0.01


@pytest.mark.parametrize(("kind", "stage", "other"), STAGES_ALIKE)
def test_stages_give_the_same_bits_at_two_ranks(verdict: Results, kind: str, stage: int, other: int) -> None:
    """In fp32 without clipping, the gradients' bits are alike as they are."""
    one, another = (verdict(f"{kind}-z{s}-2ranks-fp32-acc1").weights for s in (stage, other))
    assert [name for name in one if not torch.equal(one[name], another[name])] == []


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.run.clip])
def test_clipping_is_of_the_raw_gradient(verdict: Results, cell: str) -> None:
    """What the optimizer gets at every step has the norm that was asked for, and nothing after it is clipped.

    (That the weights then agree with unsharded clipping is the cell's own test.)
    """
    run = CELLS[cell].run
    assert verdict(cell).norms == pytest.approx([run.clip] * run.steps, rel=1e-4)
    assert min(verdict(cell).raw_norms) > run.clip, "a step of the unsharded run was not clipped: it shows nothing"


@pytest.mark.parametrize(("world_size", "borders"), [(2, {1}), (3, {1}), (4, {1, 2})])
def test_the_model_meets_every_kind_of_border(world_size: int, borders: set[int]) -> None:
    """Matrices cut by one border and by two, whole ones, and padding: else the cells above would show less."""
    for stage in (1, 2):
        units = layout_of(Run(type="Lion", stage=stage), world_size).units
        cuts = {len(units[0].holders(param)) - 1 for param in range(len(units[0].params))}
        assert cuts == {0, *borders}
        assert sum(unit.padding(world_size - 1) for unit in units) > 0
    units = layout_of(Run(type="Lion", stage=3), world_size).units
    assert any(unit.padding(world_size - 1) > 0 for unit in units)
    largest = max(spec.numel for spec in units[0].params)
    held = 26  # bytes an element, at the least: docs/scaling.md
    assert largest > _TINY_BUCKETS["exchange"]["bucket_mb"] * 2**20 / held, "no matrix is larger than a bucket"
    assert {(5, 7), (48, 24), (24, 72), (24, 24)} <= {spec.shape for spec in units[0].params}
    assert (1, 24) in {spec.shape for unit in units[1:] for spec in unit.params}, "one row is no matrix"
