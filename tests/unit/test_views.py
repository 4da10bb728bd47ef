"""MatrixView: every option against naive slicing in NumPy, and pack as the inverse of unpack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView


def naive_blocks(array: np.ndarray, options: dict[str, Any]) -> list[np.ndarray]:
    """The blocks by loops over whole matrices, one slice at a time."""
    depth = options.get("batch_dims", 0)
    matrices = [array[index] for index in np.ndindex(*array.shape[:depth])]
    matrices = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
    if options.get("transpose", False):
        matrices = [matrix.T for matrix in matrices]
    split = options.get("split") or [matrices[0].shape[0]]
    heads = options.get("heads", 1)
    heads = heads if isinstance(heads, list) else [heads] * len(split)
    turns = options.get("interleave", 1)
    order = [
        sum(split[:part]) // turns + turn * sum(split) // turns + row
        for part, rows in enumerate(split)
        for turn in range(turns)
        for row in range(rows // turns)
    ]
    matrices = [matrix[order] for matrix in matrices]
    blocks, start = [], 0
    for rows, count in zip(split, heads, strict=True):
        size = rows // count
        pieces = [x[start + h * size : start + (h + 1) * size] for x in matrices for h in range(count)]
        blocks.append(np.stack(pieces))
        start += rows
    return blocks


@st.composite
def shapes_and_options(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """A shape with options that fit it: rows are made from parts and heads, the shape from rows."""
    options: dict[str, Any] = {}
    parts = draw(st.integers(1, 3))
    if draw(st.booleans()):
        heads = draw(st.lists(st.integers(1, 4), min_size=parts, max_size=parts))
        if draw(st.booleans()):
            heads = [heads[0]] * parts
            options["heads"] = heads[0]
        else:
            options["heads"] = heads
    else:
        heads = [1] * parts
    fitting = [turns for turns in (1, 2, 3) if all(h % turns == 0 or turns % h == 0 for h in heads)]
    turns = draw(st.sampled_from(fitting)) if parts > 1 else 0
    rows = [turns * count * draw(st.integers(1, 4)) if turns else count * draw(st.integers(1, 4)) for count in heads]
    if turns:
        options["interleave"] = turns
    if parts > 1 or draw(st.booleans()):
        options["split"] = rows
    inner: tuple[int, ...]
    if draw(st.booleans()):
        options["transpose"] = True
        inner = (draw(st.integers(1, 5)), sum(rows))
    else:
        inner = (sum(rows), *draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    if stack:
        options["batch_dims"] = len(stack)
    return (*stack, *inner), options


@settings(max_examples=200, deadline=None)
@given(shapes_and_options())
def test_blocks_are_the_naive_slices_and_pack_is_the_inverse(case: tuple[tuple[int, ...], dict[str, Any]]) -> None:
    shape, options = case
    view = MatrixView.from_options("w", shape, options)
    flat = torch.arange(view.numel, dtype=torch.float32)
    blocks = view.unpack(flat)
    assert [tuple(block.shape) for block in blocks] == view.matrices()
    pair = torch.stack([flat, -flat])
    taken = [view.taken(pair, number) for number in range(len(blocks))]
    for block, both in zip(blocks, taken, strict=True):
        assert torch.equal(both, torch.cat([block, -block]))
    packed = torch.full_like(pair, float("nan"))
    view.pack_into(taken, packed)
    assert torch.equal(packed, pair)
    for block, naive in zip(blocks, naive_blocks(flat.numpy().reshape(shape), options), strict=True):
        assert np.array_equal(block.numpy(), naive)
    back = torch.full((view.numel,), float("nan"))
    view.pack_into([block.clone() for block in blocks], back)
    assert torch.equal(back, flat)


def test_pack_takes_another_dtype_and_an_offset_partition() -> None:
    view = MatrixView(shape=(4, 6), transpose=True)
    partition = torch.zeros(40)
    factors = [torch.arange(24, dtype=torch.bfloat16).view(1, 6, 4)]
    view.pack_into(factors, partition[7:31])
    assert torch.equal(partition[7:31].view(4, 6), factors[0][0].mT.float())
    assert partition[:7].count_nonzero() == partition[31:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 4), {}),
        ((6, 4), {"transpose": True, "split": [2, 2]}),
        ((6, 4), {"transpose": True, "heads": 2}),
        ((12, 4), {"split": [4, 8], "heads": [2, 4]}),
        ((3, 6, 4), {"batch_dims": 1, "split": [2, 4]}),
        ((3, 6, 4), {"batch_dims": 1, "heads": 2}),
        ((6, 2, 3, 3), {}),
    ],
)
def test_unpack_gives_views(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    view = MatrixView.from_options("w", shape, options)
    flat = torch.zeros(view.numel)
    for block in view.unpack(flat):
        block.fill_(1)
    assert torch.equal(flat, torch.ones(view.numel))


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((768, 2304), {}, "768x2304"),
        ((768, 2304), {"transpose": True, "split": [768, 768, 768]}, "3 x 768x768 (transpose, split)"),
        ((1280, 768), {"split": [768, 256, 256]}, "768x768 + 2 x 256x768 (split)"),
        ((1280, 768), {"split": [768, 256, 256], "heads": [12, 4, 4]}, "20 x 64x768 (split, heads)"),
        ((8, 512, 64), {"batch_dims": 1, "transpose": True}, "8 x 64x512 (transpose, batch_dims)"),
        ((64, 3, 7, 7), {}, "64x147 (conv)"),
        ((9, 5), {"split": [3, 3, 3], "interleave": 3}, "3 x 3x5 (split, interleave)"),
    ],
)
def test_describe(shape: tuple[int, ...], options: dict[str, Any], text: str) -> None:
    assert MatrixView.from_options("w", shape, options).describe() == text


def test_equal_options_make_equal_hashable_views() -> None:
    views = {MatrixView.from_options(name, (8, 4), {"heads": 2}) for name in ("a", "b")}
    assert views == {MatrixView(shape=(8, 4), heads=(2,))}
    assert MatrixView.from_options("a", torch.Size((8, 4)), {"heads": [2]}) in views


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((768,), {}, "two dimensions"),
        ((4, 8, 8), {"batch_dims": 2}, "lower batch_dims"),
        ((0, 8), {}, "no elements"),
        ((8, 4), {"splits": [4, 4]}, "did you mean 'split'"),
        ((8, 4), {"split": [4, 3]}, "sums to 7, the matrix has 8 rows"),
        ((8, 24), {"split": [8, 8, 8]}, "transpose an (in, out) weight"),
        ((8, 4), {"split": [8, 0]}, "whole numbers above 0"),
        ((8, 4), {"split": 8}, "whole numbers above 0"),
        ((8, 4), {"heads": 3}, "write a divisor of 8"),
        ((8, 4), {"heads": 0}, "whole numbers above 0"),
        ((8, 4), {"heads": [2, 2]}, "does not fit 1 part"),
        ((12, 4), {"split": [8, 4], "heads": [2]}, "one number for each part"),
        ((8, 4), {"transpose": 1}, "true or false"),
        ((8, 4), {"split": [4, 4], "interleave": 3}, "each a multiple of 3"),
        ((8, 4), {"interleave": 2}, "write two parts or more"),
        ((24, 4), {"split": [12, 12], "interleave": 2, "heads": 3}, "none divides the other"),
        ((8, 4), {"split": [4, 4], "interleave": -2}, "whole number such as the number of heads"),
        ((8, 4), {"batch_dims": -1}, "whole number"),
        ((8, 4), {"batch_dims": True}, "whole number"),
        ((8, 4, 3, 3), {"transpose": True}, "transpose turns two dimensions"),
    ],
)
def test_bad_options_name_parameter_sizes_and_remedy(
    shape: tuple[int, ...], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        MatrixView.from_options("h.0.attn.c_attn.weight", shape, options)
    message = str(caught.value)
    assert says in message
    assert "h.0.attn.c_attn.weight" in message
    assert str(list(shape)) in message
    assert "\n" not in message


def test_wrong_number_of_elements_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes 8 flat elements"):
        MatrixView(shape=(2, 4)).unpack(torch.zeros(9))
