"""The polar factor of a batch of matrices: what the ``polar`` object of the JSON says, and the dispatch on it.

polar(X) = UV' of the thin singular value decomposition X = USV'. Methods: ``standard`` and ``gram`` are
Newton-Schulz iterations (newton_schulz.py), ``svd`` is the exact reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError, instead
from ds_optim.matrix import dispatch, newton_schulz, symmetric
from ds_optim.matrix.normalize import nan_where_broken, prescaled
from ds_optim.matrix.precision import whole_fp32
from ds_optim.matrix.schedules import SCHEDULES, schedule

METHODS = ("auto", "standard", "gram", "svd")
NORMALIZATIONS = ("frobenius", "schatten4")
DEFAULT_STEPS = 5
_RESOLVED = ("gram_from", "strips")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PolarSpec:
    """How matrices are orthogonalized: the JSON object ``polar``.

    schedule: coefficients, ``keller`` (any step count), ``you`` (up to 5) or ``polar_express`` (5 or 8).
    steps: Newton-Schulz steps; None means 5.
    method: ``standard``, ``gram`` (iterates on the Gram matrix), ``svd`` (exact, slow) or ``auto``.
    normalize: ``frobenius`` or ``schatten4``: the norm that brings singular values into [0, 1].
    dtype: what the iteration computes in; norms are float32 always. ``auto`` asks the hardware. ``svd`` computes
        in float32 always; its dtype is that of the messages, and ``auto`` asks the model's weights.

    Set by ``resolve``, and no JSON keys:
    gram_from: the aspect above which ``auto`` means ``gram``.
    strips: into how many strips symmetric products are cut, (short side, strips from there on) pairs.
    """

    schedule: str = "keller"
    steps: int | None = DEFAULT_STEPS
    method: str = "auto"
    normalize: str = "frobenius"
    dtype: str = "auto"
    gram_from: float | None = None
    strips: dispatch.Strips | None = None

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("method", self.method, METHODS)
        _one_of("normalize", self.normalize, NORMALIZATIONS)
        _one_of("dtype", self.dtype, ("auto", *DTYPES))
        if self.steps is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool):
            raise UserError(f"polar.steps: {self.steps!r} is not a step count; write a whole number such as 5")
        schedule(self.schedule, self.steps)
        if self.method == "svd" and self.dtype == "float16":
            raise UserError(
                "polar.dtype: method 'svd' computes in float32 and raw directions vanish in a float16 message; "
                'write "float32" or "bfloat16"'
            )

    @staticmethod
    def from_json(options: Mapping[str, Any]) -> PolarSpec:
        """The spec that the JSON object says; UserError, with the nearest name, for what is unknown."""
        if not isinstance(options, Mapping):
            raise UserError(f'polar: {options!r} is no JSON object; write e.g. {{"schedule": "keller", "steps": 5}}')
        keys = [field.name for field in fields(PolarSpec) if field.name not in _RESOLVED]
        for key in options:
            if key not in keys:
                raise UserError(f"polar: unknown key '{key}'; {instead(key, keys)}")
        return PolarSpec(**options)

    def resolve(self, device: torch.device, weights: torch.dtype = torch.float32) -> PolarSpec:
        """The same spec with every ``auto`` decided for ``device``'s hardware and the model's dtype. Idempotent.

        Ranks on unlike hardware resolve unlike: resolve on one rank and send the result where plans must agree.
        """
        dtype = self.dtype
        if dtype == "auto" and self.method == "svd":
            dtype = "float32" if weights.itemsize >= 4 else "bfloat16"
        elif dtype == "auto":
            dtype = "bfloat16" if device.type != "cpu" or _cpu_has_bf16() else "float32"
        gram_from, strips = self.gram_from, self.strips
        # What the user's own machine has shown goes first.
        if gram_from is None:
            measured = dispatch.gram_from(device, dtype) if self.method == "auto" else None
            gram_from = dispatch.default_gram_from(device, dtype) if measured is None else measured
        if strips is None and self.method == "svd":
            strips = ()
        elif strips is None:
            found = dispatch.strips(device, dtype)
            strips = dispatch.default_strips(device, dtype) if found is None else found
        return replace(self, dtype=dtype, gram_from=gram_from, strips=strips)

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to be decided, so that no call decides it again."""
        return self.dtype != "auto" and self.gram_from is not None and self.strips is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the iteration's products; of a resolved spec only."""
        if self.dtype == "auto":
            raise RuntimeError("a PolarSpec with dtype 'auto' has no compute dtype: call resolve(device) first")
        return torch.float32 if self.method == "svd" else DTYPES[self.dtype]

    @property
    def message_dtype(self) -> torch.dtype:
        """The dtype of ``polar``'s input and output, and so of what travels between ranks.

        float32 where the spec says so, else bfloat16: raw directions near 1e-8 vanish in float16, so a float16
        iteration, too, is fed bfloat16 and casts after normalizing.
        """
        if self.dtype == "auto":
            raise RuntimeError("a PolarSpec with dtype 'auto' has no message dtype: call resolve(device) first")
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def method_for(self, m: int, n: int) -> str:
        """``standard``, ``gram`` or ``svd``: what an (m, n) matrix gets; of a resolved spec only.

        The Gram form is the standard one where it may take no two steps together, as with ``polar_express`` 5 in 16
        bits.
        """
        if self.method in ("standard", "svd"):
            return self.method
        if self.method == "auto" and self.gram_from is None:
            raise RuntimeError("a PolarSpec with method 'auto' has no method yet: call resolve(device) first")
        long_enough = self.gram_from is None or self.method == "gram" or max(m, n) > self.gram_from * min(m, n)
        return "gram" if long_enough and max(self.gram_segments) > 1 else "standard"

    @property
    def gram_segments(self) -> tuple[int, ...]:
        """How many steps the Gram form takes together each time; of a resolved spec only."""
        assert self.steps is not None
        return newton_schulz.gram_segments(schedule(self.schedule, self.steps), self.compute_dtype)

    def strips_for(self, m: int, n: int) -> int:
        """Into how many strips the symmetric products of an (m, n) matrix are cut; 1 is whole, as unresolved."""
        short = min(m, n)
        return next((count for side, count in reversed(self.strips or ()) if side <= short), 1)


