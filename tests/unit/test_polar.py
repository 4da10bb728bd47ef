"""The polar factor: the polynomials, their limits, and bits that depend on a matrix's values alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ds_optim.errors import UserError
from ds_optim.matrix import dispatch
from ds_optim.matrix.normalize import normalized
from ds_optim.matrix.polar import PolarSpec, cost, polar, scratch_elements
from ds_optim.matrix.precision import whole_fp32
from ds_optim.matrix.schedules import schedule
from ds_optim.matrix.shapes import normalized_in_weight_basis
from tests import reference

CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = [(1, 1), (1, 17), (23, 1), (16, 16), (24, 70), (130, 33), (64, 257)]


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma: Tensor, long: int) -> tuple[Tensor, Tensor]:
    """A wide float64 matrix with singular values ``sigma``, and its polar factor."""
    u, _ = torch.linalg.qr(gauss(len(sigma), len(sigma), seed=1).double())
    v, _ = torch.linalg.qr(gauss(long, len(sigma), seed=2).double())
    return (u * sigma.double()) @ v.mT, u @ v.mT


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def numpy_polynomial(x: Tensor, name: str, steps: int, normalize: str) -> np.ndarray:
    """float64 Newton-Schulz through the singular values: the polynomial acts on each alone."""
    u, sigma, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    table = schedule(name, steps)
    norm = (sigma**4).sum() ** 0.25 if normalize == "schatten4" else np.sqrt((sigma**2).sum())
    sigma = sigma / (norm * table.safety)
    for a, b, c in table.triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (u * sigma) @ vh


@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(
    ("name", "steps"),
    [("keller", 1), ("keller", 5), ("keller", 7), ("you", 3), ("you", 5), ("polar_express", 5), ("polar_express", 8)],
)
def test_polynomial_in_float32(name: str, steps: int, method: str, normalize: str) -> None:
    spec = PolarSpec(schedule=name, steps=steps, method=method, normalize=normalize, dtype="float32")
    for m, n in [(24, 70), (70, 24), (1, 9), (40, 40)]:
        x = gauss(1, m, n)
        want = torch.from_numpy(numpy_polynomial(x[0], name, steps, normalize))
        assert relative_error(polar(x, spec)[0], want) < 2e-5


# The table of ORTHOGONALIZATION.md for Gauss 512 x 2048, in bfloat16.
@pytest.mark.parametrize(("name", "error"), [("keller", 0.146), ("you", 0.017), ("polar_express", 0.094)])
def test_error_against_exact_factor(name: str, error: float) -> None:
    x = gauss(1, 512, 2048).bfloat16()
    exact = polar(x.float(), PolarSpec(method="svd"))
    errors = {}
    for method in ("standard", "gram"):
        got = polar(x, PolarSpec(schedule=name, method=method, dtype="bfloat16"))
        assert got.dtype == torch.bfloat16
        errors[method] = relative_error(got, exact)
    assert errors["standard"] == pytest.approx(error, abs=0.002)
    assert 0.98 * error < errors["gram"] < error + 0.002  # rounding happens to take it nearer


def test_schatten4_helps_ill_conditioned_input() -> None:
    x, exact = with_spectrum(torch.logspace(0, -3, 128), 128)
    errors = {}
    for normalize in ("frobenius", "schatten4"):
        spec = PolarSpec(schedule="polar_express", normalize=normalize, dtype="float32")
        errors[normalize] = relative_error(polar(x[None].float(), spec)[0], exact)
    assert errors["schatten4"] < 0.6 * errors["frobenius"]


def test_svd_is_exact_and_leaves_the_null_space_alone() -> None:
    x, exact = with_spectrum(torch.logspace(0, -3, 20), 50)
    spec = PolarSpec(method="svd")
    assert relative_error(polar(x[None].float(), spec)[0], exact) < 1e-3
    assert relative_error(polar(x.mT[None].float(), spec)[0], exact.mT) < 1e-3
    rank_one = polar(torch.ones(1, 4, 6), spec)
    torch.testing.assert_close(rank_one, torch.full((1, 4, 6), 24**-0.5))


@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
@pytest.mark.parametrize(("method", "dtype"), [*product(("standard", "gram"), DTYPES), ("svd", "float32")])
def test_limits_stay_finite(dtype: str, method: str, normalize: str) -> None:
    spec = PolarSpec(method=method, dtype=dtype, normalize=normalize)
    for m, n in SHAPES:
        zero = torch.zeros(2, m, n, dtype=spec.message_dtype)
        assert torch.equal(polar(zero, spec), zero)
        for size in (1e-45, 1e-38, 1e-30, 1e-8, 1e4, 1e30, 3e37):
            x = (gauss(2, m, n).clamp(-3, 3).double() * size).to(spec.message_dtype)
            assert polar(x, spec).isfinite().all(), (m, n, size)
        spike = torch.zeros(1, m, n, dtype=spec.message_dtype)
        spike[0, 0, 0] = torch.finfo(spec.message_dtype).max
        assert polar(spike, spec).isfinite().all()


def test_division_keeps_the_bits_of_ordinary_input() -> None:
    for size in (1e-6, 1.0, 1e5):
        x = gauss(3, 33, 65) * size
        for matrix in x:
            want = matrix / torch.linalg.vector_norm(matrix)
            assert torch.equal(normalized(matrix, dtype=torch.float32, safety=1.0), want)


def placements(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x (m, n) as a batch of one, in other places: offsets of a flat buffer, strides."""

    def at_offset(offset: int) -> Tensor:
        flat = torch.full((x.numel() + offset + 5,), float("nan"), dtype=x.dtype)
        flat[offset : offset + x.numel()] = x.flatten()
        return flat[offset : offset + x.numel()].view(1, *x.shape)

    def strided() -> Tensor:
        wide = torch.zeros(x.shape[0], 2 * x.shape[1] + 1, dtype=x.dtype)
        wide[:, 1::2] = x
        return wide[:, 1::2][None]

    places: dict[str, Callable[[], Tensor]] = {f"offset {k}": lambda k=k: at_offset(k) for k in (1, 3, 7, 13)}
    return places | {"strided": strided}


