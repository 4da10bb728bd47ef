"""Names and shapes decide what each parameter gets: a matrix rule, an aux rule, a view, decay or none.

A parameter is a *matrix* if it has two dimensions larger than 1, or a view that gives two, and is neither an
embedding nor an output head nor (ours) any other of ``optimizers.kinds``. What is left with two or more dimensions
is *aux*, the rest (biases, gains) *vector*: aux too, without decay unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers.checks import check_bool
from ds_optim.optimizers.derived import DerivedViews
from ds_optim.optimizers.experts import apart
from ds_optim.optimizers.kinds import Kinds
from ds_optim.optimizers.patterns import Patterns
from ds_optim.sharding.binding import Member, full_shape, is_optimized
from ds_optim.sharding.layout import ParamSpec

MATRIX, AUX, VECTOR = "matrix", "aux", "vector"
ROLES = (MATRIX, AUX, VECTOR)
MEMBERS = "members"
"""The key under which a group hands its members to an optimizer; no optimizer keeps it in its groups."""

ROUTING_OPTIONS = ("matrix_exclude", "matrix_exclude_defaults", "views", "views_defaults", "heads")
"""The options of a config that are ``param_groups``' and not the optimizer's."""

FOREIGN = "parameter groups must come from ds_optim.param_groups(model), which names their members"

_routed: WeakKeyDictionary[nn.Module, dict[int, tuple[ParamSpec, MatrixView | None, str, str]]] = WeakKeyDictionary()
"""What ``param_groups`` last said of a model's parameters, by identity: users split and rewrite its groups. Parameters
themselves get no weak references, which torch's swapping of tensors refuses."""

_unmatched: WeakKeyDictionary[nn.Module, list[tuple[str, str]]] = WeakKeyDictionary()
"""Of a pipeline's model, which is one stage's: (option, pattern) that found nothing in it, and may in another."""


def param_groups(
    model: nn.Module,
    *,
    matrix_exclude: Sequence[str] | None = None,
    matrix_exclude_defaults: bool = True,
    views: Sequence[Mapping[str, Any]] = (),
    views_defaults: bool = True,
    heads: str | bool | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups that the optimizers of this package take.

    Args:
        model: its trainable parameters are routed by name and shape; tied ones once. A model made under
            ``deepspeed.zero.Init`` is read by its full shapes.
        matrix_exclude: regular expressions, searched in the names, of matrices that take the aux rule beside
            those that do by default.
        matrix_exclude_defaults: whether embeddings, output heads and (ours) routers of experts take the aux rule
            unasked, by module and name (see ``optimizers.kinds``).
        views: options of :meth:`MatrixView.from_options`, each with a ``match`` expression; the first that
            matches a name counts. What it leaves with fewer than two dimensions (the bias of a fused QKV) is
            no matrix and has no view. GPT-2's ``Conv1D`` weights are seen transposed without being asked, and
            so are stacked experts that are stored fan-in first.
        views_defaults: whether what ``views`` does not name is seen as what the model's modules and configs say
            (see ``optimizers.derived``): stacked experts one by one, their gates and ups apart, fused queries, keys
            and values apart.
        heads: "auto" (or True) cuts queries, keys and values into heads by the config, where nobody wrote a view.
        parameters: keep to these parameters of the model.

    Returns:
        Up to three groups, named "matrix", "aux" and "vector", in this order; behind them as many for the experts of
        DeepSpeed's MoE layers, which share the name by which DeepSpeed knows their ranks. Split them, or write a
        hyperparameter of the rule into one ("lr", "weight_decay", "betas"): it wins over the optimizer's argument.

    Raises:
        UserError: a pattern that is no regular expression or matches no parameter (for a view: none with two
            dimensions); parameters that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"param_groups got a {type(model).__name__}: pass the model itself")
    aliases = _aliases(model)
    kept = {id(p) for _, p in aliases} if parameters is None else {id(p) for p in parameters}
    if not kept <= {id(p) for _, p in aliases}:
        raise UserError("some of the parameters given are not the model's: pass only parameters of the model")
    check_bool("matrix_exclude_defaults", matrix_exclude_defaults)
    kinds = Kinds(model)
    derived = _derived(model, kinds, heads, defaults=check_bool("views_defaults", views_defaults))
    excluded = () if matrix_exclude is None else matrix_exclude
    router = _Router(kinds, derived, excluded, views, defaults=matrix_exclude_defaults)
    by_role: dict[str, list[Member]] = {role: [] for role in ROLES}
    said = _routed.setdefault(model, {})
    for names, parameter in aliases:
        if is_optimized(parameter) and id(parameter) in kept:
            role, member = router.route(names, parameter)
            by_role[role].append(member)
            said[id(parameter)] = member.spec, member.view, member.reason, member.derived
        else:
            router.pass_by(names, parameter)
    if in_stages(model):
        _unmatched[model] = router.unmatched()
    else:
        router.check_all_matched()
    return _groups(by_role)


def _groups(by_role: Mapping[str, Sequence[Member]]) -> list[dict[str, Any]]:
    groups = [
        {"params": [m.parameter for m in members], "name": role, "role": role, MEMBERS: members}
        for role, members in by_role.items()
        if members
    ]
    return apart(groups, MEMBERS)