def polar(x: Tensor, spec: PolarSpec) -> Tensor:
    """The polar factors of a batch: x (B, m, n) -> (B, m, n), a new contiguous tensor in x's dtype.

    x is in ``spec.message_dtype``, any strides, and is not written. Zero gives zero, finite input finite output, a
    matrix that is not finite NaN; a positive factor on x changes nothing. On CPU each matrix is worked alone on fresh
    tensors, so that its bits depend on its values alone: not on the batch, nor on where x lies in memory. On CUDA the
    batch is one batched product.
    """
    if x.dim() != 3:
        raise ValueError(f"polar takes a batch (B, m, n), not a tensor of shape {tuple(x.shape)}")
    if not spec.is_resolved:
        spec = spec.resolve(x.device)
    if x.dtype != spec.message_dtype:
        raise ValueError(f"polar takes messages in {spec.message_dtype} for dtype {spec.dtype}, not {x.dtype}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    # As it lies in memory: the factor of a transposed matrix is the transposed factor.
    turned = not x.is_contiguous() and x.mT.is_contiguous()
    source, target = (x.mT, out.mT) if turned else (x, out)
    factor = _iteration(spec, x.shape[1], x.shape[2])
    with torch.no_grad(), whole_fp32(x.device):
        if x.device.type == "cpu":
            for matrix, result in zip(source, target, strict=True):
                result.copy_(factor(matrix))
        else:
            target.copy_(factor(source))
    return out


@lru_cache(maxsize=1024)
def _iteration(spec: PolarSpec, m: int, n: int) -> Callable[[Tensor], Tensor]:
    """What gives an (m, n) matrix, or a batch of them, its polar factor in the compute dtype; of a resolved spec."""
    method = spec.method_for(m, n)
    if method == "svd":
        return _polar_svd
    assert spec.steps is not None
    return partial(
        newton_schulz.gram if method == "gram" else newton_schulz.standard,
        table=schedule(spec.schedule, spec.steps),
        dtype=spec.compute_dtype,
        schatten4=spec.normalize == "schatten4",
        strips=spec.strips_for(m, n),
    )


def _polar_svd(x: Tensor) -> Tensor:
    """UV' by float32 SVD, x (..., m, n). Singular values within rounding of zero give 0, non-finite entries NaN."""
    scaled, _ = prescaled(x)
    broken = nan_where_broken(scaled)
    u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
    del scaled
    kept = sigma > sigma[..., :1] * (max(x.shape[-2:]) * torch.finfo(torch.float32).eps)
    if x.shape[-2] <= x.shape[-1]:  # the square factor is the smaller copy
        u = u * kept.unsqueeze(-2)
    else:
        vh = vh * kept.unsqueeze(-1)
    return (u @ vh).add_(broken)


def cost(m: int, n: int, spec: PolarSpec, *, whole: bool = False) -> float:
    """Floating-point operations of one (m, n) matrix, s the short and l the long side; modelled for svd.

    standard: 4 s^2 l + 2 s^3 a step. gram: 4 s^2 l a segment and 8 s^3 a step, less what a segment's first
    and last step save. Of XX', half of the s^2 l, and of the s^3 only the share that ``spec``'s strips leave is done;
    all of it with ``whole``. svd: thin, 6 s^2 l + 20 s^3, and the product UV'. ``spec`` is a resolved one.
    """
    short, long = min(m, n), max(m, n)
    product, cube = 2.0 * short * short * long, 2.0 * short**3
    steps = spec.steps or DEFAULT_STEPS
    method = spec.method_for(m, n)
    if method == "svd":
        return 4 * product + 10 * cube
    share = 1.0 if whole else symmetric.share(short, spec.strips_for(m, n))
    if method == "standard":
        return steps * ((share + 1) * product + share * cube)
    total = 0.0
    for length in spec.gram_segments:
        total += (share + 1) * product + newton_schulz.gram_products(length) * share * cube
    return total


def scratch_elements(m: int, n: int, spec: PolarSpec) -> int:
    """Peak temporaries of one (m, n) matrix in ``polar``, input and output not counted.

    In elements of ``spec.compute_dtype``: a float32 element beside a 16-bit iteration counts as two. Scalars
    and what a library packs inside one product (oneDNN: up to one operand) are left out. s short, l long side;
    on CPU this is the scratch of the whole batch, on CUDA that of each matrix in it. ``spec`` is a resolved one.

    standard: 2 s l + 2 s^2 (X and its ping-pong partner; A, B).
    gram: 2 s l + 4 s^2 (X and its partner; R, Z, Q and one product).
    Where symmetric products are cut, each s^2 is s (s + 64 bytes of padding).
    svd: 2 s l + s^2 + s (the long factor and the product or X, the square factor, the singular values).
    All: at least the float32 copy that is normalized, and in 16 bits the cast X beside it.
    """
    area, short = m * n, min(m, n)
    method = spec.method_for(m, n)
    square = short * symmetric.stride(short, spec.compute_dtype, spec.strips_for(m, n))
    normalizing = area if spec.compute_dtype == torch.float32 else 3 * area
    iterating = {"standard": 2 * area + 2 * square, "gram": 2 * area + 4 * square, "svd": 2 * area + square + short}
    return max(normalizing, iterating[method])


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), by oneDNN's own answer."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"polar.{key}: unknown value {value!r}; {instead(str(value), choices)}")
