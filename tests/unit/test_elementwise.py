"""Flat steps: the formulas, AdamW against torch's, and bits that depend on an element's values alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import chunks as chunking
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch, chunk_elements
from ds_optim.elementwise.native import steps as native_steps
from ds_optim.elementwise.steps import adamw_step, apply_update, sign_step

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
SIGNUM = Blend((0.9, 1 - 0.9), (0.9, 1 - 0.9))
NESTEROV = Blend((0.95**2, 1 - 0.95**2), (0.95, 1 - 0.95))


def gauss(n: int, seed: int = 0) -> Tensor:
    """Values over thirty binades, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-20, 10, (n,), generator=generator))
    return values.masked_fill_(torch.rand(n, generator=generator) < 0.05, 0.0)


def f32(x: float) -> np.float32:
    return np.float32(x)


def numpy_blend(m: np.ndarray, g: np.ndarray, blend: Blend) -> tuple[np.ndarray, np.ndarray]:
    """(direction, next momentum) with one float32 rounding an operation."""
    (d0, d1), (k0, k1) = blend.direction, blend.momentum
    return m * f32(d0) + g * f32(d1), m * f32(k0) + g * f32(k1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 elements, so that small tensors have several and a short last one."""
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: 50)


@pytest.mark.parametrize("blend", [LION, SIGNUM, NESTEROV])
@pytest.mark.usefixtures("small_chunks")
def test_blend_rounds_as_documented(blend: Blend) -> None:
    m, g = gauss(333, 1), gauss(333, 2)
    direction, moved = numpy_blend(m.numpy().copy(), g.numpy().copy(), blend)
    before = g.clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        momentum, out = m.clone(), torch.full((333,), float("nan"), dtype=dtype)
        blend_into(out, momentum, g, blend)
        assert torch.equal(out, torch.from_numpy(direction).to(dtype))
        assert torch.equal(momentum, torch.from_numpy(moved))
        assert torch.equal(g, before)


@pytest.mark.usefixtures("small_chunks")
def test_blend_may_write_the_direction_over_the_gradient() -> None:
    m, g = gauss(333, 1), gauss(333, 2)
    direction, moved = numpy_blend(m.numpy().copy(), g.numpy().copy(), LION)
    blend_into(g, m, g, LION)
    assert np.array_equal(g.numpy(), direction)
    assert np.array_equal(m.numpy(), moved)


def test_blend_without_momentum_scales_the_gradient() -> None:
    g, out = gauss(100), torch.empty(100)
    blend_into(out, None, g, Blend((0.0, 2.0), (0.0, 0.0)))
    assert torch.equal(out, 2 * g)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("blend", [LION, SIGNUM])
@pytest.mark.usefixtures("small_chunks")
def test_sign_step(blend: Blend, decay: float) -> None:
    p, m, g = gauss(333, 3), gauss(333, 1), gauss(333, 2)
    m[:4], g[:4] = 0, 0
    direction, moved = numpy_blend(m.numpy().copy(), g.numpy().copy(), blend)
    want = p.numpy() * f32(1 - 1e-3 * decay) - f32(1e-3) * np.sign(direction)
    before = g.clone()
    sign_step(p, m, g, blend=blend, lr=1e-3, decay=decay)
    assert np.array_equal(p.numpy(), want)
    assert np.array_equal(m.numpy(), moved)
    assert torch.equal(g, before)


def test_zero_direction_only_decays() -> None:
    p = torch.ones(3)
    sign_step(p, torch.zeros(3), torch.tensor([0.0, -0.0, 1.0]), blend=LION, lr=0.5, decay=0.5)
    assert p.tolist() == [0.75, 0.75, 0.25]


def test_sign_step_without_momentum() -> None:
    p = torch.zeros(3)
    sign_step(p, None, torch.tensor([3.0, 0.0, -1e-30]), blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.5, decay=0.1)
    assert p.tolist() == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.usefixtures("small_chunks")
def test_adamw_is_torchs(decay: float) -> None:
    # Small weights, so that their last bit is small beside the displacement.
    theirs = torch.nn.Parameter(0.01 * torch.randn(333, generator=torch.Generator().manual_seed(0)))
    p, m, v = theirs.detach().clone(), torch.zeros(333), torch.zeros(333)
    start = p.clone()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    for step in range(1, 21):
        g = gauss(333, step)
        theirs.grad = g.clone()
        optimizer.step()
        adamw_step(p, m, v, g, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, decay=decay, step=step)
        assert torch.equal(g, theirs.grad)
    displacement = float((theirs.detach() - start).abs().max())
    assert float((p - theirs.detach()).abs().max()) < 2e-6 * displacement
    state = optimizer.state[theirs]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_chunks")
def test_apply_update(dtype: torch.dtype) -> None:
    p, update = gauss(333, 1), gauss(333, 2).to(dtype)
    before = update.clone()
    for scale in (1.0, 5.5):
        want = p.numpy() * f32(1 - 0.02 * 0.1) - update.float().numpy() * f32(0.02 * scale)
        apply_update(p, update, lr=0.02, decay=0.1, scale=scale)
        assert np.array_equal(p.numpy(), want)
    assert torch.equal(update, before)


def run_blend(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> None:
    """The direction, rounded to bfloat16, lands in p."""
    out = torch.empty(p.numel(), dtype=torch.bfloat16)
    blend_into(out, m, g, NESTEROV)
    p.copy_(out)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], None]] = {
    "blend": run_blend,
    "sign": lambda p, m, v, g: sign_step(p, m, g, blend=LION, lr=1.7e-3, decay=0.3),
    "adamw": lambda p, m, v, g: adamw_step(p, m, v, g, lr=1.7e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.3, step=3),
    "apply": lambda p, m, v, g: apply_update(p, g, lr=1.7e-3, decay=0.3),
    "apply bfloat16": lambda p, m, v, g: apply_update(p, g.bfloat16(), lr=1.7e-3, decay=0.3),
}


@pytest.mark.parametrize("name", STEPS)
def test_bits_depend_on_the_element_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensor against every length 1..67 at every odd offset, and against chunks of awkward lengths."""
    whole = [gauss(150, 1), gauss(150, 2), gauss(150, 3).abs(), gauss(150, 4)]
    want = [tensor.clone() for tensor in whole]
    STEPS[name](*want)
    for length in range(1, 68):
        for offset in range(1, 150 - length, 2):
            parts = [tensor.clone()[offset : offset + length] for tensor in whole]
            STEPS[name](*parts)
            for part, expected in zip(parts, want, strict=True):
                assert torch.equal(part, expected[offset : offset + length]), (length, offset)
    for size in (1, 7, 16, 33, 149):
        monkeypatch.setattr(chunking, "chunk_elements", lambda device, size=size: size)
        again = [tensor.clone() for tensor in whole]
        STEPS[name](*again)
        for tensor, expected in zip(again, want, strict=True):
            assert torch.equal(tensor, expected), size


def test_vectorized_roots_and_quotients_are_the_scalar_ones() -> None:
    """What AdamW leans on beside products and sums: IEEE's own root and quotient, in body, tail and alone."""
    x, y = gauss(5003, 1).abs(), gauss(5003, 2)
    y[y == 0] = 1
    root, quotient = x.double().sqrt().float(), x / y
    assert np.array_equal(root.numpy(), np.sqrt(x.numpy()))
    assert torch.equal(quotient, (x.double() / y.double()).float())
    for size in (1, 2, 15, 16, 17, 64, 1001):
        assert torch.equal(torch.cat([part.double().sqrt().float() for part in x.split(size)]), root)
        parts = zip(x.split(size), y.split(size), strict=True)
        assert torch.equal(torch.cat([a / b for a, b in parts]), quotient)


def test_scratch_is_two_chunks_and_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: 64)
    monkeypatch.setattr(native_steps, "library", lambda: None)
    scratch = Scratch()
    p, m, v, g = (gauss(1000, seed).abs() for seed in range(4))
    for _ in range(2):
        sign_step(p, m, g, blend=LION, lr=1e-3, decay=0.1, scratch=scratch)
        adamw_step(p, m, v, g, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=1, scratch=scratch)
        blend_into(torch.empty(1000), m, g, LION, scratch)
        apply_update(p, g, lr=1e-3, decay=0.1, scratch=scratch)
        assert scratch.nbytes == 2 * 64 * 4


def test_chunks_grow_with_the_threads() -> None:
    threads = torch.get_num_threads()
    assert chunk_elements(torch.device("cpu")) >= max(chunking.CPU_CHUNK, threads * chunking.CPU_GRAIN)
    assert chunk_elements(torch.device("cuda")) == chunking.CUDA_CHUNK


def test_empty_partition_is_a_step_like_any_other() -> None:
    for step in STEPS.values():
        step(*(torch.empty(0) for _ in range(4)))


def test_shapes_that_differ_are_an_error() -> None:
    p, m, g = torch.zeros(4), torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="m "):
        sign_step(p, m, g, blend=LION, lr=0.1, decay=0.0)
    with pytest.raises(ValueError, match="update"):
        apply_update(p, torch.zeros(2, 2), lr=0.1, decay=0.0)
    with pytest.raises(ValueError, match="from 1"):
        adamw_step(p, p, p, g, lr=0.1, betas=(0.9, 0.95), eps=1e-8, decay=0.0, step=0)
