"""Shards of AutoTP and of layers that are cut by hand: the bits of the whole model, on the same gradients.

What is cut comes together by its marks alone: no rank ever holds the model that it is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optim
from ds_optim.memory import account
from tests.cases import WITH_VARIANTS
from tests.tiers import cells

from .harness import assert_all_raised, run_ranks
from .small_runs import differences, own_optimizer, quiet, small_buffers, snapshot
from .tensor_models import (
    WIDTH,
    Mpu,
    Place,
    TensorNet,
    autotp,
    cut_by_hand,
    give_gradients,
    one_step,
    settings,
    start,
    whole_weights,
)

STEPS = 3
_DRAWN = re.compile("StoSign|bfloat16")
"""Random rounding and random signs: each shard draws its own."""
PLACES: list[Place] = cells(
    [(2, 2, 1, "autotp"), (4, 2, 3, "autotp"), (2, 2, 0, "by hand")],
    [
        *((2, 2, stage, "autotp") for stage in (0, 2, 3)),
        *((4, 2, stage, "autotp") for stage in (0, 1)),
        *((4, 2, stage, "by hand") for stage in (1, 2, 3)),
        (4, 4, 3, "autotp"),
    ],
)
OTHERS = cells([], [n for n in WITH_VARIANTS if not _DRAWN.search(n) and WITH_VARIANTS[n].type != "Dion2"])
# A matrix rule everywhere, one with values of rows and one with norms at some places; --full deals out the others.
OPTIMIZERS: dict[Place, list[str]] = {
    place: list(
        dict.fromkeys(["LionMuon", *(["NorMuon", "Lamb"] if number < 2 else []), *OTHERS[number :: len(PLACES)]])
    )
    for number, place in enumerate(PLACES)
}


def random_gradients(steps: int) -> list[Mapping[str, Tensor]]:
    """Full ones of the whole model."""
    found = []
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        found.append({name: torch.randn(p.shape, generator=noise) for name, p in TensorNet().named_parameters()})
    return found


def train_all(rank: int, world_size: int, place: Place, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        engine, optimizer = start(place, {"type": WITH_VARIANTS[name].type, "params": WITH_VARIANTS[name].params})
        give_gradients(optimizer, random_gradients(STEPS))
        for step in range(STEPS):
            one_step(engine, step, place)
        found[name] = whole_weights(engine, optimizer)
        engine.destroy()
    return found


def train_all_plain(rank: int, world_size: int, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        model = TensorNet()
        optimizer = getattr(ds_optim, WITH_VARIANTS[name].type)(
            ds_optim.param_groups(model), **WITH_VARIANTS[name].params
        )
        for gradients in random_gradients(STEPS):
            for key, p in model.named_parameters():
                p.grad = gradients[key].clone()
            optimizer.step()
        found[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
    return found


@cache
def whole() -> dict[str, dict[str, Tensor]]:
    names = sorted({name for names in OPTIMIZERS.values() for name in names})
    return run_ranks(1, train_all_plain, names, init=False, timeout=100)[0]


@pytest.mark.parametrize("place", PLACES)
def test_same_gradients_give_the_bits_of_the_whole_model(place: Place) -> None:
    found = run_ranks(place[0], train_all, place, OPTIMIZERS[place], timeout=300)[0]
    for name, weights in found.items():
        assert [key for key in weights if not torch.equal(weights[key], whole()[name][key])] == [], name


# -------------------------------------------------------------------------------------------- losses, fused layers


def losses(rank: int, world_size: int, place: Place) -> list[float]:
    """10 steps on one batch."""
    engine, _ = start(place, {"type": "LionMuon", "params": {"lr": 1e-2}}, gradient_clipping=0.5)
    return [one_step(engine, 0, place) for _ in range(10)]


@pytest.mark.full
@pytest.mark.parametrize("place", [(2, 2, 2, "autotp"), (4, 2, 3, "autotp"), (4, 2, 1, "by hand")])
def test_training_is_that_of_the_whole_model(place: Place) -> None:
    ranks, size, stage, _ = place
    plain = run_ranks(ranks // size, losses, (ranks // size, 1, stage, "autotp"))[0]
    assert run_ranks(ranks, losses, place)[0] == pytest.approx(plain, abs=2e-3)
    assert plain[-1] < plain[0] - 0.2


class Fused(TensorNet):
    """Queries, keys and values of unlike widths in one weight, (48, 24): 24, 12 and 12 rows."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.query = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        torch.manual_seed(1)
        self.blocks.apply(lambda m: nn.init.normal_(m.weight, std=0.1) if isinstance(m, nn.Linear) else None)


