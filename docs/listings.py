"""What the package has of commands, refused settings and messages, as Markdown."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from docs.markdown import markdown_table, shown
from ds_optim.cli.app import app
from ds_optim.errors import UserError
from ds_optim.zero.support import REFUSED_SETTINGS, check_config

PACKAGE = Path(__file__).parents[1] / "ds_optim"
STAGES = (0, 1, 2, 3)

#: Values that a refused setting is shown with: the first that it is refused for.
_EXAMPLES = (True, 0.5, "nvme", False, 2)

#: Settings that are held against the reference at every stage where they mean something: (name, stages, config).
_BF16 = {"bf16": {"enabled": True}}
_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


def _autocast(dtype: str) -> Mapping[str, Any]:
    return {"torch_autocast": {"enabled": True, "dtype": dtype}}


SHOWN: Sequence[tuple[str, tuple[int, ...], Mapping[str, Any]]] = (
    ("fp32", STAGES, {}),
    ("bf16", STAGES, _BF16),
    ("bf16, gradients accumulated in fp32 (`data_types.grad_accum_dtype`)", (1,), {**_BF16, **_SUMS}),
    ("fp16 with a loss scale", STAGES, {"fp16": {"enabled": True}}),
    ("fp16 with `loss_scale` 1", STAGES, {"fp16": {"enabled": True, "loss_scale": 1}}),
    ("bf16 master weights, with `bf16_optimizer_states`", STAGES, _MASTERS),
    ("bf16 master weights with optimizer offload", STAGES, {**_MASTERS, **_OFFLOAD}),
    ("`torch_autocast` in bf16, over fp32 weights", STAGES, _autocast("bfloat16")),
    ("`torch_autocast` in fp16, which scales losses", STAGES, _autocast("float16")),
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


def commands() -> str:
    """The help of every command, as tables."""
    return "\n".join(_section(path, command) for path, command in _commands(typer.main.get_command(app), "ds-optim"))


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> str:
    rows = []
    for option in command.params:
        argument = option.param_type_name == "argument"
        written = option.name.upper() if argument else ", ".join([*option.opts, *option.secondary_opts])
        default = option.default
        quiet = argument or default is None or default is False or callable(default)
        rows.append((f"`{written}`", "" if quiet else shown(default), option.help or ""))
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
