"""A copy that is called verified has what a load asks for; what it would miss is refused before anything appears."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.cli import app as cli
from ds_optim.errors import UserError
from ds_optim.optimizers.saved import SAVED
from ds_optim.zero.checkpoints import open_checkpoint, reshard, writer

from .checkpoint_files import Tangle, content, own, same_bits, save_unsharded, trained

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Lion": ("Lion", {}),
    "LASM": ("LASM", {}),
    "int8": ("LionMuon", {"momentum_dtype": "int8"}),
}
Files = Callable[..., Path]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """(kind, stage) -> a checkpoint of 2 ranks, of which each test takes a copy."""
    made: dict[tuple[str, int], Path] = {}

    def find(kind: str = "Lion", stage: int = 2) -> Path:
        if (kind, stage) not in made:
            folder = tmp_path_factory.mktemp("loadable")
            model = Tangle()
            optimizer = own(KINDS[kind][0], model, **KINDS[kind][1])
            trained(model, optimizer)
            save_unsharded(folder / "original", model, optimizer, place={"rows": torch.arange(3)})
            reshard(folder / "original", folder / "flat", ranks=2, stage=stage)
            made[kind, stage] = folder / "flat"
        return made[kind, stage]

    return find


def edit(folder: Path, pattern: str, change: Callable[[dict[str, Any]], Any]) -> None:
    paths = sorted((folder / "step-3").glob(pattern))
    assert paths
    for path in paths:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def base(content: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's own dict in an optimizer file."""
    states = content["optimizer_state_dict"]
    found: dict[str, Any] = states[
        "base_optimizer_state" if "base_optimizer_state" in states else "optimizer_state_dict"
    ]
    return found


