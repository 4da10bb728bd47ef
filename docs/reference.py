"""Settings, options and arguments as Markdown, read from the code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

import ds_optim
from docs.markdown import markdown_table, shown
from ds_optim.cli.app import app
from ds_optim.job.presets import PRESETS, tuned_params
from ds_optim.job.settings import TrainSettings
from ds_optim.matrix.polar import DTYPES, METHODS, NORMALIZATIONS, PolarSpec
from ds_optim.matrix.schedules import SCHEDULES
from ds_optim.optimizers.options import EXCHANGE_DEFAULTS, CommonOptions, MatrixOptions, aux_options
from ds_optim.optimizers.rules import RULES
from ds_optim.optimizers.table import in_order

#: Of settings that are no flags.
_DEFAULTS = {"momentum_dtype": "float32", "decay_1d": False, "cautious_decay": False, "diagnostics": False, "seed": 0}
_MATRIX_WORDS = {
    "aux": "the rule for what is no matrix",
    "aux_lr": "its learning rate; LionMuon and SignMuon give it `lr / sign_lr_ratio`",
    "aux_betas": "its betas, of `lion` and `adamw`",
    "aux_beta": "its beta, of `signum`",
    "aux_weight_decay": "its decay",
    "polar": "how matrices are orthogonalized",
    "exchange": "how cut matrices come together",
}
_EXCHANGE_WORDS = {
    "bucket_mb": "MiB that an exchange may hold at once, unless one matrix asks for more",
    "overlap": "messages travel while matrices are worked on",
    "costs": 'owners get equal work by the clock, `"measured"`, or by counted operations, `"modelled"`',
    "share": 'ranks of a node share the largest matrices: `"auto"`, where it pays, or how many share each',
}
_ARGS = re.compile(r"^Args:.*\n((?: +.*\n?|\n(?= ))*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w[\w, ]*): ((?:.*\n?)(?:^ {5,}.*\n?)*)", re.MULTILINE)


def settings() -> str:
    """Every setting of ``ds-optim train``, with its flag's words."""
    rows = []
    for name, field in TrainSettings.model_fields.items():
        bounds = [_bound(one) for one in field.metadata if _bound(one)]
        choices = get_args(field.annotation) if "Literal" in str(field.annotation) else ()
        default = "none" if field.default_factory else shown(field.default)
        kind = " or ".join(map(shown, choices)) or _type(field.annotation)
        rows.append((f"`{name}`", ", ".join([kind, *bounds]), default, field.description))
    return markdown_table(("setting", "takes", "default", "what it is"), rows)


def _bound(constraint: Any) -> str:
    for attribute, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below")):
        limit = getattr(constraint, attribute, None)
        if limit is not None:
            return f"{word} {'2⁶³' if limit == 2**63 else limit}"
    return ""


def _type(annotation: Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    containers = {dict: "an object", tuple: "names, comma-separated"}
    if get_origin(annotation) in containers:
        return containers[get_origin(annotation)]
    return next(plain[kind] for kind in (annotation, *get_args(annotation)) if kind in plain)


def arguments() -> str:
    """The arguments of each optimizer's own, with defaults and what its docstring says of each."""
    parts = []
    for described in in_order():
        cls = described.cls
        said = _arguments_said(cls)
        rows = [
            (f"`{name}`", shown(parameter.default), said.get(name, ""))
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name not in ("self", "params") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        options = "matrix rules' options" if cls.has_aux else "common options"
        own = markdown_table(("argument", "default", "what it is"), rows)
        more = f"And the {options}; formulas: [API](api/index.md#{path_of(cls.__name__)})."
        parts.append(f"### {cls.__name__}\n\n{own}\n{more}\n")
    return "\n".join(parts)


def options() -> str:
    """The options that every optimizer takes, and those of rules for matrices, in the words of their docstrings."""
    common = _said_of_keys(CommonOptions)
    rows = [(f"`{name}`", shown(_DEFAULTS[name]) if name in _DEFAULTS else "", common[name]) for name in common]
    return markdown_table(("option", "default", "what it is"), rows)


def matrix_options() -> str:
    """The options of rules for matrices beside the common ones."""
    name, _ = aux_options({})
    defaults = {"aux": shown(name), "aux_weight_decay": "`weight_decay`", "polar": "below", "exchange": "below"}
    own = [key for key in MatrixOptions.__annotations__ if key not in CommonOptions.__annotations__]
    rows = [(f"`{key}`", defaults.get(key, "the aux rule's"), _MATRIX_WORDS[key]) for key in own]
    return markdown_table(("option", "default", "what it is"), rows)


def aux_rules() -> str:
    """What rules of others' parameters start from where nobody writes it."""
    rules = {name: rule.aux for name, rule in RULES.items() if rule.aux is not None}
    rows = [
        (f"`{name}`", f"`{json.dumps({f'aux_{k}': v for k, v in given.items()})}`") for name, given in rules.items()
    ]
    return markdown_table(("`aux`", "starts from"), rows)


def polar() -> str:
    """The object `polar`."""
    said = _said_of_keys(PolarSpec)
    choices = {"schedule": SCHEDULES, "method": METHODS, "normalize": NORMALIZATIONS, "dtype": ("auto", *DTYPES)}
    rows = [
        (
            f"`{field.name}`",
            ", ".join(map(shown, choices.get(field.name, ()))) or "a whole number",
            shown(field.default),
            said[field.name],
        )
        for field in dataclasses.fields(PolarSpec)
        if field.default is not None
    ]
    return markdown_table(("key", "takes", "default", "what it is"), rows)


def exchange() -> str:
    """The object `exchange`."""
    rows = [(f"`{key}`", shown(value), _EXCHANGE_WORDS[key]) for key, value in EXCHANGE_DEFAULTS.items()]
    return markdown_table(("key", "default", "what it is"), rows)


def _said_of_keys(cls: type) -> dict[str, str]:
    """By key what the docstring of a class of keys says of it, in its order there."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    found = re.findall(r"^(\w+): ((?:.*\n?)(?:^(?!\w+: )\S.*\n?|^ +\S.*\n?)*)", doc, re.MULTILINE)
    return {name: re.sub(r":\w+:`", "`", " ".join(words.split()).replace("``", "`")) for name, words in found}


def path_of(name: str) -> str:
    """Where the API page of a name of ``ds_optim`` finds it.

    That is its module for ``initialize``, which has a module of the same name, and for optimizers that are known to the
    package by their registration alone.
    """
    module = getattr(ds_optim, name).__module__
    written = name in ds_optim.__all__ and not module.endswith(f".{name}")
    return f"ds_optim.{name}" if written else f"{module}.{name}"


def _arguments_said(cls: type) -> dict[str, str]:
    """By argument what the "Args:" of the docstring say, those of the parent where it refers to it."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        doc = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
        block = _ARGS.search(doc)
        for names, words in _ARGUMENT.findall(block[1] if block else ""):
            text = " ".join(words.split()).replace("``", "`")
            found |= dict.fromkeys(names.split(", "), re.sub(r":\w+:`", "`", text))
    return found


def tuned() -> str:
    """What the presets of ``ds-optim train`` start each optimizer from."""
    names = [d.cls.__name__ for d in in_order()]
    rows = [
        (f"`{preset}`", f"`{name}`", f"`{json.dumps(params)}`")
        for preset in PRESETS
        for name in ("adamw", "deepspeed:Muon", *names)
        if (params := tuned_params(preset, name))
    ]
    return markdown_table(("preset", "optimizer", "starts from"), rows)


def _command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
