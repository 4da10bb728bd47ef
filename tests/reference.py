"""Every rule of the specification once more, in fp64 NumPy: what the package is measured against.

Written from the specification alone. It imports neither ds_optim nor torch and shares no line with either, so
that a mistake would have to be made twice to go unseen. Whole parameters, one process, no thought of speed.

A rule is a function ``rule(theta, g, s, h) -> theta``:

theta   the parameter, float64, any shape (a matrix rule gets it as (m, n))
g       its gradient, same shape
s       its state; an entry that is not there yet counts as zero.  ``s["signed"]`` is what a sign was taken of.
h       its hyperparameters, and of this step: ``eta`` (step size), ``t`` (steps before), ``name``

``run`` sends each parameter of a model to the rule it belongs to and takes the steps.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.philox import uniform_noise

Array = NDArray[np.float64]
State = dict[str, Any]
Hyper = dict[str, Any]
StepFunction = Callable[[Array, Array, State, Hyper], Array]
Observer = Callable[[str, int, State], None]
Store = Callable[[str, int, Array], Array]

KELLER = [(3.4445, -4.7750, 2.0315)] * 5
YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
POLAR_EXPRESS_5 = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
POLAR_EXPRESS_8 = [
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.875, -1.25, 0.375),
]
SCHEDULES = {
    ("keller", 5): (KELLER, 1.0),
    ("you", 5): (YOU, 1.0),
    ("polar_express", 5): (POLAR_EXPRESS_5, 1.02),
    ("polar_express", 8): (POLAR_EXPRESS_8, 1.0),
}
EXACT_POLAR = {"method": "svd"}


# ---------------------------------------------------------------------------------------- polar factors


def newton_schulz(x: Array, schedule: str = "keller", steps: int = 5, dtype: DTypeLike = np.float64) -> Array:
    """The odd polynomial of the schedule on x / ||x||_F, wide side along the columns.  x: (m, n) -> (m, n).

    The eps of the specification, 1e-7, is taken for what it is there for: 0 / 0 is 0.
    """
    triples, safety = SCHEDULES[schedule, steps]
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = (wide / (safety * np.linalg.norm(wide) or 1.0)).astype(dtype)
    for a, b, c in np.array(triples, dtype=dtype):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    out = wide.T if x.shape[0] > x.shape[1] else wide
    return out.astype(np.float64)


def exact_polar(x: Array) -> Array:
    """U V' of the thin SVD; a direction with singular value 0 is left out, so that the factor of 0 is 0."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    kept = sigma > max(x.shape) * np.finfo(np.float64).eps * sigma.max(initial=0.0)
    return (u * kept) @ vt


def polar(x: Array, h: Hyper) -> Array:
    options = dict(h.get("polar", {}))
    if options.pop("method", "newton_schulz") == "svd":
        return exact_polar(x)
    return newton_schulz(x, **options)


# ------------------------------------------------------------------------------------------ shared parts


def decay(theta: Array, h: Hyper, eta: float | None = None) -> Array:
    """theta (1 - eta lambda), with the step size that this step uses; cautious decay comes after the update."""
    h["decayed by"] = (h["eta"] if eta is None else eta) * h["weight_decay"]
    return theta if h.get("cautious_decay") else theta * (1 - h["decayed by"])


def blend(old: Any, new: Array, b: float) -> Array:
    return b * old + (1 - b) * new


def sign_of(direction: Array, s: State) -> Array:
    """sign, with sign(0) = 0; what it was taken of stays in the state for those who compare."""
    s["signed"] = direction
    return np.sign(direction)


def shape_scale(scale: str, m: int, n: int) -> float:
    if scale == "spectral":
        return max(1.0, m / n) ** 0.5
    if scale == "match_rms_adamw":
        return 0.2 * max(m, n) ** 0.5
    if scale == "unit_rms":
        return (m / n) ** 0.5
    raise KeyError(scale)


def lion_direction(g: Array, s: State, h: Hyper) -> Array:
    """c = b1 m + (1-b1) g, and the momentum moves on by b2."""
    b1, b2 = h["betas"]
    c = blend(s.get("m", 0.0), g, b1)
    s["m"] = blend(s.get("m", 0.0), g, b2)
    return c


