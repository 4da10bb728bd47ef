"""The Triton kernels: bits of the eager path, no compiling twice, and what the compiler makes of them.

Without a GPU they run in Triton's interpreter, and are compiled for GPUs that are not there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.momentum import Bfloat16, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey
from tests.unit.gpu_cases import cases

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from ds_optim.elementwise.gpu import kernels, launch  # noqa: E402

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
WEIGHTS = (*LION.direction, *LION.momentum)
F32, BF16, INT8 = "*fp32", "*i16", "*i8"
COMPILED = {
    "sign_step": [(F32, None, None, F32), (F32, F32, None, F32), (F32, BF16, None, F32), (BF16, INT8, F32, BF16)],
    "blend_into": [(F32, F32, None, F32), (BF16, INT8, F32, F32)],
    "apply_update": [(F32, F32, None), (BF16, BF16, None)],
    "adamw_step": [(F32, F32, F32, F32)],
}
"""Types of the pointers that a kernel begins with."""
ROUNDED_ANYHOW = {"sqrt.approx.ftz.f32", "cvt.rmi.ftz.f32.f32"}
"""Of the codes of int8: a root that is corrected after, and the whole part of a number above 1 or of almost 0."""
if triton.__version__.startswith("3.5."):
    ROUNDED_ANYHOW |= {"div.rn.ftz.f32", "sqrt.rn.ftz.f32"}


@pytest.mark.full
def test_bits_are_those_of_the_eager_path() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.gpu_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    complaints = json.loads(done.stdout)
    assert list(complaints) == [case.name for case in cases()]
    assert {name: wrong for name, wrong in complaints.items() if wrong} == {}


@pytest.mark.cuda
def test_bits_on_a_gpu_are_those_of_the_eager_path_on_a_cpu() -> None:
    assert {case.name: wrong for case in cases() if (wrong := case.complaint("cuda"))} == {}


@pytest.mark.cuda
def test_a_gpu_compiles_once_for_all_lengths_offsets_rates_and_steps() -> None:
    every_call("cuda")
    caches = [getattr(kernels, name).device_caches[torch.cuda.current_device()][0] for name in COMPILED]
    before = [len(cache) for cache in caches]
    every_call("cuda", more=7)
    assert [len(cache) for cache in caches] == before


@pytest.mark.cuda
def test_elements_beyond_32_bits_on_a_gpu() -> None:
    n = 2**31 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 16 * n:
        pytest.skip("a GPU with 32 GiB is needed")
    p, update = torch.zeros(n, device="cuda"), torch.ones(n, dtype=torch.bfloat16, device="cuda")
    assert launch.apply_update(p, update, 0.5, 1.0)
    assert bool((p == -0.5).all())


def test_nothing_is_compiled_anew_for_a_length_an_offset_a_rate_or_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton makes a key of, from the arguments of many calls."""
    recorded = Recorded(monkeypatch)
    every_call("cpu")
    every_call("cpu", more=7)
    every_call("meta", more=2**33)
    assert {name: len(keys) for name, keys in recorded.keys.items()} == dict.fromkeys(COMPILED, 1)
    assert all(len(calls) > 50 for calls in recorded.calls.values())
    assert {call[-1] for call in recorded.calls["sign_step"]} == {0, 1}, "aligned or not, it is one kernel"


class Recorded:
    """Stands for the kernels, and keeps what they are called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: dict[str, set[str]] = {}
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        backend = make_backend(GPUTarget("cuda", 90, 32))
        for name in COMPILED:
            kernel = getattr(kernels, name)
            binder = create_function_from_signature(kernel.signature, kernel.params, backend)
            monkeypatch.setattr(kernels, name, self.stand_in(name, binder))

    def stand_in(self, name: str, binder: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.keys.setdefault(name, set()).add(str(binder(*arguments, **options)[1:]))
            self.calls.setdefault(name, []).append(arguments)

        return Subscripted(call)


class Subscripted:
    """``self[grid](...)`` calls a function."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self.call


