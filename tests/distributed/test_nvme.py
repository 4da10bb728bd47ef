"""Optimizer state in files, by ZeRO-3's offload to NVMe: the bits of offload to the CPU, one buffer of momentum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim.job.deepspeed_json import settings_from_json
from ds_optim.job.settings import make_settings
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings
from ds_optim.optimizers.rules import SCALES_OF_MOMENTUM
from ds_optim.train.loop import train
from tests.tiers import cells

from .commands import MODELS
from .harness import assert_all_raised, run_ranks
from .nvme import SUB_GROUPS, WIDE, Net, config_of, skip_without_aio, start, take_steps, weights_at
from .small_runs import equal, full_weights, identical, own_optimizer, quiet

STEPS = 4
PIPELINED = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 8}
POLAR = {"polar": {"steps": 2, "dtype": "float32"}}
TYPES: Mapping[str, Mapping[str, Any]] = {
    "Lion": {},
    "SignSGD": {},
    "LionMuon": {"period": 2, **POLAR},
    "Muon": POLAR,
}


@pytest.fixture(scope="module", autouse=True)
def aio() -> None:
    skip_without_aio()


def files_of(place: str, rank: int) -> dict[str, bytes]:
    """What lies in a rank's files, gradients left out."""
    found = (path for path in Path(place).rglob("*.swp") if path.parent.name == f"rank{rank}")
    return {path.name.removesuffix(".tensor.swp"): path.read_bytes() for path in found}


def held(engine: Any) -> list[dict[str, Any]]:
    """Of each sub-group its master weights and state, as they are in memory."""
    zero = engine.optimizer
    return [
        {"fp32": flat.detach().clone(), **own_optimizer(engine).state[flat]}
        for flat in zero.fp32_partitioned_groups_flat
    ]


def compare(rank: int, _: int, place: str, type: str, params: Mapping[str, Any], dtype: str, offload: Any) -> str:
    """What differs between the two places of state after some steps: nothing."""
    there = start(config_of(None, type, params, dtype))
    expected, weights, memory = take_steps(there, rank, range(STEPS)), full_weights(there), held(there)
    there.destroy()
    engine = start(config_of(place, type, params, dtype, **offload))
    losses = take_steps(engine, rank, range(STEPS))
    if losses != expected:
        return f"losses {losses} {expected}"
    if different := equal(full_weights(engine), weights):
        return f"weights {different}"
    zero, files = engine.optimizer, files_of(place, rank)
    zero.state_dict()  # takes along what is in memory, and no buffer of DeepSpeed's
    written = set()
    for number, (own, in_memory) in enumerate(zip(held(engine), memory, strict=True)):
        swapped = in_memory["fp32"].numel() * 4 >= 1 << 20
        if swapped != (number < 2):
            return f"sub-group {number} of {in_memory['fp32'].numel()} elements"
        for key, value in in_memory.items():
            if not isinstance(value, Tensor) or not (
                swapped and value.dtype == torch.float32 and key != SCALES_OF_MOMENTUM
            ):
                same = identical(own[key], value) if isinstance(value, Tensor) else own[key] == value
            else:
                ds_id = zero.fp32_partitioned_groups_flat[number].ds_id
                name = ds_id if key == "fp32" else f"{key}-{ds_id}"
                written.add(name)
                same = own[key].numel() == 0 and files[name][: 4 * value.numel()] == value.numpy().tobytes()
                same &= len(files[name]) == -(-value.numel() // 256) * 1024
            if not same:
                return f"{key} of sub-group {number}"
    gradients = {name for name in files if "gradient" in name}
    if files.keys() - gradients != written:
        return f"files {sorted(files)}"
    engine.destroy()
    return told_bytes(type, params, dtype, rank, sum(map(len, files.values())), memory)


def told_bytes(type: str, params: Mapping[str, Any], dtype: str, rank: int, written: int, memory: Any) -> str:
    """Whether the estimate says so many bytes of files."""
    plan = plan_optimizer(
        shape_of_module("net", Net()),
        {"LionMuon": "lion_muon", "SignSGD": "sign_sgd"}.get(type, type.lower()),
        {key: value for key, value in params.items() if key != "momentum_dtype"},
        momentum_dtype=params.get("momentum_dtype", "float32"),
        weights=TORCH_DTYPES["fp32" if dtype == "fp32" else "bf16"],
        device="cpu",
    )
    zero = ZeroSettings(stage=3, ranks=2, dtype=dtype, offload=True, nvme=True, sub_group_size=SUB_GROUPS, device="cpu")
    told = estimate(shape_of_module("net", Net()), plan, zero).ranks[rank]
    return "" if told.files == written else f"files of {written} bytes, estimated {told.files}"


ALL = [(type, "fp32", "float32", False) for type in TYPES]
CELLS = cells(
    [("LionMuon", "bf16", "float32", True)],
    [*ALL, ("Lion", "bf16", "bfloat16", False), ("LionMuon", "fp32", "int8", True), ("Muon", "bf16", "float32", False)],
)


@pytest.mark.parametrize(("type", "dtype", "momentum", "pipeline"), CELLS)
def test_files_hold_the_bits_that_memory_held(
    type: str, dtype: str, momentum: str, pipeline: bool, tmp_path: Path
) -> None:
    """A matrix without a gradient stands still: DeepSpeed hands over what its buffer held before."""
    params = {**TYPES[type], **({} if momentum == "float32" else {"momentum_dtype": momentum})}
    assert run_ranks(2, compare, str(tmp_path), type, params, dtype, PIPELINED if pipeline else {}) == ["", ""]


def saved(rank: int, _: int, place: str, folder: str, params: Mapping[str, Any], offload: Any) -> list[float]:
    """The losses after a checkpoint, in the run that saved it."""
    weights = "weights" in offload
    engine = start(config_of(place, "LionMuon", params, "bf16", **offload), WIDE if weights else 512)
    take_steps(engine, rank, range(3), same=weights)
    engine.save_checkpoint(folder)
    return take_steps(engine, rank, range(3, 6), same=weights)


def resumed(
    rank: int, _: int, place: str, folder: str, params: Mapping[str, Any], offload: Mapping[str, Any]
) -> list[list[float]]:
    """The same in another process, whose reader is not pipelined, and once more in the engine that went on."""
    weights = "weights" in offload
    engine = start(config_of(place, "LionMuon", params, "bf16", **offload), WIDE if weights else 512)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.ds_tensor.zero_()  # of one in a file no more than a mark
    found = []
    for _ in range(2):
        ds_optim.load_checkpoint(engine, folder)
        found.append(take_steps(engine, rank, range(3, 6), same=weights))
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("momentum", "offload", "again"), [("float32", PIPELINED, {}), ("int8", {"weights": True}, {"weights": True})]
)
def test_a_resumed_run_has_the_same_losses(momentum: str, offload: Any, again: Any, tmp_path: Path) -> None:
    params = {**TYPES["LionMuon"], "momentum_dtype": momentum}
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(2, saved, str(tmp_path / "files"), folder, params, offload)
    found = run_ranks(2, resumed, str(tmp_path / "others"), folder, params, again)
    assert found == [[losses, losses] for losses in expected]


