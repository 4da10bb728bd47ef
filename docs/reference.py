"""Reference pages as Markdown, read from the code: settings, arguments, commands, what is refused, messages."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

import ds_optim
from ds_optim.cli.app import app
from ds_optim.errors import UserError
from ds_optim.job.presets import PRESETS, tuned_params
from ds_optim.job.settings import TrainSettings
from ds_optim.matrix.polar import DTYPES, METHODS, NORMALIZATIONS, PolarSpec
from ds_optim.matrix.schedules import SCHEDULES
from ds_optim.optimizers.options import EXCHANGE_DEFAULTS, CommonOptions, MatrixOptions, aux_options
from ds_optim.optimizers.rules import RULES
from ds_optim.optimizers.table import in_order
from ds_optim.zero.support import REFUSED_SETTINGS, check_config

PACKAGE = Path(__file__).parents[1] / "ds_optim"
STAGES = (0, 1, 2, 3)

#: Of settings that are no flags.
_WITHOUT_FLAG = {
    "tuned": "Start from the preset's tuned parameters of the optimizer; off where a JSON names the optimizer.",
    "deepspeed": "What else the DeepSpeed JSON (`--config`) says, as it is.",
}
#: Values that a refused setting is shown with: the first that it is refused for.
_EXAMPLES = (True, 0.5, "nvme", False, 2)

_DEFAULTS = {"momentum_dtype": "float32", "decay_1d": False, "diagnostics": False, "seed": 0}
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
}
_ARGS = re.compile(r"^Args:.*\n((?: +.*\n?|\n(?= ))*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w[\w, ]*): ((?:.*\n?)(?:^ {5,}.*\n?)*)", re.MULTILINE)

#: Settings that are held against the reference at every stage where they mean something: (name, stages, config).
_BF16 = {"bf16": {"enabled": True}}
_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
SHOWN: Sequence[tuple[str, tuple[int, ...], Mapping[str, Any]]] = (
    ("fp32", STAGES, {}),
    ("bf16", STAGES, _BF16),
    ("bf16, gradients accumulated in fp32 (`data_types.grad_accum_dtype`)", (1,), {**_BF16, **_SUMS}),
    ("fp16 with a loss scale", STAGES, {"fp16": {"enabled": True}}),
    ("fp16 with `loss_scale` 1", STAGES, {"fp16": {"enabled": True, "loss_scale": 1}}),
    ("bf16 master weights, with `bf16_optimizer_states`", STAGES, _MASTERS),
    ("bf16 master weights with optimizer offload", STAGES, {**_MASTERS, **_OFFLOAD}),
    ("`gradient_clipping`", STAGES, {"gradient_clipping": 1.0}),
    ("`gradient_accumulation_steps` above 1", STAGES, {"gradient_accumulation_steps": 4}),
    ("`offload_optimizer` to the CPU", (1, 2, 3), _OFFLOAD),
    ("`reduce_scatter`, on and off", (1, 2, 3), {"zero_optimization": {"reduce_scatter": False}}),
    ("`overlap_comm`, on and off", (1, 2, 3), {"zero_optimization": {"overlap_comm": True}}),
    ("`contiguous_gradients`, on and off", (1, 2, 3), {"zero_optimization": {"contiguous_gradients": False}}),
    ("`round_robin_gradients`", (1, 2), {"zero_optimization": {"round_robin_gradients": True}}),
    ("`sub_group_size`", (3,), {"zero_optimization": {"sub_group_size": 1000}}),
    ("`stage3_param_persistence_threshold`", (3,), {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    ("`deepspeed.zero.Init`", (3,), {}),
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a cell is escaped."""
    lines = [list(header), ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def settings() -> str:
    """Every setting of ``ds-optim train``, with its flag's words."""
    words = {option.name: option.help for option in _command("train").params}
    rows = []
    for name, field in TrainSettings.model_fields.items():
        bounds = [_bound(one) for one in field.metadata if _bound(one)]
        choices = get_args(field.annotation) if "Literal" in str(field.annotation) else ()
        default = "none" if field.default_factory else _shown(field.default)
        kind = " or ".join(map(_shown, choices)) or _type(field.annotation)
        rows.append((f"`{name}`", ", ".join([kind, *bounds]), default, words.get(name) or _WITHOUT_FLAG[name]))
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


def _shown(value: Any) -> str:
    return "none" if value is None or value == () else f"`{json.dumps(value, default=str)}`"


def arguments() -> str:
    """The arguments of each optimizer's own, with defaults and what its docstring says of each."""
    parts = []
    for described in in_order():
        cls = described.cls
        said = _arguments_said(cls)
        rows = [
            (f"`{name}`", _shown(parameter.default), said.get(name, ""))
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
    rows = [(f"`{name}`", _shown(_DEFAULTS[name]) if name in _DEFAULTS else "", common[name]) for name in common]
    return markdown_table(("option", "default", "what it is"), rows)


def matrix_options() -> str:
    """The options of rules for matrices beside the common ones."""
    name, _ = aux_options({})
    shown = {"aux": _shown(name), "aux_weight_decay": "`weight_decay`", "polar": "below", "exchange": "below"}
    own = [key for key in MatrixOptions.__annotations__ if key not in CommonOptions.__annotations__]
    rows = [(f"`{key}`", shown.get(key, "the aux rule's"), _MATRIX_WORDS[key]) for key in own]
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
            ", ".join(map(_shown, choices.get(field.name, ()))) or "a whole number",
            _shown(field.default),
            said[field.name],
        )
        for field in dataclasses.fields(PolarSpec)
        if field.default is not None
    ]
    return markdown_table(("key", "takes", "default", "what it is"), rows)


