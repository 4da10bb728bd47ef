"""Checkpoints as files: cut anew without loss, read without running them, refused in one line."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_optim.cli import app as cli
from ds_optim.elementwise.momentum import decode
from ds_optim.elementwise.quantized import largest_step, quantize, recut
from ds_optim.errors import UserError
from ds_optim.optimizers.rules import SCALES_OF_MOMENTUM
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.survival import manifest
from ds_optim.survival.identity import misplaced
from ds_optim.zero.checkpoints import open_checkpoint, reshard
from ds_optim.zero.checkpoints import verify as verify_module
from ds_optim.zero.checkpoints.pieces import flat_state
from ds_optim.zero.checkpoints.portable import MASTER, Portable, SavedGroup, Shards

from .checkpoint_files import Tangle, content, own, same_bits, save_unsharded, trained

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LionMuon": ("LionMuon", {"weight_decay": 0.2}),
    "bf16": ("Lion", {"momentum_dtype": "bfloat16"}),
    "int8": ("LionMuon", {"momentum_dtype": "int8"}),
    "scalars": ("LASM", {}),
    "two buffers": ("Muon", {"aux": "adamw"}),
    "no buffer": ("SignSGD", {}),
}
CHAIN = [(3, 3), (2, 1), (4, 2), (5, 3), (1, 3), (3, 1), (2, 0)]


def original(tmp_path: Path, kind: str = "LionMuon", **client: Any) -> Path:
    model = Tangle()
    name, params = KINDS[kind]
    optimizer = own(name, model, **params)
    trained(model, optimizer)
    return save_unsharded(tmp_path / "original", model, optimizer, **client)


# ------------------------------------------------------------------------------------------------ cut anew


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_shapes_ends_where_it_began(kind: str, tmp_path: Path) -> None:
    """Every shape holds the same, bit for bit; int8 momentum moves by steps of its quantization at joins alone."""
    folder = original(tmp_path, kind, position={"epoch": 4})
    first = open_checkpoint(folder)
    before = content(first)
    assert first.has_state
    for number, (ranks, stage) in enumerate(CHAIN):
        made = tmp_path / str(number)
        config = {"zero_optimization": {"sub_group_size": 100, "parameter_alignment": number % 2 == 0}}
        reshard(folder, made, ranks=ranks, stage=stage, config=config)
        found = open_checkpoint(made)
        assert (found.ranks, found.stage) == (ranks, stage)
        assert (found.groups, found.scalars, found.entries) == (first.groups, first.scalars, first.entries)
        assert found.models[0]["position"] == {"epoch": 4}
        assert found.description == first.description
        assert same_bits(content(found), before, but=["exp_avg"] if kind == "int8" else []) == []
        if kind == "int8":
            for spec in first.specs:
                one, other = content(found)[spec.name, "exp_avg"], before[spec.name, "exp_avg"]
                scale = first.shards.read_scales(spec.name, 0, spec.numel)
                assert torch.all((one - other).abs() <= 2 * largest_step(scale.amax()))
        folder = made
    last = torch.load(folder / "step-3" / "mp_rank_00_model_states.pt", weights_only=True)
    start = torch.load(tmp_path / "original" / "step-3" / "mp_rank_00_model_states.pt", weights_only=True)
    assert last["module"].keys() == start["module"].keys()
    assert all(torch.equal(last["module"][name], values) for name, values in start["module"].items())
    assert last["optimizer"].keys() == start["optimizer"].keys()
    model = Tangle(seed=5)
    model.load_state_dict(last["module"])
    name, params = KINDS[kind]
    again = own(name, model, **params)
    again.load_state_dict(last["optimizer"])
    trained(model, again, 1)


def test_files_of_a_shape_are_the_same_from_whatever_shape_they_are_made(tmp_path: Path) -> None:
    """Straight, and by way of others: every tensor, address and number."""
    folder = original(tmp_path)
    reshard(folder, tmp_path / "straight", ranks=3, stage=2)
    reshard(folder, tmp_path / "on the way", ranks=4, stage=3)
    reshard(tmp_path / "on the way", tmp_path / "round", ranks=3, stage=2)
    for path in sorted((tmp_path / "straight" / "step-3").iterdir()):
        one, other = (torch.load(f, weights_only=False) for f in (path, tmp_path / "round" / "step-3" / path.name))
        assert _text(one) == _text(other), path.name


def _text(content: Any) -> str:
    """Everything in a loaded file; tensors by their values."""
    if isinstance(content, dict):
        return str({key: _text(value) for key, value in content.items() if key != "ds_config"})
    if isinstance(content, (list, tuple)):
        return str([_text(value) for value in content])
    if isinstance(content, torch.Tensor):
        return f"{content.dtype} {tuple(content.shape)} {content.tolist()}"
    return str(vars(content)) if hasattr(content, "cur_scale") else str(content)


def test_tied_frozen_and_buffers_are_where_each_stage_has_them(tmp_path: Path) -> None:
    folder = original(tmp_path)
    reshard(folder, tmp_path / "z3", ranks=2, stage=3)
    saved = [
        torch.load(tmp_path / "z3" / "step-3" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=True)
        for rank in (0, 1)
    ]
    assert saved[0]["shared_params"] == {"lm_head.weight": "embed.weight"}
    assert saved[1]["shared_params"] == {}
    assert {k: tuple(v) for k, v in saved[0]["frozen_param_shapes"].items()} == {"frozen.weight": (3, 8)}
    halves = [state["frozen_param_fragments"]["frozen.weight"] for state in saved]
    assert torch.equal(torch.cat(halves).view(3, 8), Tangle().frozen.weight)
    assert torch.equal(saved[1]["module"]["table"], torch.arange(5))
    assert {name for name, tensor in saved[0]["module"].items() if tensor.numel()} == {"table"}


shapes = st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=2).map(tuple), min_size=1, max_size=5)


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "stage": draw(st.sampled_from([1, 2, 3])),
        "world_size": draw(st.integers(1, 7)),
        "param_alignment": draw(st.sampled_from([1, 4, 8])),
        "sub_group_size": draw(st.one_of(st.none(), st.integers(1, 300))),
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=2), cuts(), cuts(), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_what_is_scattered_is_gathered(groups: list[Any], one: Any, other: Any, dtype: str) -> None:
    """Whole tensors, cut one way and then another, come back: each element once, from whatever cut."""
    specs = [[ParamSpec(name=f"{g}.{p}", shape=s) for p, s in enumerate(group)] for g, group in enumerate(groups)]
    whole = _whole(specs, dtype)
    first = _cut(whole, one)
    second = _cut(first, other)
    for portable in (first, second):
        for spec in whole.specs:
            for key in (MASTER, "exp_avg"):
                values = whole.shards.read(spec.name, key, 0, spec.numel)
                if dtype == "int8" and key == "exp_avg":
                    continue
                assert torch.equal(portable.shards.read(spec.name, key, 0, spec.numel), values)
                middle = spec.numel // 2
                assert torch.equal(portable.shards.read(spec.name, key, middle, spec.numel - middle), values[middle:])
    if dtype == "int8":
        for spec in whole.specs:
            _check_codes(whole, first, spec, exact=True)  # nothing was joined that had been apart
            _check_codes(whole, second, spec, exact=False)


def _whole(specs: list[list[ParamSpec]], dtype: str) -> Portable:
    """Every parameter on one rank, its values all different."""
    layout = build_layout(specs, stage=0, world_size=1)
    flats, counter = [], 0.0
    for unit in layout.units:
        tensors = []
        for spec in unit.params:
            values = torch.arange(spec.numel) + counter + 1.0
            counter += spec.numel
            tensors.append({MASTER: values, **_momentum(torch.sin(values) * 10 ** (values % 3), dtype)})
        flats.append([tensors])
    return _portable(layout, specs, flats)


def _momentum(values: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if dtype == "int8":
        codes, scales = quantize(values, 0)
        return {"exp_avg": codes, SCALES_OF_MOMENTUM: scales}
    return {"exp_avg": values.to(getattr(torch, dtype))}


def _cut(portable: Portable, how: dict[str, Any]) -> Portable:
    specs = [list(group.params) for group in portable.groups]
    layout = build_layout(specs, **how)
    flats = [[[flat_state(portable, unit, rank)] for rank in range(layout.world_size)] for unit in layout.units]
    return _portable(layout, specs, flats)


def _portable(layout: Any, specs: list[list[ParamSpec]], flats: Any) -> Portable:
    return Portable(
        stage=layout.stage,
        ranks=layout.world_size,
        description=None,
        rows={},
        scalars={},
        entries={},
        groups=tuple(SavedGroup(hyper={}, params=tuple(group)) for group in specs),
        shards=Shards(layout=layout, flats=flats),
        has_state=True,
        wrapper={},
        models=[],
        prefix="",
        version="",
        buffers={spec.name: ("exp_avg",) for group in specs for spec in group},
    )


def _check_codes(whole: Portable, cut: Portable, spec: ParamSpec, *, exact: bool) -> None:
    values, steps = [], []
    for portable in (whole, cut):
        codes = portable.shards.read(spec.name, "exp_avg", 0, spec.numel)
        scales = portable.shards.read_scales(spec.name, 0, spec.numel)
        values.append(decode(codes, scales))
        steps.append(largest_step(scales))
    if exact:
        assert torch.equal(values[0], values[1])
    assert torch.all((values[0] - values[1]).abs() <= steps[1])


@given(st.integers(0, 700), st.integers(1, 900), st.integers(0, 900))
def test_int8_blocks_come_apart_exactly_and_together_within_a_step(start: int, numel: int, border: int) -> None:
    values = torch.sin(torch.arange(numel) * 0.7) * torch.linspace(1e-3, 5, numel)
    codes, scales = quantize(values, start)
    each = scales[(torch.arange(numel) + start) // 256 - start // 256]
    decoded = decode(codes, each)
    assert torch.all((decoded - values).abs() <= largest_step(each))
    again, kept = recut(codes, each, start)
    assert torch.equal(again, codes)
    assert torch.equal(kept, scales)
    border = min(border, numel)
    # Rounded apart, each piece by its own largest value; then joined.
    halves = [quantize(values[a:b], start + a) for a, b in pairwise((0, border, numel)) if b > a]
    froms = [a for a, b in pairwise((0, border, numel)) if b > a]
    places = [torch.arange(len(c)) + start + a for (c, _), a in zip(halves, froms, strict=True)]
    own = [s[p // 256 - int(p[0]) // 256] for (_, s), p in zip(halves, places, strict=True)]
    joined, new = recut(torch.cat([c for c, _ in halves]), torch.cat(own), start)
    of_new = new[(torch.arange(numel) + start) // 256 - start // 256]
    apart = torch.cat([decode(c, s) for (c, _), s in zip(halves, own, strict=True)])
    assert torch.all((decode(joined, of_new) - apart).abs() <= largest_step(of_new))
    unmoved = of_new == torch.cat(own)
    assert torch.equal(decode(joined, of_new)[unmoved], apart[unmoved])


# ------------------------------------------------------------------------------------------------ read safely


class Malice:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("where", ["alone", "beside tensors", "in the optimizer", "no zip"])
def test_a_malicious_file_is_refused_and_runs_nothing(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = original(tmp_path)
    trace = tmp_path / "trace"
    path = folder / "step-3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    if where == "alone":
        torch.save(Malice(trace), path)
    elif where == "beside tensors":
        torch.save({**state, "position": Malice(trace)}, path)
    elif where == "in the optimizer":
        reshard(folder, tmp_path / "flat", ranks=2, stage=2)
        folder = tmp_path / "flat"
        path = folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        torch.save({**torch.load(path, weights_only=False), "ds_config": Malice(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Malice(trace)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(folder), str(tmp_path / "out"), "--ranks", "3", "--stage", "1"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ds-optim: error:")
    assert path.name in error
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    torch.load(path, weights_only=False) if where != "no zip" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file was not malicious"


def test_arrays_and_states_of_random_generators_in_client_state_are_data(tmp_path: Path) -> None:
    import random

    import numpy as np

    noise = {"numpy": np.random.default_rng(3).standard_normal(4), "torch": torch.get_rng_state()}
    folder = original(tmp_path, rng={**noise, "python": random.getstate(), "legacy": np.random.get_state()})
    reshard(folder, tmp_path / "out", ranks=2, stage=3)
    found = open_checkpoint(tmp_path / "out").models[0]["rng"]
    assert np.array_equal(found["numpy"], noise["numpy"])
    assert found["python"] == random.getstate()
    assert np.array_equal(found["legacy"][1], np.random.get_state()[1])


def removed(folder: Path) -> str:
    (folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    return "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"


def last_removed(folder: Path) -> str:
    (folder / "step-3" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    return "was saved by 3 ranks and holds 2"


def model_removed(folder: Path) -> str:
    (folder / "step-3" / "mp_rank_00_model_states.pt").unlink()
    return "no DeepSpeed checkpoint"


def truncated(folder: Path) -> str:
    path = folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    return "zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read"


def outside(folder: Path) -> str:
    (folder / "latest").write_text("../elsewhere")
    return "no name of a folder beside it"


def linked(folder: Path) -> str:
    path = folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.rename(folder.parent / "elsewhere.pt")
    path.symlink_to(folder.parent / "elsewhere.pt")
    return "is a link to a place outside"


def folder_linked(folder: Path) -> str:
    (folder / "step-3").rename(folder.parent / "elsewhere")
    (folder / "step-3").symlink_to(folder.parent / "elsewhere")
    return "is a link to a place outside"


def of_a_shard(folder: Path) -> str:
    path = folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.rename(path.with_name("zero_pp_rank_1_mp_rank_01_optim_states.pt"))
    return "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"


def universal(folder: Path) -> str:
    (folder / "step-3" / "zero").mkdir()
    return "a universal checkpoint"


def edited(folder: Path, change: Any) -> None:
    for path in (folder / "step-3").glob("*optim_states.pt"):
        state = torch.load(path, weights_only=False)
        change(state["optimizer_state_dict"])
        torch.save(state, path)


def other_addresses(folder: Path) -> str:
    def change(state: dict[str, Any]) -> None:
        for group in state["param_slice_mappings"]:
            for address in group.values():
                address.start += 1

    edited(folder, change)
    return "addresses"


def not_by_element(folder: Path) -> str:
    def change(state: dict[str, Any]) -> None:
        state["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(3, 4)

    edited(folder, change)
    return "no value for each element"


def other_weights(folder: Path) -> str:
    def change(state: dict[str, Any]) -> None:
        state["single_partition_of_fp32_groups"][0] += 1

    edited(folder, change)
    return "are not the model's"


def of_two_steps(folder: Path) -> str:
    path = folder / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = 2
    torch.save(state, path)
    return "different steps"


def elastic(folder: Path) -> str:
    path = folder / "step-3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["ds_config"]["zero_optimization"]["elastic_checkpoint"] = True
    torch.save(state, path)
    return "was saved with elastic_checkpoint"


def older(folder: Path) -> str:
    edited(folder, lambda state: state.pop("param_slice_mappings"))
    return "is not laid out as DeepSpeed 0.19 lays it out (KeyError: 'param_slice_mappings')"


DAMAGES = [
    *(removed, last_removed, model_removed, truncated, outside, linked, folder_linked, of_a_shard, universal),
    *(other_addresses, not_by_element, other_weights, of_two_steps, elastic, older),
]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 ranks at stage 2."""
    folder = tmp_path_factory.mktemp("flat")
    reshard(original(folder), folder / "flat", ranks=3, stage=2)
    return folder / "flat"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_or_of_another_kind_is_named_in_one_line(
    damage: Any, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(flat, tmp_path / "copy")
    reshard(tmp_path / "copy", tmp_path / "whole", ranks=1)
    expected = damage(tmp_path / "copy")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(tmp_path / "copy"), str(tmp_path / "out"), "--ranks", "2"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--stage", "4"], "--stage is 4"),
        (["--optimizer", "nothing"], "--optimizer 'nothing'"),
        (["--optimizer-params", "{}"], "--optimizer-params goes with --optimizer"),
        (["--optimizer", "lion", "--optimizer-params", "{"], "is not JSON"),
        (["--optimizer", "lion", "--optimizer-params", '{"period": 2}'], "period"),
        (["--optimizer", "adamw"], "--reset-optimizer"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], expected: str, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(flat), str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_found_and_made(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(flat / "step-3"), str(tmp_path / "out"), "--ranks", "4", "--stage", "3"])
    assert stopped.value.code == 0
    found, written, verified, place = capsys.readouterr().out.strip().splitlines()[-4:]
    count = sum(math.prod(spec.shape) for spec in open_checkpoint(flat).specs)
    for line, shape in ((found, "stage 2, 3 ranks"), (written, "stage 3, 4 ranks")):
        assert f"LionMuon, {shape}, {count:,} parameters in 6 tensors" in line
        assert line.endswith("weights float32, momentum float32, step 3")
    assert "bit for bit" in verified
    assert place == str(tmp_path / "out" / "step-3")
    assert (tmp_path / "out" / "latest").read_text() == "step-3"
    assert (tmp_path / "out" / "zero_to_fp32.py").is_file()


