"""The closed form of where elements lie: properties of every layout, and small ones written out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_optim.sharding.layout import Layout, ParamSpec, Slice, Unit, build_layout, dealt, undealt

Shapes = Sequence[tuple[int, ...]]


def specs(shapes: Shapes, prefix: str = "p") -> list[ParamSpec]:
    return [ParamSpec(name=f"{prefix}{number}", shape=shape) for number, shape in enumerate(shapes)]


shapes = st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=7)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any stage, up to 9 ranks, up to 3 groups of which some are empty, aligned parameters, sub-groups."""
    groups = draw(st.lists(st.one_of(shapes, st.just([])), min_size=1, max_size=3).filter(any))
    return build_layout(
        [specs(group, f"g{number}.p") for number, group in enumerate(groups)],
        stage=draw(st.sampled_from([0, 1, 2, 3])),
        world_size=draw(st.integers(1, 9)),
        param_alignment=draw(st.sampled_from([1, 4, 8])),
        sub_group_size=draw(st.one_of(st.none(), st.integers(1, 60))),
        round_robin=draw(st.booleans()),
    )


@given(layouts())
def test_every_element_lies_in_one_place(layout: Layout) -> None:
    for unit in layout.units:
        for param, spec in enumerate(unit.params):
            held = [i for rank in range(unit.world_size) for i in _elements(unit.slice_of(param, rank))]
            assert sorted(held) == list(range(spec.numel))


@given(layouts())
def test_slices_of_a_rank_do_not_overlap_and_fit_its_partition(layout: Layout) -> None:
    for unit in layout.units:
        for rank in range(unit.world_size):
            taken = [(s.tensor, s.offset + i) for s in unit.slices(rank) for i in range(s.numel)]
            assert len(taken) == len(set(taken))
            if unit.cut == "none":
                assert all(s.offset == 0 and s.tensor == s.param for s in unit.slices(rank))
            else:
                assert all(tensor == 0 and 0 <= i < unit.partition_numel for tensor, i in taken)
                assert unit.padding(rank) == unit.partition_numel - len(taken)


@given(layouts())
def test_slices_come_in_the_order_of_memory_and_holders_by_rank(layout: Layout) -> None:
    for unit in layout.units:
        for rank in range(unit.world_size):
            places = [(s.tensor, s.offset) for s in unit.slices(rank)]
            assert places == sorted(places)
        for param in range(len(unit.params)):
            every = [(rank, unit.slice_of(param, rank)) for rank in range(unit.world_size)]
            assert unit.holders(param) == [(rank, held) for rank, held in every if held is not None]


@given(layouts())
def test_units_hold_the_groups_in_order(layout: Layout) -> None:
    """And each parameter once; stage 3 cuts groups into sub-groups, and no other stage does."""
    names = [(unit.group, spec.name) for unit in layout.units for spec in unit.params]
    assert sorted(names) == sorted(set(names))
    for unit in layout.units:
        own = [spec.name for spec in unit.params]
        assert sorted(own) in (own, undealt(own, unit.world_size))
    assert all(spec.name.startswith(f"g{unit.group}.") for unit in layout.units for spec in unit.params)
    if layout.stage < 3:
        assert len({unit.group for unit in layout.units}) == len(layout.units)
    assert {unit.cut for unit in layout.units} == {{0: "none", 1: "flat", 2: "flat", 3: "each"}[layout.stage]}
    assert layout.stage > 0 or all(unit.world_size == 1 for unit in layout.units)


@given(shapes, st.integers(1, 9), st.sampled_from([1, 4]))
def test_stages_1_and_2_cut_one_vector_at_its_partition_borders(group: Shapes, ranks: int, alignment: int) -> None:
    """A parameter is cut where a border falls into it and nowhere else; partitions are the smallest that
    hold 2 elements' alignment a rank."""
    unit = build_layout([specs(group)], stage=1, world_size=ranks, param_alignment=alignment).units[0]
    position = 0
    for param, spec in enumerate(unit.params):
        position += -position % alignment
        ends = position + spec.numel
        borders = [b for b in range(unit.partition_numel, ranks * unit.partition_numel, unit.partition_numel)]
        inside = [border for border in borders if position < border < ends]
        assert len(unit.holders(param)) == 1 + len(inside)
        for rank, held in unit.holders(param):
            assert rank * unit.partition_numel + held.offset == position + held.start
        position = ends
    assert unit.partition_numel % 2 == 0
    assert 0 <= ranks * unit.partition_numel - position < 2 * ranks
    assert sum(len(unit.holders(param)) > 1 for param in range(len(unit.params))) <= ranks - 1