@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
@pytest.mark.parametrize(("method", "dtype"), [*product(("standard", "gram"), DTYPES), ("svd", "float32")])
def test_bits_depend_on_the_matrix_alone(dtype: str, method: str, normalize: str) -> None:
    spec = PolarSpec(method=method, dtype=dtype, normalize=normalize)
    for m, n in SHAPES:
        batch = gauss(5, m, n).to(spec.message_dtype)
        together = polar(batch, spec)
        assert together.is_contiguous()
        for index, x in enumerate(batch):
            alone = polar(x[None].clone(), spec)[0]
            assert torch.equal(alone, together[index]), (m, n, "batch")
        for place, make in placements(batch[3]).items():
            assert torch.equal(polar(make(), spec)[0], together[3]), (m, n, place)
        # A transposed parameter is worked on as it is stored; how a single row is stored cannot be told.
        assert min(m, n) == 1 or torch.equal(polar(batch.mT, spec).mT, together), (m, n, "turned")


def test_input_is_not_written() -> None:
    for dtype in DTYPES:
        for method in ("standard", "gram"):
            spec = PolarSpec(dtype=dtype, method=method)
            x = gauss(2, 12, 30).to(spec.message_dtype)
            before = x.clone()
            polar(x, spec)
            assert torch.equal(x, before)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "n"), [(96, 120), (96, 480), (480, 96)])
