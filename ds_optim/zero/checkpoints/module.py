"""The model's own weights and buffers in the model files: whole at stages 0 to 2, nothing but buffers at stage 3."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.zero.checkpoints.experts import LAYERS, UNIVERSAL
from ds_optim.zero.checkpoints.folder import STAMP
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.same import same

_PER_CUT = (
    *("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"),
    *("dp_world_size", "ds_config", LAYERS, STAMP),
)


def common_entries(portable: Portable, stage: int, ranks: int, rank: int) -> dict[str, Any]:
    """What of a model file no cut changes, as a rank of a run of this shape gets it: schedule, counts, client state.

    Where each rank has a file of its own, there and here, each keeps its own.
    """
    own = portable.stage == stage == 3 and portable.ranks == ranks
    model = portable.models[rank if own else 0]
    found = {key: value for key, value in model.items() if key not in _PER_CUT}
    if isinstance(found.get(UNIVERSAL), Mapping):
        found[UNIVERSAL] = {key: value for key, value in found[UNIVERSAL].items() if key != LAYERS}
    return found


def of_one_rank(portable: Portable, stage: int, ranks: int) -> list[str]:
    """What each rank saved of its own, and of which a run of this shape gets the first rank's alone."""
    kept = [common_entries(portable, 3, portable.ranks, rank) for rank in range(len(portable.models))]
    if len(kept) == 1 or (stage == 3 and ranks == portable.ranks):
        return []
    return [key for key in kept[0] if any(key not in own or not same(own[key], kept[0][key]) for own in kept)]


class Module:
    """The model in a checkpoint, of whatever stage."""

    def __init__(self, portable: Portable) -> None:
        self._portable = portable
        self._model = portable.models[0]
        self._saved: Mapping[str, Tensor] = self._model["module"]
        self._shapes = {spec.name: spec.shape for spec in portable.model_specs}
        self.shared: dict[str, str] = self._find_shared()
        self._frozen = self._frozen_shapes()

    @property
    def names(self) -> list[str]:
        """What the model's state is to hold: the optimizer's parameters too that were left out as frozen."""
        return [*self._saved, *(name for name in self._shapes if name not in self._saved)]

    def whole(self) -> OrderedDict[str, Tensor]:
        """Stages 0 to 2: every tensor in full, in the model's own dtypes.

        Absent is what was left out of the checkpoint (``exclude_frozen_parameters``) and has no master weights.
        """
        cut = self._portable.stage == 3
        filled: OrderedDict[str, Tensor] = OrderedDict()
        for name in self.names:
            source, tensor = self.shared.get(name, name), self._saved.get(name)
            if tensor is not None and not cut:
                filled[name] = tensor
            elif source in filled:
                filled[name] = filled[source]
            elif source in self._shapes:
                filled[name] = self._portable.weights(source)
            elif source in self._frozen:
                filled[name] = self.frozen(source)
            elif name not in self.shared and tensor is not None:
                filled[name] = tensor
        return filled

    def buffers_alone(self) -> OrderedDict[str, Tensor]:
        """Stage 3: parameters are empty, their weights are in the optimizer files."""
        parameters = {*self._shapes, *self.shared, *self._frozen}
        filled: OrderedDict[str, Tensor] = OrderedDict()
        for name in self.names:
            tensor = self._saved[name] if name in self._saved else self._portable.weights(name)
            filled[name] = tensor.new_empty(0) if name in parameters else tensor
        return filled

    @property
    def frozen_shapes(self) -> OrderedDict[str, torch.Size]:
        """What DeepSpeed keeps apart as frozen: parameters of the optimizer too, if they were so at the save."""
        return OrderedDict((name, torch.Size(shape)) for name, shape in self._frozen.items())

    def frozen(self, name: str) -> Tensor:
        """A parameter of ``frozen_shapes`` in full."""
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

    def _find_shared(self) -> dict[str, str]:
        """The other names of tied parameters, with the names that they are kept under."""
        listed = self._model.get("shared_params")
        if listed is not None:
            return dict(listed)
        places = {place_of(self._saved[name]): name for name in reversed(list(self._saved)) if name in self._shapes}
        return {
            name: places[place_of(tensor)]
            for name, tensor in self._saved.items()
            if isinstance(tensor, Tensor) and tensor.numel() and places.get(place_of(tensor), name) != name
        }

    def _frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Stages 2 and 3 list them, unless they were left out; stages 0 and 1 have them among the weights."""
        listed = self._model.get("frozen_param_shapes")
        if listed is not None or self._portable.stage >= 2:
            return {name: tuple(shape) for name, shape in (listed or {}).items()}
        others = {*(self._model.get("buffer_names") or ()), *self._shapes, *self.shared}
        held = ((name, tensor) for name, tensor in self._saved.items() if isinstance(tensor, Tensor))
        return {name: tuple(tensor.shape) for name, tensor in held if name not in others}


def place_of(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What two names of one tensor share."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape)
