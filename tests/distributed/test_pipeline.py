"""DeepSpeed's pipeline engine: stages take the unsharded steps, copies of a tied layer stay one, and it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_optim
from ds_optim.errors import UserError
from ds_optim.sharding.layout import Layout
from ds_optim.zero.checkpoints.reshard import reshard
from tests.cases import WITH_VARIANTS
from tests.tiers import FULL, cells

from .harness import assert_all_raised, run_ranks
from .pipelines import batches, new_model, start
from .small_runs import differences, snapshot

STEPS = 4
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16 = {"bf16": {"enabled": True}}
# Every wrapper that the pipeline engine steps.
CONFIGS: dict[str, dict[str, Any]] = {
    "z1": {"zero_optimization": {"stage": 1}},
    "z0": {"zero_optimization": {"stage": 0}},
    "z1-bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "z1-bf16-sums": {"zero_optimization": {"stage": 1}, **BF16, **SUMS},
    "z1-all_matrices": {"zero_optimization": {"stage": 1}},
    "z1-round_robin": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
    "z1-offload": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
}
NAMES = ("LionMuon", "Lion-bfloat16", "StoSignSGD-element", "NorMuon", "SpectralLion-weight", "LASM", "Lamb")
CHOSEN = cells([("z1", "LionMuon")], [*((config, "LionMuon") for config in CONFIGS), *(("z1", name) for name in NAMES)])
ROUTING = {"z1-all_matrices": {"matrix_exclude_defaults": False}}
"""So that copies of the tied layer are matrices, which stages cut and orthogonalize differently."""
ON_TWO = [(config, name) for config, name in CHOSEN if FULL and name == "LionMuon"]

Weights = dict[str, torch.Tensor]


class Stage:
    """A stage's masters and gradients in full, put together from its ranks' partitions."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.basic_optimizer
        self.gradients: list[list[torch.Tensor]] = []
        self.optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: Any, *_: Any) -> None:
        # The wrappers call once for each group, or once for all of them.
        held = [(t, t.grad.detach().float().clone()) for group in optimizer.param_groups for t in group["params"]]
        self.gradients.append(held)  # type: ignore[arg-type]

    def full(self, local: Mapping[int, torch.Tensor]) -> Weights:
        """The parameters in full, of what this rank has for each of its tensors (by identity); on all its ranks."""
        binding = self.optimizer._binding
        layout: Layout = binding.layout
        mine = [[local[id(t)].detach().float().flatten().cpu() for t in tensors] for tensors in binding.tensors]
        everywhere: list[Any] = [None] * binding.comm.world_size
        if binding.comm.group is None:
            everywhere = [mine]
        else:
            dist.all_gather_object(everywhere, mine, group=binding.comm.group)
        found = {}
        for number, unit in enumerate(layout.units):
            for param, spec in enumerate(unit.params):
                whole = torch.full((spec.numel,), float("nan"))
                for rank, piece in unit.holders(param):
                    values = everywhere[rank][number][piece.tensor][piece.offset : piece.offset + piece.numel]
                    whole[piece.start : piece.start + piece.numel] = values
                found[spec.name] = whole.view(spec.shape)
        return found

    def steps(self) -> list[Weights]:
        """The gradients of each step in full."""
        by_step: list[dict[int, torch.Tensor]] = []
        for held in self.gradients:
            for tensor, gradient in held:
                step = next((entry for entry in by_step if id(tensor) not in entry), None)
                if step is None:
                    by_step.append(step := {})
                step[id(tensor)] = gradient
        return [self.full(step) for step in by_step]

    def masters(self) -> Weights:
        return self.full({id(t): t for tensors in self.optimizer._binding.tensors for t in tensors})


