"""DeepSpeed's MoE layers: experts are sharded over fewer ranks than the rest, and each rank has other ones."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_optim
from ds_optim import UserError
from ds_optim.optimizers.universal import check_universal
from tests.tiers import cells

from .experts import MoENet, Weights, feed, given, is_expert, one_step, start, weights_of
from .harness import assert_all_raised, run_ranks
from .small_runs import differences, snapshot

STEPS = 3
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}


def chosen(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": 1e-2, **params}}


OPTIMIZERS = {
    "Lion": chosen("Lion"),
    "Muon": chosen("Muon", **FP32),
    "LionMuon bfloat16": chosen("LionMuon", momentum_dtype="bfloat16", **FP32),
    "NorMuon": chosen("NorMuon", **FP32),
    "LASM": chosen("LASM"),
    "MiMuon": chosen("MiMuon", tau=0.5, raw_lr=0.02, **FP32),
    "StableLion": chosen("StableLion", trust_ratio_max=1e3),
    "Dion2": chosen("Dion2", **FP32),
}
# (ranks, expert parallelism, stage, settings)
PLACES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "2x1 z2": (2, 1, 2, {}),
    "2x2 z0": (2, 2, 0, {}),
    "2x2 z1": (2, 2, 1, {}),
    "4x2 z1": (4, 2, 1, {}),
    "4x2 z2": (4, 2, 2, {}),
    "4x2 z2 round robin": (4, 2, 2, {"zero": {"round_robin_gradients": True}}),
    "3x3 z2": (3, 3, 2, {}),
    "4x2 z1 bf16": (4, 2, 1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "4x2 z2 bf16": (4, 2, 2, {"bf16": {"enabled": True}}),
    "4x2 z2 offload": (4, 2, 2, {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}),
}
CELLS = cells(
    [("4x2 z2", "LionMuon bfloat16"), ("4x2 z2", "LASM")],
    [*product(("4x2 z2", "2x2 z0"), OPTIMIZERS), *product(PLACES, ("LASM", "Muon"))],
    product(PLACES, OPTIMIZERS),
)


def sharded(rank: int, world_size: int, ep: int, stage: int, more: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Weights of each optimizer's run on given gradients, of the model that this rank holds."""
    found = {}
    for name in names:
        engine = start(stage, rank, world_size, ep, OPTIMIZERS[name], **more)
        feed(engine.basic_optimizer, [given(engine.module, rank, ep, step) for step in range(STEPS)])
        for step in range(STEPS):
            one_step(engine, step, rank)
        found[name] = weights_of(engine)
        engine.destroy()
    return found


@cache
def of_place(place: str) -> list[dict[str, Weights]]:
    ranks, ep, stage, more = PLACES[place]
    return run_ranks(ranks, sharded, ep, stage, more, [name for own, name in CELLS if own == place])


def plain(
    rank: int, world_size: int, ranks: int, ep: int, dtype: torch.dtype, names: list[str]
) -> list[dict[str, Weights]]:
    """The same without DeepSpeed: for each of ``ranks`` the dense parameters and its experts, on one process."""
    found = []
    for place in range(ranks):
        own = {}
        for name in names:
            model = MoENet(ep, place).to(dtype).float()
            optimizer = getattr(ds_optim, OPTIMIZERS[name]["type"])(
                ds_optim.param_groups(model), **OPTIMIZERS[name]["params"]
            )
            for step in range(STEPS):
                gradients = given(model, place, ep, step)
                for key, p in model.named_parameters():
                    p.grad = gradients[key].clone()
                optimizer.step()
            own[name] = {key: p.detach().to(dtype) for key, p in model.named_parameters()}
        found.append(own)
    return found


@cache
def unsharded(ranks: int, ep: int, dtype: torch.dtype) -> list[dict[str, Weights]]:
    names = [name for place, name in CELLS if PLACES[place][:2] == (ranks, ep)]
    return run_ranks(1, plain, ranks, ep, dtype, list(dict.fromkeys(names)), init=False)[0]