@pytest.mark.parametrize("strips", [1, 3])
def test_scratch_is_what_it_says(strips: int, m: int, n: int, dtype: str, method: str) -> None:
    """The peak that the allocator sees during polar, for a batch of three, beyond the output.

    Left out: scalars, and the workspace of a product, which is freed right after it was allocated.
    """
    spec = PolarSpec(dtype=dtype, method=method, strips=((1, strips),))
    x = gauss(3, m, n).to(spec.message_dtype)
    polar(x, spec)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        out = polar(x, spec)
    assert trace.profiler is not None
    events = trace.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    live = peak = 0
    for change, following in zip(changes, [*changes[1:], 0], strict=True):
        live += change
        if following != -change:
            peak = max(peak, live)
    assert live == out.nbytes
    stated = scratch_elements(m, n, spec) * spec.compute_dtype.itemsize
    assert stated <= peak - out.nbytes <= stated + 4096


def test_auto_resolves_by_hardware() -> None:
    spec = PolarSpec().resolve(CPU)
    assert spec.dtype in ("float32", "bfloat16")
    assert spec.resolve(CPU) == spec
    rows = 100 * dispatch.default_gram_from(CPU, spec.dtype)
    assert (spec.method_for(100, int(rows)), spec.method_for(int(rows) + 1, 100)) == ("standard", "gram")
    cuda = PolarSpec().resolve(torch.device("cuda"))
    assert (cuda.dtype, cuda.method_for(100, 150), cuda.method_for(151, 100)) == ("bfloat16", "standard", "gram")
    assert PolarSpec(dtype="float16").message_dtype == torch.bfloat16
    assert PolarSpec(method="svd").resolve(CPU).message_dtype == torch.float32
    half = PolarSpec(method="svd").resolve(CPU, torch.float16)
    assert (half.message_dtype, half.compute_dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match="resolve"):
        _ = PolarSpec().message_dtype
    x = gauss(1, 8, 40).to(spec.message_dtype)
    assert torch.equal(polar(x, PolarSpec()), polar(x, PolarSpec(method="gram", dtype=spec.dtype)))


def test_cost_is_the_flop_count() -> None:
    def spec(method: str, **options: Any) -> PolarSpec:
        return PolarSpec(method=method, **{"dtype": "float32", **options})

    for m, n in [(768, 768), (768, 2304), (2304, 768)]:
        short, long = min(m, n), max(m, n)
        assert cost(m, n, spec("standard")) == 20 * short**2 * long + 10 * short**3
        assert cost(m, n, spec("gram")) == 12 * short**2 * long + 22 * short**3
        for dtype in ("bfloat16", "float16"):
            assert cost(m, n, spec("gram", dtype=dtype)) == 12 * short**2 * long + 22 * short**3
            one_pair = 16 * short**2 * long + 16 * short**3
            assert cost(m, n, spec("gram", schedule="you", dtype=dtype)) == one_pair
            alike = [spec(method, schedule="polar_express", dtype=dtype) for method in ("gram", "standard")]
            assert cost(m, n, alike[0]) == cost(m, n, alike[1])
            assert scratch_elements(m, n, alike[0]) == scratch_elements(m, n, alike[1])
    # Cut, towards 15 n^2 m + 5 n^3 and 9 n^2 m + 11 n^3.
    for strips, share in ((2, 0.75), (4, 0.625), (24, 25 / 48)):
        cut, n = ((64, strips),), 768
        standard = 10 * (1 + share) * n**2 * 2304 + 10 * share * n**3
        assert cost(n, 2304, spec("standard", strips=cut)) == pytest.approx(standard)
        gram = 6 * (1 + share) * n**2 * 2304 + 22 * share * n**3
        assert cost(n, 2304, spec("gram", strips=cut)) == pytest.approx(gram)
        assert cost(2304, n, spec("gram", strips=cut), whole=True) == 12 * n**2 * 2304 + 22 * n**3
        assert cost(32, 40, spec("gram", strips=cut)) == cost(32, 40, spec("gram"))
    assert cost(64, 128, spec("svd")) == 8 * cost(64, 32, spec("svd"))


