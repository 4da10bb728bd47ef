"""Flags of a command that are the fields of its settings, so that each is described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = Callable[..., int]


def with_flags(settings: type[BaseModel], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command that takes ``**flags`` a flag for each field of ``settings`` but some: None, or False, where it is
    not given."""

    def decorate(command: Command) -> Command:
        fields = [_flag(name, field) for name, field in settings.model_fields.items() if name not in without]
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own if parameter.kind != _REST]
        command.__signature__ = inspect.Signature([*fields, *kept])  # type: ignore[attr-defined]
        return command

    return decorate


_REST = inspect.Parameter.VAR_KEYWORD


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _kind(field.annotation)
    decls = (f"--{name.replace('_', '-')}",) if kind is bool else ()  # without a --no-... beside it
    option = typer.Option(*decls, help=field.description)
    annotation = Annotated[bool, option] if kind is bool else Annotated[kind | None, option]
    default = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(annotation: Any) -> type:
    """What is written for a field: text for objects and lists, which are read later."""
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    plain = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    return str if get_origin(annotation) in (dict, tuple) else plain[0]
