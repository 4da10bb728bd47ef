"""A checkpoint by parameter, whatever cut it was saved in.

Nothing is copied together: a :class:`Portable` knows the files' tensors (which are read from disk as they are used)
and the layout that they lie in, and answers with any run of elements of any parameter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import BLOCK
from ds_optim.optimizers.rules import MOMENTUM, SCALES_OF_MOMENTUM
from ds_optim.sharding.layout import Layout, ParamSpec, Slice, Unit
from ds_optim.sharding.lines import blocks_of
from ds_optim.zero.checkpoints.columns import Column, is_of_experts
from ds_optim.zero.checkpoints.experts import Experts

MASTER = "master"
"""The key of fp32 master weights beside the names of an optimizer's buffers."""

Flats = Mapping[str, Tensor]
"""By key the flat tensors of one tensor of a unit on one rank: masters, buffers, scales of int8 momentum."""


@dataclass(frozen=True, kw_only=True)
class SavedGroup:
    """A parameter group: its hyperparameters, and its parameters in order."""

    hyper: dict[str, Any]
    params: tuple[ParamSpec, ...]

    @property
    def rule(self) -> str | None:
        """The name of its rule, where an optimizer of this package wrote it."""
        return self.hyper.get("rule")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Tensors in their layout: ``flats[unit][rank][tensor]``, as :class:`Slice` numbers them."""

    layout: Layout
    flats: Sequence[Sequence[Sequence[Flats]]]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        return {spec.name: (u, p) for u, unit in enumerate(self.layout.units) for p, spec in enumerate(unit.params)}

    @cached_property
    def _holders(self) -> dict[str, list[tuple[int, Slice]]]:
        return {name: self.layout.units[u].holders(p) for name, (u, p) in self._places.items()}

    @cached_property
    def _blocks(self) -> list[list[dict[int, tuple[int, int]]]]:
        return [[blocks_of(unit, rank) for rank in range(unit.world_size)] for unit in self.layout.units]

    def unit_of(self, name: str) -> Unit:
        return self.layout.units[self._places[name][0]]

    def spec_of(self, name: str) -> ParamSpec:
        unit, param = self._places[name]
        return self.layout.units[unit].params[param]

    def first(self, name: str) -> Flats:
        """The tensors that hold the parameter's first element."""
        unit, _ = self._places[name]
        rank, held = self._holders[name][0]
        return self.flats[unit][rank][held.tensor]

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a parameter's ``key``, in the dtype they are stored in."""
        unit, _ = self._places[name]
        runs = [
            self.flats[unit][rank][held.tensor][key][held.offset + first : held.offset + first + count]
            for rank, held, first, count in self._runs(name, start, numel)
        ]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def read_scales(self, name: str, start: int, numel: int) -> Tensor:
        """Of int8 momentum, for each of these elements the scale of its block: fp32, (numel,)."""
        number, param = self._places[name]
        runs = []
        for rank, held, first, count in self._runs(name, start, numel):
            skipped, _ = self._blocks[number][rank][param]
            scales = self.flats[number][rank][held.tensor][SCALES_OF_MOMENTUM]
            begin = held.start + first
            blocks = torch.arange(begin, begin + count, dtype=torch.int64, device="cpu") // BLOCK - held.start // BLOCK
            runs.append(scales[blocks + skipped])
        return torch.cat(runs)

    def _runs(self, name: str, start: int, numel: int) -> list[tuple[int, Slice, int, int]]:
        """(rank, slice, first element in it, elements) of what holds [start, start + numel)."""
        holders = self._holders[name]
        found = []
        position = bisect_right([held.start for _, held in holders], start) - 1
        while numel:
            rank, held = holders[position]
            first = start - held.start
            count = min(numel, held.numel - first)
            found.append((rank, held, first, count))
            start, numel, position = start + count, numel - count, position + 1
        return found