VIEWS = [{"match": "query", "split": [24, 12, 12], "heads": [4, 2, 2]}]
POLAR = {"period": 1, "polar": {"steps": 3, "dtype": "float32"}}


def train_fused(rank: int, world_size: int, stage: int) -> dict[str, Tensor]:
    config = autotp(2)
    for spec in config["tensor_parallel"]["partition_config"]["layer_specs"]:
        if "query" in spec["patterns"][0]:
            spec |= {"shape": [[24, 12, 12], -1], "partition_dim": 0}
    place = (world_size, 2, stage, "autotp")
    quiet()
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, **small_buffers(stage)},
        "optimizer": {"type": "LionMuon", "params": {**POLAR, "views": VIEWS}},
        **config,
    }
    engine, *_ = ds_optim.initialize(model=Fused(), config=given)
    optimizer = own_optimizer(engine)
    pieces = {len(m.spec.shard.pieces[0]) for g in optimizer.members for m in g if "query" in m.spec.name}
    assert pieces == {3}
    give_gradients(optimizer, random_gradients(2))
    for step in range(2):
        one_step(engine, step, place)
    return whole_weights(engine, optimizer)


def train_fused_plain(rank: int, world_size: int) -> dict[str, Tensor]:
    model = Fused()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model, views=VIEWS), **POLAR)
    for gradients in random_gradients(2):
        for key, p in model.named_parameters():
            p.grad = gradients[key].clone()
        optimizer.step()
    return {key: p.detach().clone() for key, p in model.named_parameters()}


@pytest.mark.parametrize("stage", cells([1], [0, 3]))
def test_fused_matrices_and_heads_are_those_of_the_whole_weight(stage: int) -> None:
    plain = run_ranks(1, train_fused_plain, init=False)[0]
    found = run_ranks(2, train_fused, stage)[0]
    assert [key for key in plain if not torch.equal(found[key], plain[key])] == []


# ------------------------------------------------------------------------------------- bytes, and gradients of NaN

MUON = {"type": "Muon", "params": {"polar": {"steps": 3, "dtype": "bfloat16"}}}


def count(rank: int, world_size: int, place: Place) -> tuple[int, int, int, int, int]:
    """Bytes that the tensor-parallel group sent for a step of matrices, and what they should be; of momentum; elements
    of this rank's shards."""
    engine, optimizer = start(place, MUON)
    one_step(engine, 0, place)
    tensor = optimizer.layout_now().tensor
    before = tensor.sent_bytes
    one_step(engine, 1, place)
    sent = torch.tensor([tensor.sent_bytes - before])
    dist.all_reduce(sent, group=tensor.group)
    # A matrix goes to its owner and back but for the owner's own shard; every data-parallel rank has some of them.
    of_shards = [m.spec.whole_numel for m in optimizer.members[0] if m.spec.shard is not None]
    due = 2 * 2 * sum(of_shards) * (tensor.world_size - 1) // tensor.world_size
    dist.all_reduce(sent, group=engine.mpu.get_data_parallel_group())
    held = sum(m.spec.numel for group in optimizer.members for m in group)
    return int(sent), due, sum(account(engine).state.values()), held, place[0] // place[1]


