"""Weights in bf16: every step in fp32, and rounded without bias, so that what is far below half a step is not lost."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ds_optim
from ds_optim.cli.app import main
from ds_optim.elementwise import chunks as chunking
from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.momentum import WEIGHTS, Bfloat16
from ds_optim.elementwise.native import steps as native_steps
from ds_optim.elementwise.noise import NoiseKey, rounding_bits
from ds_optim.elementwise.steps import apply_update, sign_step
from ds_optim.errors import UserError
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.sharding import binding
from ds_optim.zero.support import check_config, check_wrapper
from tests import reference
from tests.philox import philox4x32
from tests.reference import Array
from tests.stepping import CONV_VIEW, SmallModel, build, random_grads, take_steps, weights_of
from tests.unit.test_optimizers import CASES, MATRIX_RULES

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


@pytest.fixture(autouse=True)
def steppable(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 parameters stepped directly, which a user is refused: what asks for it is DeepSpeed's JSON."""
    monkeypatch.setattr(binding, "_check_steppable", lambda tensor, name: None)


@pytest.fixture(params=["native", "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "eager":
        monkeypatch.setattr(native_steps, "library", lambda: None)
    elif not native.is_available():
        pytest.skip("no C compiler")


def stored(values: Tensor, step: int = 0, *, writable: bool = True) -> Bfloat16:
    rounding = NoiseKey(seed=0, stream=7, step=WEIGHTS + step, start=0)
    return Bfloat16(rounding=rounding, values=values, writable=writable)


def bf16_grads(steps: int) -> list[dict[str, Tensor]]:
    return [{name: g.bfloat16() for name, g in entry.items()} for entry in random_grads(steps)]


# ------------------------------------------------------------------------------------------------ rounding


def noise_of(name: str, step: int, numel: int, seed: int = 0) -> Array:
    """The 16 bits by which each weight is rounded, from the generator's definition."""
    element, counter_step = np.arange(numel, dtype=np.uint64), WEIGHTS + step
    which = element // 256 * 32 + element % 32
    words = [np.full(numel, counter_step & 0xFFFFFFFF), np.full(numel, counter_step >> 32), which, which * 0]
    found = philox4x32(np.stack(words, axis=1).astype(np.uint32), (seed, zlib.crc32(name.encode()) ^ 0xFFFFFFFF))
    half = (element % 256 // 32).astype(int)
    return (found[np.arange(numel), half // 2] >> (16 * (half % 2)).astype(np.uint32) & 0xFFFF).astype(np.float64)


def rounded(theta: Array, bits: Array) -> Array:
    """The bf16 neighbour of each weight that its bits choose: the upper one with the chance that keeps the mean."""
    size = np.abs(theta)
    step = 2.0 ** (np.floor(np.log2(np.maximum(size, 1e-300))) - 7)
    low = np.floor(size / step)
    return np.sign(theta) * step * (low + ((size / step - low) * 65536 + bits >= 65536))


def test_the_noise_of_weights_is_none_of_momentums() -> None:
    own = rounding_bits(torch.empty(4096), NoiseKey(seed=3, stream=7, step=WEIGHTS + 5, start=0)).double()
    momentums = rounding_bits(torch.empty(4096), NoiseKey(seed=3, stream=7, step=5, start=0)).double()
    correlation = torch.corrcoef(torch.stack([own, momentums]))[0, 1]
    assert abs(float(correlation)) < 5 / 4096**0.5
    assert np.array_equal(
        rounding_bits(
            torch.empty(900), NoiseKey(seed=0, stream=zlib.crc32(b"w"), step=WEIGHTS + 2**33 + 5, start=0)
        ).numpy(),
        noise_of("w", 2**33 + 5, 900).astype(np.int32),
    )


@pytest.mark.usefixtures("path")
def test_rounding_of_weights_has_no_bias() -> None:
    """Over 600 steps the mean is the value: |z| < 5 for each element, mean z^2 within 0.9-1.1."""
    draws = 600
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    exact = values.double().numpy()
    total = np.zeros(4096)
    for step in range(draws):
        p = torch.zeros(4096, dtype=torch.bfloat16)
        apply_update(stored(p, step), -values, lr=1.0, decay=0.0)
        total += p.double().numpy()
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    chance = np.abs(exact) / unit % 1
    usual = (chance > 0.03) & (chance < 0.97)
    z = (total / draws - exact)[usual] / (unit * np.sqrt(chance * (1 - chance) / draws))[usual]
    assert np.abs(z).max() < 5
    assert 0.9 < np.mean(z**2) < 1.1


@pytest.mark.usefixtures("path")
def test_updates_far_below_half_a_step_arrive() -> None:
    """1 - 200 x 1e-5, where a step of bf16 below 1 is 0.0039: the mean gets there, rounding to nearest stays at 1."""
    numel, steps, lr = 1 << 15, 200, 1e-5
    p, g, m = torch.ones(numel, dtype=torch.bfloat16), torch.ones(numel, dtype=torch.bfloat16), torch.zeros(numel)
    nearest = p.clone()
    for step in range(steps):
        sign_step(stored(p, step), m, stored(g, writable=False), blend=LION, lr=lr, decay=0.0)
        nearest = (nearest.float() - lr).bfloat16()
    assert float(p.float().mean()) == pytest.approx(1 - steps * lr, abs=1e-4)
    assert torch.equal(nearest, torch.ones_like(nearest))


@pytest.mark.usefixtures("path")
def test_what_went_wrong_does_not_look_sound() -> None:
    p = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.3e38, -0.0] * 60).bfloat16()
    apply_update(stored(p), torch.zeros(300), lr=1.0, decay=0.0)
    assert torch.isnan(p[0::5]).all()
    assert (p[1::5] == float("inf")).all()
    assert (p[2::5] == -float("inf")).all()
    assert torch.isfinite(p[3::5]).all()
    assert torch.signbit(p[4::5]).all()
    grown = torch.full((300,), 3.3e38).bfloat16()
    apply_update(stored(grown), torch.full((300,), -9e36), lr=1.0, decay=0.0)
    assert torch.isfinite(grown).all(), "the largest finite value has nowhere to be rounded up to"


def test_bits_do_not_depend_on_path_or_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for chunk, library in ((1 << 17, None), (512, None), (1 << 17, native_steps.library), (512, native_steps.library)):
        with monkeypatch.context() as patch:
            patch.setattr(chunking, "chunk_elements", lambda device, chunk=chunk: chunk)
            patch.setattr(native_steps, "library", library or (lambda: None))
            generator = torch.Generator().manual_seed(0)
            p, g = (torch.randn(3000, generator=generator).bfloat16() for _ in range(2))
            m = Bfloat16(rounding=NoiseKey(seed=0, stream=7, step=0, start=0), values=torch.zeros_like(p))
            sign_step(stored(p), m, stored(g, writable=False), blend=LION, lr=1e-3, decay=0.1)
            left.append(torch.cat([p, m.values]))
    assert all(torch.equal(left[0], other) for other in left[1:])


# -------------------------------------------------------------------------------------------------- rules


RULES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"lr": 1e-3, **hyper}) for name, hyper in CASES if "cautious_decay" not in hyper),
    ("Muon", {"lr": 1e-3, "aux": "adamw", "aux_lr": 1e-3}),
]


