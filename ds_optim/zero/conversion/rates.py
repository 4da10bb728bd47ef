"""Learning rate and decay from one optimizer to another, by what their sources say of AdamW's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LION = "its steps are signs: a rate 3 to 10 times below AdamW's and a decay as much above (arXiv 2302.06675; 10 taken)"
_MOONLIGHT = "its steps have the RMS of AdamW's, 0.2, and take AdamW's rate and decay (Moonlight, arXiv 2502.16982)"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """What an optimizer's rate and decay are beside AdamW's.

    Args:
        lr: times AdamW's; None: nothing is known, and the optimizer's own default has to do.
        decay: times AdamW's.
        why: with the source.
        params: what the optimizer needs for it to be so.
        aux: times AdamW's, the rate of what is no matrix; None where the optimizer derives it, or has no such rule.
    """

    lr: float | None
    decay: float
    why: str
    params: Mapping[str, Any] = field(default_factory=dict)
    aux: float | None = None


_SIGN = Ratio(lr=0.1, decay=10.0, why=_LION)
_MATRIX = Ratio(lr=1.0, decay=1.0, why=_MOONLIGHT, aux=0.1)
RATIOS: Mapping[str, Ratio] = {
    "LionMuon": Ratio(
        lr=1.0,
        decay=1.0,
        why=f"{_MOONLIGHT}; every other step is Lion's at a tenth of it (arXiv 2605.19811)",
        params={"period": 2, "sign_lr_ratio": 10},
    ),
    "SignMuon": Ratio(
        lr=3.0,
        decay=1.0,
        why="its source trains it at 3e-3 with sign_lr_ratio 30, LionMuon at 1e-3 with 10 (arXiv 2605.19811)",
        params={"period": 2, "sign_lr_ratio": 30},
    ),
    "Muon": Ratio(lr=1.0, decay=1.0, why=_MOONLIGHT, params={"scale": "match_rms_adamw"}, aux=0.1),
    **dict.fromkeys(("Muonlight", "NorMuon", "MiMuon"), _MATRIX),
    "MuonH": Ratio(lr=None, decay=10.0, why="its rate is a share of each matrix's norm, not of AdamW's rate", aux=0.1),
    "Dion2": Ratio(
        lr=None,
        decay=1.0,
        why="its rate is that of a fraction of a matrix's rows, of which AdamW's says nothing",
        aux=0.1,
    ),
    "SpectralLion": Ratio(lr=0.1, decay=10.0, why=_LION, aux=0.1),
    **dict.fromkeys(("Lion", "CautiousLion", "CLion", "LASM", "Signum", "SignSGD", "StoSignSGD"), _SIGN),
    "StableLion": Ratio(
        lr=0.03, decay=10.0, why="a trust ratio, nearly always 3, stands before Lion's step: 3e-5 beside Lion's 1e-4"
    ),
    "StableAdamW": Ratio(lr=1.0, decay=1.0, why="it is AdamW, slower where gradients outgrow their history"),
    "Lamb": Ratio(lr=None, decay=1.0, why="a trust ratio stands before its rate, of which AdamW's says nothing"),
}
"""By type of what AdamW is left for; Muon's is with the scale under which AdamW's rate fits it."""
ADAMW = Ratio(lr=1.0, decay=1.0, why="AdamW's own")
JORDAN = Ratio(lr=20.0, decay=1.0, why="0.02 under Muon's own scale stands for 1e-3 under AdamW's")
"""Muon under Jordan's scale, which is the default here and DeepSpeed's only one."""
UNKNOWN = Ratio(lr=None, decay=1.0, why="nothing is known of its rate beside AdamW's")