def test_a_state_that_cannot_be_cut_is_left_behind_on_request(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(flat, tmp_path / "copy")
    not_by_element(tmp_path / "copy")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reshard", str(tmp_path / "copy"), str(tmp_path / "out"), "--ranks", "2", "--reset-optimizer"])
    assert stopped.value.code == 0
    assert "no optimizer state" in capsys.readouterr().out
    found = open_checkpoint(tmp_path / "out")
    assert not found.has_state
    assert (
        same_bits(content(found), {k: v for k, v in content(open_checkpoint(flat)).items() if k[1] == "master"}) == []
    )


def test_a_sealed_checkpoint_is_checked_before_and_sealed_after(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``ds-optim train`` seals its own: with the new shape in the notes, and the batch shared by the new ranks."""
    shutil.copytree(flat, tmp_path / "run")
    sealed = tmp_path / "run" / "step-3"
    notes = {"step": 3, "world_size": 3, "trajectory": {"stage": 2, "micro_batch": 4, "seed": 1}}
    manifest.seal_folder(sealed, notes, bound=False)  # as releases did whose files say nothing of themselves
    command = ["reshard", str(tmp_path / "run"), str(tmp_path / "out"), "--ranks", "2", "--stage", "3"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 0
    made = manifest.read(tmp_path / "out" / "step-3")
    trajectory = {"stage": 3, "micro_batch": 6, "seed": 1}
    assert {key: made.notes[key] for key in notes} == {"step": 3, "world_size": 2, "trajectory": trajectory}
    assert made.bound
    for name in made.files:
        assert misplaced(tmp_path / "out" / "step-3", name, made.notes, bound=True) is None
    assert set(made.files) == {path.name for path in (tmp_path / "out" / "step-3").iterdir()} - {manifest.NAME}
    shutil.rmtree(tmp_path / "out")
    damaged = sealed / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    bits = bytearray(damaged.read_bytes())
    bits[len(bits) // 2] ^= 1
    damaged.write_bytes(bits)
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert f"{damaged.name} has other bits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_left_alone(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="there already"):
        reshard(flat, tmp_path / "out", ranks=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("what", ["master", "exp_avg"])
def test_nothing_is_shown_that_is_not_what_was_read(
    what: str, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_optim.zero.checkpoints import writer

    def wrong(portable: Portable, unit: Any, rank: int) -> dict[str, torch.Tensor]:
        flats = flat_state(portable, unit, rank)
        flats[what][0] += 2**-20
        return flats

    monkeypatch.setattr(writer, "flat_state", wrong)
    monkeypatch.setattr(verify_module, "check_masters", lambda portable: None)
    with pytest.raises(RuntimeError, match=f"{what} of"):
        reshard(flat, tmp_path / "out", ranks=2, stage=3)
    assert not list(tmp_path.iterdir())