@pytest.mark.parametrize(("name", "hyper"), RULES)
def test_weights_are_the_fp64_references_rounded(name: str, hyper: dict[str, Any]) -> None:
    """Each step rounds what the reference computes from the last stored weights, by the noise that is due."""
    grads, model = bf16_grads(5), SmallModel().bfloat16()
    start = weights_of(model)
    exact = {"polar": {"dtype": "float32"}} if name in MATRIX_RULES else {}
    take_steps(model, build(name, model, **hyper, **exact), grads)
    found = weights_of(model)
    entries = [{key: g.double().numpy() for key, g in entry.items()} for entry in grads]

    def referred(shift: int) -> Mapping[str, Array]:
        def store(key: str, step: int, theta: Array) -> Array:
            return rounded(theta, noise_of(key, step + shift, theta.size, hyper.get("seed", 0)).reshape(theta.shape))

        return reference.run(name, start, entries, {**hyper, "matrix_views": CONV_VIEW}, store=store)

    apart = {
        shift: np.concatenate([(found[key] - theta).ravel() / 2.0**-7 for key, theta in referred(shift).items()])
        for shift in (0, 1)
    }
    # fp32 and fp64 may fall on two sides of the noise: rarely, and then the neighbour is taken.
    assert np.mean(apart[0] != 0) <= 0.01
    assert np.abs(apart[0]).max() <= 4
    assert np.mean(apart[1] != 0) > 0.05, "another step's noise would have done as well"