@dataclass(frozen=True, kw_only=True)
class Portable:
    """A checkpoint by parameter, or one column of one.

    stage, ranks: of the run that saved it, the latter those of one tensor-parallel rank. groups: of its optimizer.
    description: what ``ds_optim.optimizers.saved`` wrote, if it did. shards: master weights and buffers. scalars: by
    parameter, where the rule keeps a number for each. rows: by key and parameter, values for each row of its matrices.
    entries: by parameter the rest of its state, such as the step count. has_state: False before a first step. wrapper:
    loss scale and such of DeepSpeed's wrapper. models: the model files' contents, one a rank at stage 3. prefix: of the
    names of optimizer files. version: of DeepSpeed. buffers: by parameter the names of its optimizer's buffers.
    stored_as: by parameter the dtype that its momentum is to have, where not as it is. column: which one it is.
    experts: what lies in files of theirs.
    """

    stage: int
    ranks: int
    groups: tuple[SavedGroup, ...]
    description: dict[str, Any] | None
    shards: Shards
    scalars: dict[str, float]
    rows: dict[str, dict[str, Tensor]]
    entries: dict[str, dict[str, Any]]
    has_state: bool
    wrapper: dict[str, Any]
    models: Sequence[Mapping[str, Any]]
    prefix: str
    version: str
    buffers: Mapping[str, tuple[str, ...]]
    stored_as: Mapping[str, torch.dtype] = field(default_factory=dict)
    column: Column = field(default_factory=Column)
    experts: Experts | None = None

    @property
    def specs(self) -> list[ParamSpec]:
        return [spec for group in self.groups for spec in group.params]

    @property
    def model_specs(self) -> list[ParamSpec]:
        """Those whose weights are in the model's own files, where weights are: not the experts'."""
        return [spec for group in self.groups if not is_of_experts(group.hyper) for spec in group.params]

    def sharing(self, unit: Unit, ranks: int) -> list[int]:
        """Which of so many data-parallel ranks cut a unit's parameters."""
        return self.column.sharing(self.groups[unit.group].hyper, ranks)

    def saved_weights(self, name: str) -> Tensor | None:
        """A parameter's weights, where the files of stages 0 to 2 have them."""
        if self.experts is not None and name in self.experts.names:
            return self.experts.weights(name)
        found: Tensor | None = self.models[0]["module"].get(name)
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The DeepSpeed JSON of the run that saved it."""
        found = self.models[0].get("ds_config")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def optimizer(self) -> str:
        """The optimizer's name, as far as the files tell it."""
        if self.description is not None:
            return str(self.description["optimizer"])
        section = self.config.get("optimizer")
        rules = sorted({group.rule for group in self.groups if group.rule})
        return ", ".join(rules) or (str(section.get("type")) if isinstance(section, Mapping) else "unknown")

    @property
    def step(self) -> int:
        return int(self.models[0]["global_steps"])

    def weights_dtype(self, name: str) -> torch.dtype:
        """What the model computes with; a parameter whose weights were left out has what the others have."""
        module = self.models[0]["module"]
        first = next((module[spec.name] for spec in self.specs if spec.name in module), None)
        own = module.get(name, first)
        return own.dtype if own is not None else self._configured_dtype()

    def _configured_dtype(self) -> torch.dtype:
        for section, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
            asked = self.config.get(section)
            if isinstance(asked, Mapping) and asked.get("enabled") is True:
                return dtype
        return torch.float32

    def weights(self, name: str) -> Tensor:
        """A parameter of the optimizer's as the model computes with it, from its master weights."""
        spec = self.shards.spec_of(name)
        whole = self.shards.read(name, MASTER, 0, spec.numel)
        return whole.to(self.weights_dtype(name), copy=True).view(spec.shape)

    def momentum_dtype(self, name: str) -> torch.dtype | None:
        flats = self.shards.first(name)
        return flats[MOMENTUM].dtype if MOMENTUM in flats else None

    def scaled(self, name: str) -> bool:
        """Whether the parameter's momentum is int8 codes."""
        return SCALES_OF_MOMENTUM in self.shards.first(name)
