"""What a config's "optimizer" says of rate and decay, and what of the rest another optimizer can take over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS, known_keys
from ds_optim.optimizers.checks import check_at_least_zero, nearest
from ds_optim.optimizers.options import CommonOptions, MatrixOptions
from ds_optim.optimizers.registry import canonical_type
from ds_optim.optimizers.routing import ROUTING_OPTIONS
from ds_optim.zero.auto import AUTO, is_open
from ds_optim.zero.config import DEEPSPEED_PREFIX
from ds_optim.zero.conversion.rates import ADAMW, JORDAN, RATIOS, UNKNOWN, Ratio

_ADAM = ("adam", "adamw", "onebitadam", "zerooneadam")
_LION_BETAS = ("Lion", "CLion", "CautiousLion", "StableLion", "LionMuon", "SpectralLion")
_MUON_MOMENTUM = ("Muon", "Muonlight", "MuonH")
_OPTIONS = {*CommonOptions.__annotations__, *MatrixOptions.__annotations__, *ROUTING_OPTIONS}
_ONE_BIT = "of messages in one bit, which is not supported"
HEADS = "heads"
_KERNEL = "it chooses DeepSpeed's kernel"
_DROPPED: Mapping[str, str] = {
    **dict.fromkeys(("freeze_step", "cuda_aware", "comm_backend_name", "var_freeze_step"), _ONE_BIT),
    **dict.fromkeys(("var_update_scaler", "local_step_scaler", "local_step_clipper"), _ONE_BIT),
    **dict.fromkeys(("torch_adam", "fused", "foreach", "fp32_optimizer_states", "capturable"), _KERNEL),
    "eps": "no average of squares is divided by",
    "bias_correction": "its averages start uncorrected",
    "amsgrad": "no average of squares is kept",
    "adam_w_mode": "decay is decoupled from the gradient, always",
    "max_grad_norm": "clipping is ZeRO's",
    "per_head_muon": "this optimizer knows no heads",
    "ns_method": "the way to orthogonalize is chosen by shape",
}
"""Parameters that people's JSONs have and that nothing here reads, and why they can go."""
_OTHERS = ("lr", "weight_decay", "betas", "momentum", "nesterov", "muon_lr", "adam_lr")
#: Where a JSON names none: what DeepSpeed's optimizer of that name takes.
_DEFAULT_LR = {"adam": 1e-3, "lion": 1e-4, "muon": 0.02}


@dataclass
class Source:
    """What was read.

    ``lr`` and ``weight_decay`` are numbers or "auto"; ``kept`` are the target's parameters that the config gives, by
    the target's names, and ``moved`` says of those with another name or meaning why; ``dropped``: why what went could.
    """

    type: str | None
    ratio: Ratio
    lr: Any
    weight_decay: Any
    same: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    clip: Any = None

    @property
    def is_muon(self) -> bool:
        return self.type is not None and canonical_type(self.type.removeprefix(DEEPSPEED_PREFIX)) == "Muon"

    def adamw_lr(self, target: str) -> float:
        """AdamW's rate that this one stands for.

        Raises:
            UserError: the file does not tell it.
        """
        if self.lr == AUTO:
            raise UserError(
                f'the trainer\'s arguments give the rate ("auto"), and {target} needs more than that one: add --lr, '
                "AdamW's rate, such as --lr 1e-3"
            )
        if self.ratio.lr is None:
            raise UserError(
                f"nothing is known of {self.type}'s rate beside AdamW's: add --lr, a rate that AdamW would have here, "
                "and --weight-decay"
            )
        return float(self.lr) / self.ratio.lr


def read_source(section: Any, target: str, *, lr: float | None, weight_decay: float | None) -> Source:
    """Read a config's "optimizer" for an optimizer of ours that is to stand in its place.

    Args:
        section: None where the config has none: the trainer's arguments say rate and decay then.
        target: a registered type.
        lr, weight_decay: AdamW's, in place of the section's.

    Raises:
        UserError: no type, parameters that are none, or values that no optimizer takes.
    """
    nothing_said = Source(type=None, ratio=ADAMW, lr=AUTO, weight_decay=AUTO)
    found = nothing_said if section is None else _read(section, target)
    if lr is not None:
        found.lr, found.ratio, found.same = check_at_least_zero("--lr", lr), ADAMW, False
    if weight_decay is not None:
        found.weight_decay = check_at_least_zero("--weight-decay", weight_decay)
        found.weight_decay *= found.ratio.decay  # as what the section would have said
    return found


