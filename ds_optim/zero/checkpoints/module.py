"""The model's own weights and buffers in the model files: whole at stages 0 to 2, nothing but buffers at stage 3."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.zero.checkpoints.portable import MASTER, Portable

_PER_MODEL = ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


def common_entries(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model file holds that no cut changes: schedule, counts, the client's state."""
    return {key: value for key, value in model.items() if key not in _PER_MODEL}


class Module:
    """The model in a checkpoint, of whatever stage."""

    def __init__(self, portable: Portable) -> None:
        self._portable = portable
        self._model = portable.models[0]
        self._saved: Mapping[str, Tensor] = self._model["module"]
        self._shapes = {spec.name: spec.shape for spec in portable.specs}
        self.shared: dict[str, str] = self._find_shared()
        buffers = set(self._model.get("buffer_names") or ())
        named = [n for n in self._saved if n not in buffers and n not in self._shapes and n not in self.shared]
        self._frozen = self._frozen_shapes(named)

    def whole(self) -> OrderedDict[str, Tensor]:
        """Stages 0 to 2: every tensor in full, in the model's own dtypes."""
        if self._portable.stage < 3:
            return OrderedDict(self._saved)
        filled: OrderedDict[str, Tensor] = OrderedDict()
        for name, tensor in self._saved.items():
            source = self.shared.get(name, name)
            if source in self._shapes:
                filled[name] = filled[source] if source in filled else self._weights(source, tensor.dtype)
            elif source in self._frozen:
                filled[name] = self.frozen(source)
            else:
                filled[name] = tensor
        return filled

    def buffers_alone(self) -> OrderedDict[str, Tensor]:
        """Stage 3: parameters are empty, their weights are in the optimizer files."""
        parameters = {*self._shapes, *self.shared, *self._frozen}
        return OrderedDict(
            (name, tensor.new_empty(0) if name in parameters else tensor) for name, tensor in self._saved.items()
        )

    @property
    def frozen_shapes(self) -> OrderedDict[str, torch.Size]:
        return OrderedDict((name, torch.Size(shape)) for name, shape in self._frozen.items())

    def frozen(self, name: str) -> Tensor:
        """A parameter that the optimizer does not have, in full."""
        if self._portable.stage < 3:
            return self._saved[name]
        shape = self._frozen[name]
        parts = [model["frozen_param_fragments"][name].reshape(-1) for model in self._portable.models]
        return torch.cat(parts)[: math.prod(shape)].view(shape)

    def frozen_slice(self, name: str, rank: int, ranks: int) -> Tensor:
        """What stage 3 keeps of it on one rank: as many elements on each, zeros behind the last."""
        weights = self.frozen(name).reshape(-1)
        shard = math.ceil(weights.numel() / ranks)
        held = weights.new_zeros(shard)
        part = weights[rank * shard : (rank + 1) * shard]
        held[: part.numel()] = part
        return held

    def _weights(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        return self._portable.shards.read(name, MASTER, 0, math.prod(shape)).to(dtype, copy=True).view(shape)

    def _find_shared(self) -> dict[str, str]:
        """The other names of tied parameters, with the names that they are kept under."""
        listed = self._model.get("shared_params")
        if listed is not None:
            return dict(listed)
        places = {_place(self._saved[name]): name for name in reversed(list(self._saved)) if name in self._shapes}
        return {
            name: places[_place(tensor)]
            for name, tensor in self._saved.items()
            if tensor.numel() and places.get(_place(tensor), name) != name
        }

    def _frozen_shapes(self, named: list[str]) -> dict[str, tuple[int, ...]]:
        listed = self._model.get("frozen_param_shapes")
        if listed is not None:
            return {name: tuple(shape) for name, shape in listed.items()}
        return {name: tuple(self._saved[name].shape) for name in named if self._portable.stage < 3}


def _place(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape)
