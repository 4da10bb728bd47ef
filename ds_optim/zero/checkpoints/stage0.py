"""Checkpoints of runs without ZeRO: one file, with the parameters themselves as the optimizer's tensors.

In fp32 the master weights are the model's own; in 16 bits DeepSpeed's wrapper saves fp32 copies beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.optimizers.rules import SCALES_OF_MOMENTUM
from ds_optim.optimizers.saved import PARAMETERS, without_description
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.zero.checkpoints.folder import Files
from ds_optim.zero.checkpoints.module import place_of
from ds_optim.zero.checkpoints.portable import MASTER, Flats
from ds_optim.zero.checkpoints.states import Saved, numbered

Shape = tuple[int, ...]
Names = Sequence[Sequence[ParamSpec]]

_UNNAMED = (
    "does not tell which parameters the optimizer has, and their shapes do not either: save it once more with "
    "this release of ds_optim, or at ZeRO stage 1"
)


def read_stage0(files: Files, model: Mapping[str, Any], names: Names | None = None, *, state: bool = True) -> Saved:
    """What a run at stage 0 saved; ``names`` of each group's parameters, for a file that has no description.

    Raises:
        UserError: it has no optimizer state, or one whose parameters cannot be named.
    """
    wrapper = model.get("optimizer")
    if not isinstance(wrapper, Mapping):
        raise UserError(f"{files.folder} holds no optimizer state: only whole checkpoints can be cut anew")
    if "fp32_groups_flat" in wrapper:
        raise UserError(f"{files.models[0]} is of DeepSpeed's fused wrapper, which is not read: save it at stage 1")
    plain, description = without_description(dict(wrapper.get("optimizer_state_dict", wrapper)))
    states, groups = plain["state"] if state else {}, plain["param_groups"]
    masters = wrapper.get("fp32_groups")
    known = names if description is None else None
    params = _named(plain, masters, model, description, files) if known is None else known
    layout = build_layout(params, stage=0, world_size=1)
    by_unit = [[states.get(number, {}) for number in groups[unit.group]["params"]] for unit in layout.units]
    flats = []
    for unit, own in zip(layout.units, by_unit, strict=True):
        weights = model["module"]
        if masters is not None:
            weights = {spec.name: master for spec, master in zip(unit.params, masters[unit.group], strict=True)}
        tensors = []
        for spec, of_tensor in zip(unit.params, own, strict=True):
            if spec.name not in weights:
                raise UserError(
                    f"the weights of {spec.name} are not in {files.models[0]}: it was frozen at the save, and left out"
                )
            tensors.append(_flats(spec, weights[spec.name].detach(), of_tensor, files))
        flats.append([tensors])
    return Saved(
        layout=layout,
        params=params,
        flats=flats,
        states=[[own] for own in by_unit],
        groups=groups,
        description=description,
        has_state=bool(states),
        wrapper={"dynamic_loss_scale": bool(wrapper.get("dynamic_loss_scale", False))},
    )


def _flats(spec: ParamSpec, master: Tensor, state: Mapping[str, Any], files: Files) -> Flats:
    found: dict[str, Tensor] = {MASTER: master.reshape(-1)}
    for key, value in numbered(state).items():
        if isinstance(value, Tensor) and value.dim():
            if key != SCALES_OF_MOMENTUM and value.shape != spec.shape:
                raise UserError(f"{files.models[0]}: {key} of {spec.name} is no value for each element")
            found[key] = value.reshape(-1)
    return found


def _named(
    plain: Mapping[str, Any], masters: Any, model: Mapping[str, Any], description: Any, files: Files
) -> list[list[ParamSpec]]:
    """For each group its parameters: as the description has them, or the model's, where all are one group's."""
    groups = plain["param_groups"]
    if description is not None:
        return [
            [ParamSpec(name=name, shape=tuple(shape)) for name, shape in group[PARAMETERS]]
            for group in description["groups"]
        ]
    if masters is not None:
        shapes: list[Shape | None] = [tuple(tensor.shape) for group in masters for tensor in group]
    else:
        shapes = [_shape(plain["state"].get(number, {})) for number in groups[0]["params"]]
    found = _alignment(module_parameters(model), shapes)
    if len(groups) != 1 or found is None:
        raise UserError(f"{files.models[0]} {_UNNAMED}")
    return [found]


def _shape(state: Mapping[str, Any]) -> Shape | None:
    return next((tuple(v.shape) for v in state.values() if isinstance(v, Tensor) and v.dim()), None)


def _alignment(specs: Sequence[ParamSpec], shapes: Sequence[Shape | None]) -> list[ParamSpec] | None:
    """Which of the model's parameters the optimizer has, in order, frozen ones left out; None where shapes do not tell.

    They tell where the first and the last possible choice are one.
    """
    first = _greedy(specs, shapes)
    last = _greedy(specs[::-1], shapes[::-1])
    return first if last is not None and first == last[::-1] else None


def _greedy(specs: Sequence[ParamSpec], shapes: Sequence[Shape | None]) -> list[ParamSpec] | None:
    rest = iter(specs)
    chosen = [next((spec for spec in rest if shape in (None, spec.shape)), None) for shape in shapes]
    found = [spec for spec in chosen if spec is not None]
    return found if len(found) == len(shapes) else None


def module_parameters(model: Mapping[str, Any]) -> list[ParamSpec]:
    """The parameters in a whole model's state, in its order, tied ones once."""
    seen: set[tuple[Any, ...]] = set()
    specs = []
    for name, tensor in model["module"].items():
        if name in model.get("buffer_names", ()):
            continue
        if place_of(tensor) not in seen:
            specs.append(ParamSpec(name=name, shape=tuple(tensor.shape)))
        seen.add(place_of(tensor))
    return specs


def is_bf16(model: Mapping[str, Any]) -> bool:
    config = model.get("ds_config")
    section = config.get("bf16", config.get("bfloat16")) if isinstance(config, Mapping) else None
    return isinstance(section, Mapping) and bool(section.get("enabled"))