@pytest.fixture
def settings_of_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.mark.parametrize("ask", ["high", "medium"])
@pytest.mark.usefixtures("settings_of_precision")
def test_what_the_model_may_multiply_in_is_no_matter(ask: str) -> None:
    x, w = (gauss(1, 200, 300, seed=seed) for seed in (0, 1))
    spec = PolarSpec(dtype="float32")
    expected = polar(x, spec), normalized_in_weight_basis(x, w)
    torch.set_float32_matmul_precision(ask)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert torch.equal(polar(x, spec), expected[0])
    assert torch.equal(normalized_in_weight_basis(x, w), expected[1])
    assert torch.get_float32_matmul_precision() == ask
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("way", ["medium", "high", "tf32", "allow_tf32", "nothing"])
@pytest.mark.usefixtures("settings_of_precision")
def test_the_setting_comes_back_whichever_way_it_was_made(way: str, device: str) -> None:
    """After an exception too; torch's older question is answered again."""
    cuda = torch.backends.cuda.matmul
    if way == "allow_tf32":
        cuda.allow_tf32 = True
    elif way == "tf32":
        cuda.fp32_precision = "tf32"
    elif way != "nothing":
        torch.set_float32_matmul_precision(way)
    backend = cuda if device == "cuda" else torch.backends.mkldnn.matmul

    def asked() -> tuple[str, str, bool]:
        older = way != "tf32" and cuda.allow_tf32
        return cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, older

    before = asked()

    def work() -> None:
        with whole_fp32(torch.device(device)):
            assert backend.fp32_precision in ("ieee", "none")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert asked() == before
    if device == "cuda" and way != "nothing":
        assert before[0] == "tf32"


def test_wrong_dtype_or_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="float32"):
        polar(gauss(1, 4, 4).bfloat16(), PolarSpec(dtype="float32"))
    with pytest.raises(ValueError, match=r"\(B, m, n\)"):
        polar(gauss(4, 4), PolarSpec(dtype="float32"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shedule": "keller"}, "unknown key 'shedule'; did you mean 'schedule'"),
        ({"gram_from": 2}, "unknown key 'gram_from'"),
        ({"strips": [[64, 2]]}, "unknown key 'strips'"),
        ({"schedule": "kellr"}, "did you mean 'keller'"),
        ({"method": "grams"}, "did you mean 'gram'"),
        ({"normalize": ["frobenius"]}, "polar.normalize"),
        ({"dtype": "bf16"}, "write one of auto, float32, bfloat16, float16"),
        ({"steps": 0}, "write 1 or more"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"schedule": "you", "steps": 6}, "write 1 to 5"),
        ({"schedule": "polar_express", "steps": 6}, "write 5 or 8"),
        ({"method": "svd", "dtype": "float16"}, 'write "float32" or "bfloat16"'),
    ],
)
def test_bad_options_name_what_to_write(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        PolarSpec.from_json(options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_round() -> None:
    with pytest.raises(UserError, match="JSON object"):
        PolarSpec.from_json("keller")  # type: ignore[arg-type]
    assert PolarSpec.from_json({}) == PolarSpec()
    spec = PolarSpec.from_json({"schedule": "polar_express", "steps": 8, "method": "gram", "dtype": "float16"})
    assert (spec.schedule, spec.steps, spec.method) == ("polar_express", 8, "gram")
    assert spec.compute_dtype == torch.float16


@pytest.mark.parametrize(("name", "steps"), list(reference.SCHEDULES))
def test_every_step_moves_singular_values_as_the_reference_does(name: str, steps: int) -> None:
    """One by one: later steps hide a wrong digit of an earlier one."""
    triples, safety = reference.SCHEDULES[name, steps]
    table = schedule(name, steps)
    sigma = torch.linspace(0.05, 1.1, 40, dtype=torch.float64)
    for ours, theirs in zip(table.triples, triples, strict=True):
        moved, expected = (a * sigma + b * sigma**3 + c * sigma**5 for a, b, c in (ours, theirs))
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
    assert table.safety == safety
