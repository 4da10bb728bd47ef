"""What the package has of commands, refused settings and messages, as Markdown."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from docs.markdown import markdown_table, shown
from ds_optim.cli.app import app
from ds_optim.errors import UserError
from ds_optim.zero.refused import REFUSED_SETTINGS
from ds_optim.zero.support import check_config
from tests.pairs import PAIRED, PAIRS, REFUSED, Pair
from tests.settings import SETTINGS, Setting

PACKAGE = Path(__file__).parents[1] / "ds_optim"
STAGES = (0, 1, 2, 3)

#: Values that a refused setting is shown with: the first that it is refused for.
_EXAMPLES = (True, 0.5, "nvme", False, 2)


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
    """Settings by stage: what a config of each is answered, on how many ranks the tests train it, and why not."""
    rows = []
    for setting in SETTINGS:
        answers = {stage: complaint(setting, stage) for stage in setting.stages}
        cells = (_answer(setting, stage, answers[stage]) if stage in answers else "–" for stage in STAGES)
        rows.append((setting.name, *cells, _reasons(answers)))
    return markdown_table(("setting", *(f"stage {stage}" for stage in STAGES), "refused, why"), rows)


def _answer(setting: Setting, stage: int, found: str | None) -> str:
    if found is not None:
        return "refused"
    ranks = setting.ranks_at(stage)
    return f"works ({', '.join(map(str, ranks))})" if ranks else "accepted, not run"


def _reasons(answers: Mapping[int, str | None]) -> str:
    """What complaints say behind the setting's name, each once, with its stages."""
    stages: dict[str, list[int]] = {}
    for stage, found in answers.items():
        if found is not None:
            stages.setdefault(re.sub(r"^.*? is not supported\b[^:]*: ", "", found), []).append(stage)
    if len(stages) == 1 and len(answers) == sum(map(len, stages.values())):
        return next(iter(stages))
    return " / ".join(f"stage {', '.join(map(str, at))}: {why}" for why, at in stages.items())


def complaint(setting: Setting, stage: int) -> str | None:
    """Why a setting is refused at a stage; None where it works."""
    return setting.refused.get(stage) or _complaint(setting.config_at(stage))


def _complaint(config: Mapping[str, Any]) -> str | None:
    try:
        check_config(config)
    except UserError as error:
        return str(error)
    return None


def pairs() -> str:
    """Each setting with those that it trains beside, by stage, and those that it is refused beside; each pair once."""
    rows = []
    for name in PAIRED:
        mine = [pair for pair in PAIRS if pair.names[0] == name]
        trained: dict[int, list[str]] = {}
        for pair in mine:
            if pair.refused is None:
                trained.setdefault(pair.stage, []).append(pair.names[1])
        beside = "; ".join(f"stage {stage}: {', '.join(trained[stage])}" for stage in sorted(trained))
        why = (f"{pair.names[1]}{_at(pair)}: {pair.refused}" for pair in mine if pair.refused is not None)
        if mine:
            rows.append((name, beside or "–", " / ".join(why) or "–"))
    return markdown_table(("setting", "trains beside, shown at", "refused beside, in a line that says"), rows)


def _at(pair: Pair) -> str:
    stages = REFUSED[pair.names][0]
    return f" (stage {', '.join(map(str, stages))})" if stages else ""


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
        zero = config.get("zero_optimization", {})
        found = [s for s in STAGES if _complaint({**config, "zero_optimization": {**zero, "stage": s}}) is not None]
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
