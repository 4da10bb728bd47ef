"""Frozen at whatever moment: a checkpoint is of what the optimizer was bound to, and loads, also when cut anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.zero.checkpoints import reshard

from .harness import assert_all_raised, device, run_ranks
from .resharding import gathered, held
from .small_runs import FP32_ACCUMULATION, MUON, Cell, bits, differences, full_weights, quiet, snapshot
from .test_edge_parameters import Net, data, loss_of

Held = list[tuple[str, str, int, Tensor]]

CELLS = [
    *(Cell(stage=stage) for stage in (0, 1, 2, 3)),
    Cell(stage=0, dtype="bf16"),
    Cell(stage=3, dtype="bf16"),
    Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
]
FROZEN = "first.weight"
MOMENTS = ("at the save", "in mid-run", "before initialize", "after initialize")


def freeze(model: nn.Module, names: Sequence[str] | None = None) -> None:
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            parameter.requires_grad_(False)


def built(cell: Cell, world_size: int, *, between: bool = False, model: nn.Module | None = None) -> Any:
    """An engine over an optimizer that was built first; ``between``: a matrix is frozen before the engine is."""
    import deepspeed

    quiet()
    model = (Net() if model is None else model).to(device(), torch.bfloat16 if cell.dtype == "bf16" else torch.float32)
    optimizer = ds_optim.Muon(ds_optim.param_groups(model), **MUON["params"])  # type: ignore[arg-type]
    if between:
        freeze(model, [FROZEN])
    config = {**cell.json(world_size), "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, number: int, rank: int, world_size: int, before_step: Callable[[], None] = lambda: None) -> None:
    x = data(number)[rank::world_size].to(device(), next(engine.module.parameters()).dtype)
    engine.backward(loss_of(engine, x))
    before_step()
    engine.step()


def frozen_and_saved(rank: int, world_size: int, folder: Path, moment: str) -> list[list[str]]:
    """What differs in a fresh run that loads what was saved so, for each cell; "refused" where it does not."""
    found = []
    for number, cell in enumerate(CELLS):
        engine = built(cell, world_size, between=moment == "before initialize")
        if moment == "after initialize":
            step(engine, 0, rank, world_size, lambda own=engine.module: freeze(own, [FROZEN]))  # type: ignore[misc]
        else:
            step(engine, 0, rank, world_size)
        if moment == "in mid-run":
            freeze(engine.module, [FROZEN])
            step(engine, 1, rank, world_size)
        if moment == "at the save":
            freeze(engine.module)
        engine.save_checkpoint(str(folder / str(number)))
        before = snapshot(engine)
        engine.destroy()
        fresh = built(cell, world_size, between=moment == "before initialize")
        fresh.load_checkpoint(str(folder / str(number)))
        found.append(differences(before, snapshot(fresh)))
        step(fresh, 2, rank, world_size)
        fresh.destroy()
    return found


@pytest.mark.full
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_was_bound_is_what_is_saved(moment: str, tmp_path: Path) -> None:
    for found in run_ranks(2, frozen_and_saved, tmp_path, moment):
        assert found == [[] for _ in CELLS]


def frozen_after(rank: int, world_size: int) -> list[list[str]]:
    """What differs between a first step whose gradient is there already when a matrix is frozen, and one without."""
    found = []
    for cell in CELLS[:4]:
        states = []
        for names in ([FROZEN], []):
            engine = built(cell, world_size)
            step(engine, 0, rank, world_size, lambda own=engine.module, n=names: freeze(own, n))  # type: ignore[misc]
            momenta = {f"momentum {n}": ds_optim.full_momentum(engine, p) for n, p in engine.module.named_parameters()}
            states.append({**full_weights(engine), **momenta})  # of padding DeepSpeed's gradient may be anything
            engine.destroy()
        found.append(differences(*states))
    return found


def test_freezing_after_initialize_changes_no_layout() -> None:
    assert run_ranks(2, frozen_after) == [[[] for _ in CELLS[:4]]] * 2


def thawed_after(rank: int, world_size: int, stage: int) -> None:
    engine = built(Cell(stage=stage), world_size, between=True)
    engine.module.first.weight.requires_grad_(True)
    step(engine, 0, rank, world_size)


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_unfrozen_too_late_to_be_trained_is_named(stage: int) -> None:
    outcomes = run_ranks(2, thawed_after, stage, expect_error=True)
    assert_all_raised(outcomes, "UserError", FROZEN, "before deepspeed.initialize")


# ------------------------------------------------------------------------------------------------ cut anew


class Adapted(nn.Module):
    """(B, 6) -> (B, 6): a frozen base with a tied pair and an integer buffer, and an adapter that is trained."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(6, 6)
        self.first = nn.Linear(6, 9, bias=False)
        self.again = nn.Linear(6, 9, bias=False)
        self.again.weight = self.first.weight
        self.register_buffer("table", torch.arange(5) + seed)
        freeze(self)
        self.down = nn.Linear(6, 3, bias=False)
        self.up = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        tied = torch.tanh(self.first(x)) @ self.again.weight
        out: Tensor = x + self.base(x) + tied + self.up(self.down(x))
        return out


