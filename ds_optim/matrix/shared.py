"""Newton-Schulz on one matrix that several ranks share: each holds a part of the long side.

X (s, l) = [X_1 ... X_g]: A = sum of X_i X_i' and each rank's X_i <- a X_i + (bA + cAA) X_i. Parts of the sum travel in
the dtype of computation; each rank adds up an equal share of A's rows in fp32, in the order of the ranks, and works on
the same rows of bA + cAA. So all ranks have A and B to the bit alike, whatever carries their messages, and what is
computed is the standard form but for the rounding of the parts.

A parameter's parts are rows of it as it is stored, (m_i, n). Those of a wide matrix, m < n, are dealt out anew by
columns first, and back at the end.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_optim.matrix import symmetric
from ds_optim.matrix.normalize import prescaled, schatten4_rescale
from ds_optim.matrix.polar import DEFAULT_STEPS, PolarSpec
from ds_optim.matrix.precision import whole_fp32
from ds_optim.matrix.schedules import Schedule, schedule

_TINY = torch.finfo(torch.float32).tiny
_NORM_BYTES = 8
#: What a byte between the ranks of a node costs in operations of a product, and a message beside its bytes. A guess for
#: GPUs of 2022 on (600e12 bf16 operations a second, 300 to 360e9 bytes one way, 30 microseconds); measured on none.
_BYTE, _MESSAGE = 2000.0, 2e10


class Peers(Protocol):
    """The ranks that share a matrix, this one among them."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_to_all(self, out: Tensor, out_counts: list[int], message: Tensor, counts: list[int]) -> Any:
        """``counts[r]`` elements of the 1-D ``message`` to rank r; what comes is there after ``wait()``."""

    def all_gather(self, out: Tensor, values: Tensor) -> None:
        """The 1-D ``values`` of all ranks, one behind the other."""


