"""Torch's protocol of an optimizer: what is saved is plain data, defaults, copies, the first release's groups."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS, ZeroOptimizer
from ds_optim.optimizers.layer_scales import LayerScales
from ds_optim.optimizers.routes import routes
from ds_optim.optimizers.rules import RULES
from ds_optim.optimizers.saved import SAVED
from tests import stepping
from tests.cases import CASES
from tests.stepping import SmallModel, random_grads, take_steps


def build(name: str, model: nn.Module, **hyper: Any) -> ZeroOptimizer:
    optimizer = stepping.build(name, model, **hyper)
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer


EVERY_OPTION: list[tuple[str, dict[str, Any]]] = [
    ("Lion", {"betas": np.array([0.9, 0.99]), "lr": np.float32(1e-3), "momentum_dtype": "int8", "decay_1d": True}),
    ("SignSGD", {"lr": torch.tensor(1e-3)}),
    ("Signum", {"beta": torch.tensor(0.9), "momentum_dtype": "bfloat16"}),
    ("CautiousLion", {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "weight_decay": torch.tensor(0.1)}),
    *(("CLion", {"gate": gate, "nu": np.float64(1e-6)}) for gate in ("tensor", "coordinate")),
    ("StableLion", {"layer_scales": {"square": 1.5, "tall": 0.5}, "trust_ratio_max": 2.0}),
    ("StableLion", {"layer_scales": [["square", 1.5]]}),
    *(("LASM", {"layer_scales": {"square": 1.5}, "variance": variance}) for variance in ("tensor", "element")),
    ("LASM", {}),
    *(("StoSignSGD", {"bound": bound, "seed": np.int64(3)}) for bound in ("tensor", "element")),
    ("Muon", {"momentum": np.float64(0.9), "nesterov": np.bool_(False), "scale": "unit_rms", "aux": "adamw"}),
    ("Muonlight", {"aux": "signum", "aux_beta": torch.tensor(0.5), "polar": {"method": "svd"}}),
    ("NorMuon", {"betas": np.array([0.9, 0.8]), "eps": np.float32(1e-8), "cautious_decay": np.bool_(True)}),
    ("MuonH", {"momentum": torch.tensor(0.9), "nesterov": False}),
    ("LionMuon", {"period": np.int64(3), "period_mode": "random", "seed": 5, "aux_betas": np.array([0.5, 0.5])}),
    ("LionMuon", {"period": 3, "spread": np.bool_(True)}),
    ("SignMuon", {"beta": torch.tensor(0.9), "period": "inf", "sign_lr_ratio": np.float32(30)}),
    ("MiMuon", {"gate": "singular_gap", "tau": np.float32(0.1), "raw_lr": torch.tensor(1e-3), "aux_weight_decay": 0}),
    *(("SpectralLion", {"basis": basis, "exchange": {"bucket_mb": 8}}) for basis in ("weight", "momentum", "gradient")),
    ("Lamb", {"eps": np.float64(1e-6)}),
    ("StableAdamW", {"eps": torch.tensor(1e-8), "diagnostics": True}),
]
GIVEN = {name for name, _ in EVERY_OPTION}
EVERY_OPTION += [(case.type, dict(case.option)) for case in CASES.values() if case.type not in GIVEN]
PLAIN = {float, int, bool, str, tuple}


def test_every_rule_is_among_the_options() -> None:
    built = {group["rule"] for name, hyper in EVERY_OPTION for group in build(name, SmallModel(), **hyper).param_groups}
    assert built == {name for name, rule in RULES.items() if rule.update.__module__.startswith("ds_optim.")}


@pytest.mark.parametrize(("name", "hyper"), EVERY_OPTION, ids=lambda value: value if isinstance(value, str) else "")
def test_groups_hold_plain_data(name: str, hyper: dict[str, Any]) -> None:
    """The loader that builds no class of ours reads what is saved, also where a scheduler wrote numpy's numbers."""
    model = SmallModel()
    optimizer = build(name, model, **hyper)
    take_steps(model, optimizer, random_grads(2))
    for group in optimizer.param_groups:
        assert {type(value) for key, value in group.items() if key != "params"} <= PLAIN
        group["lr"] = np.float64(group["lr"])
        group["weight_decay"] = torch.tensor(group["weight_decay"], dtype=torch.float64)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = build(name, copy.deepcopy(model), **hyper)
    again.load_state_dict(state)
    for group, like in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert {type(value) for key, value in group.items() if key != "params"} <= PLAIN
        assert {**group, "params": 0} == {**like, "params": 0}