@given(shapes, st.integers(1, 9), st.integers(1, 60))
def test_stage_3_cuts_every_parameter_alike(group: Shapes, ranks: int, size: int) -> None:
    """Rank r holds elements from r ceil(n/W) on; a sub-group closes with the parameter that fills it."""
    layout = build_layout([specs(group)], stage=3, world_size=ranks, sub_group_size=size)
    for unit in layout.units:
        widths = [math.ceil(spec.numel / ranks) for spec in unit.params]
        assert unit.partition_numel == sum(widths)
        for param, width in enumerate(widths):
            for rank, held in unit.holders(param):
                assert (held.start, held.offset) == (rank * width, sum(widths[:param]))
                assert held.numel == min(width, unit.params[param].numel - held.start)
        assert sum(widths[:-1]) < size
    assert all(unit.partition_numel >= size for unit in layout.units[:-1])


def test_a_digest_tells_names_shapes_and_stages_apart() -> None:
    base, again = (build_layout([specs([(4, 6), (6,)])], stage=1, world_size=2) for _ in range(2))
    renamed = replace(base.units[0], params=(ParamSpec(name="q0", shape=(4, 6)), base.units[0].params[1]))
    turned = replace(base.units[0], params=(ParamSpec(name="p0", shape=(6, 4)), base.units[0].params[1]))
    others = [replace(base, units=(unit,)) for unit in (renamed, turned)] + [replace(base, stage=2)]
    assert base.digest() == again.digest()
    assert len({layout.digest() for layout in [base, *others]}) == 4


@pytest.mark.parametrize(
    ("group", "ranks", "partition", "cuts"),
    [
        # 12 + 6 elements: one border, at 10, falls into the first
        ([(4, 3), (6,)], 2, 10, [[(0, 10), (10, 2)], [(0, 6)]]),
        # 20 + 4 elements at 4 ranks, partitions of 6: borders at 6, 12 and 18 in the first
        ([(5, 4), (4,)], 4, 6, [[(0, 6), (6, 6), (12, 6), (18, 2)], [(0, 4)]]),
        # 6 + 6 at 2 ranks: a border between parameters cuts none (8 a rank would, 6 does not)
        ([(6,), (2, 3)], 2, 6, [[(0, 6)], [(0, 6)]]),
    ],
)
def test_borders_written_out(group: Shapes, ranks: int, partition: int, cuts: list[list[tuple[int, int]]]) -> None:
    unit = build_layout([specs(group)], stage=2, world_size=ranks).units[0]
    assert unit.partition_numel == partition
    assert [[(s.start, s.numel) for _, s in unit.holders(p)] for p in range(len(group))] == cuts


def test_fewer_elements_than_ranks() -> None:
    """Ranks that hold nothing of a parameter have no slice of it."""
    unit = build_layout([specs([(3,)])], stage=3, world_size=5).units[0]
    assert [unit.slice_of(0, rank) for rank in range(5)] == [Slice(0, r, 1, 0, 0) for r in range(3)] + [None, None]
    assert [unit.padding(rank) for rank in range(5)] == [0, 0, 0, 1, 1]
    flat = build_layout([specs([(3,)])], stage=1, world_size=5).units[0]
    assert [flat.slice_of(0, rank) for rank in range(5)] == [
        Slice(0, 0, 2, 0, 0),
        Slice(0, 2, 1, 0, 0),
        None,
        None,
        None,
    ]


def _elements(held: Slice | None) -> range:
    return range(held.start, held.start + held.numel) if held is not None else range(0)


def test_asking_for_holders_of_a_far_rank_is_cheap() -> None:
    """A thousand ranks, one border: the closed form does not ask each."""
    unit = Unit(group=0, params=tuple(specs([(10,)] * 4096)), cut="flat", world_size=1024)
    assert all(1 <= len(unit.holders(param)) <= 2 for param in range(4096))


@given(st.lists(st.integers()), st.integers(1, 9))
def test_what_is_dealt_round_robin_is_found_again(things: list[int], ranks: int) -> None:
    assert undealt(dealt(things, ranks), ranks) == things


def test_round_robin_is_deepspeeds_order() -> None:
    """As ``_round_robin_reorder`` of 0.19.8 gives it for seven tensors and three ranks."""
    assert dealt("abcdefg", 3) == list("adgbecf")