# --------------------------------------------------------------------------------- rules of single elements


def lion(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    return decay(theta, h) - h["eta"] * sign_of(lion_direction(g, s, h), s)


def sign_sgd(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    return decay(theta, h) - h["eta"] * sign_of(g, s)


def signum(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    s["m"] = blend(s.get("m", 0.0), g, h["beta"])
    return decay(theta, h) - h["eta"] * sign_of(s["m"], s)


def cautious_lion(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    u = sign_of(lion_direction(g, s, h), s)
    k = (u * g > 0).astype(np.float64)
    return decay(theta, h) - h["eta"] * u * k * (k.size / max(k.sum(), k.size / 1000))


def clion(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    c = lion_direction(g, s, h)
    magnitude = np.abs(c)
    if h["gate"] == "coordinate":
        is_open = magnitude >= h["nu"]
    else:
        is_open = np.full(c.shape, magnitude[magnitude > 0].min(initial=np.inf) >= h["nu"])
    return decay(theta, h) - h["eta"] * np.where(is_open, sign_of(c, s), c)


def layer_scale(h: Hyper) -> float:
    """The factor of the first pattern in the parameter's name."""
    return next((scale for pattern, scale in h["layer_scales"] if re.search(pattern, h["name"])), 1.0)


def stable_lion(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """Ours: c of Lion in the sign, ratio 1 where a norm is 0, decay without the ratio but with eta_l."""
    eta = h["eta"] * layer_scale(h)
    theta_norm, g_norm = float(np.linalg.norm(theta)), float(np.linalg.norm(g))
    ratio = theta_norm / g_norm if theta_norm > 0 and g_norm > 0 else 1.0
    step = eta * min(ratio, h["trust_ratio_max"])
    return decay(theta, h, eta) - step * sign_of(lion_direction(g, s, h), s)


def lasm(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    b1, b2 = h["betas"]
    m_prev = s.get("m", 0.0)
    squared = (g - m_prev) ** 2
    s["v"] = blend(s.get("v", 0.0), squared if h["variance"] == "element" else squared.mean(), b2)
    sigma = 1 / (1 + np.sqrt(s["v"]))
    s["m"] = b1 * m_prev + (1 - b1) * g * sigma
    return decay(theta, h) - h["eta"] * layer_scale(h) * sign_of(s["m"], s)


def sto_sign_sgd(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    s["m"] = blend(s.get("m", 0.0), g, h["beta"])
    magnitude = np.abs(s["m"])
    s["bound"] = np.maximum(s.get("bound", 0.0), magnitude if h["bound"] == "element" else magnitude.max())
    noise = uniform_noise(h["seed"], zlib.crc32(h["name"].encode()), h["t"], g.size).reshape(g.shape)
    # Where the bound is 0, m is 0 too, and sign(0) = 0 is what the rule asks for.
    return decay(theta, h) - h["eta"] * sign_of(s["m"] + s["bound"] * noise, s)


def adaptive_moments(g: Array, s: State, h: Hyper) -> tuple[Array, Array]:
    """Bias-corrected first and second moment."""
    b1, b2 = h["betas"]
    s["m"] = blend(s.get("m", 0.0), g, b1)
    s["v"] = blend(s.get("v", 0.0), g**2, b2)
    return s["m"] / (1 - b1 ** (h["t"] + 1)), s["v"] / (1 - b2 ** (h["t"] + 1))


def adamw(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    m_hat, v_hat = adaptive_moments(g, s, h)
    return decay(theta, h) - h["eta"] * m_hat / (np.sqrt(v_hat) + h["eps"])


def stable_adamw(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """The step size that this step uses is eta / max(1, RMS), for the decay too."""
    m_hat, v_hat = adaptive_moments(g, s, h)
    rms = float(np.sqrt(np.mean(g**2 / np.maximum(v_hat, h["eps"] ** 2))))
    eta = h["eta"] / max(1.0, rms)
    return decay(theta, h, eta) - eta * m_hat / (np.sqrt(v_hat) + h["eps"])


def lamb(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """The decay stands inside r and not before the update."""
    m_hat, v_hat = adaptive_moments(g, s, h)
    r = m_hat / (np.sqrt(v_hat) + h["eps"]) + h["weight_decay"] * theta
    theta_norm, r_norm = float(np.linalg.norm(theta)), float(np.linalg.norm(r))
    ratio = min(theta_norm, 10.0) / r_norm if theta_norm > 0 and r_norm > 0 else 1.0
    return theta - h["eta"] * ratio * r


# --------------------------------------------------------------------------------- rules of whole matrices


def muon(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    mu = h["momentum"]
    s["m"] = blend(s.get("m", 0.0), g, mu)
    u = blend(s["m"], g, mu) if h["nesterov"] else s["m"]
    return decay(theta, h) - h["eta"] * shape_scale(h["scale"], *theta.shape) * polar(u, h)


def nor_muon(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """arXiv 2510.05491, its last two lines in one: W - eta s sqrt(min(m, n)) / ||N||_F N."""
    b1, b2 = h["betas"]
    s["m"] = blend(s.get("m", 0.0), g, b1)
    o = polar(blend(s["m"], g, b1) if h["nesterov"] else s["m"], h)
    s["v"] = blend(s.get("v", 0.0), np.mean(o**2, axis=1), b2)
    n = o / (np.sqrt(s["v"]) + h["eps"])[:, None]
    n = n * np.sqrt(min(theta.shape)) / (np.linalg.norm(n) or 1.0)
    return decay(theta, h) - h["eta"] * shape_scale(h["scale"], *theta.shape) * n


def muon_h(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """R Normalize(W - eta R Normalize(U)): the norm R of W stays."""
    mu = h["momentum"]
    s["m"] = blend(s.get("m", 0.0), g, mu)
    u = polar(blend(s["m"], g, mu) if h["nesterov"] else s["m"], h)
    radius = np.linalg.norm(theta)
    moved = theta - h["eta"] * radius * u / (np.linalg.norm(u) or 1.0)
    return radius * moved / (np.linalg.norm(moved) or 1.0)


def dion2(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """arXiv 2512.16928, by rows, row by row: the first of equals."""
    s["m"] = s.get("m", 0.0) + g
    rows = len(theta)
    count = max(1, math.ceil(rows * h["fraction"] - 1e-9))
    sizes = [np.float32(np.abs(row).sum()) for row in s["m"]]
    chosen: list[int] = []
    for _ in range(count):
        left = [row for row in range(rows) if row not in chosen]
        chosen.append(max(left, key=lambda row: (sizes[row], -row)))
    chosen.sort()
    stepped = decay(theta, h).copy()
    stepped[chosen] -= h["eta"] * shape_scale(h["scale"], *theta.shape) * polar(s["m"][chosen], h)
    s["m"][chosen] *= h["momentum"]
    return stepped


def lion_muon(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """period_mode "fixed"; with an infinite period no step is spectral, the first included.

    phases: by name, at which of the period's steps a matrix is orthogonalized, where it is not the first.
    """
    c = lion_direction(g, s, h)
    if h["period"] != "inf" and (h["t"] - h.get("phases", {}).get(h["name"], 0)) % h["period"] == 0:
        return decay(theta, h) - h["eta"] * shape_scale("match_rms_adamw", *theta.shape) * polar(c, h)
    eta_sign = h["eta"] / h["sign_lr_ratio"]
    return decay(theta, h, eta_sign) - eta_sign * sign_of(c, s)


def sign_muon(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    return lion_muon(theta, g, s, {**h, "betas": (h["beta"], h["beta"])})


def mimuon(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    """b weighs the NEW gradient. Ours: the shape's scale belongs to polar(M); the raw branch has raw_lr instead."""
    b = h["beta"]
    s["m"] = b * g + (1 - b) * s.get("m", 0.0)
    if h["gate"] == "frobenius":
        is_open = np.linalg.norm(s["m"]) >= h["tau"]
    else:
        sigma = np.linalg.svd(s["m"], compute_uv=False)
        sigma = sigma[sigma > max(theta.shape) * np.finfo(np.float32).eps * sigma.max(initial=0.0)]
        is_open = np.min(-np.diff(sigma), initial=np.inf) >= h["tau"]
    if is_open:
        return decay(theta, h) - h["eta"] * shape_scale(h["scale"], *theta.shape) * polar(s["m"], h)
    eta_raw = h["eta"] * (h.get("raw_lr", h["lr"]) / h["lr"])
    return decay(theta, h, eta_raw) - eta_raw * s["m"]


def spectral_lion(theta: Array, g: Array, s: State, h: Hyper) -> Array:
    if h["basis"] == "gradient":
        return lion(theta, exact_polar(g), s, h)
    c = lion_direction(g, s, h)
    rebuilt = exact_polar(c) if h["basis"] == "momentum" else column_normalized(theta, c)
    return decay(theta, h) - h["eta"] * sign_of(rebuilt, s)


def column_normalized(w: Array, c: Array, eps: float = 1e-8) -> Array:
    """R V' with R = C V, each column of R divided by its norm; V the right singular vectors of W, oriented tall.

    eps belongs to a C whose largest entry is near 1, so that a factor on C changes nothing.
    """
    if w.shape[0] < w.shape[1]:
        return column_normalized(w.T, c.T, eps).T
    c = c / (np.abs(c).max() or 1.0)
    _, v = np.linalg.eigh(w.T @ w)
    r = c @ v
    return (r / (np.linalg.norm(r, axis=0) + eps)) @ v.T


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Rule:
    """A step and its defaults.  ``matrix``: only for matrices, the rest goes to the aux rule."""

    step: StepFunction
    defaults: Mapping[str, Any]
    matrix: bool = False


LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0}
MUON = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "scale": "spectral", "weight_decay": 0.0}
LION_MUON = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "period": 2, "sign_lr_ratio": 10}
MIMUON = {"beta": 0.05, "gate": "frobenius", "tau": 1e-3, "scale": "match_rms_adamw"}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
LAYER_SCALES = ((r"(attn|attention)\.", 1.5), (r"mlp\.", 1.0), ("embed", 0.5))

RULES = {
    "SignSGD": Rule(sign_sgd, {"lr": 1e-4, "weight_decay": 0.1}),
    "Signum": Rule(signum, {"lr": 1e-4, "beta": 0.9, "weight_decay": 0.1}),
    "Lion": Rule(lion, LION),
    "CautiousLion": Rule(cautious_lion, LION | {"betas": (0.95, 0.98)}),
    "CLion": Rule(clion, LION | {"nu": 1e-6, "gate": "coordinate"}),
    "StableLion": Rule(stable_lion, LION | {"lr": 3e-5, "trust_ratio_max": 3.0, "layer_scales": ()}),
    "LASM": Rule(
        lasm,
        {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "variance": "tensor"} | {"layer_scales": LAYER_SCALES},
    ),
    "StoSignSGD": Rule(sto_sign_sgd, {"lr": 1e-4, "beta": 0.9, "weight_decay": 0.1, "seed": 0, "bound": "tensor"}),
    "Muon": Rule(muon, MUON, matrix=True),
    "Muonlight": Rule(muon, MUON | {"scale": "match_rms_adamw", "lr": 1e-3, "weight_decay": 0.1}, matrix=True),
    "NorMuon": Rule(
        nor_muon,
        {"lr": 1e-3, "betas": (0.95, 0.95), "weight_decay": 0.1, "eps": 1e-8, "nesterov": False}
        | {"scale": "match_rms_adamw"},
        matrix=True,
    ),
    "MuonH": Rule(muon_h, {"lr": 0.01, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}, matrix=True),
    "Dion2": Rule(
        dion2, {"lr": 0.01, "fraction": 0.25, "momentum": 0.95, "scale": "unit_rms", "weight_decay": 0.01}, matrix=True
    ),
    "LionMuon": Rule(lion_muon, LION_MUON, matrix=True),
    "SignMuon": Rule(sign_muon, LION_MUON | {"beta": 0.9, "lr": 3e-3, "sign_lr_ratio": 30}, matrix=True),
    "MiMuon": Rule(mimuon, MIMUON | {"lr": 1e-3, "weight_decay": 0.1}, matrix=True),
    # The default basis is left to a study of convergence, which "momentum" came out of ahead.
    "SpectralLion": Rule(spectral_lion, LION | {"weight_decay": 0.1, "basis": "momentum"}, matrix=True),
    "AdamW": Rule(adamw, ADAMW),
    "Lamb": Rule(lamb, ADAMW | {"eps": 1e-6}),
    "StableAdamW": Rule(stable_adamw, ADAMW),
}
AUX_RULES = {
    "lion": Rule(lion, {"lr": 1e-4, "betas": (0.9, 0.99)}),
    "adamw": Rule(adamw, {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}),
    "signum": Rule(signum, {"lr": 1e-4, "beta": 0.9}),
}


# ---------------------------------------------------------------------------------------------- the driver


def run(
    rule: str,
    params: Mapping[str, Array],
    grads: Sequence[Mapping[str, Array]],
    hyper: Mapping[str, Any] | None = None,
    schedule: Sequence[float] | None = None,
    observe: Observer | None = None,
    store: Store | None = None,
) -> dict[str, Array]:
    """The weights after one step for each entry of ``grads``, as new arrays.

    hyper: what differs from the defaults of the spec.  schedule: a factor on every learning rate, one a step.
    A parameter that an entry does not name is not stepped; an entry with a NaN or Inf is no step at all. One
    step count for all parameters, as they share one flat partition.
    observe(name, step, state) is called after each step of each parameter. store(name, step, theta): what becomes of
    new weights; None for themselves.
    """
    routes = {name: route(rule, name, np.shape(theta), dict(hyper or {})) for name, theta in params.items()}
    weights = {name: np.array(theta, dtype=np.float64) for name, theta in params.items()}
    states: dict[str, State] = {name: {} for name in params}
    steps_taken = 0
    for index, entry in enumerate(grads):
        if not all(np.isfinite(g).all() for g in entry.values()):
            continue
        for name, g in entry.items():
            chosen, h, view = routes[name]
            h["eta"] = h["lr"] * (1.0 if schedule is None else schedule[index])
            h["t"] = steps_taken
            shape = weights[name].shape
            theta = weights[name].reshape(view or shape)
            gradient = np.asarray(g, dtype=np.float64).reshape(view or shape)
            stepped = chosen.step(theta, gradient, states[name], h)
            if h.get("cautious_decay"):  # arXiv 2510.12402: eta lambda theta where u theta >= 0
                stepped = stepped - h["decayed by"] * theta * ((theta - stepped) * theta >= 0)
            theta = stepped.reshape(shape)
            weights[name] = theta if store is None else store(name, steps_taken, theta)
            if observe is not None:
                observe(name, index, states[name])
        steps_taken += 1
    return weights


def route(rule: str, name: str, shape: tuple[int, ...], given: Hyper) -> tuple[Rule, Hyper, tuple[int, ...] | None]:
    """The rule of one parameter, its hyperparameters, and the (m, n) under which a matrix rule sees it. What has one
    row or one column is a vector, and no matrix.

    ``matrix_views``: {name: (m, n)} for parameters that are matrices only under a view, such as convolutions.
    """
    chosen, view = RULES[rule], given.get("matrix_views", {}).get(name)
    h = {"matrix_exclude": ("embed", "lm_head"), "decay_1d": False, **chosen.defaults, **given, "name": name}
    excluded = any(re.search(pattern, name) for pattern in h["matrix_exclude"])
    if not chosen.matrix:
        view = None
    elif excluded or (view is None and (len(shape) != 2 or 1 in shape)):
        chosen, view = AUX_RULES[h.get("aux", "lion")], None
        h = aux_hyper(h, chosen)
    if len(shape) < 2 and not h["decay_1d"]:
        h["weight_decay"] = 0.0
    return chosen, h, view


def aux_hyper(h: Hyper, aux: Rule) -> Hyper:
    """What the aux rule runs with: given as aux_*, else its own default, else (the decay) the matrix rule's."""
    given = {key.removeprefix("aux_"): value for key, value in h.items() if key.startswith("aux_")}
    own_rate = {"lr": h["lr"] / h["sign_lr_ratio"]} if "sign_lr_ratio" in h else {}
    return {**h, **aux.defaults, **own_rate, **given}