# ------------------------------------------------------------------------------------------------ descriptions


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Of all groups, which have one in common."""

    def edit_one(content: dict[str, Any]) -> None:
        groups = base(content)["param_groups"]
        assert all(group[SAVED] is groups[0][SAVED] for group in groups)
        change(groups[0][SAVED])

    return edit_one


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def edit_all(content: dict[str, Any]) -> None:
        for entry in base(content)["state"].values():
            change(entry)

    return edit_all


def no_mapping(content: dict[str, Any]) -> None:
    for group in base(content)["param_groups"]:
        group[SAVED] = ["format", 1]


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no mapping": ("Lion", no_mapping, "it is no mapping"),
    "no format": ("Lion", described(lambda d: d.pop("format")), "it has no format"),
    "a format of text": ("Lion", described(lambda d: d.update(format="1")), "it has no format"),
    "a later format": ("Lion", described(lambda d: d.update(format=99)), "a later release"),
    "no optimizer": ("Lion", described(lambda d: d.pop("optimizer")), "it has no optimizer"),
    "another dtype": ("Lion", described(lambda d: d.update(momentum_dtype="int8")), "described as torch.int8"),
    "no dtype": ("Lion", described(lambda d: d.update(momentum_dtype=["int8"])), "it has no momentum_dtype"),
    "no groups": ("Lion", described(lambda d: d.update(groups=None)), "no groups"),
    "a group short": ("Lion", described(lambda d: d["groups"].pop()), "it has 2 groups and they 3"),
    "another rate": ("Lion", described(lambda d: d["groups"][0].update(lr=3.0)), "other hyperparameters"),
    "another name": (
        "Lion",
        described(lambda d: d["groups"][0]["parameters"].insert(0, ("elsewhere", (3, 4)))),
        "other parameters in the group",
    ),
    "another shape": (
        "Lion",
        described(lambda d: d["groups"][0]["parameters"].append((d["groups"][0]["parameters"].pop()[0], (1, 1)))),
        "other parameters in the group",
    ),
    "a shape of text": (
        "Lion",
        described(lambda d: d["groups"][0]["parameters"].append(("name", "shape"))),
        "no groups of named parameters",
    ),
    "a damaged table": ("Lion", described(lambda d: d.update(costs={"device": "cpu", "jobs": 3})), "no table of costs"),
    "no momentum": ("Lion", state(lambda s: s.pop("exp_avg")), "it has no exp_avg"),
    "no steps": ("Lion", state(lambda s: s.pop("step")), "it has no number of steps"),
    "steps of text": ("Lion", state(lambda s: s.update(step="3")), ""),
    "no numbers": ("LASM", state(lambda s: s.update(scalars={})), "no number of the whole parameter"),
    "no scales": ("int8", state(lambda s: s.pop("exp_avg_scale")), "damaged"),
    "no codes": ("int8", state(lambda s: s.pop("exp_avg_codes")), "described as torch.int8"),
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused_before_anything_appears(
    damage: str, stage: int, flat: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, change, expected = DAMAGES[damage]
    shutil.copytree(flat(kind, stage), tmp_path / "copy")
    edit(tmp_path / "copy", "*optim_states.pt", change)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(tmp_path / "copy"), str(tmp_path / "out"), "--ranks", "3", "--stage", "1"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("ds-optim: error:")
    assert expected in error[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no mapping", "no format", "no dtype", "no groups", "a shape of text"])
def test_a_damaged_description_is_one_line_in_a_load_too(damage: str, flat: Files, tmp_path: Path) -> None:
    shutil.copytree(flat("Lion"), tmp_path / "copy")
    edit(tmp_path / "copy", "*optim_states.pt", DAMAGES[damage][1])
    path = tmp_path / "copy" / "step-3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with pytest.raises(UserError, match="is damaged"):
        own("Lion", Tangle()).load_state_dict(base(torch.load(path, weights_only=False)))


def test_what_an_earlier_release_left_out_as_frozen_is_described_again(flat: Files, tmp_path: Path) -> None:
    """It described what was trainable at the save; the state is all there."""
    shutil.copytree(flat("Lion"), tmp_path / "copy")
    edit(tmp_path / "copy", "*optim_states.pt", described(lambda d: d["groups"][0]["parameters"].pop(0)))
    reshard(tmp_path / "copy", tmp_path / "out", ranks=3, stage=0)
    made = torch.load(tmp_path / "out" / "step-3" / "mp_rank_00_model_states.pt", weights_only=True)["optimizer"]
    model = Tangle(seed=4)
    again = own("Lion", model)
    again.load_state_dict(made)
    trained(model, again, 1)


def test_codes_under_the_name_of_values_are_still_read(flat: Files, tmp_path: Path) -> None:
    """As earlier releases wrote int8 momentum: by a load and by a reshard."""

    def earlier(content: dict[str, Any]) -> None:
        for entry in content.values():
            entry["exp_avg"] = entry.pop("exp_avg_codes")
            entry.pop("exp_avg_sq", None)

    shutil.copytree(flat("int8"), tmp_path / "copy")
    edit(tmp_path / "copy", "*optim_states.pt", lambda content: earlier(base(content)["state"]))
    reshard(tmp_path / "copy", tmp_path / "out", ranks=3, stage=3)
    reshard(flat("int8"), tmp_path / "straight", ranks=3, stage=3)
    made = content(open_checkpoint(tmp_path / "out"))
    assert same_bits(made, content(open_checkpoint(tmp_path / "straight"))) == []
    model, again = Tangle(), Tangle()
    optimizer, other = (own("LionMuon", m, momentum_dtype="int8") for m in (model, again))
    trained(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    earlier(saved["state"])
    other.load_state_dict(saved)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert one.keys() == two.keys() == {"exp_avg_codes", "exp_avg_scale", "step"}
        assert torch.equal(one["exp_avg_codes"], two["exp_avg_codes"])


# ------------------------------------------------------------------------------------------------ settings


def units(folder: Path) -> tuple[list[int], Any]:
    """Elements of each flat partition, and the paddings behind parameters."""
    path = folder / "step-3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = torch.load(path, weights_only=False)["optimizer_state_dict"]
    flats = states.get("fp32_flat_groups", states.get("single_partition_of_fp32_groups"))
    return [tensor.numel() for tensor in flats], states.get("param_alignment_paddings")


def test_what_a_config_leaves_out_is_deepspeeds_default(flat: Files, tmp_path: Path) -> None:
    small = {"zero_optimization": {"stage": 3, "sub_group_size": 50}}
    reshard(flat(), tmp_path / "small", config=small)
    assert len(units(tmp_path / "small")[0]) > 3
    reshard(tmp_path / "small", tmp_path / "as it is", ranks=3)
    assert len(units(tmp_path / "as it is")[0]) > 3
    reshard(tmp_path / "small", tmp_path / "default", ranks=3, config={"zero_optimization": {"stage": 3}})
    assert len(units(tmp_path / "default")[0]) == 3, "one for each group"
    aligned = {"zero_optimization": {"stage": 2, "parameter_alignment": True}}
    reshard(flat(), tmp_path / "aligned", config=aligned)
    assert any(map(any, units(tmp_path / "aligned")[1]))
    reshard(tmp_path / "aligned", tmp_path / "unaligned", config={"zero_optimization": {"stage": 1}})
    assert not any(map(any, units(tmp_path / "unaligned")[1]))
    reshard(tmp_path / "aligned", tmp_path / "unsharded", config={"train_batch_size": 8})
    assert open_checkpoint(tmp_path / "unsharded").stage == 0


@pytest.mark.parametrize(
    ("arguments", "config", "expected"),
    [
        (["--ranks", str(10**11)], None, "--ranks is 100000000000: write a number of ranks from 1 to 131,072"),
        (["--ranks", "131073"], None, "--ranks is 131073"),
        (
            [],
            '{"zero_optimization": {"stage": 3, "sub_group_size": "large"}}',
            "zero_optimization.sub_group_size is 'large'",
        ),
        ([], '{"zero_optimization": {"stage": 3, "sub_group_size": -1}}', "zero_optimization.sub_group_size is -1"),
        ([], '{"zero_optimization": {"parameter_alignment": 7}}', "zero_optimization.parameter_alignment is 7"),
        ([], '{"zero_optimization": true}', 'write {"stage": 1}'),
    ],
)
def test_settings_that_no_run_can_have_are_one_line(
    arguments: list[str],
    config: str | None,
    expected: str,
    flat: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if config is not None:
        (tmp_path / "ds.json").write_text(config)
        arguments = [*arguments, "--config", str(tmp_path / "ds.json")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(flat()), str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ what a load asks


def emptied(states: dict[str, Any]) -> None:
    states["frozen_param_fragments"].clear()


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the list of frozen parameters": emptied,
    "frozen frozen.weight": lambda s: s["frozen_param_fragments"]["frozen.weight"].add_(1),
    "weights of table": lambda s: s["module"].pop("table"),
    "weights of stranger": lambda s: s["module"].update(stranger=torch.zeros(0)),
    "place": lambda s: s.update(place={"rows": torch.arange(3) + 1}),
    "lr_scheduler": lambda s: s.pop("lr_scheduler"),
    "global_samples": lambda s: s.update(global_samples=math.nan),
    "settings": lambda s: s["ds_config"].update(train_batch_size=8),
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("what", WRONG)
def test_nothing_is_verified_that_a_load_would_miss(
    what: str, stage: int, flat: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever rank's file."""
    whole = writer._model_states

    def wrong(*given: Any) -> dict[str, Any]:
        states = {**whole(*given)}
        states["module"] = {**states["module"]}
        if states.get("frozen_param_fragments"):
            states["frozen_param_fragments"] = {k: t.clone() for k, t in states["frozen_param_fragments"].items()}
        if given[-1] == (2 if stage == 3 and what != "settings" else 0):
            WRONG[what](states)
        return states

    monkeypatch.setattr(writer, "_model_states", wrong)
    with pytest.raises(RuntimeError, match=f"{what}"):
        reshard(flat(), tmp_path / "out", ranks=3, stage=stage)
    assert not list(tmp_path.iterdir())


