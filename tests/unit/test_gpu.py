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
from ds_optim.elementwise.moments import Moments
from ds_optim.elementwise.momentum import Bfloat16, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey
from tests.tiers import cells

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from ds_optim.elementwise.gpu import kernels, launch, row_launch, rows  # noqa: E402
from ds_optim.elementwise.gpu.rules import RULES  # noqa: E402
from tests.unit.gpu_cases import cases  # noqa: E402

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
WEIGHTS = (*LION.direction, *LION.momentum)
MOMENTS = Moments(betas=(0.9, 0.95), eps=1e-8, step=3).weights
F32, BF16, INT8 = tl.float32, tl.int16, tl.int8
WIDE = {rule.name: tuple(F32 if letter in rule.tensors else None for letter in "pmvg") for rule in RULES.values()}
NARROW = {
    name: tuple({"p": BF16, "m": INT8, "v": None, "g": BF16}[x] if x in RULES[name].tensors else None for x in "pmvg")
    for name in ("sign_step", "blend_into", "apply_update", "cautious_step", "agreement", "move_momentum")
}
COMPILED = [
    *WIDE.items(),
    ("sign_step", (F32, None, None, F32)),
    ("sign_step", (F32, BF16, None, F32)),
    ("copy_into", (BF16, None, None, BF16)),
    ("lamb_measure", (BF16, F32, F32, BF16)),
    ("adamw_step", (BF16, F32, F32, BF16)),
    *NARROW.items(),
]  # fmt: skip
"""Rules, with the types of what p, m, v and g point to."""
ROUNDED_ANYHOW = {"sqrt.approx.ftz.f32", "cvt.rmi.ftz.f32.f32"}
"""Of the codes of int8: a root that is corrected after, and the whole part of a number above 1 or of almost 0."""
if triton.__version__.startswith("3.5."):
    ROUNDED_ANYHOW |= {"div.rn.ftz.f32", "sqrt.rn.ftz.f32"}


@pytest.mark.full
def test_bits_are_those_of_the_eager_path() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.gpu_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
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
    cache = kernels.run.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    every_call("cuda", more=7)
    assert len(cache) == before


@pytest.mark.cuda
def test_elements_beyond_32_bits_on_a_gpu() -> None:
    n = 2**31 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 16 * n:
        pytest.skip("a GPU with 32 GiB is needed")
    p, update = torch.zeros(n, device="cuda"), torch.ones(n, dtype=torch.bfloat16, device="cuda")
    assert launch.take("apply_update", (p, update.float()), (0.5, 1.0), None)
    assert bool((p == -0.5).all())


def test_nothing_is_compiled_anew_for_a_length_an_offset_a_rate_or_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton makes a key of, from the arguments of many calls."""
    recorded = Recorded(monkeypatch)
    every_call("cpu")
    every_call("cpu", more=7)
    every_call("meta", more=2**33)
    several = [launch._job(RULES["raw_step"], (torch.zeros(n),) * 3, ()) for n in (1, 16, 300)]
    launch.launch([job for job in several if job is not None])
    names = {"sign_step", "blend_into", "apply_update", "adamw_step", "lamb_measure", "raw_step"}
    assert {name: len(keys) for name, keys in recorded.keys.items()} == dict.fromkeys(names, 1)
    assert recorded.calls > 500
    assert recorded.aligned == {0, 1}, "aligned or not, it is one kernel"


class Recorded:
    """Stands for the kernels, and keeps by rule the keys of what they are called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: dict[str, set[str]] = {}
        self.aligned: set[int] = set()
        self.calls = 0
        backend = make_backend(GPUTarget("cuda", 90, 32))
        for name in ("run", "join_parts"):
            kernel = getattr(kernels, name)
            binder = create_function_from_signature(kernel.signature, kernel.params, backend)
            monkeypatch.setattr(kernels, name, self.stand_in(binder))

    def stand_in(self, binder: Any) -> Any:
        def call(table: torch.Tensor, *arguments: Any, **options: Any) -> None:
            if "rule" in options:
                key = str(binder(table, *arguments, **options)[1:])
                self.keys.setdefault(options["rule"].fn.__name__, set()).add(key)
                self.calls += 1
                if table.device.type != "meta":
                    self.aligned |= set(table[:-1, kernels.NAMES.index("aligned")].tolist())

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
        for name, tensors, numbers in (
            ("sign_step", (weights, m, g), (WEIGHTS, rate, 1 - rate)),
            ("blend_into", (p, m, g), (WEIGHTS,)),
            ("apply_update", (p, g), (rate, 1.0)),
            ("adamw_step", (p, v, g, g), ((0.9, 0.1, rate, 1 - rate, rate, 1.0, rate, 1.0),)),
            ("lamb_measure", (p, v, g, g), (MOMENTS, rate)),
        ):
            assert launch.take(name, tensors, numbers, None) is not False