def exchange() -> str:
    """The object `exchange`."""
    rows = [(f"`{key}`", _shown(value), _EXCHANGE_WORDS[key]) for key, value in EXCHANGE_DEFAULTS.items()]
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


def commands() -> str:
    """The help of every command, as tables."""
    return "\n".join(_section(path, command) for path, command in _commands(typer.main.get_command(app), "ds-optim"))


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def _section(path: str, command: Any) -> str:
    rows = []
    for option in command.params:
        argument = option.param_type_name == "argument"
        written = option.name.upper() if argument else ", ".join([*option.opts, *option.secondary_opts])
        default = option.default
        shown = "" if argument or default is None or default is False or callable(default) else _shown(default)
        rows.append((f"`{written}`", shown, option.help or ""))
    parts = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    words = "\n\n".join(f"```bash\n{part}\n```" if part.startswith("ds-optim ") else part for part in parts)
    table = markdown_table(("flag", "default", "what it is"), rows) if rows else ""
    return f"## {path}\n\n{words}\n\n{table}"


def works() -> str:
    """Settings by stage: what a config of each is answered."""
    rows = [
        (name, *(_answer(config, stage) if stage in stages else "–" for stage in STAGES))
        for name, stages, config in SHOWN
    ]
    return markdown_table(("setting", *(f"stage {stage}" for stage in STAGES)), rows)


def _answer(config: Mapping[str, Any], stage: int) -> str:
    return "works" if _complaint(config, stage) is None else "refused"


def _complaint(config: Mapping[str, Any], stage: int) -> str | None:
    zero = {**config.get("zero_optimization", {}), "stage": stage}
    try:
        check_config({**config, "zero_optimization": zero})
    except UserError as error:
        return str(error)
    return None


def refused() -> str:
    """What is refused at every stage, with what to write instead."""
    rows = []
    for path, test, remedy in REFUSED_SETTINGS:
        if path.startswith("bfloat16."):
            continue  # the other name of the same section
        value = next(example for example in _EXAMPLES if test(example))
        config: Any = value
        for key in reversed(path.split(".")):
            config = {key: config}
        found = [stage for stage in STAGES if _complaint(config, stage) is not None]
        stages = "all" if len(found) == len(STAGES) else ", ".join(map(str, found))
        rows.append((f"`{path}`", f"`{json.dumps(value)}`", stages, remedy))
    return markdown_table(("setting", "such as", "stages", "why, or what to write"), rows)


def messages() -> str:
    """Every message of a user's mistake, by the module that says it; … stands for what it fills in."""
    parts = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found = list(dict.fromkeys(messages_of(path)))
        if found:
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            parts.append(f"## {name}\n\n" + "".join(f"- {_literal(text)}\n" for text in found))
    return "\n".join(parts)


def messages_of(path: Path) -> Iterator[str]:
    """The texts of a module's ``raise UserError(...)``, of those that stand there and do not come from elsewhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and call.args and getattr(call.func, "id", "") == "UserError":
            text = text_of(call.args[0])
            if len(text.replace("…", "").strip()) > 12:
                yield text


def text_of(node: ast.expr) -> str:
    """What an expression of text says, … for what it fills in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("(…\\s*)+…", "…", "".join(text_of(part) for part in node.values))
    return "…"


def _literal(text: str) -> str:
    """As code in Markdown, backquotes or not."""
    plain = " ".join(text.split())
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"
