"""The reference against numbers worked out by hand, identities of the rules, and published test vectors."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.philox import philox4x32, uniform_noise
from tests.reference import RULES, Array, Hyper

EXACT = {"polar": {"method": "svd"}}
# eta lambda = 0.05 throughout: the decay of a step is a factor 0.95.
COMMON = {"lr": 0.1, "eta": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "name": "w"}


def steps(rule: str, theta: Any, grads: list[Any], **hyper: Any) -> Array:
    """``theta`` after one step of ``rule`` for each gradient."""
    h: Hyper = {**RULES[rule].defaults, **COMMON, **hyper}
    state: reference.State = {}
    weights = np.array(theta, dtype=np.float64)
    for t, g in enumerate(grads):
        weights = RULES[rule].step(weights, np.array(g, dtype=np.float64), state, {**h, "t": t})
    return weights


ROOT2 = 2**0.5
G1, G2 = [4, -1], [-2, 3]
BY_HAND = [
    # c1 = (2, -.5), m1 = (1, -.25); c2 = (-.5, 1.375)
    ("Lion", {}, [2, -4], [G1, G2], [1.8 * 0.95 + 0.1, -3.7 * 0.95 - 0.1]),
    ("Lion", {}, [2, -4], [[0, 0]], [1.9, -3.8]),
    ("SignSGD", {}, [2, -4], [G1, [0, 3]], [1.8 * 0.95, -3.7 * 0.95 - 0.1]),
    # m1 = (1, -.25), m2 = (.25, .5625)
    ("Signum", {"beta": 0.75}, [2, -4], [G1, G2], [1.8 * 0.95 - 0.1, -3.7 * 0.95 - 0.1]),
    # c2 = (.25, 1.375): the first element disagrees with its gradient, the other takes its step too.
    ("CautiousLion", {}, [2, -4], [G1, [-0.5, 3]], [1.8 * 0.95, -3.7 * 0.95 - 0.2]),
    ("CLion", {"nu": 1.0}, [2, -4], [G1], [1.9 - 0.1, -3.8 + 0.05]),
    ("CLion", {"nu": 1.0, "gate": "tensor"}, [2, -4], [G1], [1.9 - 0.2, -3.8 + 0.05]),
    ("CLion", {"nu": 0.5, "gate": "tensor"}, [2, -4], [G1], [1.9 - 0.1, -3.8 + 0.1]),
    ("CLion", {"nu": 0.5, "gate": "tensor"}, [2, -4], [[4, 0]], [1.9 - 0.1, -3.8]),
    ("StableLion", {}, [3, 4], [[0, -10]], [2.85, 3.8 + 0.05]),
    ("StableLion", {}, [3, 4], [[0.06, -0.08]], [2.85 - 0.3, 3.8 + 0.3]),
    ("StableLion", {}, [0, 0], [[1, -1]], [-0.1, 0.1]),
    # v = 4, sigma = 1/3, m1 = (2/3, -2/3); then v = 4 again, m2 = (1/9, -1/9): without sigma its sign turns.
    *[
        (
            "LASM",
            {"name": "attn.q", "variance": variance},
            [2, -4],
            [[4, -4], [-4 / 3, 4 / 3]],
            [1.75 * 0.95 - 0.15, -3.65 * 0.95 + 0.15],
        )
        for variance in ("tensor", "element")
    ],
    ("LASM", {"name": "embed"}, [2, -4], [[4, -4]], [1.85, -3.75]),
    ("LASM", {"name": "mlp.up"}, [2, -4], [[4, -4]], [1.8, -3.7]),
    # m = (0, 1.25) / .75, v = (4, 2.4375) / .4375 at the second step; eps is 0 here.
    ("AdamW", {}, [2, -4], [G1], [1.8, -3.7]),
    ("AdamW", {}, [2, -4], [G1, G2], [1.71, -3.515 - 0.1 * (5 / 3) / (2.4375 / 0.4375) ** 0.5]),
    ("StableAdamW", {}, [2, -4], [G1], [1.8, -3.7]),
    # r = (1 + 1.5, -1 + 2)
    ("Lamb", {}, [3, 4], [[1, -1]], [3 - 0.5 * 2.5 / 7.25**0.5, 4 - 0.5 / 7.25**0.5]),
    # r = (1 + 15, -1 + 20), and the norm 50 of theta counts as 10
    ("Lamb", {}, [30, 40], [[1, -1]], [30 - 16 / 617**0.5, 40 - 19 / 617**0.5]),
    ("Lamb", {}, [0, 0], [[1, -1]], [-0.1, 0.1]),
    # The polar factor of one row is the row over its norm. M1 = (1.5, 2)
    ("Muon", {"momentum": 0.5}, [[2, -4]], [[[3, 4]]], [[1.9 - 0.06, -3.8 - 0.08]]),
    # M2 = (0, 1.5); U2 = (-.75, 1.25)
    (
        "Muon",
        {"momentum": 0.5, "nesterov": False},
        [[2, -4]],
        [[[3, 4]], [[-1.5, 1]]],
        [[1.84 * 0.95, -3.88 * 0.95 - 0.1]],
    ),
    (
        "Muon",
        {"momentum": 0.5},
        [[2, -4]],
        [[[3, 4]], [[-1.5, 1]]],
        [[1.84 * 0.95 + 0.075 / 2.125**0.5, -3.88 * 0.95 - 0.125 / 2.125**0.5]],
    ),
    # The factor of one column is the column over its norm: (.6, .8), whose squares make v = (.09, .16) and N = (2, 2).
    ("NorMuon", {}, [[2], [-4]], [[[3], [4]]], [[1.9 - 0.02], [-3.8 - 0.02]]),
    # M2 = (4, -3), O = (.8, -.6), v = (.2275, .21)
    (
        "NorMuon",
        {},
        [[2], [-4]],
        [[[3], [4]], [[6.5], [-8]]],
        [
            [1.88 * 0.95 - 0.016 * ROOT2 / (0.64 + 0.36 * 0.2275 / 0.21) ** 0.5],
            [-3.82 * 0.95 + 0.012 * ROOT2 / (0.36 + 0.64 * 0.21 / 0.2275) ** 0.5],
        ],
    ),
    # The second row is the larger: its factor is (.6, .8), and half of it is left. Of M2 = (3, 0), (1, 2), which are
    # equals, the first one steps.
    ("Dion2", {"fraction": 0.5, "momentum": 0.5}, [[2, 0], [2, -4]], [[[1, 0], [3, 4]]], [[1.9, 0], [1.84, -3.88]]),
    (
        "Dion2",
        {"fraction": 0.5, "momentum": 0.5},
        [[2, 0], [2, -4]],
        [[[1, 0], [3, 4]], [[2, 0], [-0.5, 0]]],
        [[1.9 * 0.95 - 0.1, 0], [1.84 * 0.95, -3.88 * 0.95]],
    ),
    # R = 5, M = (4, 0): W - .5 (1, 0) = (2.5, 4), brought back to the norm 5
    (
        "MuonH",
        {"momentum": 0.5, "nesterov": False},
        [[3, 4]],
        [[[8, 0]]],
        [[12.5 / 22.25**0.5, 20 / 22.25**0.5]],
    ),
    ("Muonlight", {}, [[2, -4]], [[[3, 4]]], [[1.9 - 0.06 * 0.2 * ROOT2, -3.8 - 0.08 * 0.2 * ROOT2]]),
    # t = 0 is spectral; t = 1 is Lion at eta / 10: c2 = .5 (.75, 1) + .5 g2 = (-.625, 1), decay .995
    (
        "LionMuon",
        {},
        [[2, -4]],
        [[[3, 4]], [[-2, 1]]],
        [[(1.9 - 0.012 * ROOT2) * 0.995 + 0.01, (-3.8 - 0.016 * ROOT2) * 0.995 - 0.01]],
    ),
    # c2 = m2 = .5 (1.5, 2) + .5 g2 = (-.25, 1.5)
    (
        "SignMuon",
        {"beta": 0.5, "sign_lr_ratio": 10},
        [[2, -4]],
        [[[3, 4]], [[-2, 1]]],
        [[(1.9 - 0.012 * ROOT2) * 0.995 + 0.01, (-3.8 - 0.016 * ROOT2) * 0.995 - 0.01]],
    ),
    ("LionMuon", {"period": "inf"}, [[2, -4]], [[[3, 4]]], [[1.99 - 0.01, -3.98 - 0.01]]),
    # b = .25 weighs the new gradient: M = (.75, 1), of norm 1.25
    (
        "MiMuon",
        {"beta": 0.25, "tau": 1.25},
        [[2, -4]],
        [[[3, 4]]],
        [[1.9 - 0.012 * ROOT2, -3.8 - 0.016 * ROOT2]],
    ),
    ("MiMuon", {"beta": 0.25, "tau": 1.26, "raw_lr": 0.2}, [[2, -4]], [[[3, 4]]], [[1.8 - 0.15, -3.6 - 0.2]]),
    # M = diag(1, .25): the gap is .75
    (
        "MiMuon",
        {"beta": 0.25, "gate": "singular_gap", "tau": 0.7},
        [[0, 0], [0, 0]],
        [[[4, 0], [0, 1]]],
        [[-0.02 * ROOT2, 0], [0, -0.02 * ROOT2]],
    ),
    (
        "MiMuon",
        {"beta": 0.25, "gate": "singular_gap", "tau": 0.8, "raw_lr": 0.2},
        [[0, 0], [0, 0]],
        [[[4, 0], [0, 1]]],
        [[-0.2, 0], [0, -0.05]],
    ),
    ("SpectralLion", {"basis": "momentum"}, [[2, -4]], [[[3, -4]]], [[1.8, -3.7]]),
    ("SpectralLion", {"basis": "weight"}, [[2, 0], [0, 1]], [[[3, 0], [-4, 5]]], [[1.8, 0], [0.1, 0.85]]),
    # The second gradient, a thousand times smaller, outweighs what is left of the first: G' are (1, 0) and (-0.6, 0.8).
    ("SpectralLion", {"basis": "gradient"}, [[2, -4]], [[[1000, 0]], [[-0.6, 0.8]]], [[1.81, -3.71]]),
]


@pytest.mark.parametrize(("rule", "hyper", "theta", "grads", "expected"), BY_HAND)
def test_a_rule_gives_what_the_hand_gives(
    rule: str, hyper: dict[str, Any], theta: Any, grads: list[Any], expected: Any
) -> None:
    np.testing.assert_allclose(steps(rule, theta, grads, **EXACT, **hyper), expected, rtol=1e-13, atol=1e-13)


def test_every_rule_is_worked_out_by_hand() -> None:
    # StoSignSGD draws random numbers and has tests of its own.
    assert {case[0] for case in BY_HAND} | {"StoSignSGD"} == set(RULES)


def test_stable_adamw_shortens_a_step_with_large_gradients() -> None:
    v_hat = np.array([4, 2.4375]) / 0.4375
    eta = 0.1 / np.sqrt(np.mean(np.array([4, 9]) / v_hat))
    expected = np.array([1.8, -3.7]) * (1 - 0.5 * eta) - eta * np.array([0, 5 / 3]) / np.sqrt(v_hat)
    assert eta < 0.1
    np.testing.assert_allclose(steps("StableAdamW", [2, -4], [G1, G2]), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((4, 1), (2, 0.4, 2)), ((1, 4), (1, 0.4, 0.5)), ((9, 9), (1, 0.6, 1))],
)
def test_scales_of_a_shape(shape: tuple[int, int], scales: tuple[float, ...]) -> None:
    names = ("spectral", "match_rms_adamw", "unit_rms")
    np.testing.assert_allclose([reference.shape_scale(name, *shape) for name in names], scales, rtol=1e-15)


# -------------------------------------------------------------------------------------------- random numbers


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
ZEROS = (0, 0, 0, 0), (0, 0)


@pytest.mark.parametrize(
    ("rounds", "inputs", "expected"),
    [
        (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_philox_gives_the_vectors_of_its_authors(
    rounds: int, inputs: tuple[tuple[int, ...], tuple[int, int]], expected: tuple[int, ...]
) -> None:
    """Known answers of the Random123 distribution."""
    counter, key = inputs
    assert tuple(philox4x32(np.array([counter], dtype=np.uint32), key, rounds)[0]) == expected


def test_noise_is_uniform_and_depends_on_all_that_it_should() -> None:
    noise = uniform_noise(seed=1, name_crc=2, step=3, numel=100_000)
    assert np.abs(noise).max() < 1
    # Standard errors of a uniform variable on (-1, 1): .0018 for the mean, .00094 for the mean square.
    assert abs(noise.mean()) < 0.007
    assert abs((noise**2).mean() - 1 / 3) < 0.004
    assert len(np.unique(noise)) > 99_990
    np.testing.assert_array_equal(noise[:10], uniform_noise(1, 2, 3, 10))
    for other in (uniform_noise(0, 2, 3, 10), uniform_noise(1, 0, 3, 10), uniform_noise(1, 2, 0, 10)):
        assert (other != noise[:10]).all()


def test_sto_sign_sgd_is_unbiased() -> None:
    m = np.repeat([1.0, 0.25, -0.5, 0.0], 20_000)
    moved = steps("StoSignSGD", np.zeros(80_000), [m], beta=0.0, seed=7).reshape(4, -1) / -0.1
    # E sign(m + B n) = m / B; the standard error of a mean of 20,000 signs is .007.
    np.testing.assert_allclose(moved.mean(axis=1), [1.0, 0.25, -0.5, 0.0], atol=0.03)
    assert (moved[0] == moved[0, 0]).all(), "the largest element has no noise to turn it"


def test_sto_sign_sgd_keeps_its_largest_bound_and_moves_nothing_at_zero() -> None:
    np.testing.assert_array_equal(steps("StoSignSGD", [2, -4], [[0, 0]]), [1.9, -3.8])
    noise = uniform_noise(0, zlib.crc32(b"w"), 1, 2)
    for bound, b_second in (("tensor", [4.0, 4.0]), ("element", [4.0, 1.0])):
        moved = steps("StoSignSGD", [0, 0], [[4, -1], [0.5, 0.5]], beta=0.0, bound=bound, weight_decay=0.0)
        first = steps("StoSignSGD", [0, 0], [[4, -1]], beta=0.0, bound=bound, weight_decay=0.0)
        np.testing.assert_allclose(moved - first, -0.1 * np.sign(0.5 + np.array(b_second) * noise))


# --------------------------------------------------------------------------------------------- polar factors


def gauss(m: int, n: int) -> Array:
    return np.random.default_rng(m * 1000 + n).standard_normal((m, n))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize(("schedule", "count"), list(reference.SCHEDULES))
def test_newton_schulz_is_a_polynomial_of_the_singular_values(
    shape: tuple[int, int], schedule: str, count: int
) -> None:
    x = gauss(*shape)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    triples, safety = reference.SCHEDULES[schedule, count]
    assert len(triples) == count
    sigma = sigma / (safety * np.sqrt((sigma**2).sum()))
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    np.testing.assert_allclose(reference.newton_schulz(x, schedule, count), (u * sigma) @ vt, atol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "count", "published"),
    [("keller", 5, 0.146), ("you", 5, 0.017), ("polar_express", 5, 0.094), ("polar_express", 8, 0.007)],
)
def test_schedules_come_as_near_to_the_polar_factor_as_the_spec_says(
    schedule: str, count: int, published: float
) -> None:
    """The column "Gauss 512x2048": the error depends on the aspect, hardly on the size."""
    x = gauss(256, 1024)
    exact = reference.exact_polar(x)
    error = np.linalg.norm(reference.newton_schulz(x, schedule, count) - exact) / np.linalg.norm(exact)
    # bf16 rounding, which the published column has and this has not, is worth .005 to .01
    assert published - 0.012 < error < published + 0.01


def test_exact_polar_is_orthogonal_and_leaves_a_null_space_alone() -> None:
    x = gauss(4, 7)
    np.testing.assert_allclose(reference.exact_polar(x) @ reference.exact_polar(x).T, np.eye(4), atol=1e-13)
    np.testing.assert_array_equal(reference.exact_polar(np.zeros((3, 5))), np.zeros((3, 5)))
    np.testing.assert_allclose(reference.exact_polar(np.diag([2.0, 0.0])), np.diag([1.0, 0.0]), atol=1e-15)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_spectral_lion_in_the_weights_basis_is_project_normalize_rebuild(shape: tuple[int, int]) -> None:
    """The source's literal procedure, with the full U of the tall orientation, which cancels."""
    w, c = gauss(*shape), gauss(*shape[::-1]).T
    tall_w, tall_c = (w, c) if shape[0] >= shape[1] else (w.T, c.T)
    u, _, vt = np.linalg.svd(tall_w, full_matrices=True)
    projected = u.T @ tall_c @ vt.T
    literal = u @ (projected / (np.linalg.norm(projected, axis=0) + 1e-8)) @ vt
    ours = reference.column_normalized(w, c)
    np.testing.assert_allclose(ours if shape[0] >= shape[1] else ours.T, literal, atol=1e-12)