def _read(section: Any, target: str) -> Source:
    kind, params = _checked(section)
    plain = canonical_type(kind.removeprefix(DEEPSPEED_PREFIX))
    family = "adam" if plain.lower() in _ADAM else plain.lower()
    same = plain == target
    lr = params.get("muon_lr", params.get("lr", _DEFAULT_LR.get(family)))
    if lr is None:
        raise UserError(f'"optimizer" {kind} has no "lr": write it there, or add --lr')
    found = Source(
        type=kind,
        ratio=_ratio(family, plain, params),
        lr=_number("lr", lr),
        weight_decay=_number("weight_decay", params.get("weight_decay", 0.0)),
        same=same,
        clip=params.get("max_grad_norm"),
    )
    _sort(found, params, plain, target)
    return found


def _checked(section: Any) -> tuple[str, Mapping[str, Any]]:
    """Type and parameters, each of them known to somebody."""
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise UserError('"optimizer" names no type: write {"type": "AdamW", "params": {…}}, or leave it out')
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        raise UserError(f'"optimizer": {{"params": …}} is {params!r}: write an object of parameters')
    kind = section["type"]
    own = canonical_type(kind.removeprefix(DEEPSPEED_PREFIX))
    known = {*_OTHERS, *_DROPPED, *(known_keys(OPTIMIZERS[own]) | _OPTIONS if own in OPTIMIZERS else ())}
    for key in params:
        if key not in known:
            raise UserError(f'"optimizer" {kind} has a parameter {key!r} that nothing reads{nearest(key, known)}')
    return kind, params


def _number(key: str, value: Any) -> Any:
    return AUTO if value == AUTO else check_at_least_zero(f"optimizer.params.{key}", value)


def _ratio(family: str, plain: str, params: Mapping[str, Any]) -> Ratio:
    if family == "muon":
        return RATIOS["Muon"] if params.get("scale") == "match_rms_adamw" else JORDAN
    return ADAMW if family == "adam" else RATIOS.get(plain, UNKNOWN)


def _sort(found: Source, params: Mapping[str, Any], plain: str, target: str) -> None:
    """Which parameters the target takes over, and why the others go."""
    takes = known_keys(OPTIMIZERS[target]) | set(ROUTING_OPTIONS)
    meant = {key for key in params if key in takes and _means_the_same(key, plain, target)}
    found.kept = {
        key: params[key] for key in params if key in meant and not is_open(f"optimizer.params.{key}", params[key])
    }
    if "adam_lr" in params and "aux_lr" in takes:
        _keep_adam(found, params)
    if params.get("per_head_muon") is True and HEADS in takes and OPTIMIZERS[target].has_aux:
        found.kept[HEADS], found.moved[HEADS] = AUTO, "as per_head_muon, from the model's config"
    for key in params:
        if key not in found.kept and key not in ("lr", "weight_decay", "muon_lr", "adam_lr"):
            found.dropped[key] = _DROPPED.get(key, f"{plain}'s; {target} has its own")


def _means_the_same(key: str, plain: str, target: str) -> bool:
    if key in ("lr", "weight_decay"):
        return False
    if plain == target or key in _OPTIONS:
        return True
    pairs: tuple[tuple[Iterable[str], bool, Iterable[str]], ...] = (
        (("betas",), plain in _LION_BETAS, _LION_BETAS),
        (("betas", "eps"), plain.lower() in _ADAM, ("StableAdamW", "Lamb")),
        (("momentum", "nesterov"), plain in _MUON_MOMENTUM, _MUON_MOMENTUM),
    )
    return any(key in keys and given and target in targets for keys, given, targets in pairs)


def _keep_adam(found: Source, params: Mapping[str, Any]) -> None:
    """DeepSpeed's Muon steps what is no matrix by Adam, at a rate of its own."""
    why = "DeepSpeed's Muon steps what is no matrix by Adam, which stays (two values a parameter there; lion keeps one)"
    given = {"aux": "adamw", "aux_lr": _number("adam_lr", params["adam_lr"])}
    if params.get("betas", AUTO) != AUTO:
        given["aux_betas"] = params["betas"]
    given = {key: value for key, value in given.items() if value != AUTO}
    found.kept |= given
    found.moved |= dict.fromkeys(given, why)
