"""The one reader of every JSON that a user writes: DeepSpeed's own, with a line for each mistake.

DeepSpeed reads its configs with hjson, which takes comments and trailing commas, and refuses a key that stands twice.
"""

from __future__ import annotations

import base64
import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hjson

from ds_optim.errors import UserError


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a dict of its own, from a dict, a JSON file, or a string of a JSON in base64.

    Raises:
        UserError: the file is missing, or holds no JSON object that DeepSpeed reads.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, Path)):
        raise UserError(f"the DeepSpeed config is {config!r}: pass a dict or the path of a JSON")
    if isinstance(config, str) and not os.path.exists(config):
        decoded = _from_base64(config)
        if decoded is not None:
            return decoded
    value = read_json(config)
    if not isinstance(value, dict):
        raise UserError(f'{config} holds no JSON object: a DeepSpeed config is one, such as {{"train_batch_size": 8}}')
    return value


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: one line that names the file.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise UserError(f"cannot read the config {str(path)!r}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not JSON in UTF-8 (at byte {problem.start}): save it as UTF-8") from None
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; ``where`` begins the line of a mistake in it."""

    def once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where} has the key {twice!r} twice in one object: keep one of them")
        return found

    if not text.strip():
        raise UserError(f"{where} is empty: write a JSON object")
    try:
        return hjson.loads(text, object_pairs_hook=once_each)
    except hjson.HjsonDecodeError as problem:
        raise UserError(
            f"{where} is not JSON (line {problem.lineno}: {problem.msg}): look there for a comma, quote or bracket too"
            " few, and for True, None or NaN, which JSON has not"
        ) from None
    except (OverflowError, RecursionError) as problem:
        raise UserError(f"{where} is not JSON that DeepSpeed reads ({problem})") from None


def _from_base64(text: str) -> dict[str, Any] | None:
    """The config that a string encodes as DeepSpeed takes it; None where it is none, but the path of a file."""
    try:
        decoded = base64.b64decode("".join(text.split()), altchars=b"-_", validate=True).decode("utf-8")
    except ValueError:
        return None
    value = parse_json(decoded, "the config in base64") if decoded.lstrip().startswith("{") else None
    return value if isinstance(value, dict) else None
