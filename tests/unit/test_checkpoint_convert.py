"""A checkpoint of one optimizer for another: what goes over, what is refused, and what loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.saved import SAVED
from ds_optim.zero.checkpoints import open_checkpoint, reshard
from ds_optim.zero.checkpoints.convert import change_optimizer
from tests.cases import WITH_ONE_MEAN

from .checkpoint_files import STEPS, Tangle, content, own, same_bits, save_unsharded, trained

FP32 = {"polar": {"steps": 2, "dtype": "float32"}}


def adamw(model: nn.Module, **params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, **params)


def saved(tmp_path: Path, name: str, *, config: dict[str, Any] | None = None, **params: Any) -> Path:
    model = Tangle()
    optimizer = adamw(model, **params) if name == "AdamW" else own(name, model, **params)
    trained(model, optimizer)
    return save_unsharded(tmp_path / "original", model, optimizer, config=config)


def converted(folder: Path, place: Path, name: str, *, reset: bool = False, **params: Any) -> dict[str, Any]:
    """The file of the converted checkpoint at stage 0."""
    reshard(folder, place, stage=0, change=lambda portable: change_optimizer(portable, name, params, reset=reset))
    found: dict[str, Any] = torch.load(place / "step-3" / "mp_rank_00_model_states.pt", weights_only=True)
    return found


def loaded(state: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    model.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return optimizer


OURS = WITH_ONE_MEAN


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", ["AdamW", "Lion", "Muon"])
def test_the_first_moment_goes_over_bit_for_bit(source: str, target: str, tmp_path: Path) -> None:
    """By name, although the groups are others, with the steps done; hyperparameters are those of a new optimizer."""
    folder = saved(tmp_path, source)
    before = {key: v for key, v in content(open_checkpoint(folder)).items() if key[1] in ("master", "exp_avg")}
    state = converted(folder, tmp_path / "out", target)
    found = open_checkpoint(tmp_path / "out")
    assert same_bits(content(found), before) == []
    assert {entry["step"] for entry in found.entries.values()} == {STEPS}
    model = Tangle(seed=5)
    fresh = own(target, model)
    expected = [{k: v for k, v in group.items() if k != "params"} for group in fresh.param_groups]
    given = [{k: v for k, v in group.items() if k != "params"} for group in loaded(state, fresh, model).param_groups]
    assert given == expected
    trained(model, fresh, 1)


def test_a_run_begins_to_take_turns(tmp_path: Path) -> None:
    """Its groups of matrices are cut where the saved ones were whole; the momentum is the same."""
    folder = saved(tmp_path, "LionMuon", **FP32)
    state = converted(folder, tmp_path / "out", "LionMuon", spread=True, period=2, **FP32)
    before, after = content(open_checkpoint(folder)), content(open_checkpoint(tmp_path / "out"))
    assert same_bits(after, before) == []
    model = Tangle(seed=5)
    fresh = loaded(state, own("LionMuon", model, spread=True, period=2, **FP32), model)
    assert [group["phase"] for group in fresh.param_groups if group["role"] == "matrix"] == [0, 1]
    trained(model, fresh, 1)


def test_adamw_keeps_its_second_moment_where_the_aux_rule_is_adamw(tmp_path: Path) -> None:
    folder = saved(tmp_path, "AdamW")
    state = converted(folder, tmp_path / "out", "Muon", aux="adamw", **FP32)
    before, after = content(open_checkpoint(folder)), content(open_checkpoint(tmp_path / "out"))
    squares = [key for key in after if key[1] == "exp_avg_sq"]
    assert {name for name, _ in squares} == {"embed.weight", "block.0.bias", "block.1.weight", "block.1.bias"}
    assert same_bits({key: after[key] for key in squares}, {key: before[key] for key in squares}) == []
    model = Tangle(seed=5)
    trained(model, loaded(state, own("Muon", model, aux="adamw"), model), 1)


@pytest.mark.parametrize(("dtype", "loss"), [("bfloat16", 2**-8), ("int8", 0.02)])
def test_momentum_is_rounded_where_the_target_stores_it_so(dtype: str, loss: float, tmp_path: Path) -> None:
    folder = saved(tmp_path, "AdamW")
    state = converted(folder, tmp_path / "out", "LionMuon", momentum_dtype=dtype)
    before, after = content(open_checkpoint(folder)), content(open_checkpoint(tmp_path / "out"))
    for spec in open_checkpoint(folder).specs:
        one, other = before[spec.name, "exp_avg"], after[spec.name, "exp_avg"].float()
        assert 0 < (one - other).abs().max() <= loss * one.abs().max()
    model = Tangle(seed=5)
    optimizer = loaded(state, own("LionMuon", model, momentum_dtype=dtype), model)
    key = "exp_avg_codes" if dtype == "int8" else "exp_avg"
    assert {str(s[key].dtype) for s in optimizer.state.values()} == {f"torch.{dtype}"}


REFUSED = [
    ("SignSGD", {}, "Lion", {}, r"the mean of gradients \(exp_avg\) for .*, and the checkpoint holds no buffer"),
    ("Lion", {}, "StableAdamW", {}, r"squared gradients \(exp_avg_sq\) for .* holds exp_avg, the mean of gradients"),
    ("Lion", {}, "Muon", {"aux": "adamw"}, "'adamw' keeps the root of the mean of squared gradients"),
    ("Lion", {}, "LASM", {}, "keeps a mean of damped gradients .* holds exp_avg, the mean of gradients"),
    ("LASM", {}, "Lion", {}, "keeps the mean of gradients .* holds exp_avg, a mean of damped gradients"),
    ("Lion", {}, "StoSignSGD", {}, r"keeps the largest momentum so far \(scalars\)"),
    ("StoSignSGD", {"bound": "element"}, "Lamb", {}, "exp_avg_sq, the largest momentum so far"),
    ("Lion", {}, "AdamW", {}, "second buffer"),
]


@pytest.mark.parametrize(("source", "given", "target", "params", "reason"), REFUSED)
def test_what_does_not_go_over_is_refused_with_a_reason(
    source: str, given: dict[str, Any], target: str, params: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    portable = open_checkpoint(saved(tmp_path, source, **given))
    with pytest.raises(UserError, match=reason) as refused:
        change_optimizer(portable, target, params)
    assert "--reset-optimizer" in str(refused.value)
    assert not change_optimizer(portable, target, params, reset=True).has_state


def test_momentum_that_is_a_sum_is_refused(tmp_path: Path) -> None:
    """torch's SGD keeps m <- b m + g under another name."""
    model = Tangle()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    trained(model, optimizer)
    portable = open_checkpoint(save_unsharded(tmp_path / "sgd", model, optimizer))
    with pytest.raises(UserError, match="momentum_buffer"):
        change_optimizer(portable, "Lion", {})


