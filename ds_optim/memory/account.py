"""What a rank holds between two steps: bytes by owner, each storage counted once.

A tensor's bytes are those of its storage, whatever view reaches it, and the first owner that reaches a storage
keeps it: optimizer state, model weights, master weights, gradients, then what else ZeRO's wrapper holds.
The wrapper's attributes are private to DeepSpeed, so none but the flat partitions is asked for by name: the rest
is found by walking the wrapper, and an attribute that a later release adds lands in ``buckets`` or ``other``
instead of being missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: State tensors of at most this many elements are step counts and per-parameter scalars, kept apart.
SCALAR_NUMEL = 1
#: Attributes of ZeRO's wrappers that hold an optimizer's momentum outside ``optimizer.state`` (DeepSpeed's Muon).
_STATE_WORDS = ("momentum",)
_GRADIENT_WORDS = ("grad",)
_BUCKET_WORDS = ("bucket", "ipg", "buffer", "pin", "pending")
_WALK_DEPTH = 5


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """Bytes that one rank holds, by owner.

    Attributes:
        weights: parameters and buffers that the model computes with (at stage 3 this rank's slices, and the
            parameters that stay gathered).
        gradients: what ``.grad`` and ZeRO's gradient lists hold at the moment of the count.
        master: the fp32 (or bf16) partitions, where they are not the weights themselves.
        state: optimizer state by key, step counts and scalars left out; padding included.
        scalars: step counts and per-parameter scalars.
        buckets: ZeRO's communication buckets, and staging copies that live from backward to step.
        other: what else the wrapper holds.
        activations: of the tensors saved for the backward pass, what is none of the above; where they were given.
        state_padding, master_padding: the part of ``state`` and ``master`` that stands for no parameter.
        by_device: the same bytes by device type, for offload.
    """

    weights: int = 0
    gradients: int = 0
    master: int = 0
    state: Mapping[str, int] = field(default_factory=dict)
    scalars: int = 0
    buckets: int = 0
    other: int = 0
    activations: int = 0
    state_padding: int = 0
    master_padding: int = 0
    by_device: Mapping[str, int] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Optimizer state without padding, bytes."""
        return sum(self.state.values()) - self.state_padding

    @property
    def model_state_bytes(self) -> int:
        """Weights, gradients, master weights and optimizer state, padding included, bytes."""
        return self.weights + self.gradients + self.master + sum(self.state.values())

    @property
    def total_bytes(self) -> int:
        """All that was counted."""
        return self.model_state_bytes + self.scalars + self.buckets + self.other + self.activations

    def owners(self) -> dict[str, int]:
        """Bytes by owner, the optimizer's state as one; they add up to ``total_bytes``."""
        names = ("weights", "gradients", "master", "state", "scalars", "buckets", "activations", "other")
        return {name: sum(self.state.values()) if name == "state" else getattr(self, name) for name in names}


class _Ledger:
    """Storages seen so far; ``take`` returns a tensor's bytes the first time its storage is met, else 0."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, int]] = set()
        self.by_device: dict[str, int] = {}

    def take(self, tensor: torch.Tensor | None) -> int:
        if tensor is None or tensor.device.type == "meta":
            return 0
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and other tensors without one storage
            return 0
        size = storage.nbytes()
        key = (tensor.device.type, storage.data_ptr())
        if size == 0 or key in self._seen:
            return 0
        self._seen.add(key)
        self.by_device[tensor.device.type] = self.by_device.get(tensor.device.type, 0) + size
        return size

    def take_all(self, tensors: Iterable[torch.Tensor | None]) -> int:
        return sum(self.take(tensor) for tensor in tensors)


def account(
    engine: Any, optimizer: torch.optim.Optimizer | None = None, *, saved: Iterable[torch.Tensor] = ()
) -> MemoryAccount:
    """Count what this rank holds now.

    Args:
        engine: a DeepSpeed engine, or any object with ``module`` and, where there is one, ``optimizer``.
        optimizer: the optimizer that steps; by default the innermost one that ``engine.optimizer`` wraps.
        saved: tensors that autograd keeps for the backward pass.

    Gradients live between ``backward`` and ``step`` only (at stages 1 and 2 they are dropped after it): call it
    there for a count of model states, from the second step on, when the optimizer's state exists.
    """
    wrapper = getattr(engine, "optimizer", None)
    inner = optimizer if optimizer is not None else innermost_optimizer(wrapper)
    ledger = _Ledger()
    state, scalars = _optimizer_state(inner, ledger)
    model = engine.module
    weights = ledger.take_all(_weight_tensors(model))
    partitions = _flat_partitions(wrapper)
    stepped = [p for group in inner.param_groups for p in group["params"]] if inner is not None else []
    held = [(ledger.take(flat), padded * flat.element_size()) for flat, padded in partitions]
    master = sum(size for size, _ in held) + ledger.take_all(stepped)
    gradients = ledger.take_all(p.grad for p in model.parameters())
    gradients += ledger.take_all(getattr(p, "grad_accum", None) for p in model.parameters())
    gradients += ledger.take_all(p.grad for p in [flat for flat, _ in partitions] + stepped)
    found = _walk_wrapper(wrapper, inner, ledger)
    for key, size in found.pop("state").items():
        state[key] = state.get(key, 0) + size
    padding = {id(flat): padded for flat, padded in partitions}
    return MemoryAccount(
        weights=weights,
        gradients=gradients + found["gradients"],
        master=master,
        state=state,
        scalars=scalars,
        buckets=found["buckets"],
        other=found["other"],
        activations=ledger.take_all(saved),
        state_padding=_state_padding(inner, padding),
        master_padding=sum(padded for size, padded in held if size),
        by_device=ledger.by_device,
    )


def innermost_optimizer(wrapper: Any) -> Any:
    """The optimizer whose ``step`` moves the weights, under however many wrappers."""
    inner = wrapper
    while inner is not None and getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    return inner


def parameter_count(model: torch.nn.Module) -> int:
    """Elements of the model's trainable parameters, each counted once, whole also where ZeRO-3 cut them."""
    return sum(full_numel(p) for p in model.parameters() if p.requires_grad)