def in_the_first_release(state: dict[str, Any]) -> dict[str, Any]:
    """A saved state as that had it: one rate in all groups, and beside it each one's share of it."""
    shared = copy.deepcopy(state)
    rate = state["param_groups"][0]["lr"]
    # All groups hold one description.
    described = shared["param_groups"][0][SAVED]
    described["format"] = 1
    for group in (*shared["param_groups"], *described["groups"]):
        group.update(lr=rate, lr_scale=group["lr"] / rate, initial_lr=0.5)
        if "layer_scales" in group:
            group["layer_scales"] = LayerScales(group["layer_scales"])
    return shared


@pytest.mark.parametrize("name", ["LionMuon", "Muon", "Lion", "StableLion"])
def test_groups_of_the_first_release_get_their_own_rates(name: str) -> None:
    hyper = {"layer_scales": {"square": 1.5}} if name == "StableLion" else {}
    model = SmallModel()
    optimizer = build(name, model, **hyper)
    take_steps(model, optimizer, random_grads(2))
    old = in_the_first_release(optimizer.state_dict())
    again = build(name, model, **hyper)
    again.load_state_dict(old)
    for group, like, saved in zip(again.param_groups, optimizer.param_groups, old["param_groups"], strict=True):
        assert group["lr"] == pytest.approx(like["lr"], rel=1e-12)
        assert group["initial_lr"] == pytest.approx(0.5 * like["lr"] / saved["lr"], rel=1e-12)
        assert "lr_scale" not in group
        assert {type(value) for key, value in group.items() if key != "params"} <= PLAIN
    assert again.loaded_shares


def test_defaults_hold_what_schedulers_ask_for_and_no_momentum() -> None:
    """OneCycleLR, CyclicLR and DeepSpeed's OneCycle cycle what they find in them; get_scheduler divides by "lr"."""
    for name in OPTIMIZERS:
        assert set(build(name, SmallModel(), lr=0.25).defaults) == {"lr", "weight_decay"}
    built = build("LionMuon", SmallModel(), lr=torch.tensor(0.25), weight_decay=0)
    assert built.defaults == {"lr": 0.25, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="must support momentum"):
        torch.optim.lr_scheduler.OneCycleLR(built, max_lr=0.25, total_steps=5)


def pickled(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("LionMuon", {"momentum_dtype": "bfloat16", "diagnostics": True}),
        ("Lion", {"momentum_dtype": "int8"}),
        ("LASM", {}),
        ("Muon", {"aux": "adamw"}),
        ("StoSignSGD", {"seed": 3}),
    ],
)
def test_a_copy_goes_on_with_the_same_bits(way: Callable[[Any], Any], name: str, hyper: dict[str, Any]) -> None:
    model = SmallModel()
    optimizer = build(name, model, **hyper)
    take_steps(model, optimizer, random_grads(3))
    other, twin = way((model, optimizer))
    stepped = [id(p) for group in twin.param_groups for p in group["params"]]
    assert [id(member.parameter) for members in twin.members for member in members] == stepped
    assert {id(p) for p in other.parameters()} == set(stepped)
    more = random_grads(3, seed=5)
    take_steps(model, optimizer, more)
    take_steps(other, twin, more)
    for (label, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q), label
        for key, value in optimizer.state[p].items():
            same = twin.state[q][key]
            assert torch.equal(value, same) if torch.is_tensor(value) else value == same, key
    alone = way(optimizer)
    assert alone.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    alone.load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="cannot be added once"):
        alone.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_the_routes_show_where_a_schedule_leads() -> None:
    """And not the 0 that a warmup starts from."""
    optimizer = build("LionMuon", SmallModel(), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
    lines = [line.split(",")[1] for line in routes(optimizer) if line.startswith("  ") and " lr " in line]
    assert lines == [" lr 0.01", " lr 0.001", " lr 0.001"]