def test_what_does_not_lie_in_step_is_left_to_the_eager_path() -> None:
    rounding = NoiseKey(seed=1, stream=2, step=3, start=4)
    values = torch.zeros(10, dtype=torch.bfloat16)
    p, m = Bfloat16(rounding=rounding, values=values), Bfloat16(rounding=replace(rounding, start=5), values=values)
    g = torch.zeros(10)
    moved = replace(m, writable=False)
    for name, tensors, numbers in (
        ("sign_step", (p, m, g), (WEIGHTS, 0.1, 1.0)),  # blocks of p and m begin elsewhere
        ("blend_into", (g, moved, g), (WEIGHTS,)),  # momentum that must not move
        ("apply_update", (g.double(), g), (0.1, 1.0)),
        ("apply_update", (torch.zeros(20)[::2], g), (0.1, 1.0)),
        ("sign_step", (g, g.bfloat16(), g), (WEIGHTS, 0.1, 1.0)),
        ("square_sums", (g.double(),), ()),
    ):
        assert launch.take(name, tensors, numbers, None) is False


def test_what_no_launch_has_shown_to_compile_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that where a compiler fails, the eager path does the work of that very call."""
    launches: list[int] = []
    monkeypatch.setattr(launch, "_start", lambda rule, types, jobs, *_: launches.append(len(jobs)))
    monkeypatch.setattr(launch, "_launched", set())
    waiting: list[Any] = []
    for _ in range(4):
        assert launch.take("raw_step", (torch.zeros(3),) * 3, (WEIGHTS, 0.1, 1.0), waiting)
    assert (launches, len(waiting)) == ([1], 3)
    assert launch.take("agreement", (torch.zeros(3),) * 2, (WEIGHTS,), waiting) is not False
    assert (launches, len(waiting)) == ([1, 1], 3)
    launch.launch(waiting)
    assert launches == [1, 1, 3]


@pytest.mark.parametrize(
    ("name", "types", "capability"),
    cells(
        [("sign_step", NARROW["sign_step"], 100), ("lamb_measure", WIDE["lamb_measure"], 90)],
        [*((*item, 90) for item in COMPILED), *((*item, other) for item in NARROW.items() for other in (80, 100))],
        [(*item, other) for item in COMPILED for other in (80, 100)],
    ),
)
def test_compiled_code(name: str, types: tuple[Any, ...], capability: int, fresh_cache: Path) -> None:
    """For GPUs that are not there: roundings as written, no spilled registers, 16 bytes at once."""
    made = compiled(name, types, capability)
    assert_rounded_as_written(made, fresh_cache)
    assert "ld.global.v4.b32" in made.asm["ptx"]
    if RULES[name].writes and name != "move_momentum":
        assert "st.global.v4.b32" in made.asm["ptx"]


OF_ROWS = [
    *(("sum_rows", (None, None, turned, False)) for turned in (False, True)),
    *(("gather_rows", (None, kind, turned, False)) for turned in (False, True) for kind in (F32, BF16)),
    *(("step_rows", (p, g, turned, False)) for turned in (False, True) for p, g in ((F32, BF16), (BF16, F32))),
    ("step_rows", (F32, BF16, False, True)),
]
"""Kernels for chosen rows, with the types of p and g, whether the rows are turned, and whether decay is cautious."""


@pytest.mark.parametrize(
    ("name", "types", "capability"),
    cells(
        [(*OF_ROWS[-1], 90)],
        [*((*item, 90) for item in OF_ROWS), *((*OF_ROWS[-1], other) for other in (80, 100))],
        [(*item, other) for item in OF_ROWS for other in (80, 100)],
    ),
)
def test_compiled_code_of_chosen_rows(name: str, types: tuple[Any, ...], capability: int, fresh_cache: Path) -> None:
    """Their elements stand where flags say, so that no thread moves several at once."""
    kernel, given = getattr(rows, name), row_launch.constants(name, types)
    assert_rounded_as_written(made_of(kernel, given, capability), fresh_cache)


def assert_rounded_as_written(made: Any, folder: Path) -> None:
    """And no spilled registers."""
    instructions = set(re.findall(r"^\s+(?:@%p\d+ )?([a-z]+\.[\w.:]+)", made.asm["ptx"], re.MULTILINE))
    assert not {one for one in instructions if one.startswith("fma")}
    loose = {one for one in instructions if re.search(r"ftz|approx|full|^(add|sub|mul)\.f32", one)}
    assert loose <= ROUNDED_ANYHOW
    usage = subprocess.run(
        [_tool("cuobjdump"), "-res-usage", _written(made.asm["cubin"], folder)], capture_output=True, text=True
    ).stdout
    assert re.search(r"STACK:(\d+)", usage)[1] == "0", usage  # type: ignore[index]


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def compiled(name: str, types: tuple[Any, ...], capability: int) -> Any:
    rule = RULES[name]
    given = launch.constants(rule, types)
    if not rule.columns:
        given["out"] = None
    return made_of(kernels.run, given, capability)


def made_of(kernel: Any, given: dict[str, Any], capability: int) -> Any:
    varying = {"table": "*i64", "slices": "i32", "out": "*fp64"}
    signature = {one.name: "constexpr" if one.name in given else varying[one.name] for one in kernel.params}
    source = ASTSource(kernel, signature, constexprs=given)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.OPTIONS)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _written(binary: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    return str(path)