@pytest.mark.parametrize(("place", "name"), CELLS)
def test_same_gradients_give_the_same_bits(place: str, name: str) -> None:
    """On every rank, of what all share and of the experts that it shares with some."""
    ranks, ep, _, more = PLACES[place]
    dtype = torch.bfloat16 if "bf16" in more else torch.float32
    for rank in range(ranks):
        here, there = of_place(place)[rank][name], unsharded(ranks, ep, dtype)[rank][name]
        assert [key for key in there if not torch.equal(here[key], there[key])] == [], f"rank {rank}"


@pytest.mark.full
def test_experts_are_told_apart() -> None:
    """What is compared above differs between the experts of two ranks."""
    one, other = (unsharded(4, 2, torch.float32)[rank]["Muon"] for rank in (0, 1))
    experts = [key for key in one if "deepspeed_experts" in key]
    assert len(experts) == 18
    assert all(not torch.equal(one[key], other[key]) for key in experts)
    assert all(torch.equal(one[key], other[key]) for key in one if key not in experts)


# ------------------------------------------------------------------------------------------------------- training

BESIDE = 20
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}
CLIPPED = {"gradient_clipping": 0.5}
TRAINED = cells(
    [("4x2 z2", "fp32")], [(place, dtype) for place in PLACES for dtype in ("fp32", "bf16") if "bf16" not in place]
)


def losses(rank: int, world_size: int, ep: int, stage: int, dtype: str, more: dict[str, Any]) -> dict[str, Any]:
    """Twenty losses with AdamW and with LionMuon, half of the words never seen, and what is then held of the dense."""
    found = {}
    for name, optimizer in (("AdamW", ADAMW), ("LionMuon", {"type": "LionMuon", "params": {"lr": 0.1, **FP32}})):
        engine = start(stage, rank, world_size, ep, optimizer, dtype=dtype, **CLIPPED, **more)
        seen = [one_step(engine, step, rank, words=6) for step in range(BESIDE)]
        found[name] = seen, {key: v for key, v in weights_of(engine).items() if "deepspeed_experts" not in key}
        engine.destroy()
    return found


@pytest.mark.parametrize(("place", "dtype"), TRAINED)
def test_it_trains_as_adamw_does_and_the_ranks_stay_together(place: str, dtype: str) -> None:
    ranks, ep, stage, more = PLACES[place]
    found = run_ranks(ranks, losses, ep, stage, dtype, more)
    for name in ("AdamW", "LionMuon"):
        for seen, _ in (own[name] for own in found):
            assert sum(seen[-4:]) < 0.5 * sum(seen[:4]), (name, seen)
        for _, dense in (own[name] for own in found[1:]):
            assert [key for key, v in dense.items() if not torch.equal(v, found[0][name][1][key])] == [], name


# ------------------------------------------------------------------------------------------- what is held and sent

WIRED = chosen("Muon", polar={"steps": 3, "dtype": "bfloat16"})


def counted(rank: int, world_size: int, ep: int) -> dict[str, Any]:
    """Bytes of momentum, and those of the messages to owners and back in one step, by the size of their group."""
    engine = start(2, rank, world_size, ep, WIRED)
    one_step(engine, 0, rank)
    sent: dict[int, int] = {}
    original = dist.all_to_all_single

    def count(*args: Any, **kwargs: Any) -> Any:
        if args:  # DeepSpeed's own, of tokens, go by names
            (_, message, _, counts), group = args, kwargs["group"]
            others, size = sum(counts) - counts[dist.get_rank(group)], dist.get_world_size(group)
            sent[size] = sent.get(size, 0) + others * message.element_size()
        return original(*args, **kwargs)

    dist.all_to_all_single = count
    one_step(engine, 1, rank)
    dist.all_to_all_single = original
    optimizer = engine.basic_optimizer
    plans = [exchange.plan for exchange in optimizer.exchanges.values()]
    owners = {p: owner for plan in plans for b in plan.buckets for owner, own in enumerate(b.owned) for p in own}
    return {
        "momentum": sum(state["exp_avg"].nbytes for state in optimizer.state.values()),
        "sent": sent,
        "owners": {plan.unit.params[p].name: owners[p] for plan in plans for p in plan.cut},
    }


