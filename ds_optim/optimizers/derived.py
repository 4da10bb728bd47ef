"""Views that nobody has to write: what a model's own modules and configs say of the matrices in its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers.kinds import Kinds
from ds_optim.optimizers.layouts import (
    LOOKS_FUSED,
    Cut,
    Widths,
    deep,
    family_of,
    fused,
    heads_of,
    is_projection,
    layers_of,
)
from ds_optim.sharding.binding import full_shape

UNKNOWN = "fused in a way that is not known"
NO_HEADS = "whole: its rows are not the config's heads"
#: Stacks of gates and ups: of transformers 5, and of JetMoe and Granite's own.
_GATE_AND_UP = re.compile(r"\bgate_up_proj$|\b(mlp|block_sparse_moe)\.input_linear\.weight$")
_LORA_B = "LoRA's B of "


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Options of a view, and what they make of a parameter, in words."""

    options: dict[str, Any]
    what: str


class DerivedViews:
    """The views of a model's parameters, by identity.

    Args:
        kinds: of the same model; knows which weights are stored fan-in first.
        heads: "auto" to cut queries, keys and values into heads, by the config of the module that holds them; True is
            the same, for who fills each "auto" of a JSON in (Accelerate).

    Raises:
        UserError: ``heads`` is something else, or nothing of the model can be cut so.
    """

    def __init__(self, model: nn.Module, kinds: Kinds, *, heads: str | bool | None) -> None:
        if heads is not None and not isinstance(heads, bool) and heads != "auto":
            raise UserError(
                f'heads is {heads!r}: write "auto", or a number into a view: {{"match": "q_proj", "heads": 12}}'
            )
        self._kinds, self._by_head = kinds, bool(heads)
        self._found: dict[int, Derived] = {}
        for path, module, config in _with_configs(model):
            widths = Widths(module, config)
            self._add_layers(module, widths)
            self._add_stacks(path, module, widths)
        if self._by_head and not any("heads" in found.options for found in self._found.values()):
            raise UserError(
                'heads is "auto", and no module of the model is an attention whose heads can be read: leave it out, or '
                'write views: [{"match": "q_proj", "heads": 12}]'
            )

    def of(self, parameter: nn.Parameter) -> Derived | None:
        """What is derived of a parameter."""
        return self._found.get(id(parameter))

    def _add_layers(self, module: nn.Module, widths: Widths) -> None:
        """Linear layers that are fused, or whose rows are heads; LoRA's B falls apart as the layer it adds to."""
        for name, weight, added in layers_of(module):
            shape = full_shape(weight)
            if len(shape) != 2:
                continue
            rows = shape[1] if id(weight) in self._kinds.transposed else shape[0]
            cut = fused(module, name, widths, rows)
            if cut is None and LOOKS_FUSED.fullmatch(name):
                self._add(weight, {}, UNKNOWN)
                continue
            if cut is None and self._by_head:
                cut = heads_of(module, name, widths, rows)
                if cut is None and is_projection(module, name):
                    self._add(weight, {}, NO_HEADS)
            options = {} if cut is None else cut.options(self._by_head)
            if cut is not None and options:
                self._add(weight, options, (_LORA_B if added else "") + _words(cut, options))

    def _add_stacks(self, path: str, module: nn.Module, widths: Widths) -> None:
        """Parameters of three dimensions: above all experts of which one parameter holds all."""
        wrapped = getattr(module, "lora_A", None)
        count = getattr(module, "num_experts", 0)
        if isinstance(wrapped, nn.ModuleDict) and isinstance(count, int) and count > 1:
            # PEFT's target_parameters. The columns of its B are every expert's first, then every second: no view.
            for adapter in wrapped.values():
                self._add(adapter.get_parameter("weight"), {"heads": count}, f"LoRA's A of {count} experts")
        for name, parameter in module.named_parameters(recurse=False):
            options = deep(module, name)
            if options is not None and len(full_shape(parameter)) == 3:
                self._add(parameter, options, "blocks" if options else "heads in one")
        if "expert" not in path.lower() and "expert" not in type(module).__name__.lower():
            return
        for name, parameter in module.named_parameters(recurse=False):
            shape = full_shape(parameter)
            is_stack = id(parameter) not in self._kinds.convolutions | self._kinds.transposed_convolutions
            if is_stack and len(shape) == 3 and min(shape) > 1 and "bias" not in name:
                self._add_stack(module, f"{path}.{name}", parameter, shape)
            elif len(shape) == 2 and family_of(module) == "dbrx":
                experts = widths.first("moe_num_experts")
                if experts and shape[0] % experts == 0:
                    self._add(parameter, {"heads": experts}, f"{experts} experts")

    def _add_stack(self, module: nn.Module, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
        options: dict[str, Any] = {"batch_dims": 1}
        what = f"{shape[0]} experts"
        rows = shape[2] if id(parameter) in self._kinds.transposed else shape[1]
        if _GATE_AND_UP.search(name) and rows % 2 == 0:
            joined = getattr(module, "is_concatenated", None)  # transformers 5 says it
            family = family_of(module)
            if joined is None and not family:
                what += f", gate and up {UNKNOWN}"
            else:
                options["split"] = [rows // 2, rows // 2]
                what += ", gate and up apart"
                if joined is False or family == "gpt_oss":
                    options["interleave"] = rows // 2
        self._add(parameter, options, what)

    def _add(self, parameter: nn.Parameter, options: dict[str, Any], what: str) -> None:
        self._found[id(parameter)] = Derived(options=options, what=what)


def unread(what: str) -> bool:
    """Whether what is said of a parameter is that its module could not be read."""
    return UNKNOWN in what or NO_HEADS in what


def _words(cut: Cut, options: dict[str, Any]) -> str:
    parts = [*cut.parts]
    apart = f"{', '.join(parts[:-1])} and {parts[-1]} apart" if "split" in options else ""
    return ", ".join(filter(None, (apart, "by head" if "heads" in options else "")))


def _with_configs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """All modules by path, each once, with the nearest config: their own, or that of what holds them."""
    configs: dict[str, Any] = {}
    for path, module in model.named_modules():
        above = configs.get(path.rpartition(".")[0]) if path else None
        configs[path] = getattr(module, "config", None) or above
        yield path, module, configs[path]
