"""The reference product, against Python's integers and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS, Grid
from hfquant.kernels.reference import scaled_matmul
from tests import oracle


def product(x, x_scale, w, w_scale, zero, columns, segments) -> torch.Tensor:
    """Multiply codes given as numbers, of at most 16 bits and a sign."""
    grid = Grid(FORMATS["int16"], tuple(columns), w_scale, zero)
    return scaled_matmul(x, x_scale, w, grid, segments)


def by_hand(x, x_scale, w, w_scale, zero, columns, segments) -> np.ndarray:
    """Return the float64 sum over columns j of x_j s_x (w_j - z) s_w, one column at a time."""
    rows = x.reshape(-1, x.shape[-1]).double().numpy()
    w = w.double().numpy()
    group = np.repeat(np.arange(len(columns)), columns)
    segment = np.repeat(np.arange(len(segments)), segments)
    x_scale = (
        None
        if x_scale is None
        else x_scale.double().expand(*x.shape[:-1], len(segments)).reshape(len(rows), len(segments))
    )
    total = np.zeros((len(rows), len(w)))
    for j in range(rows.shape[1]):
        left, right = rows[:, j], w[:, j]
        if zero is not None:
            right = right - zero[:, group[j]].double().numpy()
        if w_scale is not None:
            right = right * w_scale[:, group[j]].double().numpy()
        if x_scale is not None:
            left = left * x_scale[:, segment[j]].numpy()
        total += left[:, None] * right[None]
    return total.reshape(*x.shape[:-1], len(w))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize(
    ("columns", "segments"),
    [
        ((12,), (12,)),
        ((4, 4, 4), (12,)),
        ((5, 7), (5, 7)),
        ((2,) * 6, (4, 8)),
        ((1, 2, 9), (1, 2, 9)),
        ((5, 5, 2), (12,)),
        ((4, 3, 4, 1), (7, 5)),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("scales", ["token", "tensor", "weight", "none"])
def test_against_float64(scales, zero, columns, segments, lead) -> None:
    x = torch.randint(-127, 128, (*lead, 12)).float()
    w = torch.randint(-7, 8, (5, 12)).float()
    x_scale = {"token": torch.rand(*lead, len(segments)), "tensor": torch.rand(len(segments))}.get(scales)
    w_scale = None if scales == "none" else torch.rand(5, len(columns)) + 0.1
    zero_point = torch.randint(-8, 8, (5, len(columns)), dtype=torch.int8) if zero else None
    y = product(x, x_scale, w, w_scale, zero_point, columns, segments)
    assert y.dtype == torch.float32
    assert y.shape == (*lead, 5)
    expected = by_hand(x, x_scale, w, w_scale, zero_point, columns, segments)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("left", "right", "k"),
    [
        (127, 127, 20000),
        (127 << 8, 127, 8192),
        (7 << 12, 7, 4096),
        (31 << 10, 31, 4096),
        (32767, 32767, 4096),
        (32767, 65535, 4096),
    ],
)
@pytest.mark.parametrize("signs", ["equal", "alternating", "random"])
def test_extreme_integer_codes_are_exact(left, right, k, signs) -> None:
    match signs:
        case "equal":
            sign = torch.ones(k)
        case "alternating":
            sign = torch.ones(k)
            sign[1::2] = -1
        case _:
            sign = torch.randint(0, 2, (k,)) * 2.0 - 1
    x = (left * sign)[None]
    w = torch.stack([torch.full((k,), float(right)), right * sign, right * torch.ones(k).cumsum(0) // k])
    y = product(x, None, w, None, None, (k,), (k,))
    xs, ws = [int(v) for v in x[0].tolist()], [[int(v) for v in row] for row in w.tolist()]
    exact = [sum(a * b for a, b in zip(xs, row, strict=True)) for row in ws]
    assert y[0].tolist() == [np.float32(v).item() for v in exact]


def test_extreme_zero_points_cancel_exactly() -> None:
    # Unsigned 8-bit code 255 against zero points 0 and 255: the correction must not lose a bit.
    k = 4096
    x = torch.full((1, k), 127.0 * 256)
    w = torch.stack([torch.full((k,), 127.0), torch.full((k,), -128.0)])
    zero = torch.tensor([[-128], [127]], dtype=torch.int8)
    y = product(x, None, w, None, zero, (k,), (k,))
    assert y[0].tolist() == [127.0 * 256 * 255 * k, -127.0 * 256 * 255 * k]


def test_fp8_values_are_exact() -> None:
    values = torch.from_numpy(oracle.decode("fp8e4m3"))
    values = values[values.isfinite()].float()
    x, w = values[None], torch.stack([values, values.flip(0), values.roll(17)])
    form = FORMATS["fp8e4m3"]
    grid = Grid(form, (len(values),), None)
    y = scaled_matmul(x, None, form.quantize(w, torch.ones(())), grid, (len(values),))
    xs = [int(v * 2**9) for v in x[0].tolist()]
    exact = [sum(a * int(b * 2**9) for a, b in zip(xs, row, strict=True)) for row in w.tolist()]
    assert y[0].tolist() == [np.float32(v / 2**18).item() for v in exact]


def test_nothing_overflows_on_the_way() -> None:
    x = torch.full((1, 64), 1e37)
    w = torch.full((2, 64), 127.0)
    y = product(x, None, w, torch.full((2, 1), 1e-4), None, (64,), (64,))
    np.testing.assert_allclose(y.numpy(), 1e37 * 127 * 64 * 1e-4, rtol=1e-6)
    tiny = product(torch.ones(1, 64), torch.tensor([1e-30]), w, torch.full((2, 1), 1e-30), None, (64,), (64,))
    assert (tiny == 0).all()  # 8e-57 is below float32's range
    y = product(w[:1], torch.tensor([1e-30]), w * 1e6, torch.full((2, 1), 1e-20), None, (64,), (64,))
    np.testing.assert_allclose(y.numpy(), 127.0 * 1e-30 * 127e6 * 1e-20 * 64, rtol=1e-6)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**31), st.booleans())
def test_segments_add_up(segments, seed, groups) -> None:
    """For any partition, the product is the sum of its parts' products."""
    generator = torch.Generator().manual_seed(seed)
    columns = [1] * sum(segments) if groups else segments
    x = torch.randint(-127, 128, (3, sum(segments)), generator=generator).float()
    w = torch.randint(-127, 128, (4, sum(segments)), generator=generator).float()
    x_scale = torch.rand(3, len(segments), generator=generator)
    w_scale = torch.rand(4, len(columns), generator=generator)
    y = product(x, x_scale, w, w_scale, None, columns, segments)
    np.testing.assert_allclose(
        y.numpy(), by_hand(x, x_scale, w, w_scale, None, columns, segments), rtol=1e-6, atol=1e-6
    )
    parts, start, first = [], 0, 0
    for i, size in enumerate(segments):
        count = size if groups else 1
        parts.append(
            product(
                x[:, start : start + size], x_scale[:, i : i + 1], w[:, start : start + size],
                w_scale[:, first : first + count], None, columns[first : first + count], [size],
            )
        )  # fmt: skip
        start, first = start + size, first + count
    np.testing.assert_allclose(y.double().numpy(), torch.stack(parts).double().sum(0).numpy(), rtol=1e-5, atol=1e-3)