def test_experts_are_held_and_sent_among_the_ranks_that_share_them() -> None:
    """Momentum and messages by hand: 2 ranks hold 3 experts of 752 + 48 elements, all 4 the rest."""
    found = run_ranks(4, counted, 2)
    matrices, vectors = 3 * (240 + 320 + 192), 3 * (20 + 16 + 12)
    dense, others, biases = 144, 24 * 12 * 2 + 6 * 12, 12
    shares = [matrices / 2, vectors / 2, dense / 4, others / 4, 8]  # the last: of 12 padded to 16, in fours, and 2 each
    assert math.ceil(biases / 8) * 8 / 4 == 4
    shares[-1] = 4
    assert [own["momentum"] for own in found] == [4 * sum(shares)] * 4
    # Rank 0's half ends in the middle expert's second matrix, of which it has 136 elements of 320; dense: 36 of 144.
    cut = {"moe.deepspeed_moe.experts.deepspeed_experts.1.2.weight", "dense.weight"}
    for own in found:
        assert set(own["owners"]) == cut
    name = "moe.deepspeed_moe.experts.deepspeed_experts.1.2.weight"
    for pair in ((0, 2), (1, 3)):  # each pair for itself
        travelling = 184 if found[pair[0]]["owners"][name] == 0 else 136
        assert sum(found[rank]["sent"][2] for rank in pair) == 2 * 2 * travelling
    assert sum(own["sent"][4] for own in found) == 2 * 2 * 108


# -------------------------------------------------------------------------------------------------- bad input


def one_nan(rank: int, world_size: int) -> tuple[int, list[str]]:
    """Steps skipped, and what moved, where one expert of rank 1 has a gradient that is no number."""
    engine = start(0, rank, world_size, 2, OPTIMIZERS["Muon"])
    one_step(engine, 0, rank)
    before = weights_of(engine)
    if rank == 1:
        next(p for p in engine.module.parameters() if is_expert(p)).register_hook(lambda g: g * float("nan"))
    one_step(engine, 1, rank)
    after = weights_of(engine)
    return engine.basic_optimizer.skipped_steps, [k for k in before if not torch.equal(before[k], after[k])]


def test_a_nan_in_one_ranks_expert_is_skipped_on_all() -> None:
    """At stage 0 in fp32, where DeepSpeed does not look: else the others' dense weights would go on alone."""
    assert run_ranks(2, one_nan) == [(1, []), (1, [])]


def at_stage_3(rank: int, world_size: int) -> None:
    start(3, rank, world_size, 2, OPTIMIZERS["Lion"])


@pytest.mark.full
def test_stage_3_is_refused_as_deepspeed_refuses_it() -> None:
    outcomes = run_ranks(2, at_stage_3, expect_error=True)
    assert_all_raised(outcomes, "UserError", "moe is a DeepSpeed MoE layer", "set zero_optimization.stage to 2")


def adamw_at_stage_3(rank: int, world_size: int) -> None:
    start(3, rank, world_size, 2, ADAMW)


@pytest.mark.full
def test_deepspeed_itself_refuses_stage_3() -> None:
    outcomes = run_ranks(2, adamw_at_stage_3, expect_error=True)
    assert_all_raised(outcomes, "AssertionError", "Native DeepSpeed MoE is not supported with ZeRO Stage 3")


# ----------------------------------------------------------------------------------------------------- checkpoints

INT8 = chosen("LionMuon", momentum_dtype="int8", **FP32)
SAVED = cells(
    [("4x2 z2", "INT8")],
    [*((place, "INT8") for place in PLACES), *product(("4x2 z2", "2x2 z0"), ("NorMuon", "LASM"))],
    product(PLACES, ("INT8", "NorMuon", "LASM")),
)
BY_NAME = {**OPTIMIZERS, "INT8": INT8}


