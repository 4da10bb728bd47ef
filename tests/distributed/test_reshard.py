"""A checkpoint cut anew by ``ds_optim.zero.checkpoints`` loads in a run of the new shape, with nothing lost.

--full: every change of stage and of ranks by one, every kind of optimizer; DS_OPTIM_ALL_CELLS=1 runs all of ranks x
stages to ranks x stages, and every kind of optimizer at each of these changes.
"""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.zero.checkpoints import Portable, reshard
from ds_optim.zero.checkpoints.convert import change_optimizer
from tests.tiers import ALL, FULL

from .harness import run_ranks
from .models import TinyNet
from .resharding import BEFORE, KINDS, Seen, Shape, gathered, held, load_runs, place, save_runs, steps
from .small_runs import bits, start

SHAPES = [*product((1, 2, 3, 4), (1, 2, 3)), (2, 0)]
CHANGES: list[tuple[Shape, Shape]] = [
    ((1, 1), (2, 3)),
    ((2, 3), (3, 1)),
    ((3, 1), (4, 2)),
    ((4, 2), (1, 3)),
    ((1, 3), (4, 1)),
    ((2, 1), (1, 2)),
    ((3, 2), (2, 1)),
    ((4, 3), (3, 2)),
    ((2, 2), (2, 3)),
    ((2, 3), (2, 1)),
    ((2, 1), (2, 2)),
    ((3, 3), (2, 3)),
    ((2, 0), (2, 3)),
    ((2, 1), (2, 0)),
]
BITWISE = [(2, 1), (2, 2), (2, 3)]
"""Shapes whose gradients are the same to the last bit, so that whole runs are."""


def cells() -> list[tuple[str, Shape, Shape]]:
    if ALL:
        every = [("LionMuon", one, other) for one, other in product(SHAPES, SHAPES) if one != other]
        others = [(kind, one, other) for kind in KINDS if kind != "LionMuon" for one, other in CHANGES]
        return every + [cell for cell in others if _has(*cell)]
    if not FULL:
        return [("int8 momentum", (2, 3), (1, 2)), ("LionMuon", (2, 1), (2, 3))]
    kinds = cycle(KINDS)
    each = [(next(k for k in kinds if _has(k, one, other)), one, other) for one, other in CHANGES]
    same_bits = [("LionMuon", one, other) for one, other in CHANGES if one in BITWISE and other in BITWISE]
    return [*each, *(cell for cell in same_bits if cell not in each)]


def _has(kind: str, one: Shape, other: Shape) -> bool:
    """Whether both shapes have such a thing."""
    return not (KINDS[kind].sharded and 0 in (one[1], other[1]))


CELLS = cells()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, Shape], list[Seen]]]:
    """The folder of all originals, and of each what its ranks held."""
    folder = tmp_path_factory.mktemp("originals")
    found: dict[tuple[str, Shape], list[Seen]] = {}
    for ranks in sorted({one[0] for _, one, _ in CELLS}):
        runs = sorted({(kind, one[1]) for kind, one, _ in CELLS if one[0] == ranks})
        every = run_ranks(ranks, save_runs, folder, runs, timeout=600)
        found |= {(kind, (ranks, stage)): [own[kind, stage] for own in every] for kind, stage in runs}
    return folder, found