def full_numel(parameter: torch.Tensor) -> int:
    """Elements of the whole parameter, also where ZeRO-3 left an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _optimizer_state(inner: Any, ledger: _Ledger) -> tuple[dict[str, int], int]:
    """State bytes by key, and the bytes of step counts and scalars."""
    state: dict[str, int] = {}
    scalars = 0
    for entries in getattr(inner, "state", {}).values():
        for key, value in entries.items():
            if isinstance(value, Mapping):  # by parameter, values for each row of its matrices
                held = ledger.take_all(_tensors_in(value, 1))
                state.update({key: state.get(key, 0) + held} if held else {})
            if not torch.is_tensor(value):
                continue
            if value.numel() <= SCALAR_NUMEL:
                scalars += ledger.take(value)
            else:
                state[key] = state.get(key, 0) + ledger.take(value)
    return state, scalars


def _weight_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    for parameter in model.parameters():
        yield getattr(parameter, "ds_tensor", None)
        yield getattr(parameter, "ds_secondary_tensor", None)  # of hpZ, from forward to step
        yield parameter.data
    yield from model.buffers()


def _flat_partitions(wrapper: Any) -> list[tuple[torch.Tensor, int]]:
    """(this rank's flat master partition, its elements that are padding), for the wrappers that have them."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        groups = wrapper.fp16_groups
        return [
            (flat, flat.numel() - sum(_stage3_real_numel(p) for p in groups[i]))
            for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
        ]
    for flats, groups in (
        ("single_partition_of_fp32_groups", "bit16_groups"),  # ZeRO-1/2
        ("fp32_groups_flat_partition", "bf16_groups"),  # BF16_Optimizer
    ):
        if hasattr(wrapper, flats):
            process_groups = wrapper.real_dp_process_group
            return [
                (flat, _tail_padding(flat, getattr(wrapper, groups)[i], process_groups[i]))
                for i, flat in enumerate(getattr(wrapper, flats))
            ]
    return []


def _stage3_real_numel(parameter: Any) -> int:
    """Elements of this rank's slice that belong to the parameter: the last slices end in zeros."""
    width = int(parameter.partition_numel())
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return min(width, max(0, int(parameter.ds_numel) - rank * width))


def _tail_padding(flat: torch.Tensor, parameters: Iterable[torch.Tensor], process_group: Any) -> int:
    """Padding in rank r's partition of a flat group: what lies past the group's last parameter."""
    rank = torch.distributed.get_rank(process_group)
    total = sum(p.numel() for p in parameters)
    return flat.numel() - min(flat.numel(), max(0, total - rank * flat.numel()))


def _state_padding(inner: Any, padding: Mapping[int, int]) -> int:
    """Bytes of padding in the state tensors that are as long as their flat partition."""
    total = 0
    for owner, entries in getattr(inner, "state", {}).items():
        padded = padding.get(id(owner), 0)
        for value in entries.values():
            if torch.is_tensor(value) and value.numel() > SCALAR_NUMEL and value.numel() == owner.numel():
                total += padded * value.element_size()
    return total


def _walk_wrapper(wrapper: Any, inner: Any, ledger: _Ledger) -> dict[str, Any]:
    """Bytes behind the wrapper's attributes that no other owner took, sorted by the attribute's name."""
    found: dict[str, Any] = {"state": {}, "gradients": 0, "buckets": 0, "other": 0}
    if wrapper is None or wrapper is inner:
        return found
    for name, value in list(vars(wrapper).items()):
        if name in ("optimizer", "module"):
            continue
        size = ledger.take_all(_tensors_in(value, _WALK_DEPTH))
        if size == 0:
            continue
        lowered = name.lower()
        if any(word in lowered for word in _STATE_WORDS) and "pending" not in lowered:
            found["state"][name] = size
        elif any(word in lowered for word in _BUCKET_WORDS) and "grad_partitions" not in lowered:
            found["buckets"] += size
        elif any(word in lowered for word in _GRADIENT_WORDS):
            found["gradients"] += size
        else:
            found["other"] += size
    return found


def _tensors_in(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Tensors in nested containers, and in DeepSpeed's bucket objects."""
    if torch.is_tensor(value):
        yield value
    elif depth > 0 and isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _tensors_in(item, depth - 1)
    elif depth > 0 and isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _tensors_in(item, depth - 1)
    elif depth > 0 and type(value).__name__.startswith("IPGBucket"):
        yield from _tensors_in(vars(value), depth - 1)