def saved_and_loaded(
    rank: int, world_size: int, ep: int, stage: int, more: dict[str, Any], name: str, folder: Path
) -> dict[str, list[str]]:
    """What differs between a run and one that went on from its checkpoint, by each of the two ways to load it."""
    engine = start(stage, rank, world_size, ep, BY_NAME[name], **more)
    for step in range(3):
        one_step(engine, step, rank)
    engine.save_checkpoint(str(folder))
    before = snapshot(engine)
    for step in range(3, 5):
        one_step(engine, step, rank)
    after = snapshot(engine)
    engine.destroy()
    found = {}
    for way in ("engine", "ds_optim"):
        resumed = start(stage, rank, world_size, ep, BY_NAME[name], seed=9, **more)
        if way == "engine":
            resumed.load_checkpoint(str(folder))
        else:
            ds_optim.load_checkpoint(resumed, folder)
        found[f"{way}: loaded"] = differences(before, snapshot(resumed))
        for step in range(3, 5):
            one_step(resumed, step, rank)
        found[f"{way}: went on"] = differences(after, snapshot(resumed))
        resumed.destroy()
    return found


@pytest.mark.parametrize(("place", "name"), SAVED)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(place: str, name: str, tmp_path: Path) -> None:
    ranks, ep, stage, more = PLACES[place]
    for found in run_ranks(ranks, saved_and_loaded, ep, stage, more, name, tmp_path):
        assert found == {key: [] for key in found}
        assert len(found) == 4


def save(rank: int, world_size: int, ep: int, stage: int, folder: Path) -> None:
    engine = start(stage, rank, world_size, ep, INT8)
    one_step(engine, 0, rank)
    engine.save_checkpoint(str(folder))


def load(rank: int, world_size: int, ep: int, stage: int, folder: Path, way: str, more: dict[str, Any]) -> None:
    engine = start(stage, rank, world_size, ep, INT8, seed=9, **more)
    if way == "engine":
        engine.load_checkpoint(str(folder))
    else:
        ds_optim.load_checkpoint(engine, folder)


DATA_FIRST = {"use_data_before_expert_parallelism": True}
# (ranks, expert parallelism, stage, way, settings, error, what is said) of loads of a checkpoint of 4 ranks, 2 of them
# to an expert, at stage 2; of another ep_size DeepSpeed itself finds that partitions are of other sizes.
OTHER_RANKS = "(matrix of ep_size_2) were shared by other ranks than here"
OTHER_SHAPES = [
    (4, 2, 2, "engine", DATA_FIRST, "UserError", (OTHER_RANKS, "use_data_before_expert_parallelism")),
    (4, 1, 2, "engine", {}, "RuntimeError", ("layout does not match",)),
]


@pytest.mark.full
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    run_ranks(4, save, 2, 2, tmp_path)
    for ranks, ep, stage, way, more, error, parts in OTHER_SHAPES:
        outcomes = run_ranks(ranks, load, ep, stage, tmp_path, way, more, expect_error=True)
        assert_all_raised(outcomes, error, *parts)


@pytest.mark.full
def test_a_universal_checkpoint_of_experts_is_refused() -> None:
    optimizer = ds_optim.Lion(ds_optim.param_groups(MoENet(2)))
    saved = optimizer.state_dict()["param_groups"][0]["saved"]
    with pytest.raises(UserError, match="its tool takes those of all ranks for the same"):
        check_universal(saved, optimizer.identity())


def moved_by_one_word(rank: int, world_size: int, stage: int) -> set[str]:
    """The experts here whose weights moved, where every token is the same word and goes to one expert of all."""
    engine = start(stage, rank, world_size, 2, chosen("Lion", weight_decay=0.0))
    before = weights_of(engine)
    for step in range(2):
        one_step(engine, step, rank, words=1)
    after = weights_of(engine)
    return {key.split("experts.")[-1][0] for key in before if moved(before, after, key)}


def moved(before: Weights, after: Weights, key: str) -> bool:
    return "deepspeed_experts" in key and not torch.equal(before[key], after[key])


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2])
def test_an_expert_without_a_token_has_a_gradient_of_zeros(stage: int) -> None:
    """It is stepped, so its momentum goes on, and it stays where there is none."""
    found = run_ranks(2, moved_by_one_word, stage)
    assert sorted(map(len, found)) == [0, 1]