def _derived(model: nn.Module, kinds: Kinds, heads: str | bool | None, *, defaults: bool) -> DerivedViews | None:
    """What the model itself says of views; None where nobody is to ask it."""
    if not defaults and heads:
        raise UserError('"heads": "auto" is one of the views_defaults: leave "views_defaults": false out')
    return DerivedViews(model, kinds, heads=heads) if defaults else None


class _Router:
    """What the user's patterns and the model itself say of a parameter."""

    def __init__(
        self,
        kinds: Kinds,
        derived: DerivedViews | None,
        exclude: Sequence[str],
        views: Sequence[Mapping[str, Any]],
        *,
        defaults: bool,
    ) -> None:
        if isinstance(views, (str, Mapping)) or not isinstance(views, Sequence):
            raise UserError(f'views is {views!r}: write a list of views, such as [{{"match": "qkv", "heads": 12}}]')
        self._exclude = Patterns("matrix_exclude", exclude)
        self._viewed = Patterns("views", [_match_of(view) for view in views])
        self._options = [{k: v for k, v in view.items() if k != "match"} for view in views]
        self._kinds, self._derived, self._defaults = kinds, derived, defaults

    def route(self, names: Sequence[str], parameter: nn.Parameter) -> tuple[str, Member]:
        """The parameter's role, and the parameter with its view or with the reason why it is no matrix."""
        spec = ParamSpec(name=names[0], shape=full_shape(parameter))
        excluded = self._exclude.first(names)
        number = _first_view(self._viewed, names, parameter)
        if len(spec.shape) < 2:
            return VECTOR, Member(spec, parameter)
        found = self._derived.of(parameter) if self._derived is not None and number is None else None
        chosen = dict(self._options[number] if number is not None else found.options if found is not None else {})
        if id(parameter) in self._kinds.transposed and _dimensions(chosen, spec.shape) == 2:
            chosen.setdefault("transpose", True)
        reason = None if excluded is None else f"matrix_exclude {self._exclude.patterns[excluded].pattern!r}"
        if reason is None and self._defaults:
            reason = self._kinds.excluded(names, parameter)
        reason = reason or self._kinds.no_matrix(names, parameter)
        if reason is None and number is not None and _dimensions(chosen, spec.shape) == 1:
            reason = "vectors by their view"  # batch_dims sets too much aside: the biases of stacked experts
        if (
            reason is None
            and number is None
            and found is None
            and len(spec.shape) > 2
            and id(parameter) not in self._kinds.convolutions
        ):
            reason = self._kinds.without_view(parameter)
        if reason is None:
            view = MatrixView.from_options(spec.name, spec.shape, chosen)
            if min(view.rows, view.columns) > 1:
                return MATRIX, Member(spec, parameter, view, derived="" if found is None else found.what)
            reason = "vector"
        return AUX, Member(spec, parameter, reason=reason)

    def pass_by(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Patterns may mean a parameter that is not stepped: a frozen layer must not turn a config into an error."""
        self._exclude.first(names)
        _first_view(self._viewed, names, parameter)

    def unmatched(self) -> list[tuple[str, str]]:
        """The user's patterns that have matched nothing, with their options."""
        return [(own.option, pattern) for own in (self._viewed, self._exclude) for pattern in own.unmatched()]

    def check_all_matched(self) -> None:
        """Refuse the user's patterns that have matched nothing."""
        self._viewed.check_all_matched()
        self._exclude.check_all_matched()


def in_stages(model: object) -> bool:
    """Whether a model is DeepSpeed's ``PipelineModule``, whose parameters are those of one stage."""
    return any(cls.__name__ == "PipelineModule" for cls in type(model).__mro__)


def unmatched_in(model: nn.Module) -> list[tuple[str, str]]:
    """(option, pattern) of what ``param_groups`` was told of a pipeline's model and found no parameter by."""
    return _unmatched.get(model, [])


def _first_view(viewed: Patterns, names: Sequence[str], parameter: nn.Parameter) -> int | None:
    """The number of the view for a parameter; a pattern for a layer's weight may find its bias, and means none."""
    return viewed.first(names) if len(full_shape(parameter)) >= 2 else None


def _dimensions(options: Mapping[str, Any], shape: Sequence[int]) -> int:
    """The dimensions that ``batch_dims`` leaves; malformed options are the view's to refuse."""
    batch_dims = options.get("batch_dims", 0)
    return len(shape) - batch_dims if isinstance(batch_dims, int) else len(shape)


def routed(parameter: torch.Tensor) -> Member | None:
    """The member that ``param_groups`` made of a parameter; None where it has not seen it."""
    for model, said in _routed.items():
        spec, view, *words = said.get(id(parameter), (None, None, "", ""))
        if spec is not None and _has(model, spec.name, parameter):
            return Member(spec, parameter, view, *words)  # type: ignore[arg-type]
    return None


def _has(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether ``name`` still is that parameter: an identity may be another's by now."""
    try:
        return model.get_parameter(name) is parameter
    except AttributeError:
        return False


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
    return _groups(by_role)


def _aliases(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names: a tied head answers to its own name too."""
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(names.values())


def _match_of(view: Mapping[str, Any]) -> str:
    if not isinstance(view, Mapping):
        raise UserError(f'the view {view!r} is no object: write e.g. {{"match": "qkv", "heads": 12}}')
    if "match" not in view:
        raise UserError(f'the view {dict(view)!r} has no "match": write the pattern of the names that it is for')
    return str(view["match"])
