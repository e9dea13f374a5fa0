"""Windows against loops, and tiles against the grid that they cover."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.nn.unfold import channels_first, channels_last, draw, ranges, tiles, windows


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dilation"),
    [
        ((2, 3, 9), (3,), (1,), (1,)),
        ((2, 3, 9), (2,), (3,), (4,)),
        ((2, 3, 6, 7), (3, 2), (1, 2), (2, 1)),
        ((1, 2, 5, 4), (1, 1), (2, 3), (1, 1)),
        ((1, 2, 4, 5, 6), (2, 1, 3), (1, 2, 2), (1, 1, 2)),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_windows_are_what_each_output_sees(shape, kernel, stride, dilation, last) -> None:
    x = torch.randn(shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found = windows(x, kernel, stride, dilation)
    outs = [(s - (k - 1) * d - 1) // t + 1 for s, k, t, d in zip(shape[2:], kernel, stride, dilation, strict=True)]
    assert found.shape == (shape[0], *outs, *kernel, shape[1])
    assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for out in itertools.product(*map(range, outs)):
        for k in itertools.product(*map(range, kernel)):
            at = [o * t + i * d for o, t, i, d in zip(out, stride, k, dilation, strict=True)]
            assert torch.equal(found[(slice(None), *out, *k)], x[(slice(None), slice(None), *at)])


def test_a_kernel_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"a kernel that spans 5 does not fit a padded input of shape \(1, 2, 4, 9\)"):
        windows(torch.zeros(1, 2, 4, 9), (3, 3), (1, 1), (2, 2))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 40))
def test_tiles_cover_the_grid_once_and_in_order(sizes, points) -> None:
    grid = torch.arange(torch.Size(sizes).numel()).view(sizes)
    parts = [grid[tile].flatten() for tile in tiles(sizes, points)]
    assert torch.equal(torch.cat(parts), grid.flatten())
    assert all(1 <= len(part) <= points for part in parts)
    # No unnecessary splits: whole rows, and whole planes if they fit.
    assert len(parts) <= 2 * max(-(-grid.numel() // points), 1) * max(sizes)


def test_draw() -> None:
    seen = windows(torch.arange(2.0 * 3 * 8 * 8).view(2, 3, 8, 8), (3, 3), (1, 1), (1, 1))
    rows = seen.reshape(-1, 27)
    assert torch.equal(draw(seen, 2, 72, 5), rows)
    some = draw(seen, 2, 20, 5)
    assert some.shape == (20, 27)
    where = (some[:, None] == rows).all(-1).nonzero()[:, 1]
    assert len(where.unique()) == 20
    assert torch.equal(some, draw(seen, 2, 20, 5))
    assert not torch.equal(some, draw(seen, 2, 20, 6))


@pytest.mark.parametrize("pixels", [1, 7, 8])
def test_ranges_bound_every_row(pixels) -> None:
    x = torch.randn(2, 3, pixels)
    low, high = ranges(x, 2)
    assert low.shape == high.shape == (2, 6)
    assert torch.equal(low.amin(0), x.amin((0, 2)).repeat(2))
    assert torch.equal(high.amax(0), x.amax((0, 2)).repeat(2))
    if pixels > 1:
        assert torch.equal(high[1], x[..., 1::2].amax((0, 2)).repeat(2))


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 70, 8, 9), (3, 5, 2, 3, 4), (0, 5, 4, 4), (2, 0, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("gradient", [False, True])
def test_channels_go_last_and_back(shape, gradient) -> None:
    x = torch.randn(shape, requires_grad=gradient)
    y = channels_last(x)
    assert y.is_contiguous()
    assert torch.equal(y, x.movedim(1, -1))
    back = channels_first(y)
    assert back.is_contiguous()
    assert torch.equal(back, x)
    if gradient:
        back.sum().backward()
        assert torch.equal(x.grad, torch.ones(shape))


def test_what_has_its_channels_last_is_not_copied() -> None:
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    assert channels_last(x).data_ptr() == x.data_ptr()