def of_deepspeed(rank: int, _: int, place: str, folder: str, steps: int) -> list[float]:
    """The losses of DeepSpeed's own AdamW behind a checkpoint after ``steps``; of a run that loads it with 0."""
    engine = start(config_of(place, "deepspeed:AdamW", {}, "fp32"))
    take_steps(engine, rank, range(steps))
    if steps:
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    return take_steps(engine, rank, range(3, 6))


@pytest.mark.full
def test_deepspeeds_own_load_begins_adamw_anew(tmp_path: Path) -> None:
    """Why ``ds_optim.load_checkpoint`` is asked for: it reads masters alone, of those that are in files."""
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(2, of_deepspeed, str(tmp_path / "files"), folder, 3)
    found = run_ranks(2, of_deepspeed, str(tmp_path / "others"), folder, 0)
    assert found != expected


def between_blocks(rank: int, _: int, place: str | None, type: str) -> list[float]:
    return take_steps(start(config_of(place, type, {}, "fp32"), width=514), rank, range(2))


@pytest.mark.full
def test_gradients_that_begin_between_two_blocks_are_not_read(tmp_path: Path) -> None:
    """DeepSpeed's own AdamW then steps a matrix with zeros and goes on; ours is refused."""
    in_memory = run_ranks(2, between_blocks, None, "deepspeed:AdamW")
    in_files = run_ranks(2, between_blocks, str(tmp_path / "theirs"), "deepspeed:AdamW")
    assert [losses[0] for losses in in_files] == [losses[0] for losses in in_memory]
    assert [losses[1] for losses in in_files] != [losses[1] for losses in in_memory]
    outcomes = run_ranks(2, between_blocks, str(tmp_path / "ours"), "Lion", expect_error=True)
    assert_all_raised(outcomes, "UserError", "second.weight", "set zero_optimization.sub_group_size to 1")


