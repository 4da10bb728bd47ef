"""Coefficient tables of the quintic Newton-Schulz iteration, X <- aX + (bA + cAA)X with A = XX'.

A schedule is a table of triples (a, b, c), one per step. ``keller`` repeats one triple (Jordan, Muon),
``you`` has five tuned ones (You), ``polar_express`` has the tables of Amsel et al. (2505.16932), made for a
fixed number of steps each: a prefix or a continuation of them is another method, so other step counts are
refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_optim.errors import UserError

Triple = tuple[float, float, float]

_KELLER: Triple = (3.4445, -4.7750, 2.0315)

_YOU: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_POLAR_EXPRESS_5: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

_POLAR_EXPRESS_8: tuple[Triple, ...] = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.875, -1.25, 0.375),
)

SCHEDULES = ("keller", "you", "polar_express")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The triples of all steps.

    safety: a factor on the norm that X is first divided by.
    alone: how many of the first steps the Gram form takes one by one in 16 bits (newton_schulz.gram_segments), as
        measured on ill-conditioned spectra (tests/unit/test_range.py). What decides is how far values rise between
        steps, and how steeply the next polynomial leaves its range above them: keller's never rise above 1.21, those of
        the other tables do, most in the steps with the largest a.
    """

    triples: tuple[Triple, ...]
    safety: float = 1.0
    alone: int = 0


def schedule(name: str, steps: int) -> Schedule:
    """The table of ``name`` for ``steps`` steps; a UserError where no such table exists."""
    if name == "keller":
        if steps < 1:
            raise UserError(f"polar.steps: {steps} is not a step count; write 1 or more (usual: 5)")
        return Schedule(triples=(_KELLER,) * steps)
    if name == "you":
        if not 1 <= steps <= len(_YOU):
            raise UserError(f"polar.steps: schedule 'you' has 5 coefficient triples, not {steps}; write 1 to 5")
        return Schedule(triples=_YOU[:steps], alone=2)
    if name == "polar_express":
        if steps == 5:
            return Schedule(triples=_POLAR_EXPRESS_5, safety=1.02, alone=5)
        if steps == 8:
            return Schedule(triples=_POLAR_EXPRESS_8, alone=2)
        raise UserError(
            f"polar.steps: schedule 'polar_express' has tables for 5 and 8 steps, not {steps}; "
            "write 5 or 8, or take schedule 'keller', which repeats"
        )
    raise UserError(f"polar.schedule: unknown '{name}'; write one of {', '.join(SCHEDULES)}")
