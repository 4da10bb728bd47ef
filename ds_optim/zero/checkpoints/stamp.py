"""What a file of a sealed checkpoint says of itself, within: of which run, step and save it is, and its own name.

A checksum beside a file tells whether the file is as it was; not whether it belongs where it lies. Two ranks' files in
each other's place, or a shard of another run, have the sizes and shapes that a load asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

STAMP = "ds_optim_seal"
"""The key in the file's dict; DeepSpeed hands what it does not know to the client's state."""

Stamps = Callable[[str], Mapping[str, Any]]
"""The stamp of a file by its name."""


def stamped(content: Mapping[str, Any], name: str, stamps: Stamps | None) -> dict[str, Any]:
    """What is to be written to the file ``name``; an earlier stamp goes."""
    bare = {key: value for key, value in content.items() if key != STAMP}
    return bare if stamps is None else {**bare, STAMP: dict(stamps(name))}
