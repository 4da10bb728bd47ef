"""What must move nothing moves nothing, and a gradient is what DeepSpeed hands over."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim

from .harness import device, run_ranks
from .models import batch, share
from .small_runs import (
    BATCH,
    CELLS,
    FP32_ACCUMULATION,
    LION,
    LION_MUON,
    OFFLOAD,
    Cell,
    bits,
    differences,
    identical,
    local_tensors,
    new_model,
    one_step,
    own_optimizer,
    quiet,
    snapshot,
    start,
)

pytestmark = pytest.mark.full

# ------------------------------------------------------------------------------- steps that must move nothing


def set_up_moves_nothing(rank: int, world_size: int) -> dict[str, Any]:
    """After DeepSpeed's own step while it initializes, and after the first real one."""
    cell = Cell(stage=0, dtype="bf16")
    model = new_model("bf16")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = start(cell, world_size, LION_MUON, model)
    moved = [name for name, p in model.named_parameters() if not torch.equal(bits(p), bits(before[name]))]
    masters = local_tensors(engine)
    state = len(own_optimizer(engine).state)
    one_step(engine, 0, rank, world_size)
    counts = {own_optimizer(engine).state[t]["step"] for t in masters}
    return {"wrapper": type(engine.optimizer).__name__, "moved": moved, "state": state, "counts": counts}


def test_deepspeeds_step_while_it_initializes_moves_nothing() -> None:
    for found in run_ranks(2, set_up_moves_nothing):
        assert found == {"wrapper": "FP16_UnfusedOptimizer", "moved": [], "state": 0, "counts": {1}}


def poison(model: nn.Module, name: str, value: float) -> Any:
    """Put ``value`` into one element of a parameter's gradient in the next backward; returns the hook."""

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[3] = value
        return spoilt

    return dict(model.named_parameters())[name].register_hook(spoil)


def bad_gradients(rank: int, world_size: int, cells: list[Cell]) -> dict[str, dict[str, list[str]]]:
    """For each cell and each bad step what it moved, and what of the state the next clean step left alone.

    Only the last rank's gradient is bad, once in the first group that DeepSpeed steps and once in the last.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for cell, optimizer in itertools.product(cells, (LION_MUON, LION)):
        engine = start(cell, world_size, optimizer)
        one_step(engine, 0, rank, world_size)
        result: dict[str, list[str]] = {}
        for value, name in itertools.product((float("nan"), float("inf"), float("-inf")), ("tall.weight", "norm.bias")):
            before = snapshot(engine)
            hook = poison(engine.module, name, value) if rank == world_size - 1 else None
            one_step(engine, 1, rank, world_size)
            result[f"{value} in {name}"] = differences(before, snapshot(engine))
            if hook is not None:
                hook.remove()
        before = snapshot(engine)
        one_step(engine, 2, rank, world_size)
        after = snapshot(engine)
        moved = differences(before, after)
        # Steps of 1e-3 are lost in a 16-bit weight near 1; the masters show them.
        result["still"] = sorted(k for k in set(before) - set(moved) if not k.startswith("model"))
        result["not finite"] = [k for k, v in after.items() if isinstance(v, Tensor) and not v.isfinite().all()]
        found[f"{optimizer['type']} {cell.label}"] = result
        engine.destroy()
    return found


def assert_nothing_moved(ranks: list[dict[str, dict[str, list[str]]]]) -> None:
    for rank, found in enumerate(ranks):
        for label, result in found.items():
            for what, names in result.items():
                assert names == [], f"rank {rank}, {label}, {what}: {names}"


def test_a_bad_gradient_on_one_rank_moves_nothing_on_any() -> None:
    assert_nothing_moved(run_ranks(2, bad_gradients, CELLS, timeout=300))


def fp16_overflows(rank: int, world_size: int) -> dict[str, dict[str, list[str]]]:
    """Overflow by a loss scale of 2**40, and bad gradients as above, in fp16 at every stage."""
    from deepspeed.accelerator import get_accelerator

    if torch.float16 not in get_accelerator().supported_dtypes():
        # This CPU's backend has no fp16 kernels of its own; torch's generic ones are exact enough to overflow.
        get_accelerator().is_fp16_supported = lambda: True
    small = {"fp16": {"initial_scale_power": 10, "hysteresis": 1}}
    cells = [Cell(stage=s, dtype="fp16", config=small) for s in (1, 2, 3)]
    cells += [Cell(stage=0, dtype="fp16", config={"fp16": {"loss_scale": 1}})]
    cells += [Cell(stage=s, dtype="fp16", config=small, zero=OFFLOAD) for s in (2, 3)]
    found = bad_gradients(rank, world_size, cells)
    for stage in (1, 2, 3):
        cell = Cell(stage=stage, dtype="fp16", config={"fp16": {"initial_scale_power": 4}})
        engine = start(cell, world_size, LION_MUON)
        one_step(engine, 0, rank, world_size)
        set_loss_scale(engine, 2.0**40)
        before = snapshot(engine)
        one_step(engine, 1, rank, world_size)
        found[f"overflow z{stage}"] = {"moved": differences(before, snapshot(engine))}
        if engine.skipped_steps != 1:
            found[f"overflow z{stage}"]["skipped"] = [str(engine.skipped_steps)]
        set_loss_scale(engine, 16.0)
        one_step(engine, 2, rank, world_size)
        still = {k for k in set(before) - set(differences(before, snapshot(engine))) if not k.startswith("model")}
        found[f"overflow z{stage}"]["still"] = sorted(still)
        engine.destroy()
    return found


def set_loss_scale(engine: Any, scale: float) -> None:
    holder = getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
    holder.cur_scale = scale


def test_an_fp16_overflow_moves_nothing() -> None:
    assert_nothing_moved(run_ranks(2, fp16_overflows, timeout=200))


# ---------------------------------------------------------------------------------------- gradients and leftovers


class Probe(torch.optim.Optimizer):
    """Does nothing, so that hooks see what DeepSpeed hands to any optimizer."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def plain_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": group["params"]} for group in ds_optim.param_groups(model)]


