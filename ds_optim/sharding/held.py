"""What a rank holds during an exchange: messages, stacks, results, and matrices in work, in bytes, from its plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product

from ds_optim.matrix.shapes import Part
from ds_optim.sharding.plan import Bucket, ExchangePlan
from ds_optim.sharding.working import bytes_of, values_of


def peak_scratch(plan: ExchangePlan, rank: int, *, offloaded: bool = False) -> int:
    """The most bytes that a rank holds at once in an exchange: messages, stacks, results, and matrices in work; on the
    accelerator, where slices lie on the host."""
    arriving = [
        _message_bytes(plan, bucket, rank, plan.there) + _stack_bytes(plan, bucket.owned[rank], plan.there)
        for bucket in plan.buckets
    ]
    most = behind = 0  # behind: results on their way to the host while the next matrices are worked on
    for batch in plan.whole[rank]:
        held = _stack_bytes(plan, batch, plan.there) + _working(plan, batch)
        most = max(most, held + sum(arriving[:1]) + behind)
        behind = offloaded * _stack_bytes(plan, batch, plan.back)
    for number, bucket in enumerate(plan.buckets):
        held = arriving[number] + _working(plan, bucket.owned[rank])
        leaving = plan.buckets[number - 1 : number] if number else ()
        if plan.overlap:
            held += sum(arriving[number + 1 : number + 2])
            held += sum(_message_bytes(plan, last, rank, plan.back) for last in leaving)
        most = max(most, held + behind)
        if offloaded:
            last = bucket if not plan.overlap else leaving[0] if leaving else None
            behind = _moved_bytes(plan, last or bucket, rank, plan.back)[0 if last else 2]
    return most + (0 if offloaded else _choice_bytes(plan, rank))


def _message_bytes(plan: ExchangePlan, bucket: Bucket, rank: int, parts: Sequence[Part]) -> int:
    """What a rank sends and receives for a bucket one way."""
    return sum(_moved_bytes(plan, bucket, rank, parts)[:2])


def _moved_bytes(plan: ExchangePlan, bucket: Bucket, rank: int, parts: Sequence[Part]) -> tuple[int, int, int]:
    """What a rank sends to owners, receives as one, and keeps; of chosen rows at most, as all may be with one rank,
    which then keeps them all."""
    sent = received = kept = 0
    for part, (owner, params) in product(parts, enumerate(bucket.owned)):
        for param in params:
            held, whole = plan.held(param, rank, part), values_of(plan.views[param], part)
            most = values_of(plan.worked[param], part)
            if owner == rank:
                received += min(whole - held, most) * part.dtype.itemsize
                kept += (most - min(whole - held, most)) * part.dtype.itemsize
            else:
                sent += min(held, most) * part.dtype.itemsize
    return sent, received, kept


def _stack_bytes(plan: ExchangePlan, params: Sequence[int], parts: Sequence[Part]) -> int:
    return bytes_of([plan.worked[param] for param in params], parts)


def _working(plan: ExchangePlan, params: Sequence[int]) -> int:
    return plan.working.most(plan.worked[param] for param in params)


def _choice_bytes(plan: ExchangePlan, rank: int) -> int:
    """What says during an exchange which rows were chosen: a byte a row, and 8 for how many are before it."""
    if plan.fraction == 1.0:
        return 0
    params = [*plan.cut, *chain.from_iterable(plan.whole[rank])]
    return sum(9 * plan.views[param].of_rows.numel for param in params) + 8 * bool(params)
