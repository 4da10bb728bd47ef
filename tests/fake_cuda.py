"""A step on a CUDA that is not there: tensors without memory on the device "cuda", and ranks that send nothing.

What a step would do is counted: kernels (Triton's and torch's), waits of the host for the device, copies between
devices, bytes that a step holds at once, messages and the device they lie on. A CPU build of torch can do this for all
but ``copy_``, indexing and a few more, which are answered here.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

import ds_optim
from ds_optim.elementwise.gpu import kernels, launch, row_launch, rows
from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers import base, planning, row_steps
from ds_optim.sharding import returns, selection
from ds_optim.sharding.binding import Binding, Groups, Member
from ds_optim.sharding.comm import Comm, Pending
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import build_layout
from ds_optim.sharding.selection import Chosen
from tests.fake_streams import FakeStreams

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_NO_KERNEL = {
    "aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach",
    "aten::alias", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::resize_",
    "aten::set_.source_Storage_storage_offset", "aten::is_same_size", "prim::device",
}  # fmt: skip
_READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}


@dataclass
class Counts:
    """What happened: kernels by name, syncs and fp64 by line of the package, crossings by devices and line, slices by
    rule, and what was asked of streams beside the current one (``FakeStreams``).
    """

    kernels: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    crossings: Counter[str] = field(default_factory=Counter)
    doubles: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    slices: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    late: int = 0
    live: int = 0
    peak: int = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())


class DryCuda(FakeTensorMode):
    """Fake tensors, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.streams = FakeStreams()
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            if _on_cuda(args):
                self.counts.syncs[_line()] += 1
            if func is aten.equal.default or args[0].dtype == torch.bool or func is aten.is_nonzero.default:
                return True
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.copy_.default:
            return self.copied(*args[:2])
        if func is aten._to_copy.default and "device" in kwargs:
            self.crossed(args[0].device, torch.device(kwargs["device"] or args[0].device))
        if not func.is_view and func.name() not in _NO_KERNEL:
            self.streams.touched(_tensors(args))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._count(func, args, result)
        return result

    def copied(self, target: Tensor, source: Tensor) -> Tensor:
        torch.broadcast_shapes(target.shape, source.shape)
        self.crossed(source.device, target.device)
        self.streams.copied(target, source)
        if CUDA.type in (source.device.type, target.device.type):
            self.counts.kernels["aten::copy_"] += 1
        return target

    def crossed(self, source: torch.device, target: torch.device) -> None:
        if source.type != target.type:
            self.counts.crossings[f"{source.type} -> {target.type} {_line()}"] += 1

    def _count(self, func: Any, args: Any, result: Any) -> None:
        made = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, FakeTensor)]
        for tensor in made:
            if tensor.device.type == CUDA.type:
                self._hold(tensor)
                if tensor.dtype == torch.float64:
                    self.counts.doubles[_line()] += 1
        # prim and prims: questions about a tensor, and parts of operations that are counted themselves.
        if func.is_view or func.name() in _NO_KERNEL or func.namespace in ("prim", "prims"):
            return
        if any(t.device.type == CUDA.type for t in made) or _on_cuda(args):
            self.counts.kernels[func.name()] += 1

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = size
        self.counts.live += size
        self.counts.peak = max(self.counts.peak, self.counts.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.streams.freed(key)
        self.counts.live -= self._seen.pop(key, 0)


class _Answers(TorchFunctionMode):
    """What a CPU build cannot even dispatch for a device that it has not."""

    def __init__(self, dry: DryCuda) -> None:
        super().__init__()
        self._dry = dry

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_:
            return self._dry.copied(*args[:2])
        if func in (Tensor.__float__, Tensor.__int__) and args[0].device.type == CUDA.type:
            self._dry.counts.syncs[_line()] += 1
            return 1.0 if func is Tensor.__float__ else 1
        if func is Tensor.__getitem__ and args[0].device.type == CUDA.type:
            return _taken(*args)
        if func is Tensor.__setitem__ and args[0].device.type == CUDA.type and isinstance(args[2], Tensor):
            return self._dry.copied(_taken(args[0], args[1]), args[2])
        return func(*args, **kwargs)


def _tensors(args: Any) -> list[Tensor]:
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return [x for x in flat if isinstance(x, Tensor)]


def _on_cuda(args: Any) -> bool:
    return any(x.device.type == CUDA.type for x in _tensors(args))


def _line() -> str:
    """The innermost function of the package that is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/ds_optim/" in file and "/tests/" not in file:
            return f"{file.rsplit('/ds_optim/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _taken(tensor: Tensor, index: Any) -> Tensor:
    """Basic indexing, by the operations that it stands for."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *[slice(None)] * (tensor.dim() - sum(i is not None for i in index) + 1), *index[at + 1 :])
    dim = 0
    for i in index:
        if i is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(i, int):
            tensor = tensor.select(dim, i)
        elif isinstance(i, slice):
            first, last, step = i.indices(tensor.shape[dim])
            tensor, dim = aten.slice.Tensor(tensor, dim, first, last, step), dim + 1
        elif isinstance(i, Tensor) and i.dtype != torch.bool:
            tensor, dim = torch.index_select(tensor, dim, i), dim + 1
        else:
            raise NotImplementedError(f"an index of type {type(i).__name__}")
    return tensor


@dataclass
class SilentComm(Comm):
    """Ranks that all say the same, and messages that nobody reads."""

    counts: Counts = field(default_factory=Counts)
    choice: Callable[[], Any] | None = None
    """What rank 0 says of owners, which others wait for with None."""

    def all_to_all(self, out: Tensor, out_counts: list[int], message: Tensor, counts: list[int]) -> Pending:
        self.counts.messages[f"all_to_all {message.device.type} {out.device.type}"] += 1
        assert out.numel() == sum(out_counts)
        assert message.numel() == sum(counts)
        return _Arrived()

    def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        if self.world_size > 1:
            self.counts.messages[f"all_reduce {values.device.type}"] += 1
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        return [self.choice() if value is None and self.choice is not None else value] * self.world_size

    def device(self, fallback: torch.device) -> torch.device:
        return CUDA


class _Arrived:
    def wait(self) -> None:
        return None


def _nowhere(*_: object) -> int:
    """An address. No mock with a return value: it would keep the tensors that it is called with, and their bytes."""
    return 0


def _most_moved(exchange: Exchange, param: int, view: MatrixView) -> Any:
    """How many rows are chosen before each, as ``Chosen.sums``, where the values do not say: those of which this rank
    has most to send, or as their owner most to receive."""
    rank = exchange.comm.rank
    held = exchange.plan.unit.slice_of(param, rank)
    owns = any(param in bucket.owned[rank] for bucket in exchange.plan.buckets)
    with unset_fake_temporarily():
        here = torch.zeros(view.numel)
        if held is not None:
            here[held.start : held.start + held.numel] = 1.0
        sums, rows = torch.zeros(view.of_rows.numel), torch.arange(view.of_rows.numel)
        for part, numbers in zip(view.unpack(here), view.of_rows.unpack(rows.float()), strict=True):
            sums[numbers.flatten().long()] = part.sum(dim=-1).flatten()
        flags = selection._largest(view, -sums if owns else sums, exchange.plan.fraction)
        return np.pad(np.cumsum(flags.numpy()), (1, 0))


@contextmanager
def dry_cuda() -> Iterator[DryCuda]:
    """In it tensors are fake, and Triton's kernels are counted in place of being launched."""
    dry = DryCuda()

    def started(rule: Any, types: Any, jobs: Any, ends: Any, parts: Any, device: Any) -> None:
        table = torch.empty(len(ends), kernels.WIDTH, dtype=torch.int64, device=device)
        dry.crossed(CPU, table.device)
        dry.counts.kernels["aten::copy_"] += 1
        dry.counts.kernels[f"triton::{rule.name}"] += 1
        dry.counts.slices[rule.name] += len(jobs)
        if parts is not None:
            dry.counts.kernels["triton::join_parts"] += 1

    def rows_started(jobs: Any, ends: Any) -> None:
        name, _, device = jobs[0].kind
        table = torch.empty(len(ends), rows.WIDTH, dtype=torch.int64, device=device)
        dry.crossed(CPU, table.device)
        dry.counts.kernels["aten::copy_"] += 1
        dry.counts.kernels[f"triton::{name}"] += 1
        dry.counts.slices[name] += len(jobs)

    def chosen_of(exchange: Exchange, chosen: dict[int, Chosen]) -> Exchange:
        for param, one in chosen.items():
            chosen[param] = replace(one, sums=_most_moved(exchange, param, one.view))
        return selection.chosen_of(exchange, chosen)

    def listed(tensor: Tensor) -> Any:
        if tensor.device.type == CUDA.type:
            dry.counts.syncs[_line()] += 1
        return np.ones(tuple(tensor.shape)).tolist()

    with (
        mock.patch.object(FakeTensor, "tolist", listed),
        mock.patch.object(row_steps, "chosen_of", chosen_of),
        mock.patch.object(returns, "cuda", dry.streams),
        mock.patch.object(launch, "_start", started),
        mock.patch.object(launch, "address", _nowhere),
        mock.patch.object(row_launch, "_start", rows_started),
        mock.patch.object(row_launch, "address", _nowhere),
        dry,
        _Answers(dry),
    ):
        yield dry


def dry_steps(
    name: str, model: Sequence[tuple[str, Sequence[int]]], *, stage: int, ranks: int = 4, rank: int = 0,
    offload: bool = False, routing: Mapping[str, Any] | None = None, masters: torch.dtype = torch.float32,
    grads: torch.dtype = torch.float32, **params: Any,
) -> tuple[Counts, Counts]:  # fmt: skip
    """The counts of a first and of a second step of one rank.

    Args:
        model: names and shapes of its parameters.
        masters, grads: dtypes of the flat partitions; stage 0 steps the parameters themselves.
        routing: options of ``param_groups``.
        offload: the partitions lie on the host, matrices are worked on on the device.
    """
    with dry_cuda() as dry:
        home = CPU if offload else CUDA
        with CUDA:
            module = module_of(model)
        optimizer = getattr(ds_optim, name)(ds_optim.param_groups(module, **(routing or {})), **params)
        comm = SilentComm(rank, ranks if stage else 1)

        def bound(_: Any, members: Sequence[Sequence[Member]], groups: Groups) -> Binding:
            if stage == 0:
                return base_bind(optimizer, members, groups)
            layout = build_layout([[m.spec for m in group] for group in members], stage=stage, world_size=ranks)
            own = {m.spec.name: m for group in members for m in group}
            return Binding(
                layout, comm, CUDA, [[flats[number]] for number in range(len(layout.units))],
                [[own[spec.name] for spec in unit.params] for unit in layout.units],
            )  # fmt: skip

        unresolved = planning._unresolved

        def planned(binding: Binding, *given: Any) -> Any:
            plans = unresolved(binding, *given)
            comm.choice = lambda: planning._guarded(binding, plans, False, None)
            return plans

        base_bind = base.bind
        groups = [group for group in optimizer.param_groups if group["params"]]
        flats: list[Tensor] = []
        if stage:
            specs = [[m.spec for m in group] for group in optimizer._members]
            for unit in build_layout(specs, stage=stage, world_size=ranks).units:
                flats.append(torch.empty(unit.partition_numel, device=home, dtype=masters))
            for group, flat in zip(groups, flats, strict=True):
                group["params"] = [flat]
        found = []
        with mock.patch.object(base, "bind", bound), mock.patch.object(planning, "_unresolved", planned):
            for _ in range(2):
                for group in groups:
                    for tensor in group["params"]:
                        tensor.grad = torch.empty(tensor.shape, device=tensor.device, dtype=grads)
                dry.counts.__init__(live=dry.counts.live, peak=dry.counts.live)  # type: ignore[misc]
                dry.streams.asked.clear()
                comm.counts = dry.counts
                before = dry.counts.live
                optimizer.step()
                kept = Counts(**{name: type(v)(v) for name, v in vars(dry.counts).items()})
                kept.peak -= before
                kept.asked, kept.late = Counter(dry.streams.asked), dry.streams.late
                assert not kept.asked["freed too early"], "freed too early, while a copy was under way"
                found.append(kept)
        return found[0], found[1]


def module_of(model: Sequence[tuple[str, Sequence[int]]]) -> nn.Module:
    """A module of parameters of these names and shapes, on torch's current device."""
    module = nn.Module()
    for path, shape in model:
        _register(module, path, nn.Parameter(torch.empty(*shape)))
    return module


def _register(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.register_parameter(last, parameter)


def small(layers: int = 2, width: int = 64) -> list[tuple[str, tuple[int, ...]]]:
    """A model of so many layers, with an embedding, gains and biases: 5 parameters a layer and 3 more."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("embed_tokens.weight", (100, width))]
    for n in range(layers):
        shapes += [
            (f"layers.{n}.attn.q_proj.weight", (width, width)),
            (f"layers.{n}.attn.q_proj.bias", (width,)),
            (f"layers.{n}.mlp.up_proj.weight", (3 * width, width)),
            (f"layers.{n}.mlp.down_proj.weight", (width, 3 * width)),
            (f"layers.{n}.norm.weight", (width,)),
        ]
    return [*shapes, ("norm.weight", (width,)), ("lm_head.weight", (100, width))]
