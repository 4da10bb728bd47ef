"""What the study runs: one declarative file, and the cells that are to run next given those that are done.

A block's cells follow from results where its learning rates are looked for: ``due`` is asked again after every cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_optim.errors import UserError
from ds_optim.zero.complaints import reword

Done = Mapping[str, float]
"""Validation loss by a cell's key; infinite where the run diverged."""
Rows = Mapping[str, Mapping[str, Any]]
"""What a cell measured (``benchmarks/convergence/loop.py``), by its key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Part):
    """A preset of ``ds-optim train`` or the shape of a Qwen3, and what it is fed; ``batch`` counts windows."""

    preset: str | None = None
    shape: dict[str, int] = Field(default_factory=dict)
    tokenizer: str
    seq_len: int = Field(ge=2)
    batch: int = Field(ge=1)
    body: int = Field(ge=1, description="parameters outside embeddings and head: what a horizon is counted in")


class Entry(_Part):
    """An optimizer of the study: what is fixed, and what is tuned. ``like`` takes the tuned values of another entry;
    ``kin`` is another entry that it is held against, beside AdamW or the one that it is like.

    ``axes`` are tried one after the other, each at the best of those before it, and grow as rates do. An axis ``lr``
    holds factors of the rate found so far: the best rate is looked for again where another axis has moved it.
    """

    type: str
    params: dict[str, Any] = Field(default_factory=dict)
    lr: tuple[float, ...] = ()
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    like: str | None = None
    kin: str | None = None
    lr_times: float = 1.0


class Block(_Part):
    """Cells of one purpose. ``rates`` look for the learning rate, ``axes`` for the rest from there on, one after the
    other; ``seeds`` run the best of each entry with seeds that tuning never saw. ``tuned_by``: another block, at whose
    model and horizon the rest was tuned; the rate alone is looked for again, from half of that one's to twice."""

    name: str
    kind: Literal["rates", "axes", "seeds"]
    model: str
    data: str
    horizon: float = Field(gt=0, description="tokens per parameter outside embeddings")
    entries: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    tuned_by: str = ""

    def fits(self, other: Block) -> bool:
        """Whether runs of the two are runs of one kind."""
        return (self.model, self.data, self.horizon) == (other.model, other.data, other.horizon)


class Cell(_Part):
    """One run, by all that decides its losses; ``setting``: what its names stand for, digested."""

    entry: str
    model: str
    data: str
    setting: str = ""
    horizon: float
    optimizer: str
    params: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        said = self.model_dump(exclude={"entry"})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