@pytest.mark.parametrize("name", ["SignSGD", "Lion", "Lamb", "Muon"])
def test_weights_are_rounded_by_the_optimizers_seed(name: str) -> None:
    found = []
    for seed in (0, 1, 1):
        model = SmallModel().bfloat16()
        take_steps(model, build(name, model, seed=seed), bf16_grads(1))
        found.append(weights_of(model))
    assert all((found[1][key] == found[2][key]).all() for key in found[0])
    assert any((found[0][key] != found[1][key]).any() for key in found[0])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_rule_trains_near_its_fp32_run(name: str) -> None:
    """Ten steps: apart by less than a fifth of the way that fp32 weights went; all state is fp32."""
    grads, found = bf16_grads(10), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = SmallModel(0.001).bfloat16().to(dtype)
        start = weights_of(model)
        optimizer = build(name, model, lr=0.01, diagnostics=True)
        take_steps(model, optimizer, [{key: g.to(dtype) for key, g in entry.items()} for entry in grads])
        found[dtype] = weights_of(model)
        kept = {v.dtype for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)}
        assert kept <= {torch.float32}
        shown = optimizer.diagnostics.values()  # type: ignore[attr-defined]
        assert shown
        assert np.isfinite(list(shown)).all()
    wide, narrow = found[torch.float32], found[torch.bfloat16]
    apart = sum(float(((narrow[n] - w) ** 2).sum()) for n, w in wide.items()) ** 0.5
    moved = sum(float(((w - start[n]) ** 2).sum()) for n, w in wide.items()) ** 0.5
    assert 0 < apart < moved / 5


class Storages(TorchDispatchMode):
    """The largest storage that an operation made anew, bytes."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["Lion", "StableLion", "CautiousLion", "StoSignSGD"])
def test_no_step_makes_a_full_copy(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks of 1024: nothing longer than a few of them is made, of p, g or m, in fp32 or otherwise."""
    chunk = 1024
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: chunk)
    model = torch.nn.Linear(256, 256, bias=False).bfloat16()
    optimizer = build(name, model, momentum_dtype=dtype)
    for _ in range(2):
        model.weight.grad = torch.randn_like(model.weight)
        state = (v for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v))
        with Storages(iter([model.weight, model.weight.grad, *state])) as seen:
            optimizer.step()
    assert 0 < seen.largest <= 16 * chunk < 2 * model.weight.numel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_load_keeps_dtype_and_bits(dtype: str) -> None:
    """Torch would make fp32 momentum and the scales of int8 bf16, as the weights are."""
    model = SmallModel().bfloat16()
    optimizer = build("Muon", model, momentum_dtype=dtype, aux="adamw")
    take_steps(model, optimizer, bf16_grads(2))
    again = build("Muon", model, momentum_dtype=dtype, aux="adamw")
    again.load_state_dict(optimizer.state_dict())
    for parameter, state in optimizer.state.items():
        assert set(state) == set(again.state[parameter])
        for key, value in state.items():
            restored = again.state[parameter][key]
            if torch.is_tensor(value):
                assert restored.dtype == value.dtype
                assert torch.equal(restored, value)


# ------------------------------------------------------------------------------------------------ refusals


def config(bf16: Mapping[str, Any], stage: int = 3, **other: Any) -> dict[str, Any]:
    zero = {"stage": stage, **other.pop("zero", {})}
    return {"optimizer": {"type": "Lion"}, "bf16": dict(bf16), "zero_optimization": zero, **other}