def test_normalizing_the_columns_in_the_momentums_own_basis_gives_the_polar_factor() -> None:
    c = gauss(6, 4)
    np.testing.assert_allclose(reference.column_normalized(c, c), reference.exact_polar(c), atol=1e-7)


# ------------------------------------------------------------------------------------------------ the driver

PARAMS = {
    "embed": gauss(5, 3),
    "wide": gauss(3, 5),
    "bias": gauss(1, 4)[0],
    "conv": gauss(2, 12).reshape(2, 3, 2, 2),
}
ONES = {name: np.ones_like(value) for name, value in PARAMS.items()}


def moved(rule: str, **hyper: Any) -> dict[str, Array]:
    after = reference.run(rule, PARAMS, [ONES], hyper)
    return {name: after[name] - PARAMS[name] for name in PARAMS}


def test_an_elementwise_rule_takes_every_parameter_and_decays_all_but_vectors() -> None:
    delta = moved("Lion", lr=0.1, weight_decay=0.5)
    for name, theta in PARAMS.items():
        np.testing.assert_allclose(delta[name], -0.1 - (0.0 if name == "bias" else 0.05) * theta, rtol=1e-12)
    bias = moved("Lion", lr=0.1, weight_decay=0.5, decay_1d=True)["bias"]
    np.testing.assert_allclose(bias, -0.1 - 0.05 * PARAMS["bias"], rtol=1e-12)


