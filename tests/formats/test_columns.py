"""Reductions over blocks of columns, including blocks of unequal size, against float64."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import amax_columns, expand_columns, range_columns, split_columns, sum_columns


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1, 7, 4), (5, 7)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_column_blocks(sizes, lead) -> None:
    x = torch.randn(*lead, 12).bfloat16()
    low, high = range_columns(x, sizes)
    amax = amax_columns(x, sizes)
    total = sum_columns(x.float(), sizes)
    wide = expand_columns(amax, sizes)
    assert low.shape == high.shape == amax.shape == total.shape == (*lead, len(sizes))
    assert low.dtype == high.dtype == amax.dtype == torch.float32
    assert wide.shape == (*lead, 12)
    parts = np.split(x.float().numpy(), np.cumsum(sizes)[:-1], axis=-1)
    for g, part in enumerate(parts):
        np.testing.assert_array_equal(low[..., g].numpy(), part.min(-1))
        np.testing.assert_array_equal(high[..., g].numpy(), part.max(-1))
        np.testing.assert_array_equal(amax[..., g].numpy(), np.abs(part).max(-1))
        np.testing.assert_allclose(total[..., g].numpy(), part.sum(-1, dtype=np.float64), rtol=1e-5, atol=1e-5)
        block = wide[..., sum(sizes[:g]) : sum(sizes[: g + 1])]
        np.testing.assert_array_equal(block.numpy(), np.abs(part).max(-1, keepdims=True).repeat(sizes[g], -1))


SHORT = (64,) * 67 + (16,)


def blocks(x: torch.Tensor, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Yield the blocks of columns one by one, in float64."""
    array = x.double().numpy()
    return [array[..., a:b] for a, b in pairwise(accumulate(sizes, initial=0))]


def check(x: torch.Tensor, sizes: tuple[int, ...]) -> None:
    parts = blocks(x, sizes)
    low, high = range_columns(x, sizes)
    np.testing.assert_array_equal(low.numpy(), np.stack([p.min(-1) for p in parts], -1))
    np.testing.assert_array_equal(high.numpy(), np.stack([p.max(-1) for p in parts], -1))
    np.testing.assert_array_equal(amax_columns(x, sizes).numpy(), np.stack([np.abs(p).max(-1) for p in parts], -1))
    exact, size = (np.stack([f(p).sum(-1) for p in parts], -1) for f in (np.asarray, np.abs))
    assert (np.abs(sum_columns(x, sizes).double().numpy() - exact) <= 1e-6 * size + 1e-30).all()
    column = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(expand_columns(high, sizes).numpy(), high.numpy()[..., column])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "sizes",
    [SHORT, (64, 64, 16, 64, 64, 8), (16, 64, 64), (1,), (1, 1, 1), (3, 2, 2, 3, 3), (64,) * 53 + (28,)],
    ids=lambda s: f"{len(s)} blocks",
)
def test_unequal_blocks(sizes, lead) -> None:
    check(torch.randn(*lead, sum(sizes)) * torch.logspace(-3, 3, sum(sizes)), sizes)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(0, 2**31))
def test_any_blocks(sizes, seed) -> None:
    check(torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(seed)), tuple(sizes))


@pytest.mark.parametrize(
    ("sizes", "group", "expected"),
    [
        ((4304,), 64, SHORT),
        ((3420,), 64, (64,) * 53 + (28,)),
        ((128,), 64, (64, 64)),
        ((10,), 64, (10,)),
        ((5, 8), 4, (4, 1, 4, 4)),  # no group straddles two segments
        ((5, 8), 1, (1,) * 13),
        ((5, 8), None, (5, 8)),
    ],
    ids=str,
)
def test_split_columns(sizes, group, expected) -> None:
    assert split_columns(sizes, group) == expected


def test_one_block_is_expanded_without_a_copy() -> None:
    values = torch.randn(3, 1)
    assert expand_columns(values, (1000,)).data_ptr() == values.data_ptr()