def refused(rank: int, _: int, place: str, folder: str) -> list[str]:
    """What is said of what cannot be: a load of DeepSpeed's own, too few buffers, other files."""
    engine = start(config_of(f"{place}.a", "Lion", {}, "bf16"))
    take_steps(engine, rank, range(1))
    engine.save_checkpoint(folder)
    said = []
    for make in (
        lambda: (engine.load_checkpoint(folder), take_steps(start_loaded(place, folder), rank, range(1))),
        lambda: take_steps(start(config_of(f"{place}.b", "Lion", {}, "bf16", buffer_count=2)), rank, range(1)),
        lambda: ds_optim.load_checkpoint(start(config_of(f"{place}.c", "Lion", {}, "bf16")), folder),
        lambda: ds_optim.load_checkpoint(start(config_of(None, "Lion", {}, "bf16")), folder),
    ):
        try:
            make()
            said.append("")
        except ds_optim.UserError as problem:
            said.append(str(problem))
    return said


def start_loaded(place: str, folder: str) -> Any:
    """An engine that has loaded by DeepSpeed's own means."""
    engine = start(config_of(f"{place}.loaded", "Lion", {}, "bf16"))
    engine.load_checkpoint(folder)
    return engine


@pytest.mark.full
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    for said in run_ranks(2, refused, str(tmp_path / "files"), str(tmp_path / "checkpoint")):
        for line, part in zip(
            said,
            (
                "load with ds_optim.load_checkpoint(engine, folder)",
                "buffer_count is 2: write 3 or more",
                "load it in a new one",
                "state that was offloaded to NVMe, which ds-optim reshard does not read",
            ),
            strict=True,
        ):
            assert part in line
            assert "\n" not in line


# ------------------------------------------------------------------------------------------------ by the command


def commanded(rank: int, world_size: int, folder: Path, offload: Any, config: Any, flags: Any) -> Any:
    """The losses of ``ds-optim train --config``; offload: what it says of state, and of weights."""
    quiet()
    zero = {"stage": 3, "sub_group_size": 1, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 100_000}
    given = {
        "train_batch_size": 6,
        "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0, **offload},
        "optimizer": {"type": "LionMuon", "params": {"lr": 1e-3, **TYPES["LionMuon"]}},
        **config,
    }
    told = {"seq_len": 16, "steps": 4, "warmup": 0, "eval_batches": 1, "model": str(folder / "model"), **flags}
    return train(make_settings(**settings_from_json(given, told))).losses


IN_MEMORY = {"offload_optimizer": {"device": "cpu"}}


def places(folder: Path, *, weights: bool, inner: int) -> dict[str, Any]:
    """State in files under a folder, in which a model is written, and weights too. inner: intermediate size."""
    model = {**MODELS["qwen3"], "hidden_size": 512, "intermediate_size": inner}
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(model), encoding="utf-8")
    there = str(folder / "files")
    return {"offload_optimizer": {"device": "nvme", "nvme_path": there}, **(weights_at(there) if weights else {})}


_BF16 = {"bf16": {"enabled": True}}
# ranks, whether weights are in files too, and the config and flags.
BESIDE: Mapping[str, tuple[int, bool, Mapping[str, Any], Mapping[str, Any]]] = {
    "autocast": (3, False, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}),
    "zero.Init": (2, True, _BF16, {"zero_init": True}),
    "sequences cut": (2, True, {**_BF16, "sequence_parallel_size": 2}, {}),
    "AutoTP": (2, True, {**_BF16, "tensor_parallel": {"autotp_size": 2}}, {}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BESIDE)
def test_settings_beside_files_have_the_losses_of_memory(name: str, tmp_path: Path) -> None:
    """Under ``zero.Init`` it goes on from a checkpoint, too."""
    ranks, weights, config, flags = BESIDE[name]
    there = places(tmp_path, weights=weights, inner=2100 if weights else 1540)
    memory = run_ranks(ranks, commanded, tmp_path, IN_MEMORY, config, flags)
    saving = {"out": tmp_path / "out", "save_every": 2} if name == "zero.Init" else {}
    assert run_ranks(ranks, commanded, tmp_path, there, config, {**flags, **saving}) == memory
    assert any((tmp_path / "files").rglob("*_param.tensor.swp" if weights else "*.swp"))
    if saving:
        shutil.rmtree(tmp_path / "out/checkpoints/step-4")
        again = run_ranks(ranks, commanded, tmp_path, there, config, {**flags, **saving, "resume": True})
        assert again == [losses[2:] for losses in memory]