REFUSED = {
    "needs the states": (config({**MASTERS, "bf16_optimizer_states": False}), "set bf16_optimizer_states to true too"),
    "needs the masters": (config({**MASTERS, "bf16_master_weights_and_grads": False}), "set both to true"),
    "stage 0": (config(MASTERS, stage=0), "set zero_optimization.stage to 1, 2 or 3"),
    "bf16 off": (config({**MASTERS, "enabled": False}), 'set "enabled" to true in "bf16"'),
    "offload": (
        config(MASTERS, zero={"offload_optimizer": {"device": "cpu"}}),
        "leave zero_optimization.offload_optimizer out",
    ),
    "old offload": (config(MASTERS, zero={"cpu_offload": True}), "leave zero_optimization.offload_optimizer out"),
    "BF16_Optimizer": (
        config(MASTERS, stage=1, data_types={"grad_accum_dtype": "fp32"}),
        "leave data_types.grad_accum_dtype out, or use stage 2",
    ),
    "fp16": (config({}, fp16={"enabled": True, "fp16_master_weights_and_grads": True}), "master weights must be fp32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    given, remedy = REFUSED[name]
    with pytest.raises(UserError) as caught:
        ds_optim.from_config(torch.nn.Linear(4, 4), given)
    line = str(caught.value)
    assert remedy in line
    assert "is not supported" in line
    assert "\n" not in line


def test_what_can_be_is_taken() -> None:
    for stage in (1, 2, 3):
        ds_optim.from_config(torch.nn.Linear(4, 4), config(MASTERS, stage=stage))
    check_config(config(MASTERS, stage=2, data_types={"grad_accum_dtype": "fp32"}))
    check_config({"bfloat16": MASTERS, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}})


def test_wrappers_of_a_client_optimizer() -> None:
    own = {"master_weights_and_grads_dtype": torch.bfloat16, "bf16_optimizer_states": True}
    check_wrapper(SimpleNamespace(**own, low_precision_master_weights_and_grads=True, cpu_offload=False))
    check_wrapper(SimpleNamespace(**own, offload_optimizer=False))
    check_wrapper(SimpleNamespace(master_weights_and_grads_dtype=torch.float32))
    for other in (
        {**own, "bf16_optimizer_states": False},
        {**own, "offload_optimizer": True},
        {**own, "cpu_offload": True},
        {"master_weights_and_grads_dtype": torch.float16},
    ):
        with pytest.raises(UserError, match=r"not supported .* master weights must be fp32, or bf16 with") as caught:
            check_wrapper(SimpleNamespace(**other))
        assert "\n" not in str(caught.value)


def test_deepspeeds_wrappers_have_these_attributes() -> None:
    import inspect

    from deepspeed.runtime import base_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for wrapper, offload in ((stage3, "offload_optimizer"), (stage_1_and_2, "cpu_offload")):
        source = inspect.getsource(wrapper)
        assert "self.master_weights_and_grads_dtype = " in source
        assert f"self.{offload} = True" in source
    assert "self.bf16_optimizer_states = " in inspect.getsource(base_optimizer)


def test_without_deepspeed_bf16_parameters_stay_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = torch.nn.Linear(4, 4).bfloat16()
    optimizer = build("Lion", model)
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    with pytest.raises(UserError, match="nothing keeps fp32 master weights"):
        optimizer.step()


# ----------------------------------------------------------------------------------------------- estimates


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "--params", "1e6", "--ranks", "4", "--json", *words])
    assert not ended.value.code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_estimate_takes_a_flag_or_the_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--optimizers", "adamw,lion", "--momentum-dtype", "int8", "--accumulation", "1"]
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": MASTERS}))
    by_flag = rows(capsys, *words, "--bf16-masters")
    assert by_flag == rows(capsys, *words, "--config", str(tmp_path / "ds.json"))
    usual = rows(capsys, *words)
    assert by_flag[:2] == usual[:2], "stage 0 has no master weights of its own"
    for new, old in zip(by_flag[2:], usual[2:], strict=True):
        assert new["per_rank"]["master"] == 250_000 * 2 == old["per_rank"]["master"] // 2
        assert new["per_rank"]["gradients"] == old["per_rank"]["gradients"]
        assert new["per_rank"]["step_gradients"] == 250_000 * 2 == old["per_rank"]["step_gradients"] // 3
        assert new["saving_percent_of_adamw"]["model_states"] > old["saving_percent_of_adamw"]["model_states"]
        if new["optimizer"] == "adamw":  # torch's and DeepSpeed's keep state in the dtype of what they step
            assert new["per_rank"]["optimizer_state"] == old["per_rank"]["optimizer_state"] // 2
        else:
            assert new["state"] == old["state"]
            assert new["per_rank"]["chunks"] == old["per_rank"]["chunks"] == 2 * 512 + 250_000 // 256  # kernels' tables
    last = by_flag[-1]["per_rank"]
    assert (last["gradients"] + last["master"] + last["optimizer_state"]) / 250_000 == pytest.approx(5.0156, abs=1e-3)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0}, "stages 1 to 3"),
        ({"stage": 2, "dtype": "fp16"}, "dtype bf16, not fp16"),
        ({"stage": 2, "offload": True}, "not supported with offload"),
        ({"stage": 1, "grad_accum_dtype": "fp32"}, "use stage 2"),
    ],
)
def test_estimates_of_what_cannot_be_are_refused(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ZeroSettings(ranks=2, bf16_masters=True, **zero)


def test_a_json_with_half_of_the_pair_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {**MASTERS, "bf16_optimizer_states": False}}))
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "--params", "1e6", "--config", str(tmp_path / "ds.json")])
    assert ended.value.code == 2
    assert "set bf16_optimizer_states to true too" in capsys.readouterr().err