def test_a_reset_keeps_weights_schedule_and_place(tmp_path: Path) -> None:
    folder = saved(tmp_path, "LionMuon")
    reshard(folder, tmp_path / "out", ranks=3, stage=3, state=False)
    found, before = open_checkpoint(tmp_path / "out"), open_checkpoint(folder)
    assert before.has_state
    assert not found.has_state
    assert found.groups == before.groups
    assert (found.step, found.models[0]["global_samples"]) == (before.step, 24)
    masters = {key: values for key, values in content(before).items() if key[1] == "master"}
    assert same_bits(content(found), masters) == []


@pytest.mark.parametrize("source", ["Lion", "LionMuon", "AdamW"])
def test_adamw_starts_anew_on_the_weights(source: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, source)
    state = converted(folder, tmp_path / "out", "AdamW", reset=True, lr=2e-3, betas=[0.9, 0.95])
    model = Tangle(seed=5)
    optimizer = loaded(state, adamw(model), model)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (2e-3, (0.9, 0.95))
    trained(model, optimizer, 1)
    assert len(optimizer.state) == 6


def test_the_rate_goes_on_at_the_fraction_of_its_peak(tmp_path: Path) -> None:
    """Of a torch schedule, whose own rates are set anew, and of DeepSpeed's, whose peak stands in the JSON."""
    model = Tangle()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trained(model, optimizer)
    schedule.step()
    folder = save_unsharded(tmp_path / "torch", model, optimizer, lr_scheduler=schedule.state_dict())
    state = converted(folder, tmp_path / "one", "LionMuon", lr=0.01)
    fresh = own("LionMuon", model, lr=0.01)
    again = torch.optim.lr_scheduler.LambdaLR(fresh, lambda step: 1 / (1 + step))
    fresh.load_state_dict(state["optimizer"])
    again.load_state_dict(state["lr_scheduler"])
    assert [group["lr"] for group in fresh.param_groups] == [0.005, 0.0005, 0.0005]
    again.step()
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx([0.01 / 3, 0.001 / 3, 0.001 / 3])

    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 4e-3}}, "optimizer": {"type": "AdamW"}}
    model = Tangle()
    optimizer = adamw(model)
    trained(model, optimizer)
    folder = save_unsharded(tmp_path / "deepspeed", model, optimizer, config=config)
    state = converted(folder, tmp_path / "other", "LionMuon", lr=0.01)
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.01 * 1e-3 / 4e-3, 0.001 * 1e-3 / 4e-3, 0.001 * 1e-3 / 4e-3])
    assert "optimizer" not in state["ds_config"]


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 5))
        self.gate = nn.Linear(8, 3)


def test_three_dimensions_ask_for_a_view(tmp_path: Path) -> None:
    model = Stacked()
    optimizer = adamw(model)
    trained(model, optimizer)
    portable = open_checkpoint(save_unsharded(tmp_path / "stacked", model, optimizer))
    with pytest.raises(UserError, match="experts has the shape"):
        change_optimizer(portable, "LionMuon", {})
    made = change_optimizer(portable, "LionMuon", {"views": [{"match": "experts", "batch_dims": 1}]})
    assert [[spec.name for spec in group.params] for group in made.groups] == [
        ["experts"],
        ["gate.weight"],
        ["gate.bias"],
    ]
    made = change_optimizer(portable, "LionMuon", {"matrix_exclude": ["experts"]})
    assert [spec.name for spec in made.groups[0].params] == ["experts", "gate.weight"], (
        "the gate of experts is a router"
    )


