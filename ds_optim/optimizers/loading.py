"""State is loaded in the dtype in which it was saved: torch would make it the parameter's.

That would make narrow momentum wide, and beside bf16 master weights round fp32 momentum and the scales of int8.
Torch leaves alone what it does not know: tensors pass its ``load_state_dict`` in a wrapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Wrapped:
    value: Tensor | dict[str, Any]


def wrapped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` for torch's ``load_state_dict``, after which ``unwrap`` is due."""
    state = {
        number: {key: _Wrapped(value) if isinstance(value, (Tensor, dict)) else value for key, value in entry.items()}
        for number, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def unwrap(optimizer: torch.optim.Optimizer) -> None:
    """Put the loaded tensors into the state, on their parameters' devices, in their own dtypes."""
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, _Wrapped):
                entry[key] = _on(value.value, parameter.device)


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or those in a dict by parameter, on a device."""
    if isinstance(value, dict):
        return {key: _on(one, device) for key, one in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
