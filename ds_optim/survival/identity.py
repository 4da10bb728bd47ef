"""Each file of a sealed checkpoint bound to its place: run, step, name, and all that the manifest notes of the save.

The notes name ranks, stage, optimizer and settings, and a number drawn for the save; a digest of them stands in each
file. So the files of one manifest are those that were written together, each under its own name.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable, short, typed
from ds_optim.zero.checkpoints.folder import STAMP, Stamps
from ds_optim.zero.checkpoints.safe import load

RUN, SAVE = "run", "save"
"""Keys of the notes: numbers drawn at a run's first start, and at each save."""
DIGESTS = "inputs"
"""The key of ``ds_optim.survival.inputs`` in a checkpoint's notes."""
OF_THE_OPTIMIZER = ("optimizer", "optimizer_params", "lr", "tuned")
"""The settings among the notes that say which optimizer it is."""
_ID = r"^[0-9a-f]{16}$"
_POSITION: TypeAdapter[Any] = TypeAdapter(dict[str, Annotated[int, Field(strict=True, ge=0, lt=2**63)]])


def new_id() -> str:
    """A name that no other run or save has."""
    return secrets.token_hex(8)


class _Trajectory(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    stage: Literal[0, 1, 2, 3]


class _Notes(BaseModel):
    """What a manifest notes; of older releases without the names of run and save."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0, lt=2**53)
    world_size: int = Field(ge=1, lt=2**24)
    trajectory: _Trajectory
    run: str | None = Field(None, pattern=_ID)
    save: str | None = Field(None, pattern=_ID)


def check_notes(notes: Any, *, bound: bool) -> None:
    """Raise ``Unreadable`` for notes that no save writes."""
    read = typed(notes, _Notes)
    if bound and None in (read.run, read.save):
        raise Unreadable("is damaged (it names no run)")


def missing_files(notes: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Which files of ranks are not among the ``names``, as far as each rank writes one; None where all are."""
    stage, ranks = notes["trajectory"]["stage"], notes["world_size"]
    for kind, count in (("model", ranks if stage == 3 else 1), ("optim", ranks if stage else 0)):
        found = sum(name.endswith(f"{kind}_states.pt") for name in names)
        if found < count:
            return f"{found} of {count} *_{kind}_states.pt are there"
    return None


def stamps_of(notes: Mapping[str, Any]) -> Stamps:
    """The stamps of the files of a save with these notes."""
    common = {RUN: notes[RUN], "step": notes["step"], "notes": _digest(notes)}
    return lambda name: {"file": name, **common}


def misplaced(folder: Path, name: str, notes: Mapping[str, Any], *, bound: bool) -> str | None:
    """Why a file of a checkpoint is not the one that its manifest is about, or holds more than data; in one line.

    bound: whether the files are stamped; of others only the step can be told, where the client's state has it.
    """
    if not name.endswith("_states.pt"):
        return None  # an optimizer's swapped state, which DeepSpeed copies and nobody unpickles
    try:
        content = load(folder / name)
    except UserError as problem:
        return str(problem).removeprefix(f"{folder}/")
    if not isinstance(content, Mapping):
        return f"{name} is no file of a DeepSpeed checkpoint"
    found = content.get(STAMP)
    if not bound and found is not None:
        return f"{name} is of a later release than its manifest"
    if not bound:
        found = {"step": content.get("step", notes["step"])}
    reason = _difference(found, stamps_of(notes)(name) if bound else {"step": notes["step"]})
    if reason is None and "position" in content:
        try:
            _POSITION.validate_python(content["position"])
        except (ValidationError, RecursionError):
            reason = "holds no position of the text"
    return None if reason is None else f"{name} {reason}"


def _difference(found: Any, expected: Mapping[str, Any]) -> str | None:
    if not isinstance(found, Mapping):
        return "does not say of which run it is"
    for key, says in (
        (RUN, "is of another run"),
        ("step", f"is of step {short(found.get('step'), 40)}"),
        ("file", f"was written as {short(found.get('file'), 80)}"),
        ("notes", "is of another save: other settings, optimizer, ranks or layout than the manifest notes"),
    ):
        value = found.get(key)
        if key in expected and not (type(value) is type(expected[key]) and value == expected[key]):
            return says
    return None


def _digest(notes: Mapping[str, Any]) -> str:
    # As they come back from the manifest: JSON has no tuples, and no keys but strings.
    plain = json.loads(json.dumps(notes))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
