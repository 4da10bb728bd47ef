"""What this rank holds of a unit: flat views of weights, gradients and state, and the slices they are cut into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_optim.elementwise import fused
from ds_optim.elementwise.chunks import Scratch, chunk_elements
from ds_optim.elementwise.momentum import BLOCK, NARROW, WEIGHTS, Bfloat16, Flat, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey, stream_of
from ds_optim.optimizers.rules import (
    CODES_OF_MOMENTUM,
    MOMENTUM,
    SCALARS,
    SCALES_OF_MOMENTUM,
    SECOND_MOMENT,
    STEP,
    Rule,
)
from ds_optim.optimizers.updates import Piece
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Slice, Unit
from ds_optim.sharding.lines import Lines, blocks_of


class Whole(NamedTuple):
    """A flat partition, with what is kept for it."""

    p: Flat
    g: Flat
    momentum: Flat | None
    second: Tensor | None


class Local:
    """One unit in one call of ``step()``.

    Args:
        tensors: the flat partition, or the parameters themselves where nothing is sharded.
        state: the optimizer's state of each of them.
        scratch: of this call.
        seed: of the noise in rounding momentum and weights.
        cautious_decay: what the rule was told nothing of, to be done around its steps.
        tensor: the ranks that hold the other shards of what tensor parallelism cut.
        lines: all slices of a flat partition.
    """

    def __init__(
        self,
        unit: Unit,
        comm: Comm,
        tensors: Sequence[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        scratch: Scratch,
        seed: int,
        cautious_decay: float = 0.0,
        tensor: Comm | None = None,
        lines: Lines | None = None,
    ) -> None:
        self.unit = unit
        self.comm = comm
        self.tensors = tensors
        self.states = [state[tensor] for tensor in tensors]
        self.scratch = scratch
        self.seed = seed
        self.cautious_decay = cautious_decay
        self.tensor = tensor
        self.lines = lines
        self.absent = frozenset(number for number, tensor in enumerate(tensors) if tensor.grad is None)
        """Tensors without a gradient: to be left alone. None under ZeRO."""

    @cached_property
    def p(self) -> list[Tensor]:
        """Weights, flat, by tensor."""
        return [flat(tensor) for tensor in self.tensors]

    @cached_property
    def g(self) -> list[Tensor | None]:
        """Gradients, flat, by tensor."""
        return [None if t.grad is None else t.grad.detach().resolve_neg().reshape(-1) for t in self.tensors]

    @property
    def rounds(self) -> bool:
        """Whether weights or momentum are stored in fewer bits: the noise of that is a function of the parameter."""
        state = self.states[0]
        narrow = CODES_OF_MOMENTUM in state or (MOMENTUM in state and state[MOMENTUM].dtype in NARROW)
        return narrow or self.p[0].dtype in NARROW

    def piece(self, held: Slice) -> Piece:
        """A slice of weights, gradient and the rule's buffers, as they are stored."""
        state, g = self.states[held.tensor], self.g[held.tensor]
        assert g is not None
        return Piece(
            spec=self.unit.params[held.param],
            start=held.start,
            p=self.weights(held),
            g=self.read(held, run(g, held)),
            momentum=self._momentum(held, state),
            second=run(flat(state[SECOND_MOMENT]), held) if SECOND_MOMENT in state else None,
            scratch=self.scratch,
        )

    @property
    def key(self) -> NoiseKey:
        """Of rounding in this step, for kernels that know streams and starts."""
        return NoiseKey(seed=self.seed, stream=0, step=self.step, start=0)

    @cached_property
    def whole(self) -> Whole:
        """All of a flat partition, for kernels that know its slices."""
        state, (g,), key = self.states[0], self.g, self.key
        assert g is not None
        m: Flat | None = None
        if CODES_OF_MOMENTUM in state:
            m = Int8(rounding=key, codes=flat(state[CODES_OF_MOMENTUM]), scales=state[SCALES_OF_MOMENTUM])
        elif MOMENTUM in state:
            m = as_stored(self._momenta[0], key)
        return Whole(
            p=as_stored(self.p[0], replace(key, step=WEIGHTS + self.step)),
            g=as_stored(g, key),
            momentum=m,
            second=flat(state[SECOND_MOMENT]) if SECOND_MOMENT in state else None,
        )

    def weights(self, held: Slice) -> Flat:
        """A slice of the weights, as they are stored."""
        p = run(self.p[held.tensor], held)
        return Bfloat16(rounding=self._rounding(held, WEIGHTS + self.step), values=p) if p.dtype in NARROW else p

    def parts(self, held: Slice) -> Iterator[Slice]:
        """A slice as it is to be stepped: whole, or where the old weights are to be kept, in chunks of whole blocks."""
        if self.cautious_decay:
            yield from self.chunks(held)
        else:
            yield held

    def chunks(self, held: Slice) -> Iterator[Slice]:
        """A slice in runs of whole blocks, each of which stays in cache."""
        step = chunk_elements(self.p[held.tensor].device)
        first = step - held.start % BLOCK
        begins = [0, *range(first, held.numel, step)]
        for begin, end in zip(begins, [*begins[1:], held.numel], strict=True):
            yield replace(held, start=held.start + begin, offset=held.offset + begin, numel=end - begin)

    @contextmanager
    def decaying(self, weights: Flat, lr: float, *, alone: bool = False) -> Iterator[None]:
        """Around a step of one of these parts' weights without decay: decays them, by lr, where the step was not away
        from zero.

        alone: of a step that may do anything; of all others kernels decay as they step.
        """
        if not self.cautious_decay:
            yield
            return
        rate, kept = lr * self.cautious_decay, []
        assert isinstance(weights, Tensor)
        with ExitStack() as lent:

            def keep() -> None:
                kept.extend(lent.enter_context(self.scratch.lend(weights, 2)))
                kept[0].copy_(weights)

            if alone or not fused.ready(weights.device):
                keep()
                with fused.together():  # what others do in one launch is done here, before it is looked at
                    yield
            else:
                with fused.cautiously(rate, keep):
                    yield
            if kept:
                old, moved = kept
                torch.sub(old, weights, out=moved).mul_(old).ge_(0)
                weights.sub_(old.mul_(rate).mul_(moved))

    def read(self, held: Slice, values: Tensor) -> Flat:
        """Values of a slice, (n,) in fp32 or bfloat16, to be read only."""
        if values.dtype not in NARROW:
            return values
        return Bfloat16(rounding=self._rounding(held, self.step), values=values, writable=False)

    def _momentum(self, held: Slice, state: Mapping[str, Any]) -> Flat | None:
        if CODES_OF_MOMENTUM in state:
            codes, (first, _) = run(flat(state[CODES_OF_MOMENTUM]), held), self._blocks[held.param]
            first += held.start // BLOCK - self._starts[held.param] // BLOCK
            scales = state[SCALES_OF_MOMENTUM][first : first + scales_numel(held.start, held.numel)]
            return Int8(rounding=self._rounding(held, self.step), codes=codes, scales=scales)
        if MOMENTUM not in state:
            return None
        values = run(self._momenta[held.tensor], held)
        return Bfloat16(rounding=self._rounding(held, self.step), values=values) if values.dtype in NARROW else values

    def _rounding(self, held: Slice, step: int) -> NoiseKey:
        name = self.unit.params[held.param].noise_name
        return NoiseKey(seed=self.seed, stream=stream_of(name), step=step, start=held.start)

    @cached_property
    def _momenta(self) -> list[Tensor]:
        """Momentum that is stored as values, flat, by tensor."""
        return [flat(state[MOMENTUM]) for state in self.states]

    @cached_property
    def _blocks(self) -> dict[int, tuple[int, int]]:
        return blocks_of(self.unit, self.comm.rank)

    @cached_property
    def _starts(self) -> dict[int, int]:
        return {held.param: held.start for held in self.unit.slices(self.comm.rank)}

    @cached_property
    def step(self) -> int:
        """Steps done so far; asked of all tensors once, since every slice asks for it."""
        return max(int(state[STEP]) for number, state in enumerate(self.states) if number not in self.absent)

    def count_step(self) -> None:
        self.step += 1
        for number, state in enumerate(self.states):
            if number not in self.absent:
                state[STEP] = self.step

    def slices(self) -> Iterator[Slice]:
        """The slices that this rank holds and that have a gradient."""
        return (held for held in self.unit.slices(self.comm.rank) if held.tensor not in self.absent)

    def params(self) -> list[int]:
        """The unit's parameters that take part: unsharded, those with a gradient."""
        absent = self.absent if self.unit.cut == "none" else ()
        return [param for param in range(len(self.unit.params)) if param not in absent]

    def is_counted_elsewhere(self, param: int) -> bool:
        """Whether each tensor-parallel rank holds all of a parameter, and another one counts it."""
        return self.tensor is not None and self.tensor.rank > 0 and self.unit.params[param].shard is None

    def rows(self, held: Slice, rule: Rule) -> Tensor:
        """The values that a rule keeps of the rows that begin in a slice."""
        values: Tensor = self.states[held.tensor][rule.rows[0]][self.unit.params[held.param].name]
        return values

    def scalars(self, param: int) -> dict[str, float]:
        """Where the number of a parameter is kept, by the parameter's name."""
        state = self.states[param if self.unit.cut == "none" else 0]
        kept: dict[str, float] = state[SCALARS]
        return kept


def as_stored(values: Tensor, key: NoiseKey) -> Flat:
    return Bfloat16(rounding=key, values=values) if values.dtype in NARROW else values


def run(tensor: Tensor, held: Slice) -> Tensor:
    """A slice of a flat tensor."""
    return tensor[held.offset : held.offset + held.numel]


def flat(tensor: Tensor) -> Tensor:
    """A tensor as a vector over the same memory."""
    return tensor.detach().view(-1)