# ----------------------------------------------------------------------------- what an optimizer takes from a file


def test_the_state_of_another_optimizer_is_refused_and_nothing_loaded() -> None:
    one, other = (own(name, Tangle()) for name in ("Lion", "LionMuon"))
    trained(Tangle(), one, 0)
    groups = [dict(group) for group in other.param_groups]
    with pytest.raises(UserError, match=r"is of Lion .* --optimizer LionMuon"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="of another optimizer"):
        other.load_state_dict(adamw(Tangle()).state_dict())
    assert [dict(group) for group in other.param_groups] == groups


def test_the_state_of_other_parameters_is_refused() -> None:
    """A matrix that one run leaves to the aux rule, and one that is called otherwise."""
    state = own("LionMuon", Tangle()).state_dict()
    routed = ds_optim.LionMuon(ds_optim.param_groups(Tangle(), matrix_exclude=["block.0"]))
    with pytest.raises(UserError, match=r"block.0.weight \(33, 8\) is in 'aux' here and in 'matrix' there"):
        routed.load_state_dict(state)

    class Renamed(Tangle):
        def __init__(self) -> None:
            super().__init__()
            self.called = self.block
            del self.block

    with pytest.raises(UserError, match=r"called.0.weight \(33, 8\) is in 'matrix' here, and not there"):
        own("LionMuon", Renamed()).load_state_dict(state)


class Judge(nn.Module):
    """With an output head that is not called lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(8, 6), nn.Linear(6, 4)


def test_older_routes_are_told_apart_and_converted(tmp_path: Path) -> None:
    """A head was a matrix once: the line says what to write, and that does it."""
    model = Judge()
    older = ds_optim.Muon(ds_optim.param_groups(model, matrix_exclude_defaults=False), **FP32)
    trained(model, older)
    folder = save_unsharded(tmp_path / "older", model, older)
    now = ds_optim.Muon(ds_optim.param_groups(Judge()), **FP32)
    with pytest.raises(UserError) as refused:
        now.load_state_dict(older.state_dict())
    line = str(refused.value)
    assert "score.weight (4, 6) is in 'aux' here and in 'matrix' there" in line
    assert 'or convert it with "ds-optim reshard SOURCE TARGET --optimizer Muon' in line
    assert "\n" not in line
    now.load_state_dict(converted(folder, tmp_path / "now", "Muon")["optimizer"])


class Experts(nn.Module):
    """With experts in one parameter, which took the aux rule once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 6)
        self.experts = nn.ParameterDict({"down_proj": torch.zeros(3, 6, 4)})


def test_experts_that_took_the_aux_rule_are_told_and_converted(tmp_path: Path) -> None:
    model = Experts()
    older = ds_optim.Muon(ds_optim.param_groups(model, views_defaults=False), **FP32)
    trained(model, older)
    folder = save_unsharded(tmp_path / "older", model, older)
    now = ds_optim.Muon(ds_optim.param_groups(Experts()), **FP32)
    with pytest.raises(
        UserError, match=r"experts.down_proj \(3, 6, 4\) is in 'matrix' here and in 'aux' there.*views_defaults"
    ):
        now.load_state_dict(older.state_dict())
    # Heads need modules, which a checkpoint has not; no role depends on it
    now.load_state_dict(converted(folder, tmp_path / "now", "Muon", heads="auto")["optimizer"])
    same = ds_optim.Muon(ds_optim.param_groups(Experts(), views_defaults=False), **FP32)
    same.load_state_dict(older.state_dict())


def test_the_state_of_the_first_release_loads() -> None:
    """It has no description."""
    model = Tangle()
    optimizer = own("LionMuon", model)
    trained(model, optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group[SAVED]
    again = own("LionMuon", model)
    again.load_state_dict(state)
    assert all(torch.equal(again.state[p]["exp_avg"], own["exp_avg"]) for p, own in optimizer.state.items())
    with pytest.raises(UserError, match="another optimizer"):
        own("Muon", model).load_state_dict(state)


def test_a_description_is_in_files_alone() -> None:
    """Live groups, and unsharded state, are what they were before."""
    model = Tangle()
    optimizer = own("LionMuon", model)
    trained(model, optimizer)
    state = optimizer.state_dict()
    assert all(SAVED in group for group in state["param_groups"])
    assert not any(SAVED in group for group in optimizer.param_groups)
    assert {key for own in state["state"].values() for key in own} == {"exp_avg", "step"}
    optimizer.load_state_dict(state)
    assert not any(SAVED in group for group in optimizer.param_groups)