def gradients_of(cell: Cell, rank: int, world_size: int, name: str) -> tuple[list[Tensor | None], list[str]]:
    """What an optimizer is handed in steps of which some do not use ``square``, and what it wrote into it.

    With learning rate 0 the weights stand still, so that every optimizer sees the same gradients.
    """
    import deepspeed

    model = new_model(cell.dtype)
    optimizer: torch.optim.Optimizer
    if name == "probe":
        optimizer = Probe(plain_groups(model))
    else:
        optimizer = getattr(ds_optim, name)(
            ds_optim.param_groups(model), lr=0.0, **({"aux_lr": 0.0} if name != "Lion" else {})
        )
    config = {**cell.json(world_size), "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    seen: list[Tensor | None] = []
    written: list[str] = []

    def before(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            seen.extend(None if t.grad is None else t.grad.detach().clone() for t in group["params"])

    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [t for group in stepped.param_groups for t in group["params"]]
        for tensor, handed in zip(tensors, seen[-len(tensors) :], strict=True):
            if not identical(tensor.grad, handed):
                written.append(f"call {len(seen)}")

    if cell.stage == 0 and cell.dtype == "bf16":
        one_step(engine, 0, rank, world_size)
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    for step in range(5):
        one_step(engine, step, rank, world_size, unused=step in (1, 3, 4))
    engine.destroy()
    return seen, written


LEFTOVER_CELLS = [
    Cell(stage=1),
    Cell(stage=2),
    Cell(stage=3),
    Cell(stage=0),
    Cell(stage=2, dtype="bf16"),
    Cell(stage=3, dtype="bf16"),
    Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
    Cell(stage=1, zero=OFFLOAD),
    Cell(stage=2, zero=OFFLOAD),
    Cell(stage=3, zero=OFFLOAD),
    Cell(stage=3, zero={"sub_group_size": 1}),
    Cell(stage=3, zero={"sub_group_size": 1, **OFFLOAD}),
    Cell(stage=2, config={"gradient_clipping": 0.1}),
    Cell(stage=3, config={"gradient_clipping": 0.1}, zero={"sub_group_size": 1, **OFFLOAD}),
]


def leftovers(rank: int, world_size: int) -> dict[str, list[str]]:
    """For each cell where our optimizers were handed other gradients than the probe, or wrote into them."""
    quiet()
    found: dict[str, list[str]] = {}
    for cell in LEFTOVER_CELLS:
        expected, _ = gradients_of(cell, rank, world_size, "probe")
        assert any(g is not None and g.any() for g in expected)
        for name in ("Lion", "Muon", "LionMuon"):
            seen, written = gradients_of(cell, rank, world_size, name)
            same = [identical(a, b) for a, b in zip(seen, expected, strict=True)]
            found[f"{name} {cell.label}"] = [*written, *(f"handed {i}" for i, s in enumerate(same) if not s)]
    return found


def test_an_unused_parameter_gets_what_deepspeed_gives_it_and_no_gradient_is_written() -> None:
    for found in run_ranks(2, leftovers, timeout=300):
        assert {label: what for label, what in found.items() if what} == {}


# --------------------------------------------------------------------------------------- no DeepSpeed around


def test_plain_training_leaves_gradients_alone_and_skips_bad_ones() -> None:
    model = new_model()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), polar={"steps": 3, "dtype": "float32"})
    for step, value in enumerate((None, float("nan"), float("inf"), None)):
        hook = poison(model, "norm.bias", value) if value is not None else None
        optimizer.zero_grad()
        tokens, targets = share(*batch(step, BATCH), 0, 1)
        model(tokens.to(device()), targets.to(device()), unused=step == 3).backward()
        if hook is not None:
            hook.remove()
        handed = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert identical(p.grad, handed[name]), f"{name}.grad was written"
            moves = value is None and handed[name] is not None
            assert torch.equal(p, weights[name]) is not moves, f"step {step}: {name}"
    assert optimizer.skipped_steps == 2
    assert {optimizer.state[p]["step"] for p in model.parameters()} == {1, 2}