def replayed(config: str, name: str, model: torch.nn.Module, gradients: list[Weights]) -> Weights:
    """What the unsharded optimizer makes of a stage's first weights and these gradients."""
    model = model.float()
    case = WITH_VARIANTS[name]
    optimizer = getattr(ds_optim, case.type)(ds_optim.param_groups(model, **ROUTING.get(config, {})), **case.params)
    for step in gradients:
        for key, parameter in model.named_parameters():
            parameter.grad = step[key].clone()
        optimizer.step()
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def train(rank: int, world_size: int, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for config, name in wanted:
        case = WITH_VARIANTS[name]
        engine = start(world_size, case.type, {**case.params, **ROUTING.get(config, {})}, CONFIGS[config])
        stage = Stage(engine)
        data = batches(engine)
        for _ in range(STEPS):
            engine.train_batch(data)
        first = new_model()
        if "bf16" in CONFIGS[config]:
            first = first.bfloat16()
        masters, expected = stage.masters(), replayed(config, name, first, stage.steps())
        comm = stage.optimizer._binding.comm
        found[config, name] = {
            "differing": [key for key in masters if not torch.equal(masters[key], expected[key])],
            "names": sorted(masters),
            "tied": masters["tied_modules.embed.weight"],
            "ranks": comm.world_size,
            "sent": comm.sent_bytes,
            "planned": sum(e.plan.sent_bytes(comm.rank) for e in stage.optimizer.exchanges.values()),
        }
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def on_four() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(4, train, CHOSEN, timeout=300)


@pytest.fixture(scope="module")
def on_two() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(2, train, ON_TWO, timeout=100)


@pytest.mark.parametrize(("config", "name"), CHOSEN)
def test_every_stage_takes_the_unsharded_steps(on_four: list[Any], config: str, name: str) -> None:
    found = [rank[config, name] for rank in on_four]
    assert [own["differing"] for own in found] == [[]] * 4
    assert [own["names"][0] for own in found] == ["1.down.weight", "1.down.weight", "3.down.weight", "3.down.weight"]
    assert config == "z0" or [own["ranks"] for own in found] == [2] * 4


@pytest.mark.parametrize(("config", "name"), CHOSEN)
def test_copies_of_a_tied_layer_stay_one(on_four: list[Any], config: str, name: str) -> None:
    """To the bit, though each stage cuts its copy at another border."""
    first, *others = (rank[config, name]["tied"] for rank in on_four)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.full
@pytest.mark.parametrize(("config", "name"), ON_TWO)
def test_stages_of_one_rank(on_two: list[Any], config: str, name: str) -> None:
    found = [rank[config, name] for rank in on_two]
    assert [own["differing"] for own in found] == [[], []]
    assert torch.equal(found[0]["tied"], found[1]["tied"])


def test_a_stage_sends_what_its_own_plan_says(on_four: list[Any]) -> None:
    """LionMuon's spectral steps, every second; nothing else travels but the hash of what is meant alike."""
    for rank in on_four:
        own = rank["z1", "LionMuon"]
        assert own["sent"] == own["planned"] * STEPS // 2
    assert sum(rank["z1", "LionMuon"]["sent"] for rank in on_four) > 0


# ------------------------------------------------------------------------------------------------ checkpoints

LION_MUON = {"period": 2, "polar": {"dtype": "float32"}}


def go_on(rank: int, world_size: int, folder: Path, config: str) -> dict[str, Any]:
    """What differs from the run that went on, after both ways of loading."""
    engine = start(world_size, "LionMuon", LION_MUON, CONFIGS[config])
    data = batches(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(str(folder))
    engine.train_batch(data)
    whole = snapshot(engine)
    engine.destroy()
    found: dict[str, Any] = {}
    for way in ("engine", "ds_optim"):
        again = start(world_size, "LionMuon", LION_MUON, CONFIGS[config])
        if way == "engine":
            again.load_checkpoint(str(folder))
        else:
            ds_optim.load_checkpoint(again, str(folder))
        again.train_batch(batches(again, 3))
        found[way] = differences(whole, snapshot(again))
        again.destroy()
    return found


@pytest.mark.parametrize("config", cells(["z1"], [name for name in CONFIGS if name != "z1"]))
def test_it_goes_on_to_the_bit(tmp_path: Path, config: str) -> None:
    for found in run_ranks(4, go_on, tmp_path, config):
        assert found == {"engine": [], "ds_optim": []}
    with pytest.raises(UserError, match="a pipeline's file"):
        reshard(tmp_path, tmp_path / "other", ranks=1)


def save(rank: int, world_size: int, folder: Path, stages: int) -> None:
    engine = start(world_size, "LionMuon", LION_MUON, CONFIGS["z1"], stages=stages)
    engine.train_batch(batches(engine))
    engine.save_checkpoint(str(folder))


def load(rank: int, world_size: int, folder: Path, stages: int, way: str) -> None:
    engine = start(world_size, "LionMuon", LION_MUON, CONFIGS["z1"], stages=stages)
    if way == "ds_optim":
        ds_optim.load_checkpoint(engine, str(folder))
    else:
        engine.load_checkpoint(str(folder))


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "stages", "way", "error", "parts"),
    [
        (2, 1, "ds_optim", "UserError", ("2 stages", "1 stage")),
        (2, 1, "engine", "RuntimeError", ("layout does not match",)),
        (2, 2, "ds_optim", "ZeRORuntimeException", ("DP world size of 2 but the current world size is 1",)),
    ],
)
def test_another_shape_is_refused(
    tmp_path: Path, ranks: int, stages: int, way: str, error: str, parts: tuple[str, ...]
) -> None:
    """Than two stages of two ranks each."""
    run_ranks(4, save, tmp_path, 2)
    assert_all_raised(run_ranks(ranks, load, tmp_path, stages, way, expect_error=True), error, *parts)


