"""How far two runs may lie apart, and how far they do.

Sharded training finds other gradients than unsharded training does: sums in another order, in 16 bits or
32. AdamW, which nobody doubts, says how much: its own gradients' difference from its unsharded run is the
noise of a cell. A rule that is fed the unsharded run's gradients with so much random noise on them ends up
some way off; the sharded run may end up that far, with a factor for chance, and no farther.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.rules import RULES
from ds_optim.optimizers.updates import MatrixSignUpdate, MatrixUpdate, ParameterUpdate, RowsUpdate, SignUpdate

from .training import Run, Trained, Weights, initial_weights, replay, total_norm

CHANCE = 3
"""Factor between one draw of noise and what a run may do; and flips that a run may have where a draw has none."""

LARGEST_FACTOR = 3
"""On a step size, by a trust ratio or a layer's scale."""


@dataclass
class Noise:
    """Differences of AdamW's gradients between sharded and unsharded runs.

    ``relative[t][name]``: Frobenius norm over the gradient's at step t. ``largest[name]``: of an entry, over
    all steps. ``displacement``: of AdamW's weights in the end, relative to the way they went.
    """

    relative: list[dict[str, float]]
    largest: dict[str, float]
    displacement: float


def measure_noise(pairs: Sequence[tuple[Trained, Trained]], dtype: str) -> Noise:
    """The largest differences of several (sharded, unsharded) runs of AdamW."""
    steps = range(len(pairs[0][0].gradients))
    names = list(pairs[0][0].weights)
    start = initial_weights(dtype)

    def relative(step: int, name: str) -> float:
        return max(_ratio(a.gradients[step][name], b.gradients[step][name]) for a, b in pairs)

    def largest(name: str) -> float:
        return max(float((a.gradients[t][name] - b.gradients[t][name]).abs().max()) for a, b in pairs for t in steps)

    return Noise(
        relative=[{name: relative(step, name) for name in names} for step in steps],
        largest={name: largest(name) for name in names},
        displacement=max(_distance(a.weights, b.weights, names) / _distance(b.weights, start, names) for a, b in pairs),
    )


def disturbed(gradients: Sequence[Weights], noise: Noise, seed: int = 0) -> list[Weights]:
    """The same gradients with random noise of the measured norm on each."""
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for entry, levels in zip(gradients, noise.relative, strict=True):
        changed = {}
        for name, g in entry.items():
            direction = torch.randn(g.shape, generator=generator)
            changed[name] = g + direction * (levels[name] * g.norm() / direction.norm())
        entries.append(changed)
    return entries


@dataclass
class Verdict:
    """One sharded run beside its unsharded one.

    replay_differs: parameters whose bits are not those of the unsharded optimizer fed the same gradients.
    changed, disturbed_changed, entries: weights under sign rules that differ, in the run and under noise, and all.
    off_multiple: how far their differences lie from whole multiples of the step size, in step sizes.
    apart, disturbed_apart, moved: Frobenius norms over the matrices of the difference between the runs, of that
    under noise, and of the way from the start. sign_step: step size of sign steps on matrices, 0 where none.
    flips, decisions: signs taken otherwise than unsharded, and all signs taken, of entries under sign rules.
    norms, raw_norms: of the whole gradient that the optimizer got, and that plain training had before clipping.
    farthest: the largest |c| of a flip, in units of AdamW's largest difference of that parameter's gradient.
    """

    weights: Weights = field(repr=False)
    replay_differs: list[str]
    noisy: bool
    adamw: float
    changed: int
    disturbed_changed: int
    entries: int
    off_multiple: float
    apart: float
    disturbed_apart: float
    moved: float
    sign_step: float
    flips: int
    decisions: int
    farthest: float
    norms: list[float]
    raw_norms: list[float]


