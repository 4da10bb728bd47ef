"""State is loaded in the dtype in which it was saved: torch would make it the parameter's.

Beside bf16 master weights that would round fp32 momentum and the scales of int8 momentum. Torch leaves alone what it
does not know, so tensors pass its ``load_state_dict`` in a wrapping that two of its own hooks put on and take off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Wrapped:
    tensor: Tensor


def keep_dtypes(optimizer: torch.optim.Optimizer) -> None:
    """Let every later ``load_state_dict`` of ``optimizer`` leave dtypes as they were saved."""
    optimizer.register_load_state_dict_pre_hook(_wrap)
    optimizer.register_load_state_dict_post_hook(_unwrap)


def _wrap(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        number: {key: _Wrapped(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _unwrap(optimizer: torch.optim.Optimizer) -> None:
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, _Wrapped):
                entry[key] = value.tensor.to(parameter.device)