@pytest.mark.parametrize(
    ("aux", "rate"), [({}, 1e-4), ({"aux": "adamw"}, 3e-4), ({"aux": "signum"}, 1e-4), ({"aux_lr": 0.3}, 0.3)]
)
def test_a_matrix_rule_leaves_the_rest_to_aux(aux: dict[str, Any], rate: float) -> None:
    delta = moved("Muonlight", weight_decay=0.5, aux_weight_decay=0.25, **EXACT, **aux)
    # First steps: sign(1) for lion and signum, 1 / (1 + 1e-8) for adamw.
    for name in ("embed", "bias", "conv"):
        decay = 0.0 if name == "bias" else 0.25
        np.testing.assert_allclose(delta[name], -rate * (1 + decay * PARAMS[name]), rtol=1e-7)
    polar_of_ones = np.ones((3, 5)) / 15**0.5
    expected = -1e-3 * (0.5 * PARAMS["wide"] + 0.2 * 5**0.5 * polar_of_ones)
    np.testing.assert_allclose(delta["wide"], expected, rtol=1e-10)


def test_a_view_makes_a_matrix_of_a_convolution() -> None:
    delta = moved("Muonlight", weight_decay=0.0, matrix_views={"conv": (2, 12)}, **EXACT)
    np.testing.assert_allclose(delta["conv"], np.full((2, 3, 2, 2), -1e-3 * 0.2 * 12**0.5 / 24**0.5), rtol=1e-10)


def test_lion_muon_gives_aux_the_rate_of_its_sign_steps_and_a_schedule_moves_all_rates() -> None:
    after = reference.run("LionMuon", PARAMS, [ONES], {"lr": 0.4, "sign_lr_ratio": 4, **EXACT}, schedule=[0.5])
    np.testing.assert_allclose(after["bias"] - PARAMS["bias"], -0.05, rtol=1e-12)


def test_a_gradient_that_is_not_finite_is_no_step_and_a_missing_one_leaves_its_parameter() -> None:
    bad = {**ONES, "bias": np.array([1, np.nan, 1, 1])}
    with_bad = reference.run("LionMuon", PARAMS, [ONES, bad, ONES], EXACT)
    without = reference.run("LionMuon", PARAMS, [ONES, ONES], EXACT)
    for name in PARAMS:
        np.testing.assert_array_equal(with_bad[name], without[name])
    only_bias = reference.run("LionMuon", PARAMS, [{"bias": ONES["bias"]}])
    np.testing.assert_array_equal(only_bias["wide"], PARAMS["wide"])
    assert (only_bias["bias"] != PARAMS["bias"]).all()