def judge(run: Run, sharded: Trained, plain: Trained, shaken: Weights, noise: Noise) -> Verdict:
    """Compare a sharded run with the unsharded one, and with ``shaken``: the latter's weights under noise."""
    again = replay(run, sharded.gradients)
    rates, sign_step = _sign_rates(plain.optimizer)
    matrices = [name for name in plain.weights if name not in rates]
    multiples = {n: (sharded.weights[n] - plain.weights[n]).abs() / lr for n, lr in rates.items()}
    flips, decisions, farthest = _flips(sharded, plain, noise)
    return Verdict(
        weights=sharded.weights,
        replay_differs=[n for n, w in again.items() if not torch.equal(w, sharded.weights[n])],
        noisy=any(level > 0 for levels in noise.relative for level in levels.values()),
        adamw=noise.displacement,
        changed=sum(int((k > 0.5).sum()) for k in multiples.values()),
        disturbed_changed=sum(int(((shaken[n] - plain.weights[n]).abs() > 0.5 * lr).sum()) for n, lr in rates.items()),
        entries=sum(k.numel() for k in multiples.values()),
        off_multiple=max((float((k - k.round()).abs().max()) for k in multiples.values()), default=0.0),
        apart=_distance(sharded.weights, plain.weights, matrices),
        disturbed_apart=_distance(shaken, plain.weights, matrices),
        moved=_distance(plain.weights, initial_weights(run.dtype), matrices),
        sign_step=sign_step,
        flips=flips,
        decisions=decisions,
        farthest=farthest,
        norms=[total_norm(entry) for entry in sharded.gradients],
        raw_norms=plain.raw_norms,
    )


def _sign_rates(optimizer: Any) -> tuple[dict[str, float], float]:
    """The step size of each parameter that only ever takes signs; and that of the others when they do, or 0."""
    rates: dict[str, float] = {}
    on_matrices = 0.0
    for group, name in _named(optimizer):
        updates = [RULES[group["rule"]].update(group, step) for step in range(2)]
        sign = [update.lr for update in updates if isinstance(update, SignUpdate)]
        if len(sign) == len(updates):
            rates[name] = sign[0]
        elif sign:
            on_matrices = sign[0]
        elif isinstance(updates[0], MatrixSignUpdate):
            on_matrices = updates[0].lr
        elif any(isinstance(update, ParameterUpdate) for update in updates):
            on_matrices = LARGEST_FACTOR * group["lr"]
    return rates, on_matrices


def _named(optimizer: Any) -> list[tuple[dict[str, Any], str]]:
    assert isinstance(optimizer, ZeroOptimizer)
    groups = zip(optimizer.param_groups, optimizer.members, strict=True)
    return [(group, member.spec.name) for group, members in groups for member in members]


def _flips(sharded: Trained, plain: Trained, noise: Noise) -> tuple[int, int, float]:
    flips, decisions, farthest = 0, 0, 0.0
    for group, name in _named(plain.optimizer):
        if isinstance(RULES[group["rule"]].update(group, 0), ParameterUpdate | MatrixSignUpdate | RowsUpdate):
            continue  # what it takes signs of, and whether it does, is its own business
        ours, theirs = (_directions(group, name, trained.gradients) for trained in (sharded, plain))
        for c, expected in zip(ours, theirs, strict=True):
            if c is None or expected is None:
                continue
            flipped = c.sign() != expected.sign()
            flips += int(flipped.sum())
            decisions += c.numel()
            if flipped.any():
                farthest = max(farthest, float(expected[flipped].abs().max()) / max(noise.largest[name], 1e-300))
    return flips, decisions, farthest


def _directions(group: Mapping[str, Any], name: str, gradients: Sequence[Weights]) -> list[Tensor | None]:
    """In fp64, what each step takes the sign of; None at steps that orthogonalize."""
    momentum = torch.zeros_like(gradients[0][name], dtype=torch.float64)
    directions: list[Tensor | None] = []
    for step, entry in enumerate(gradients):
        g = entry[name].double()
        update = RULES[group["rule"]].update(dict(group), step)
        assert isinstance(update, SignUpdate | MatrixUpdate)
        (a, b), (c, d) = update.blend.direction, update.blend.momentum
        directions.append(a * momentum + b * g if isinstance(update, SignUpdate) else None)
        momentum = c * momentum + d * g
    return directions


def _ratio(value: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((value - expected).norm()) / scale if scale else 0.0


def _distance(one: Weights, other: Weights, names: Sequence[str]) -> float:
    return float(sum(((one[n] - other[n]).double() ** 2).sum() for n in names)) ** 0.5