SAVED_AT = (1, 2, 3)
LOADED_AT = (1, 2, 3)


def adapted_saved(rank: int, world_size: int, folder: Path) -> list[Held]:
    """Saved with and without the frozen base, and with all frozen; the last step's masters and momentum."""
    found = []
    for stage in SAVED_AT:
        engine = built(Cell(stage=stage), world_size, model=Adapted())
        for number in range(2):
            step(engine, number, rank, world_size)
        client = {"place": {"rows": torch.arange(3)}}
        engine.save_checkpoint(str(folder / f"whole {stage}"), client_state=client)
        engine.save_checkpoint(str(folder / f"adapter {stage}"), client_state=client, exclude_frozen_parameters=True)
        freeze(engine.module)
        engine.save_checkpoint(str(folder / f"all frozen {stage}"), client_state=client)
        engine.save_checkpoint(str(folder / f"nothing {stage}"), client_state=client, exclude_frozen_parameters=True)
        found.append(held(engine, Cell(stage=stage), rank, world_size))
        engine.destroy()
    return found


def adapted_loaded(rank: int, world_size: int, folder: Path, kinds: Sequence[str]) -> dict[str, tuple[Held, Any]]:
    """What arrives in a run whose base is another, and its frozen weights."""
    import deepspeed

    found = {}
    for kind in kinds:
        for one in SAVED_AT:
            for other in LOADED_AT:
                engine = built(Cell(stage=other), world_size, model=Adapted(seed=9))
                strict = kind in ("whole", "all frozen")
                place = str(folder / f"{kind} {one} {other}")
                _, client = engine.load_checkpoint(place, load_module_strict=strict)
                assert torch.equal(client["place"]["rows"], torch.arange(3))
                weights = {}
                for name, p in engine.module.named_parameters():
                    with deepspeed.zero.GatheredParameters([p] if other == 3 else []):
                        weights[name] = p.detach().clone()
                seen = held(engine, Cell(stage=other), rank, world_size)
                step(engine, 2, rank, world_size)
                found[f"{kind} {one} {other}"] = seen, (weights, engine.module.table.clone())
                engine.destroy()
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[tuple[str, str], Tensor]]]:
    folder = tmp_path_factory.mktemp("adapters")
    every = run_ranks(2, adapted_saved, folder)
    return folder, [gathered(rank[number] for rank in every) for number in range(len(SAVED_AT))]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["whole", "adapter", "all frozen", "nothing"])
def test_a_verified_copy_of_a_frozen_base_loads(
    kind: str, adapters: tuple[Path, list[dict[tuple[str, str], Tensor]]], tmp_path: Path
) -> None:
    """Strictly where the base was saved; where it was left out the run's own stays, as with the original.

    Of a tied pair DeepSpeed leaves one name out and not the other, whose weights at stages 1 and 2 are whole.
    """
    for one in SAVED_AT:
        for other in LOADED_AT:
            reshard(adapters[0] / f"{kind} {one}", tmp_path / f"{kind} {one} {other}", ranks=3, stage=other)
    every = run_ranks(3, adapted_loaded, tmp_path, [kind])
    saved, own = Adapted(), Adapted(seed=9)
    for one, before in zip(SAVED_AT, adapters[1], strict=True):
        for other in LOADED_AT:
            cell = f"{kind} {one} {other}"
            arrived = gathered(rank[cell][0] for rank in every)
            assert arrived.keys() == before.keys()
            assert [key for key in before if not torch.equal(bits(arrived[key]), bits(before[key]))] == [], cell
            left_out = kind in ("adapter", "nothing")
            for rank in every:
                weights, table = rank[cell][1]
                for name, p in (own if left_out else saved).named_parameters():
                    trained = before.get((name, "master"))
                    expected = p.detach() if trained is None else trained.view(p.shape)
                    if left_out and name == "first.weight" and max(one, other) < 3:
                        expected = saved.first.weight.detach()
                    assert torch.equal(weights[name], expected), f"{cell}: {name}"
                assert torch.equal(table, saved.table)


def test_an_optimizer_alone_saves_what_it_holds() -> None:
    """Without DeepSpeed too, where the groups hold the parameters themselves."""
    model, again = Net(), Net()
    optimizer, other = (ds_optim.Lion(ds_optim.param_groups(m)) for m in (model, again))
    loss_of(model, data(0)).backward()
    optimizer.step()
    freeze(model)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == len(optimizer.state) == len(list(model.parameters()))
    with pytest.raises(UserError, match="of Lion"):
        ds_optim.Signum(ds_optim.param_groups(again)).load_state_dict(optimizer.state_dict())
