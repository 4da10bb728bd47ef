"""What a micro-batch's forward and backward hold, moment by moment, and how that meets what ZeRO holds meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A stretch of the passes, which ends where a parameter's gradient is complete.

    held: the most bytes at once in it, beside weights and the gradients that were complete before. logits: what of
    them was as wide as the vocabulary. made: elements of the gradients that were complete before.
    """

    held: int
    made: int
    logits: int = 0


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Of one micro-batch.

    kept: bytes from the forward to the backward pass. moments: the first is the forward pass; empty where nothing is
    known. short: bytes that the most of them may be more than is said. how: they were found.
    """

    kept: int = 0
    moments: tuple[Moment, ...] = ()
    short: int = 0
    how: str = ""

    @property
    def elements(self) -> int:
        """Of all gradients."""
        return max((moment.made for moment in self.moments), default=0)

    @property
    def most(self) -> int:
        """The most bytes at once beside weights and complete gradients."""
        return max((moment.held for moment in self.moments), default=0)


NOTHING = Passes()


@dataclass(frozen=True, kw_only=True)
class AtOnce:
    """What the accelerator holds at a moment of backward beside model states that are there all the time, bytes."""

    gradients: int
    buckets: int
    gathered: int
    logits: int
    activations: int

    @property
    def total(self) -> int:
        return self.gradients + self.buckets + self.gathered + self.logits + self.activations


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What ZeRO holds beside model states while backward goes on, bytes.

    Attributes:
        gradients: held before it begins. more_gradients: more of them where all are complete; a rank's own come to it
            between the parts ``first`` and ``last`` of all gradients, as backward runs from the model's end.
        buckets: from the first complete gradient on, or only at the end where ``reduced_last``.
        early_buckets: what of them is there before.
        gathered: parameters that are whole at its begin. whole: that all of them would be. ahead: of the layer in work
            and of what is fetched before it.
    """

    gradients: int = 0
    more_gradients: int = 0
    first: float = 0.0
    last: float = 1.0
    buckets: int = 0
    early_buckets: int = 0
    reduced_last: bool = False
    gathered: int = 0
    whole: int = 0
    ahead: int = 0

    def fullest(self, passes: Passes) -> AtOnce:
        """The moment at which most is held; without passes all at once."""
        return max(self._moments(passes), key=lambda at: at.total)

    def _moments(self, passes: Passes) -> Iterator[AtOnce]:
        if not passes.moments:
            yield self._at(1.0, self.gathered, Moment(held=0, made=0))
        total = max(1, passes.elements)
        for moment in passes.moments:
            done = moment.made / total
            left = int((1 - done) * self.whole) + self.ahead  # what backward has passed is cut again
            yield self._at(done, min(self.gathered, left), moment)

    def _at(self, done: float, gathered: int, moment: Moment) -> AtOnce:
        reduced = done >= 1.0 if self.reduced_last else done > 0
        own = min(1.0, max(0.0, (done - self.first) / (self.last - self.first)))
        return AtOnce(
            gradients=self.gradients + int(own * self.more_gradients),
            buckets=self.buckets if reduced else self.early_buckets,
            gathered=gathered,
            logits=moment.logits,
            activations=moment.held - moment.logits,
        )


def extrapolated(two: Passes, three: Passes, micro_batch: int) -> Passes:
    """Of ``micro_batch`` sequences, from those of two and of three: each moment grows by as much with each sequence.

    From two on: of a single one some kernels have no copy to make.
    """

    def at(first: int, second: int) -> int:
        return first + (micro_batch - 2) * (second - first)

    moments = tuple(
        Moment(held=at(a.held, b.held), logits=at(a.logits, b.logits), made=a.made)
        for a, b in zip(two.moments, three.moments, strict=True)
    )
    return Passes(kept=at(two.kept, three.kept), moments=moments, short=at(two.short, three.short), how=two.how)