@pytest.mark.parametrize("place", cells([(4, 2, 3, "autotp")], [(2, 2, 1, "autotp"), (4, 4, 2, "by hand")]))
def test_wire_and_state_bytes_are_the_formulas(place: Place) -> None:
    for sent, due, state, held, data in run_ranks(place[0], count, place):
        assert sent == due
        assert held * 4 / data <= state <= held * 4 / data + 4 * 100


def step_on_nan(rank: int, world_size: int, place: Place) -> tuple[list[str], list[str]]:
    """What moved on a NaN in one rank's shard, and on the step after it."""
    engine, _ = start(place, MUON)
    one_step(engine, 0, place)
    before = snapshot(engine)
    hook = None
    if rank == 1:
        hook = engine.module.blocks[0].up.weight.register_hook(lambda gradient: gradient * float("nan"))
    one_step(engine, 1, place)
    if hook is not None:
        hook.remove()
    held = differences(before, snapshot(engine))
    one_step(engine, 2, place)
    return held, differences(before, snapshot(engine))


@pytest.mark.parametrize("stage", cells([0, 1], [2, 3]))
def test_a_nan_in_one_shard_skips_the_step_on_all_ranks(stage: int) -> None:
    for held, moved in run_ranks(2, step_on_nan, (2, 2, stage, "autotp")):
        assert held == []
        assert moved


# ------------------------------------------------------------------------------------------------ checkpoints

INT8 = {"type": "LionMuon", "params": {"period": 2, "polar": {"steps": 3}, "momentum_dtype": "int8"}}


def go_on(rank: int, world_size: int, place: Place, folder: Path) -> list[str]:
    engine, _ = start(place, INT8)
    for step in range(3):
        one_step(engine, step, place)
    engine.save_checkpoint(str(folder))
    one_step(engine, 3, place)
    whole = snapshot(engine)
    engine.destroy()
    again, _ = start(place, INT8, TensorNet(seed=9))
    ds_optim.load_checkpoint(again, folder)
    one_step(again, 3, place)
    return differences(whole, snapshot(again))


@pytest.mark.parametrize(
    "place",
    cells([(4, 2, 1, "autotp")], [*((4, 2, stage, "autotp") for stage in (0, 2, 3)), (2, 2, 1, "by hand")]),
)
def test_a_run_goes_on_to_the_bit(place: Place, tmp_path: Path) -> None:
    assert run_ranks(place[0], go_on, place, tmp_path) == [[]] * place[0]


def save(rank: int, world_size: int, place: Place, folder: Path) -> None:
    engine, _ = start(place, MUON)
    one_step(engine, 0, place)
    engine.save_checkpoint(str(folder))


def load(rank: int, world_size: int, place: Place, folder: Path) -> None:
    engine, _ = start(place, MUON)
    ds_optim.load_checkpoint(engine, folder)


@pytest.mark.full
def test_a_run_without_tensor_parallelism_refuses_shards(tmp_path: Path) -> None:
    run_ranks(2, save, (2, 2, 2, "autotp"), tmp_path)
    outcomes = run_ranks(2, load, (2, 1, 2, "autotp"), tmp_path, expect_error=True)
    assert_all_raised(outcomes, "UserError", "is of 2 tensor-parallel ranks, and this run has 1")


# --------------------------------------------------------------------------------------------------- refusals


class Odd(TensorNet):
    """Matrices of so many rows, and of as many columns."""

    def __init__(self, width: int = 73) -> None:
        super().__init__()
        for block in self.blocks:
            block.up, block.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)


AUTOTP, BY_HAND = (2, 2, 1, "autotp"), (2, 2, 1, "by hand")
DION2 = {"type": "Dion2", "params": {"polar": {"steps": 1}}}


def _marked(mark: str, value: Any) -> TensorNet:
    """Cut by hand, with another mark on a weight."""
    model = cut_by_hand(TensorNet(), Mpu(2))
    setattr(model.blocks[0].up.weight, mark, value)
    return model


