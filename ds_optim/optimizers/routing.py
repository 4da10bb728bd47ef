"""Names and shapes decide what each parameter gets: a matrix rule, an aux rule, a view, decay or none.

A parameter is a *matrix* if it has two dimensions, or a view that gives two, and is neither an embedding
nor an output head. What is left with two or more dimensions is *aux*, the rest (biases, gains) *vector*:
aux too, without decay unless it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.binding import Member, full_shape, is_optimized
from ds_optim.sharding.layout import ParamSpec

MATRIX, AUX, VECTOR = "matrix", "aux", "vector"
ROLES = (MATRIX, AUX, VECTOR)
MEMBERS = "members"
"""The key under which a group hands its members to an optimizer; no optimizer keeps it in its groups."""

FOREIGN = "parameter groups must come from ds_optim.param_groups(model), which names their members"

_routed = WeakTensorKeyDictionary()
"""What ``param_groups`` last said of each parameter that is still alive: users split and rewrite its groups."""

DEFAULT_EXCLUDE = ("embed", "lm_head", r"\bwte\b", r"\bwpe\b")


def param_groups(
    model: nn.Module,
    *,
    matrix_exclude: Sequence[str] | None = None,
    views: Sequence[Mapping[str, Any]] = (),
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups that the optimizers of this package take.

    Args:
        model: its trainable parameters are routed by name and shape; tied ones once. A model made under
            ``deepspeed.zero.Init`` is read by its full shapes.
        matrix_exclude: regular expressions, searched in the names, of matrices that take the aux rule.
            Default: embeddings (by module type and name) and output heads.
        views: options of :meth:`MatrixView.from_options`, each with a ``match`` expression; the first that
            matches a name counts. What it leaves with fewer than two dimensions (the bias of a fused QKV) is
            no matrix and has no view. GPT-2's ``Conv1D`` weights are seen transposed without being asked.
        parameters: keep to these parameters of the model.

    Returns:
        Up to three groups, named "matrix", "aux" and "vector", in this order. Split them, or write a hyperparameter
        of the rule into one ("lr", "weight_decay", "betas"): it wins over the optimizer's argument.

    Raises:
        UserError: a pattern that is no regular expression or matches no parameter (for a view: none with two
            dimensions); parameters that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"param_groups got a {type(model).__name__}: pass the model itself")
    aliases = _aliases(model)
    kept = None if parameters is None else {id(p) for p in parameters}
    if kept is not None and not kept <= {id(p) for _, p in aliases}:
        raise UserError("some of the parameters given are not the model's: pass only parameters of the model")
    router = _Router(model, matrix_exclude, views)
    by_role: dict[str, list[Member]] = {role: [] for role in ROLES}
    for names, parameter in aliases:
        if is_optimized(parameter) and (kept is None or id(parameter) in kept):
            role, member = router.route(names, parameter)
            by_role[role].append(member)
            _routed[parameter] = member.spec, member.view
        else:
            router.pass_by(names, parameter)
    router.check_all_matched()
    return [
        {"params": [m.parameter for m in members], "name": role, "role": role, MEMBERS: members}
        for role, members in by_role.items()
        if members
    ]


class _Router:
    """What the user's patterns and the model's modules say of a parameter."""

    def __init__(
        self, model: nn.Module, matrix_exclude: Sequence[str] | None, views: Sequence[Mapping[str, Any]]
    ) -> None:
        self._by_default = matrix_exclude is None
        self._exclude = _Patterns("matrix_exclude", DEFAULT_EXCLUDE if matrix_exclude is None else matrix_exclude)
        if isinstance(views, (str, Mapping)) or not isinstance(views, Sequence):
            raise UserError(f'views is {views!r}: write a list of views, such as [{{"match": "qkv", "heads": 12}}]')
        self._viewed = _Patterns("views", [_match_of(view) for view in views])
        self._options = [{k: v for k, v in view.items() if k != "match"} for view in views]
        self._transposed, self._embeddings, self._convolutions = _module_kinds(model)

    def route(self, names: Sequence[str], parameter: nn.Parameter) -> tuple[str, Member]:
        """The parameter's role, and the parameter with its view."""
        spec = ParamSpec(name=names[0], shape=full_shape(parameter))
        excluded = self._exclude.first(names) is not None
        excluded = excluded or (self._by_default and id(parameter) in self._embeddings)
        number = _first_view(self._viewed, names, parameter)
        chosen = dict(self._options[number]) if number is not None else {}
        if id(parameter) in self._transposed:
            chosen.setdefault("transpose", True)
        is_matrix = len(spec.shape) == 2 or number is not None or id(parameter) in self._convolutions
        if is_matrix and not excluded and not _stacks_vectors(chosen, spec.shape):
            return MATRIX, Member(spec, parameter, MatrixView.from_options(spec.name, spec.shape, chosen))
        return (AUX if len(spec.shape) >= 2 else VECTOR), Member(spec, parameter)

    def pass_by(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Patterns may mean a parameter that is not stepped: a frozen layer must not turn a config into an error."""
        self._exclude.first(names)
        _first_view(self._viewed, names, parameter)

    def check_all_matched(self) -> None:
        """Refuse the user's patterns that have matched nothing."""
        self._viewed.check_all_matched()
        if not self._by_default:
            self._exclude.check_all_matched()


def _first_view(viewed: _Patterns, names: Sequence[str], parameter: nn.Parameter) -> int | None:
    """The number of the view for a parameter; a pattern for a layer's weight may find its bias, and means none."""
    return viewed.first(names) if len(full_shape(parameter)) >= 2 else None


def _stacks_vectors(options: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether ``batch_dims`` sets so much aside that no matrix is left: the biases of stacked experts."""
    batch_dims = options.get("batch_dims", 0)
    return isinstance(batch_dims, int) and len(shape) - batch_dims == 1


def routed(parameter: torch.Tensor) -> Member | None:
    """The member that ``param_groups`` made of a parameter; None where it has not seen it."""
    found = _routed.get(parameter)
    return None if found is None else Member(found[0], parameter, found[1])  # type: ignore[arg-type]


def unnamed_group(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups for bare parameters or (name, parameter) pairs: enough for rules that ask for no matrix."""
    by_role: dict[str, list[Member]] = {AUX: [], VECTOR: []}
    for number, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if not isinstance(parameter, torch.Tensor):
            raise UserError(FOREIGN)
        if not is_optimized(parameter):  # type: ignore[arg-type]  # DeepSpeed refuses groups without any other
            continue
        spec = ParamSpec(name=name, shape=full_shape(parameter))  # type: ignore[arg-type]
        role = AUX if len(spec.shape) >= 2 else VECTOR
        by_role[role].append(Member(spec, parameter))  # type: ignore[arg-type]
    if not any(by_role.values()):
        raise UserError("none of the parameters is trainable: unfreeze some before the optimizer is built")
    return [
        {"params": [m.parameter for m in members], "name": role, "role": role, MEMBERS: members}
        for role, members in by_role.items()
        if members
    ]


def _aliases(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names: a tied head answers to its own name too."""
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(names.values())


def _module_kinds(model: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """Identities of the weights that are stored transposed, that embed, and that convolve."""
    transposed, embeddings, convolutions = set(), set(), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if type(module).__name__ == "Conv1D":  # transformers' GPT-2 layer, fan-in x fan-out
            transposed.add(id(weight))
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embeddings.add(id(weight))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            convolutions.add(id(weight))
    return transposed, embeddings, convolutions


def _match_of(view: Mapping[str, Any]) -> str:
    if not isinstance(view, Mapping):
        raise UserError(f'the view {view!r} is no object: write e.g. {{"match": "qkv", "heads": 12}}')
    if "match" not in view:
        raise UserError(f'the view {dict(view)!r} has no "match": write the pattern of the names that it is for')
    return str(view["match"])


class _Patterns:
    """Regular expressions of one option, and which of them have matched something."""

    def __init__(self, option: str, patterns: Sequence[str]) -> None:
        if isinstance(patterns, (str, Mapping)) or not isinstance(patterns, Sequence):
            raise UserError(f"{option} is {patterns!r}: write a list of patterns")
        self.option = option
        self.patterns = []
        for text in patterns:
            try:
                self.patterns.append(re.compile(text))
            except (re.error, TypeError) as problem:
                raise UserError(f"{option}: {text!r} is no regular expression ({problem})") from None
        self.matched = [False] * len(self.patterns)

    def first(self, names: Sequence[str]) -> int | None:
        """The number of the first pattern that is found in one of ``names``."""
        found = None
        for number, pattern in enumerate(self.patterns):
            if any(pattern.search(name) for name in names):
                self.matched[number] = True
                found = number if found is None else found
        return found

    def check_all_matched(self) -> None:
        for pattern, matched in zip(self.patterns, self.matched, strict=True):
            if not matched:
                raise UserError(
                    f"{self.option}: the pattern {pattern.pattern!r} matches no parameter of the model: "
                    "correct it or leave it out"
                )