def test_a_loss_scale_arrives_or_is_refused(flat: Files, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scaler = DynamicLossScaler(
        init_scale=2**9,
        scale_window=7,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )

    def scaled(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"] |= {"loss_scaler": scaler}

    shutil.copytree(flat(), tmp_path / "copy")
    edit(tmp_path / "copy", "*optim_states.pt", scaled)
    reshard(tmp_path / "copy", tmp_path / "out", ranks=3, stage=3)
    assert vars(open_checkpoint(tmp_path / "out").wrapper["loss_scaler"]) == vars(scaler)
    with pytest.raises(UserError, match="--stage 1"):
        reshard(tmp_path / "copy", tmp_path / "unsharded", stage=0)
    assert vars(open_checkpoint(flat()).wrapper["loss_scaler"]) == vars(LossScaler(scale=1.0))


def test_what_each_rank_saved_of_its_own_is_said(
    flat: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At stage 3, where each rank has a model file: kept by as many ranks, the first one's alone by others."""
    shutil.copytree(flat("Lion", 3), tmp_path / "copy")
    paths = sorted((tmp_path / "copy" / "step-3").glob("*model_states.pt"))
    for rank, path in enumerate(paths):
        torch.save({**torch.load(path, weights_only=False), "rng": torch.tensor([rank])}, path)
    reshard(tmp_path / "copy", tmp_path / "same", config={"zero_optimization": {"stage": 3, "sub_group_size": 100}})
    assert [int(model["rng"]) for model in open_checkpoint(tmp_path / "same").models] == [0, 1]
    for arguments, said in ((["--ranks", "3"], True), (["--stage", "2"], True), ([], False)):
        with pytest.raises(SystemExit):
            cli.main(["reshard", str(tmp_path / "copy"), str(tmp_path / "-".join(["out", *arguments])), *arguments])
        lines = capsys.readouterr().out.splitlines()
        assert ("of the first rank alone, where each had its own: rng" in lines) == said


def test_extra_state_that_is_no_tensor_goes_over(flat: Files, tmp_path: Path) -> None:
    shutil.copytree(flat(), tmp_path / "copy")
    edit(tmp_path / "copy", "*model_states.pt", lambda content: content["module"].update({"block._extra_state": b"\0"}))
    reshard(tmp_path / "copy", tmp_path / "cut", ranks=3, stage=3)
    reshard(tmp_path / "cut", tmp_path / "whole", ranks=1, stage=1)
    for folder in ("cut", "whole"):
        assert open_checkpoint(tmp_path / folder).models[0]["module"]["block._extra_state"] == b"\0"


# ------------------------------------------------------------------------------------------------ anything at all

VALUES = [None, -1, "x", [], {}, 0.5, [1, [2]], {"a": {}}, math.nan, torch.zeros(2), b"", (1,), 10**30]


def places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything that can be changed."""
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = list(enumerate(content))
    else:
        return []
    return [*((content, key) for key, _ in pairs), *(place for _, value in pairs for place in places(value))]


@pytest.mark.parametrize(("kind", "stage"), [("int8", 2), ("LASM", 3), ("Lion", 1)])
def test_a_change_anywhere_is_one_line_or_goes_over(kind: str, stage: int, flat: Files, tmp_path: Path) -> None:
    """Random ones, by number: nothing but a line comes of what is refused, and nothing is left of it."""
    original = flat(kind, stage)
    lines: list[str] = []
    for number in range(40):
        chance = random.Random(number)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(original, tmp_path / "copy")
        path = chance.choice(sorted((tmp_path / "copy" / "step-3").glob("*.pt")))
        content = torch.load(path, weights_only=False)
        container, key = chance.choice(places(content))
        if chance.random() < 0.25:
            del container[key]
        else:
            container[key] = chance.choice(VALUES)
        torch.save(content, path)
        out, before = tmp_path / f"out {number}", len(lines)
        try:
            reshard(tmp_path / "copy", out, ranks=chance.choice([1, 3]), stage=chance.choice([0, 1, 2, 3]))
            open_checkpoint(out)
        except UserError as problem:
            lines.append(str(problem))
        assert out.exists() == (len(lines) == before)
    assert 10 < len(lines) < 40
    assert not any("\n" in line for line in lines)