class Study(_Part):
    """The whole file, blocks in the order in which they run. ``grow``: how often a grid or an axis grows at an edge."""

    models: dict[str, Model]
    data: dict[str, str]
    entries: dict[str, Entry]
    blocks: tuple[Block, ...]
    clip: float = 1.0
    warmup: float = Field(0.1, ge=0, lt=1, description="part of the steps")
    evals: int = Field(20, ge=1, description="validations in a run")
    eval_batches: int = Field(32, ge=1)
    grow: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        for block in self.blocks:
            wanted: list[tuple[str, Mapping[str, Any]]] = [(block.model, self.models), (block.data, self.data)]
            if block.tuned_by:
                wanted.append((block.tuned_by, {b.name: b for b in self.blocks if not b.tuned_by}))
            for name, known in [*wanted, *((entry, self.entries) for entry in block.entries)]:
                if name not in known:
                    raise ValueError(f"block {block.name!r} names {name!r}; there are {', '.join(known)}")
        for name, entry in self.entries.items():
            if entry.like is None and not entry.lr:
                raise ValueError(f"entry {name!r} has no lr to try: write lr: [1e-3, 2e-3, 4e-3], or like: ENTRY")
            if entry.like is not None and (entry.like not in self.entries or self.entries[entry.like].like):
                raise ValueError(f"entry {name!r} is like {entry.like!r}, which is no entry that is tuned itself")
            if entry.kin is not None and entry.kin not in self.entries:
                raise ValueError(f"entry {name!r} has kin {entry.kin!r}, which is no entry")
        return self

    def steps(self, cell: Cell) -> int:
        model = self.models[cell.model]
        return max(2, round(cell.horizon * model.body / (model.batch * model.seq_len)))

    def setting(self, model: str, data: str) -> str:
        """A digest of model, text and schedule as the file has them: rows made with others do not count as done."""
        said = [self.models[model].model_dump(), self.data[data], self.clip, self.warmup]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]

    def cell(self, block: Block, name: str, params: Mapping[str, Any], seed: int) -> Cell:
        entry = self.entries[name]
        return Cell(
            entry=name, model=block.model, data=block.data, setting=self.setting(block.model, block.data),
            horizon=block.horizon, optimizer=entry.type, seed=seed,
            params={**params, **entry.params} if entry.like else {**entry.params, **params},
        )  # fmt: skip

    def due(self, done: Done) -> list[Cell]:
        """The cells that are now known to be wanted and not done, in the committed order, each once."""
        found = {cell.key: cell for block in self.blocks for cell in self.wanted(block, done) if cell.key not in done}
        return list(found.values())

    def best(self, block: Block, name: str, done: Done) -> dict[str, Any] | None:
        """The tuned values of an entry at a block's model and horizon; None until its learning rate is inside, and the
        axes done that a block of them asks for."""
        entry = self.entries[name]
        if entry.like is not None:
            values = self.best(block, entry.like, done)
            tuned = self.entries[entry.like].params
            return None if values is None else {**tuned, **values, "lr": values["lr"] * entry.lr_times}
        if len(entry.lr) == 1:  # as somebody published it
            return {"lr": entry.lr[0]}
        cells, value = self.rates(block, name, done)
        if value is None or any(cell.key not in done for cell in cells):
            return None
        if block.tuned_by:
            return {**(self._tuned(block, name, done) or {}), "lr": value}
        cells, chosen = self._axes(block, name, {"lr": value}, done)
        waits = any(b.kind == "axes" and b.fits(block) and name in b.entries for b in self.blocks)
        return None if waits and any(cell.key not in done for cell in cells) else chosen

    def _moved(self, axis: str, option: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The values with one changed."""
        value = float(f"{chosen['lr'] * option:.3g}") if axis == "lr" else option
        return {**chosen, axis: value}

    def rates(self, block: Block, name: str, done: Done) -> tuple[list[Cell], float | None]:
        """The cells of an entry's learning rates, grown where the best is at an edge, and the best so far."""
        rates, rest = sorted(self.entries[name].lr), {}
        if block.tuned_by:
            tuned = self._tuned(block, name, done)
            if tuned is None:
                return [], None
            rest = {key: value for key, value in tuned.items() if key != "lr"}
            rates = [float(f"{tuned['lr'] * factor:.3g}") for factor in (0.5, 1.0, 2.0)] if len(rates) > 1 else rates
        ratio = rates[1] / rates[0] if len(rates) > 1 else 1.0
        for _ in range(self.grow + 1):
            cells = {rate: self.cell(block, name, {**rest, "lr": rate}, 0) for rate in rates}
            losses = {rate: done[cell.key] for rate, cell in cells.items() if cell.key in done}
            best = min(losses, key=losses.__getitem__) if losses else None
            if len(losses) < len(rates) or best is None or len(rates) == 1 or best not in (rates[0], rates[-1]):
                break
            grown = best / ratio if best == rates[0] else best * ratio
            rates = sorted([*rates, float(f"{grown:.3g}")])
        return [self.cell(block, name, {**rest, "lr": rate}, 0) for rate in rates], best

    def _tuned(self, block: Block, name: str, done: Done) -> dict[str, Any] | None:
        """The best of an entry at the block that tuned it; None until it is known."""
        return self.best(next(b for b in self.blocks if b.name == block.tuned_by), name, done)

    def wanted(self, block: Block, done: Done) -> Iterator[Cell]:
        """A block's cells as far as they are known, those that are done among them."""
        for name in block.entries:
            cells, value = self.rates(block, name, done)
            if block.kind == "rates":
                yield from cells
            elif block.kind == "axes" and value is not None and all(cell.key in done for cell in cells):
                yield from self._axes(block, name, {"lr": value}, done)[0]
            elif block.kind == "seeds" and (values := self.best(block, name, done)) is not None:
                yield from (self.cell(block, name, values, seed) for seed in block.seeds)

    def _axes(self, block: Block, name: str, chosen: dict[str, Any], done: Done) -> tuple[list[Cell], dict[str, Any]]:
        """The cells of one axis after another, each from the best of those before it, and the best of all."""
        known: list[Cell] = []
        for axis, options in self.entries[name].axes.items():
            cells, best = self._along(block, name, axis, options, chosen, done)
            known += cells
            if best is None:
                break
            chosen = best
        return known, chosen

    def _along(
        self, block: Block, name: str, axis: str, options: tuple[Any, ...], chosen: dict[str, Any], done: Done
    ) -> tuple[list[Cell], dict[str, Any] | None]:
        """The cells of an axis, grown where the best is at an edge, and the best with it; None until all are done."""
        asis, tried = done.get(self.cell(block, name, chosen, 0).key, math.inf), list(options)
        while True:
            values = [self._moved(axis, option, chosen) for option in tried]
            cells = [self.cell(block, name, moved, 0) for moved in values]
            if any(cell.key not in done for cell in cells):
                return cells, None
            best = min(range(len(cells)), key=lambda index: done[cells[index].key])
            if done[cells[best].key] >= asis:
                return cells, chosen
            grown = _beyond(tried, tried[best], options)
            if grown is None or len(tried) - len(options) == self.grow:
                return cells, values[best]
            tried.append(grown)


def _beyond(tried: list[Any], best: Any, options: tuple[Any, ...]) -> Any | None:
    """The next value past an edge, as far again as the options lie from the value between them; None elsewhere."""
    numbers = all(isinstance(option, int | float) and not isinstance(option, bool) and option > 0 for option in options)
    if not numbers or len(options) < 2 or best not in (min(tried), max(tried)):
        return None
    ratio = (max(options) / min(options)) ** (1 / len(options))
    return type(best)(float(f"{best * ratio if best == max(tried) else best / ratio:.2g}"))


def losses(rows: Rows) -> dict[str, float]:
    """Validation losses by key; a run that diverged is worse than any."""
    return {key: math.inf if row["val_loss"] is None else row["val_loss"] for key, row in rows.items()}


def load_study(path: Path) -> Study:
    """A study file, checked; raises ``UserError`` with one line."""
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the study file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {reword(error, Study)}") from None