def load_adamw(rank: int, world_size: int, folder: Path) -> None:
    engine = start(world_size, "AdamW", {}, BF16)
    engine.train_batch(batches(engine))
    engine.save_checkpoint(str(folder))
    engine.destroy()
    start(world_size, "AdamW", {}, BF16).load_checkpoint(str(folder))


@pytest.mark.full
def test_deepspeed_loses_state_in_bf16_at_stage_0(tmp_path: Path) -> None:
    """Its AdamW's too, of all ranks of a stage but the first: that is why it is refused."""
    outcomes = run_ranks(4, load_adamw, tmp_path, expect_error=True)
    assert [outcome.error_type for outcome in outcomes[1::2]] == ["KeyError"] * 2


# --------------------------------------------------------------------------------------------------- mistakes


def start_wrong(rank: int, world_size: int, params: dict[str, Any], config: dict[str, Any]) -> None:
    if params.get("seed") == "by rank":
        params = {**params, "seed": rank}
    start(world_size, "Lion" if "momentum_dtype" in params else "LionMuon", params, config, tied="tied" not in params)


@pytest.mark.parametrize(
    ("params", "config", "parts"),
    [
        ({}, {"zero_optimization": {"stage": 2}}, ("PipelineModule", "use stage 1")),
        ({}, {"sequence_parallel_size": 2}, ("PipelineModule", "set sequence_parallel_size to 1")),
        (LION_MUON, BF16, ("bf16 at ZeRO stage 0", "use stage 1")),
        ({"momentum_dtype": "int8"}, CONFIGS["z1"], ("tied_modules.embed.weight", '"bfloat16"')),
        ({"matrix_exclude": ["^9\\.", "^1\\.up"]}, CONFIGS["z1"], ("'^9\\\\.'", "no parameter of any stage")),
    ],
)
def test_mistakes_are_said_on_every_rank(
    params: dict[str, Any], config: dict[str, Any], parts: tuple[str, ...]
) -> None:
    assert_all_raised(run_ranks(4, start_wrong, params, config, expect_error=True), "UserError", *parts)


def seeds_by_stage(rank: int, world_size: int) -> None:
    import deepspeed

    model = new_model()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), seed=model.stage_id)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **CONFIGS["z1"]}
    deepspeed.initialize(model=model, optimizer=optimizer, config=config)


def test_stages_must_mean_one_stream_of_random_numbers() -> None:
    outcomes = run_ranks(4, seeds_by_stage, expect_error=True)
    assert_all_raised(outcomes, "UserError", "disagree on the seed", "0 on ranks 0, 1", "1 on ranks 2, 3")
