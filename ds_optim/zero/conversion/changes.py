"""A config that is being changed, and a line for each change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ds_optim.zero.auto import at


@dataclass
class Changes:
    """The config, changed in place, and what was changed: where, to what, why."""

    config: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    def set(self, path: str, value: Any, why: str) -> None:
        """Set the value at "a.b", whose object must be there."""
        old = at(self.config, path)
        owner, key = self._owner(path)
        owner[key] = value
        self.say(path, f"{'' if old is None else json.dumps(old) + ' -> '}{json.dumps(value)}", why)

    def drop(self, path: str, why: str) -> None:
        """Take the value at "a.b" out."""
        owner, key = self._owner(path)
        old = owner.pop(key)
        if not owner and "." in path:
            self._owner(path.rpartition(".")[0])[0].pop(path.split(".")[-2])
        self.say(path, f"{json.dumps(old)} taken out", why)

    def say(self, path: str, what: str, why: str) -> None:
        self.lines.append(f"{path}: {what} ({why})")

    def _owner(self, path: str) -> tuple[dict[str, Any], str]:
        *above, key = path.split(".")
        owner = at(self.config, ".".join(above)) if above else self.config
        assert isinstance(owner, dict), path
        return owner, key
