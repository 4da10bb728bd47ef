"""The files of experts, which DeepSpeed keeps apart from the model's: one for each expert of each layer.

At stages 0 to 2 they hold weights, by the number of the expert among all; the ranks that have it know it by its number
among their own. At stage 3, which AutoEP alone has, its weights are in the optimizer's files and there are none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.zero.checkpoints.columns import Column
from ds_optim.zero.checkpoints.folder import expert_file
from ds_optim.zero.checkpoints.safe import load

_PLACE = re.compile(r"layer_(\d+)_expert_(\d+)_")
_OF_A_LAYER = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")
_OF_AUTOEP = re.compile(r"(.*experts\.w[123])\.(\d+)")
LAYERS = "ds_autoep_layers"
"""The key of a model file, and of what it says for universal checkpoints, under which AutoEP lists its layers."""
UNIVERSAL = "universal_checkpoint_info"
_FORMATS = {True: ("zero3_partitioned", 1), False: ("per_expert_files", None)}

Place = tuple[int, int]
"""Layer and number of an expert."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one column, by the names that its ranks have for them.

    files: by layer and number of the expert, what is in its file.
    """

    column: Column
    files: Mapping[Place, Mapping[str, Tensor]]

    @cached_property
    def _keys(self) -> dict[str, list[tuple[Place, str]]]:
        """By name the files and keys of what it is made of: one, or of AutoEP's stacks one for each expert."""
        counts: dict[int, int] = defaultdict(int)
        for layer, _ in self.files:
            counts[layer] += 1
        found: dict[str, list[tuple[Place, str]]] = defaultdict(list)
        for (layer, expert), content in sorted(self.files.items(), key=lambda item: item[0]):
            own, local = divmod(expert, counts[layer] // self.column.count)
            if own == self.column.number:
                for key in content:
                    found[_local(key, expert, local)].append(((layer, expert), key))
        return dict(found)

    @property
    def names(self) -> list[str]:
        return list(self._keys)

    def weights(self, name: str) -> Tensor:
        """A parameter as the ranks of the column have it."""
        parts = [self.files[place][key] for place, key in self._keys[name]]
        stacked = all(_OF_AUTOEP.fullmatch(key) for _, key in self._keys[name])
        return torch.stack(parts) if stacked else parts[0]


def read_experts(paths: Sequence[Path], column: Column) -> Experts:
    """Raises ``UserError`` where a file is damaged."""
    files = {}
    for path in paths:
        found = _PLACE.match(path.name)
        content = load(path)
        if found is None or not isinstance(content, Mapping):
            raise UserError(f"{path} is no file of an expert")
        files[int(found[1]), int(found[2])] = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    return Experts(column=column, files=files)


def _local(key: str, expert: int, local: int) -> str:
    stacked, own = _OF_AUTOEP.fullmatch(key), _OF_A_LAYER.fullmatch(key)
    if stacked is not None and int(stacked[2]) == expert:
        return stacked[1]
    if own is not None and int(own[2]) == expert:
        return f"{own[1]}{local}{own[3]}"
    raise UserError(f"{key} is in the file of expert {expert}: it is none of that expert's")


# ------------------------------------------------------------------------------------------------------- AutoEP


def placed(layers: Any, column: Column, rank: int, ranks: int, stage: int) -> Any:
    """AutoEP's list of its layers as one of so many ranks at that stage writes it; what is none is left as it is."""
    if not isinstance(layers, list):
        return layers
    sharing = column.ranks(ranks)
    name, version = _FORMATS[stage == 3]
    return [
        {
            **layer,
            "checkpoint_format": name,
            "checkpoint_format_version": version,
            "ep_rank": column.number,
            "expert_data_parallel_rank": sharing.index(rank),
            "expert_data_parallel_world_size": len(sharing),
            "global_expert_start": column.number * layer["num_local_experts"],
            "global_expert_end": (column.number + 1) * layer["num_local_experts"],
        }
        for layer in layers
    ]


def single(layers: Any, column: Column, weights: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and content of the files of a column's experts, of AutoEP's stacked ``weights`` by name."""
    for layer in layers:
        for local in range(layer["num_local_experts"]):
            expert = column.number * layer["num_local_experts"] + local
            stacks = [f"{layer['expert_key_prefix']}.{name}" for name in ("w1", "w2", "w3")]
            content = {f"{stack}.{expert}": weights(stack)[local].clone() for stack in stacks}
            yield expert_file(layer["moe_layer_id"], expert), content