def bounds(size: int, ranks: int) -> tuple[int, ...]:
    """Where each rank's rows (or columns) of so many begin, and ``size`` at the end."""
    return tuple(size * rank // ranks for rank in range(ranks + 1))


def polar_of_rows(rows: Tensor, m: int, spec: PolarSpec, peers: Peers) -> Tensor:
    """The same rows of the polar factor of a matrix (m, n): rows (m_i, n) as ``bounds`` has them -> (m_i, n), new.

    rows and result are in ``spec.message_dtype``; collective; of a resolved spec that is no svd.
    """
    n = rows.shape[1]
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    with torch.no_grad(), whole_fp32(rows.device):
        if m >= n:
            return out.copy_(_iterated(rows.mT, spec, min(m, n), peers).mT)
        columns = _iterated(_to_columns(rows, m, peers), spec, m, peers).to(rows.dtype)
        return _to_rows(columns, out, peers)


def _iterated(x: Tensor, spec: PolarSpec, side: int, peers: Peers) -> Tensor:
    """x (s, l_i) in any strides -> its part of the polar factor, in the compute dtype."""
    assert spec.steps is not None
    table, schatten4 = schedule(spec.schedule, spec.steps), spec.normalize == "schatten4"
    x = _normalized(x, peers, spec.compute_dtype, 1.0 if schatten4 else table.safety)
    return _newton_schulz(x, table, schatten4=schatten4, strips=spec.strips_for(side, side), peers=peers)


def _normalized(x: Tensor, peers: Peers, dtype: torch.dtype, safety: float) -> Tensor:
    """This rank's part of X / (safety ||X||_F), contiguous: as ``normalize.normalized``, by all parts' norms."""
    scaled, scale = prescaled(x)
    own = torch.linalg.vector_norm(scaled, dtype=torch.float64).div_(scale.double().squeeze()).view(1)
    norms = own.new_empty(peers.world_size)
    peers.all_gather(norms, own)
    # In fp64, whose range squares of fp32 do not leave: each part has a power of two of its own.
    norm = torch.linalg.vector_norm(norms).mul_(safety).mul_(scale.double().squeeze()).float()
    return scaled.div_(norm.clamp_min_(_TINY)).to(dtype)


def _newton_schulz(x: Tensor, table: Schedule, *, schatten4: bool, strips: int, peers: Peers) -> Tensor:
    """x (s, l_i), which is overwritten: allocates its ping-pong partner, A and B in rows for all ranks, and some rows.

    What is A's square holds this rank's part of the sum first, and B's what came of the others'.
    """
    side = len(x)
    own = -(-side // peers.world_size)
    first, second = (x.new_zeros(own * peers.world_size, side) for _ in range(2))
    a_matrix, b_matrix, mine = first[:side], second[:side], slice(own * peers.rank, own * (peers.rank + 1))
    spare = torch.empty_like(x)
    for step, (a, b, c) in enumerate(table.triples):
        symmetric.matmul(x, x.mT, out=a_matrix, strips=strips)
        first[side:] = 0
        peers.all_gather(first.view(-1), _summed(first, second, own, peers).view(-1))
        if step == 0 and schatten4:
            schatten4_rescale(x, a_matrix, safety=table.safety)
        rows = torch.addmm(first[mine], first[mine], a_matrix, beta=b, alpha=c)
        peers.all_gather(second.view(-1), rows.view(-1))
        torch.addmm(x, b_matrix, x, beta=a, alpha=1.0, out=spare)
        x, spare = spare, x
    return x


def _summed(parts: Tensor, arrived: Tensor, rows: int, peers: Peers) -> Tensor:
    """This rank's rows of the sum of all ranks' parts (g rows, s): (rows, s). Ranks in order, in fp32."""
    counts = [rows * parts.shape[1]] * peers.world_size
    peers.all_to_all(arrived.view(-1), counts, parts.view(-1), counts).wait()
    total = torch.zeros(rows, parts.shape[1], dtype=torch.float32, device=parts.device)
    for part in arrived.split(rows):
        total += part
    return total.to(parts.dtype)


def _to_columns(rows: Tensor, m: int, peers: Peers) -> Tensor:
    """Rows (m_i, n) of each rank -> columns (m, n_i)."""
    n, ranks = rows.shape[1], peers.world_size
    tall, wide = bounds(m, ranks), bounds(n, ranks)
    own = wide[peers.rank + 1] - wide[peers.rank]
    message = torch.cat([rows[:, start:stop].reshape(-1) for start, stop in pairwise(wide)])
    out = rows.new_empty(m, own)
    out_counts = [(stop - start) * own for start, stop in pairwise(tall)]
    peers.all_to_all(out.view(-1), out_counts, message, [len(rows) * (e - b) for b, e in pairwise(wide)]).wait()
    return out


def _to_rows(columns: Tensor, out: Tensor, peers: Peers) -> Tensor:
    """The inverse: columns (m, n_i) -> ``out`` (m_i, n)."""
    (m, own), (mine, n) = columns.shape, out.shape
    tall, wide = bounds(m, peers.world_size), bounds(n, peers.world_size)
    arrived = out.new_empty(out.numel())
    counts = [mine * (stop - start) for start, stop in pairwise(wide)]
    peers.all_to_all(arrived, counts, columns.reshape(-1), [(e - b) * own for b, e in pairwise(tall)]).wait()
    return torch.cat([piece.view(mine, -1) for piece in arrived.split(counts)], dim=1, out=out)


# --------------------------------------------------------------------------------------------- what it takes


def cost(m: int, n: int, spec: PolarSpec, ranks: int) -> float:
    """Operations of each of so many ranks that share an (m, n) matrix, and what its messages cost in such."""
    s, long = min(m, n), max(m, n)
    steps, item = spec.steps or DEFAULT_STEPS, spec.compute_dtype.itemsize
    products = (symmetric.share(s, spec.strips_for(m, n)) + 1) * 2.0 * s * s * long + 2.0 * s**3
    away = (ranks - 1) / ranks
    total = steps * (products / ranks + 3 * (away * s * s * item * _BYTE + _MESSAGE))
    recut = 2 * (away * s * long / ranks * spec.message_dtype.itemsize * _BYTE + _MESSAGE)
    return total + (recut if m < n else 0.0) + _MESSAGE


def sent_bytes(m: int, n: int, spec: PolarSpec, ranks: int, rank: int) -> int:
    """Bytes that ``rank`` of those sends the others to orthogonalize an (m, n) matrix that they hold rows of."""
    s = min(m, n)
    steps, others = spec.steps or DEFAULT_STEPS, ranks - 1
    squares = 3 * steps * others * -(-s // ranks) * s * spec.compute_dtype.itemsize
    if m >= n:
        return squares + others * _NORM_BYTES
    rows, columns = (b[rank + 1] - b[rank] for b in (bounds(m, ranks), bounds(n, ranks)))
    recut = rows * (n - columns) + columns * (m - rows)
    return squares + others * _NORM_BYTES + recut * spec.message_dtype.itemsize


def scratch_bytes(m: int, n: int, spec: PolarSpec, ranks: int) -> int:
    """Peak temporaries of the rank with the largest part, input and output not counted.

    As much as its part of the factor; its part p = s l / g, rounded up: the fp32 copy that is normalized and the cast
    one, or the latter, its partner, two squares, and rows of them: their sum in fp32 and rounded, and B's. Of a wide
    matrix its columns and a message, too.
    """
    s, item = min(m, n), spec.compute_dtype.itemsize
    part = s * -(-max(m, n) // ranks)
    # By rows or by columns, a part is not larger than this.
    most = max(part, -(-m // ranks) * n) * spec.message_dtype.itemsize
    rows = -(-s // ranks) * s
    iterating = 2 * part * item + 2 * ranks * rows * item + rows * (4 + 2 * item)
    normalizing = part * (4 if spec.compute_dtype == torch.float32 else 4 + item)
    if m >= n:
        return most + max(normalizing, iterating)
    return most + max(2 * most, most + max(normalizing, iterating), part * item + 2 * most)
