"""What an estimate knows of a model: names, shapes and roles of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate_shards import added_bytes, among, held_by_one
from ds_optim.memory.estimate_widths import Transformer, has_towers, transformer_of
from ds_optim.optimizers.routing import MEMBERS, param_groups
from ds_optim.sharding.binding import experts_of, is_optimized
from ds_optim.sharding.layout import ParamSpec, Shard

FROZEN = "frozen"
#: Elements of one parameter of a model that is only a count: small beside any partition that matters.
COUNT_PIECE = 1 << 22
_MOST_PARAMETERS = 1e12
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter by name and shape; its role is what routing gave it: "matrix", "aux", "vector" or "frozen".

    derived: see ``Member``. shard: what part ``shape`` is of a parameter that AutoTP cut. over: among how many ranks
    AutoEP deals out the experts that ``shape`` is some of.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    view: MatrixView | None = None
    derived: str = ""
    shard: Shard | None = None
    over: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def spec(self) -> ParamSpec:
        return ParamSpec(name=self.name, shape=self.shape, shard=self.shard)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model without weights.

    parameters: in the model's order, tied ones once. buffer_bytes: of the module's buffers. transformer: None where
    the widths of a decoder are not known. counted: the class and the part of a config that this is, where it is of one.
    has_towers: there are others beside the text decoder that ``transformer`` is of. module: what was routed.
    tensor, experts: ranks among which AutoTP and AutoEP have cut the parameters to what one holds.
    """

    name: str
    parameters: tuple[Parameter, ...]
    buffer_bytes: int = 0
    transformer: Transformer | None = None
    counted: str = ""
    has_towers: bool = False
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    tensor: int = 1
    experts: int = 1

    def for_ranks(self, tensor: int, experts: int) -> ModelShape:
        """What one of so many tensor- and expert-parallel ranks holds of a whole model.

        Raises:
            UserError: what they cut is not known, or does not divide.
        """
        if tensor == experts == 1:
            return self
        held = held_by_one(self.parameters, self.module, tensor=tensor, experts=experts)
        buffers = self.buffer_bytes + added_bytes(held)
        return replace(self, parameters=held, buffer_bytes=buffers, tensor=tensor, experts=experts)

    def routed(self, **routing: Any) -> ModelShape:
        """The same model under other options of ``ds_optim.param_groups``."""
        if self.module is None:
            raise UserError(f"{', '.join(routing)}: {self.name} has no names and shapes to route; give a model")
        whole = _parameters(self.module, routing)
        if self.tensor == self.experts == 1:
            return replace(self, parameters=whole)
        held = held_by_one(whole, self.module, tensor=self.tensor, experts=self.experts)
        return replace(self, parameters=held)

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.role != FROZEN)

    @property
    def frozen(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.role == FROZEN)

    @property
    def largest_layer(self) -> int:
        """Elements of the largest numbered block, or of the largest parameter outside of them."""
        sizes: dict[str, int] = {}
        for parameter in self.parameters:
            found = _LAYER.match(parameter.name)
            key = found.group(1) if found else parameter.name
            sizes[key] = sizes.get(key, 0) + parameter.numel
        return max(sizes.values(), default=0)


def shape_of_module(
    name: str, module: nn.Module, *, config: Any = None, counted: str = "", **routing: Any
) -> ModelShape:
    """The shape of a module, which may be on the meta device, routed as an optimizer would route it.

    Args:
        config: the model's ``transformers`` config, for its widths.
        counted: what the module is of a config.
        routing: options of ``ds_optim.param_groups``.
    """
    parameters = _parameters(module, routing)
    return ModelShape(
        name=name,
        parameters=parameters,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()),
        transformer=None if config is None else transformer_of(config, module),
        counted=counted,
        has_towers=has_towers(config),
        module=module,
    )


def _parameters(module: nn.Module, routing: Mapping[str, Any]) -> tuple[Parameter, ...]:
    members = {
        id(member.parameter): (group["role"], member.view, member.derived)
        for group in param_groups(module, **routing)
        for member in group[MEMBERS]
    }
    found = []
    for key, parameter in module.named_parameters():
        role, view, derived = members[id(parameter)] if is_optimized(parameter) else (FROZEN, None, "")
        over = among(experts_of(parameter))
        found.append(
            Parameter(name=key, shape=tuple(parameter.shape), role=role, view=view, derived=derived, over=over)
        )
    return tuple(found)


def shape_of_list(name: str, entries: Any) -> ModelShape:
    """The shape of a parameter list as JSON has it: [{"name": …, "shape": […]}, …] or {name: shape}.

    Raises:
        UserError: it is neither, or has a shape or a name that no parameter can have.
    """
    if isinstance(entries, Mapping):
        entries = [{"name": key, "shape": shape} for key, shape in entries.items()]
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{name} is no parameter list: write [{{"name": "layers.0.weight", "shape": [64, 64]}}, …]')
    root = nn.Module()
    for entry in entries:
        key, shape = _entry(name, entry)
        *path, last = key.split(".")
        module = root
        try:
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")))
        except (KeyError, AttributeError):
            raise UserError(f"{name}: {key!r} is no name of a parameter, or is given twice") from None
    return shape_of_module(name, root)


def shape_of_count(count: float) -> ModelShape:
    """A model that is nothing but so many parameters: vectors of at most ``COUNT_PIECE`` elements."""
    if not 1 <= count <= _MOST_PARAMETERS:
        raise UserError(f"params is {count!r}: write a number of parameters up to {_MOST_PARAMETERS:g}, such as 7.5e9")
    left = round(count)
    pieces: list[Parameter] = []
    while left:
        size = min(left, COUNT_PIECE)
        pieces.append(Parameter(name=f"parameter_{len(pieces)}", shape=(size,), role="vector"))
        left -= size
    return ModelShape(name=f"{count:,.0f} parameters", parameters=tuple(pieces))


def numel_of(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


def _entry(owner: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    key = entry.get("name") if isinstance(entry, Mapping) else None
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    sizes = shape if isinstance(shape, list) and shape else [0]
    if not isinstance(key, str) or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f'{owner}: {entry!r} is no parameter: write {{"name": "layers.0.weight", "shape": [64, 64]}}')
    return key, tuple(sizes)
