"""What DeepSpeed and pydantic say of a config, as one line that says what to write instead.

An engine is built by some thousand lines that assert and raise about their input. What they raise themselves, about
what the user wrote, is the user's to mend; all else keeps its traceback.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ds_optim.errors import UserError, did_you_mean

#: Sections of a config by the name of the model that DeepSpeed reads them with.
SECTIONS: Mapping[str, str] = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedMonitorConfig": "",  # its fields are the sections
    "CommsLoggerConfig": "comms_logger",
    "CompileConfig": "compile",
    "DeepSpeedThroughputTimerConfig": "timers.throughput",
    "TPTrainingConfig": "tensor_parallel",
    "HybridEngineConfig": "hybrid_engine",
    "WeightQuantConfig": "weight_quantization",
}
#: Kinds of pydantic's errors, by how their names begin, and what to write.
_WRITE = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "a string",
    "list": "a list",
    "dict": "an object of settings",
    "model": "an object of settings",
}
#: How many known names are listed where none is near.
_LISTED = 12


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raise what DeepSpeed says against its input, while it builds an engine, as ``UserError`` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = complaint(error)
        if line is None:
            raise
        raise UserError(line) from error


def complaint(error: Exception, section: str | None = None) -> str | None:
    """The line of an error in which DeepSpeed speaks against its input; None for any other.

    Args:
        section: of the config that was read, where it has another name than DeepSpeed's model of it says.
    """
    if isinstance(error, ValidationError):
        return reword(error, section=section)
    text = " ".join(str(error).split())
    trace = _innermost(error.__traceback__)
    if not text or trace is None:
        return None
    module = str(trace.tb_frame.f_globals.get("__name__"))
    theirs = module.split(".")[0] == "deepspeed"
    if theirs and isinstance(error, ImportError):
        return f"the config asks for what is not installed ({text}): install it, or take its section out"
    if theirs and isinstance(error, TypeError) and ("keyword argument" in text or "required positional" in text):
        return f"the config's parameters do not fit: {text}"
    if (theirs or module.startswith("torch.optim")) and _raises(trace):
        return f"DeepSpeed does not take this config: {text}"
    return None


def reword(error: ValidationError, model: type[BaseModel] | None = None, section: str | None = None) -> str:
    """The first complaint of a pydantic error as one line: which setting, its value, what to write.

    Args:
        model: whose fields were validated; found by its name among DeepSpeed's where it is not given.
        section: that it was read from, likewise.
    """
    first: Mapping[str, Any] = error.errors()[0]
    loc = tuple(str(part) for part in first["loc"])
    section = SECTIONS.get(error.title, "") if section is None else section
    where = ".".join(part for part in (section, *loc) if part)
    kind, message = str(first["type"]), " ".join(str(first["msg"]).split())
    if kind == "extra_forbidden":
        known = _names(model if model is not None else _model_named(error.title), loc[:-1])
        return f"there is no setting {where!r}{_hint(loc[-1], known)}"
    if kind in ("value_error", "assertion_error"):
        message = re.sub(r"^(Value error|Assertion failed), ", "", message)
        return f"{where}: {message}" if where and not message.startswith(where) else message
    if kind == "missing":
        return f"{where} is missing: give it a value"
    return f"{where or error.title} is {first['input']!r}: write {_to_write(kind, message)}"


def _to_write(kind: str, message: str) -> str:
    rest = message.removeprefix("Input should be ")
    if kind in ("enum", "literal_error"):
        # DeepSpeed's enumeration of stages has two names for 3.
        return " or ".join(_once(rest))
    if kind.startswith(("greater", "less")):
        return f"a number {rest}"
    return _WRITE.get(kind.split("_")[0], rest)


def _once(choices: str) -> list[str]:
    """["a, b", "c"] of "a, b, c or c"."""
    names = list(dict.fromkeys(re.split(r", | or ", choices)))
    return [", ".join(names[:-1]), names[-1]] if len(names) > 1 else names


def _hint(word: str, known: list[str]) -> str:
    near = did_you_mean(word, known)
    if near:
        return near
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _LISTED else ": take it out"


def _names(model: type[BaseModel] | None, path: tuple[str, ...]) -> list[str]:
    """The names of a model's settings, or of a section's under it."""
    for part in path:
        annotation = model.model_fields[part].annotation if model is not None and part in model.model_fields else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), None)
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _model_named(title: str) -> type[BaseModel] | None:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = [DeepSpeedConfigModel]
    for model in models:
        models += model.__subclasses__()
    return next((model for model in models if model.__name__ == title), None)


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _raises(trace: TracebackType) -> bool:
    """Whether a frame ended in a ``raise`` or an ``assert`` of its own, and not in what it called."""
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