def every_call(device: str, more: int = 0) -> None:
    """Each kernel for one set of dtypes, with all that may differ from call to call."""
    lengths, starts, rates, counts = (1, 16, 1000, 4096), (0, 77, 2**33), (0.0, 1.0, 1e-3), (1, 16, 2**33 + 17)
    for n, start, rate, count in product(lengths, starts, rates, counts):
        shift, size = (n + start) % 2, n + more
        rounding = NoiseKey(seed=count, stream=start, step=count, start=start)
        p, g, v = (torch.zeros(size + shift, device=device)[shift:] for _ in range(3))
        codes = torch.zeros(size + shift, dtype=torch.int8, device=device)[shift:]
        m = Int8(rounding=rounding, codes=codes, scales=torch.zeros(scales_numel(start, size), device=device))
        weights = Bfloat16(rounding=rounding, values=torch.zeros(size, dtype=torch.bfloat16, device=device))
        assert launch.sign_step(weights, m, g, WEIGHTS, rate, 1 - rate)
        assert launch.blend_into(p, m, g, WEIGHTS)
        assert launch.apply_update(p, g, rate, 1.0)
        assert launch.adamw_step(p, v, g, g, (0.9, 0.1, rate, 1 - rate, rate, 1.0, rate, 1.0))


def test_what_does_not_lie_in_step_is_left_to_the_eager_path() -> None:
    rounding = NoiseKey(seed=1, stream=2, step=3, start=4)
    values = torch.zeros(10, dtype=torch.bfloat16)
    p, m = Bfloat16(rounding=rounding, values=values), Bfloat16(rounding=replace(rounding, start=5), values=values)
    g = torch.zeros(10)
    assert not launch.sign_step(p, m, g, WEIGHTS, 0.1, 1.0), "blocks of p and m begin elsewhere"
    assert not launch.blend_into(g, replace(m, writable=False), g, WEIGHTS), "momentum that must not move"
    assert not launch.apply_update(g.double(), g, 0.1, 1.0)
    assert not launch.apply_update(torch.zeros(20)[::2], g, 0.1, 1.0)
    assert not launch.apply_update(g[:0], g[:0], 0.1, 1.0)


@pytest.mark.parametrize(("name", "pointers"), [(name, p) for name, many in COMPILED.items() for p in many])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code(name: str, pointers: tuple[str | None, ...], capability: int, fresh_cache: Path) -> None:
    """For GPUs that are not there: roundings as written, no spilled registers, 16 bytes at once."""
    made = compiled(name, pointers, capability)
    instructions = set(re.findall(r"^\s+(?:@%p\d+ )?([a-z]+\.[\w.:]+)", made.asm["ptx"], re.MULTILINE))
    assert not {one for one in instructions if one.startswith("fma")}
    loose = {one for one in instructions if re.search(r"ftz|approx|full|^(add|sub|mul)\.f32", one)}
    assert loose <= ROUNDED_ANYHOW
    assert "ld.global.v4.b32" in made.asm["ptx"]
    assert "st.global.v4.b32" in made.asm["ptx"]
    usage = subprocess.run(
        [_tool("cuobjdump"), "-res-usage", _written(made.asm["cubin"], fresh_cache)], capture_output=True, text=True
    ).stdout
    assert re.search(r"STACK:(\d+)", usage)[1] == "0", usage  # type: ignore[index]


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def compiled(name: str, pointers: tuple[str | None, ...], capability: int) -> Any:
    kernel = getattr(kernels, name)
    given = dict(zip((one.name for one in kernel.params), pointers, strict=False))
    types = {
        one.name: given[one.name] or "constexpr" if one.name in given else one.annotation_type for one in kernel.params
    }
    source = ASTSource(kernel, types, constexprs={name: None for name, type_ in given.items() if type_ is None})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.OPTIONS)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _written(binary: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    return str(path)