def _by_hand(model: TensorNet, *, mpu: bool = True, **params: Any) -> None:
    quiet()
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1, **small_buffers(1)},
        "optimizer": {"type": "Muon", "params": params},
    }
    engine, *_ = ds_optim.initialize(model=model, config=given, mpu=Mpu(2) if mpu else None)
    one_step(engine, 0, BY_HAND)


def _clipped() -> None:
    engine, _ = start(AUTOTP, MUON)
    clip = ds_optim.QKClip(engine, {"0": ("blocks.0.query.weight", "blocks.0.query.weight")}, 2)
    clip.observe("0", torch.ones(2))
    one_step(engine, 0, AUTOTP)


def _under_zero_init() -> None:
    import deepspeed

    place = (2, 2, 3, "autotp")
    with deepspeed.zero.Init(config_dict_or_path=settings(place)):
        model = TensorNet()
    one_step(start(place, MUON, model)[0], 0, place)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "unequal parts": (
        lambda: one_step(start(AUTOTP, MUON, Odd())[0], 0, AUTOTP),
        r"blocks\.0\.up\.weight is cut into unequal parts \[37, 36\]",
    ),
    "nothing left": (
        lambda: one_step(start(AUTOTP, MUON, Odd(1))[0], 0, AUTOTP),
        r"blocks\.0\.up\.weight is cut into unequal parts \[1, 0\] .* of which some hold nothing",
    ),
    "rows are chosen": (
        lambda: one_step(start(AUTOTP, DION2)[0], 0, AUTOTP),
        "blocks.0.up.weight is cut over tensor-parallel ranks, and dion2 chooses",
    ),
    "no mpu": (lambda: _by_hand(_marked("partition_dim", 0), mpu=False), "no engine with an mpu steps it"),
    "dim": (lambda: _by_hand(_marked("partition_dim", 7)), r"blocks\.0\.up\.weight .* partition_dim is 7"),
    "stride": (lambda: _by_hand(_marked("partition_stride", 2)), r"blocks\.0\.up\.weight has partition_stride 2"),
    "view": (
        lambda: _by_hand(_marked("partition_dim", 0), views=[{"match": "query", "heads": 2}]),
        r"blocks\.0\.query\.weight is a tensor-parallel shard that is seen as",
    ),
    "zero.Init": (_under_zero_init, r"is no longer the model's: AutoTP replaces .*zero\.Init"),
    "QKClip": (_clipped, "QKClip is not supported under tensor parallelism"),
    "universal": (
        lambda: start(AUTOTP, MUON, checkpoint={"load_universal": True}),
        "load_universal is not supported under tensor parallelism",
    ),
}


def make_mistake(rank: int, world_size: int, name: str) -> None:
    MISTAKES[name][0]()


@pytest.mark.parametrize("name", cells(["unequal parts", "no mpu"], MISTAKES))
def test_what_cannot_be_right_is_refused_by_name(name: str) -> None:
    outcomes = run_ranks(2, make_mistake, name, expect_error=True)
    assert re.search(MISTAKES[name][1], assert_all_raised(outcomes, "UserError"))


def train_by_model_init(rank: int, world_size: int) -> bool:
    """DeepSpeed's other way to ask for AutoTP: whether a matrix is cut, and training goes on."""
    import deepspeed

    quiet()
    model = deepspeed.tp_model_init(TensorNet(), tp_size=2, dtype=torch.float32)
    given = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2, **small_buffers(2)}}
    plan = {"tensor_parallel": {"partition_config": autotp(2)["tensor_parallel"]["partition_config"]}}
    engine, *_ = ds_optim.initialize(model=model, config={**given, **plan, "optimizer": MUON})
    found = [one_step(engine, 0, AUTOTP) for _ in range(5)]
    return own_optimizer(engine).layout_now().tensor is not None and found[-1] < found[0]


@pytest.mark.full
def test_tp_model_init() -> None:
    assert run_ranks(2, train_by_model_init) == [True, True]