@pytest.fixture(scope="module")
def loaded(
    saved: tuple[Path, dict[tuple[str, Shape], list[Seen]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, Shape, Shape], list[Seen]]:
    """Of each resharded checkpoint what the ranks that loaded it held."""
    folder = tmp_path_factory.mktemp("resharded")
    found: dict[tuple[str, Shape, Shape], list[Seen]] = {}
    for ranks in sorted({other[0] for _, _, other in CELLS}):
        own = [cell for cell in CELLS if cell[2][0] == ranks]
        runs = []
        for kind, one, other in own:
            made = folder / f"{place(kind, one)}-{other[0]}x{other[1]}"
            config = {"zero_optimization": {**KINDS[kind].zero3, **KINDS[kind].flat}}
            reshard(saved[0] / place(kind, one), made, ranks=other[0], stage=other[1], config=config)
            runs.append((kind, other[1], made))
        every = run_ranks(ranks, load_runs, runs, timeout=600)
        found |= {cell: [seen[number] for seen in every] for number, cell in enumerate(own)}
    return found


@pytest.mark.parametrize(("kind", "one", "other"), CELLS, ids=lambda value: str(value).replace(" ", ""))
def test_everything_arrives(
    kind: str,
    one: Shape,
    other: Shape,
    saved: tuple[Path, dict[tuple[str, Shape], list[Seen]]],
    loaded: dict[tuple[str, Shape, Shape], list[Seen]],
) -> None:
    """Gathered state bit for bit (int8: a step of its quantization), groups, counts, schedule, client state."""
    before, after = saved[1][kind, one], loaded[kind, one, other]
    original, arrived = gathered(seen.held for seen in before), gathered(seen.held for seen in after)
    assert original.keys() == arrived.keys()
    quantized = KINDS[kind].momentum_dtype == "int8"
    for (name, what), values in original.items():
        found = arrived[name, what]
        if quantized and what == "exp_avg":
            assert values.any()
            assert (found - values).abs().max() <= values.abs().max() * (1 - (126 / 127) ** 2), name
        else:
            assert torch.equal(bits(found), bits(values)), (name, what)
    for seen in after:
        assert seen.groups == before[0].groups
        assert {k: v for k, v in seen.counts.items() if k != "scalars"} == {
            k: v for k, v in before[0].counts.items() if k != "scalars"
        }
        assert seen.client == {"epoch": 7}
    assert _scalars(after) == _scalars(before)


@pytest.mark.parametrize("cell", CELLS[:2], ids=lambda value: str(value).replace(" ", ""))
def test_a_load_cuts_it_on_the_way_in(
    cell: tuple[str, Shape, Shape],
    saved: tuple[Path, dict[tuple[str, Shape], list[Seen]]],
    loaded: dict[tuple[str, Shape, Shape], list[Seen]],
    tmp_path: Path,
) -> None:
    kind, one, (ranks, stage) = cell
    original = saved[0] / place(kind, one)
    before = sorted(str(path) for path in original.rglob("*"))
    for scratch in (None, tmp_path):
        every = run_ranks(ranks, load_anew, [(kind, stage, original)], scratch)
        assert _same(gathered(own[0].held for own in every), gathered(seen.held for seen in loaded[cell]))
        assert [own[0].losses for own in every] == [seen.losses for seen in loaded[cell]]
        assert every[0][0].client == {"epoch": 7}
    assert sorted(str(path) for path in original.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def load_anew(rank: int, world_size: int, runs: list[tuple[str, int, Path]], scratch: Path | None) -> list[Seen]:
    return load_runs(rank, world_size, runs, anew=True, scratch=scratch)


def _same(one: dict[tuple[str, str], Tensor], other: dict[tuple[str, str], Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(bits(one[key]), bits(other[key])) for key in one)


@pytest.mark.parametrize(("kind", "one", "other"), CELLS, ids=lambda value: str(value).replace(" ", ""))
def test_the_run_goes_on(
    kind: str,
    one: Shape,
    other: Shape,
    saved: tuple[Path, dict[tuple[str, Shape], list[Seen]]],
    loaded: dict[tuple[str, Shape, Shape], list[Seen]],
) -> None:
    """As the run that was never resharded: to the bit where its arithmetic is, else as near as rounding lets it."""
    before, after = saved[1][kind, one], loaded[kind, one, other]
    exact = one in BITWISE and other in BITWISE and KINDS[kind].momentum_dtype != "int8"
    if exact:
        assert [seen.losses for seen in after] == [seen.losses for seen in before]
        original, arrived = gathered(seen.after for seen in before), gathered(seen.after for seen in after)
        for key, values in original.items():
            assert torch.equal(bits(arrived[key]), bits(values)), key
    near = 0.02 if KINDS[kind].dtype == "bf16" else 2e-3
    for step in range(len(before[0].losses)):
        means = [sum(seen.losses[step] for seen in run) / len(run) for run in (before, after)]
        assert means[1] == pytest.approx(means[0], abs=near)


def _scalars(run: list[Seen]) -> dict[str, float]:
    return {name: value for seen in run for name, value in seen.counts["scalars"].items()}


# ------------------------------------------------------------------------------------------------ other optimizers

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
DEEPSPEEDS_ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


def adamw_saves(rank: int, world_size: int, folder: Path, stage: int) -> dict[str, Tensor]:
    engine = start(KINDS["LionMuon"].cell(stage), world_size, ADAMW)
    steps(engine, range(BEFORE), rank, world_size)
    engine.save_checkpoint(str(folder), client_state={"position": {"epoch": 7}})
    return full_state(engine)


def full_state(engine: Any) -> dict[str, Tensor]:
    """Whole masters, and momentum after a step, by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    named = dict(engine.module.named_parameters())
    masters = {f"master {name}": safe_get_full_fp32_param(p) for name, p in named.items()}
    if not any(engine.basic_optimizer.state.values()):
        return masters
    return masters | {f"exp_avg {name}": safe_get_full_optimizer_state(p, "exp_avg") for name, p in named.items()}


def go_on(rank: int, world_size: int, folder: Path, stage: int, optimizer: dict[str, Any]) -> Any:
    """What an engine with this optimizer holds after it has loaded (slices where it is ours); it then takes a step."""
    cell = KINDS["LionMuon"].cell(stage)
    engine = start(cell, world_size, optimizer, TinyNet(seed=9))
    _, client = engine.load_checkpoint(str(folder))
    assert client["position"] == {"epoch": 7}
    assert engine.global_steps == BEFORE
    ours = isinstance(engine.basic_optimizer, ZeroOptimizer)
    found = held(engine, cell, rank, world_size) if ours else full_state(engine)
    before = [t.detach().clone() for t in engine_tensors(engine)]
    steps(engine, [BEFORE], rank, world_size)
    assert not all(torch.equal(a, b) for a, b in zip(before, engine_tensors(engine), strict=True))
    return found


def engine_tensors(engine: Any) -> list[Tensor]:
    wrapper = engine.optimizer
    name = "fp32_partitioned_groups_flat" if hasattr(wrapper, "fp32_partitioned_groups_flat") else ""
    return list(getattr(wrapper, name or "single_partition_of_fp32_groups"))


@pytest.mark.full
@pytest.mark.parametrize(("one", "other"), [((2, 2), (3, 3)), ((2, 3), (3, 1))])
def test_adamws_first_moment_goes_over_to_lion_muon(one: Shape, other: Shape, tmp_path: Path) -> None:
    before = run_ranks(one[0], adamw_saves, tmp_path / "adamw", one[1])[0]
    assert any(values.any() for name, values in before.items() if name.startswith("exp_avg"))
    optimizer = dict(KINDS["LionMuon"].optimizer)

    def change(portable: Portable) -> Portable:
        return change_optimizer(portable, "lion_muon", optimizer["params"])

    reshard(tmp_path / "adamw", tmp_path / "lion_muon", ranks=other[0], stage=other[1], change=change)
    found = gathered(run_ranks(other[0], go_on, tmp_path / "lion_muon", other[1], optimizer))
    assert len(found) == len(before)
    for (name, what), values in found.items():
        assert torch.equal(bits(values), bits(before[f"{what} {name}"])), (name, what)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "optimizer"), [(1, ADAMW), (3, ADAMW), (2, DEEPSPEEDS_ADAMW)])
def test_adamw_starts_anew_on_the_weights_of_lion_muon(
    stage: int, optimizer: dict[str, Any], saved: tuple[Path, dict[tuple[str, Shape], list[Seen]]], tmp_path: Path
) -> None:
    def change(portable: Portable) -> Portable:
        return change_optimizer(portable, "AdamW", {"lr": 1e-3}, reset=True)

    reshard(saved[0] / place("LionMuon", (2, 1)), tmp_path / "adamw", ranks=2, stage=stage, change=change)
    state = gathered(seen.held for seen in saved[1]["LionMuon", (2, 1)])
    before = {f"master {name}": values for (name, what), values in state.items() if what == "master"}
    for found in run_ranks(2, go_on, tmp_path / "adamw", stage, optimizer):
        assert found.keys() == before.keys()
        assert [name for name in before if not torch.equal(bits(found[name]), bits(before[name]))] == []
