"""The weight grid: whose extremes make each scale, what clipping buys, and rounding on it."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.algorithms.rounding import CLIP_FACTORS, dequantize_weight, round_to_nearest, weight_grid
from hfquant.config import DType, WeightQuant
from tests import oracle

SCALED = [d for d in DType if d.is_scaled]
INTEGERS = [d for d in DType if d.is_integer]
COLUMNS = {"channel": (12,), "group": (4, 4, 4), "segments": (5, 7), "unit": (1,) * 12}
ROWS = {"each": None, "tensor": (6,), "blocks": (1, 2, 3)}


def blocks(rows, columns):
    """(rows, column index, columns) of every block that shares a scale, as slices."""
    for r0, r1 in pairwise(accumulate(rows or (1,) * 6, initial=0)):
        for g, (c0, c1) in enumerate(pairwise(accumulate(columns, initial=0))):
            yield slice(r0, r1), g, slice(c0, c1)


def weights() -> torch.Tensor:
    w = torch.randn(6, 12) * torch.logspace(-2, 2, 6)[:, None]
    w[2, 3], w[4] = 1e3, 0.0
    return w


def squared_error(w, scale, zero, dtype, columns, importance=None) -> torch.Tensor:
    """Of each row and column block, in float64."""
    codes = round_to_nearest(w, scale, zero, dtype, columns)
    error = (dequantize_weight(codes, scale, zero, dtype, columns).double() - w.double()) ** 2
    if importance is not None:
        error = error * importance.double()
    return torch.stack([part.sum(-1) for part in error.split(list(columns), -1)], -1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", SCALED)
def test_symmetric_grid_against_oracle(dtype, columns, rows) -> None:
    w, columns, rows = weights(), COLUMNS[columns], ROWS[rows]
    scale, zero = weight_grid(w, WeightQuant(type=dtype), columns, rows)
    assert zero is None
    assert scale.shape == (6, len(columns))
    assert scale.dtype == torch.float32
    codes = round_to_nearest(w, scale, None, dtype, columns)
    back = dequantize_weight(codes, scale, None, dtype, columns)
    assert codes.shape == back.shape == w.shape
    assert not codes.is_floating_point()
    for r, g, c in blocks(rows, columns):
        part = w[r, c].numpy()
        s = oracle.scale_of(np.abs(part).max(), dtype.value)
        assert (scale[r, g] == s.item()).all()
        expected = (oracle.codes_of(part, s, dtype.value) * np.float64(s)).astype(np.float32)
        np.testing.assert_array_equal(back[r, c].numpy(), expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_asymmetric_grid_against_oracle(dtype, columns, rows) -> None:
    w, columns, rows = weights() + 0.5, COLUMNS[columns], ROWS[rows]
    w[4] = 0.0
    scale, zero = weight_grid(w, WeightQuant(type=dtype, symmetric=False), columns, rows)
    assert scale.shape == zero.shape == (6, len(columns))
    codes = round_to_nearest(w, scale, zero, dtype, columns)
    back = dequantize_weight(codes, scale, zero, dtype, columns)
    levels, half = 2**dtype.bits - 1, 2 ** (dtype.bits - 1)
    for r, g, c in blocks(rows, columns):
        part = w[r, c].numpy()
        low, high = min(part.min(), 0.0), max(part.max(), 0.0)
        step = (np.float64(high) - low) / levels if high > low else 1.0
        np.testing.assert_allclose(scale[r, g].numpy(), step, rtol=2e-7)
        s, z = scale[r, g][0].numpy(), int(zero[r, g][0]) + half
        assert (zero[r, g] == zero[r, g][0]).all()
        assert z == np.rint(-np.float32(low) / s)
        unsigned = np.clip(np.rint(part / s) + z, 0, levels)
        np.testing.assert_array_equal(codes[r, c].int().numpy() + half, unsigned)
        np.testing.assert_array_equal(back[r, c].numpy(), ((unsigned - z) * np.float64(s)).astype(np.float32))


@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_casts_have_no_grid(dtype) -> None:
    w = weights()
    assert weight_grid(w, WeightQuant(type=dtype), (12,)) == (None, None)
    codes = round_to_nearest(w, None, None, dtype, (12,))
    np.testing.assert_array_equal(
        dequantize_weight(codes, None, None, dtype, (12,)).numpy(), oracle.codes_of(w.numpy(), None, dtype.value)
    )


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype(source) -> None:
    w = torch.randn(6, 12).to(source)
    for dtype in SCALED:
        a = weight_grid(w, WeightQuant(type=dtype), (4, 4, 4))[0]
        b = weight_grid(w.float(), WeightQuant(type=dtype), (4, 4, 4))[0]
        assert torch.equal(a, b)
        codes = round_to_nearest(w, a, None, dtype, (4, 4, 4))
        assert torch.equal(codes, round_to_nearest(w.float(), a, None, dtype, (4, 4, 4)))


# Clipping.


def test_clip_factors() -> None:
    assert CLIP_FACTORS[0] == 1.0
    assert min(CLIP_FACTORS) == pytest.approx(0.6)
    assert max(CLIP_FACTORS) == 1.0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", ["group", "segments"])
@pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [(DType.INT4, True), (DType.INT4, False), (DType.INT8, True), (DType.INT8, False), (DType.FP8E4M3, True)],
)
def test_clipping_is_the_best_of_its_factors(dtype, symmetric, columns, rows, weighted) -> None:
    w, columns, rows = weights() + 0.1, COLUMNS[columns], ROWS[rows]
    w[5] = 0.0
    importance = torch.rand(12) ** 4 * 100 if weighted else None
    quant = WeightQuant(type=dtype, symmetric=symmetric, clip="mse")
    scale, zero = weight_grid(w, quant, columns, rows, importance)
    for r, g, _ in blocks(rows, columns):
        assert (scale[r, g] == scale[r, g][0]).all()
        assert zero is None or (zero[r, g] == zero[r, g][0]).all()
    loss = squared_error(w, scale, zero, dtype, columns, importance)
    plain = WeightQuant(type=dtype, symmetric=symmetric)
    best = None
    for factor in CLIP_FACTORS:
        # A clipped block is one whose extremes are those of the scaled block.
        s, z = weight_grid(w * factor, plain, columns, rows)
        tried = squared_error(w, s, z, dtype, columns, importance)
        tried = torch.cat([b.sum(0, keepdim=True) for b in tried.split(list(rows or (1,) * 6))])
        best = tried if best is None else torch.minimum(best, tried)
    loss = torch.cat([b.sum(0, keepdim=True) for b in loss.split(list(rows or (1,) * 6))])
    assert (loss <= best * (1 + 1e-5) + 1e-12).all()


def test_clipping_pays_at_four_bits() -> None:
    w = torch.randn(64, 64)
    amax = weight_grid(w, WeightQuant(type=DType.INT4), (64,))[0]
    mse = weight_grid(w, WeightQuant(type=DType.INT4, clip="mse"), (64,))[0]
    losses = [squared_error(w, s, None, DType.INT4, (64,)) for s in (amax, mse)]
    assert (losses[1] <= losses[0]).all()
    assert losses[1].sum() < 0.9 * losses[0].sum()
    # An error in a column that matters counts more: there the grid is not clipped.
    importance = torch.zeros(64)
    importance[w[0].abs().argmax()] = 1.0
    weighted = weight_grid(w[:1], WeightQuant(type=DType.INT4, clip="mse"), (64,), importance=importance)[0]
    assert squared_error(w[:1], weighted, None, DType.INT4, (64,), importance) < 1e-12


@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_all_zero_weights(dtype, rows, symmetric, clip) -> None:
    w = torch.zeros(6, 12)
    quant = WeightQuant(type=dtype, symmetric=symmetric, clip=clip)
    scale, zero = weight_grid(w, quant, (4, 4, 4), ROWS[rows])
    assert (scale == 1).all()
    assert zero is None or (zero == -(2 ** (dtype.bits - 1))).all()
    codes = round_to_nearest(w, scale, zero, dtype, (4, 4, 4))
    assert (dequantize_weight(codes, scale, zero, dtype, (4, 4, 4)) == 0).all()


@pytest.mark.parametrize("clip", ["amax", "mse"])
def test_huge_weights_stay_finite(clip) -> None:
    w = torch.tensor([[1e30, -2e30, 1e-30, 0.0], [3.4e38, -3.4e38, 1.0, 1e38]])
    for dtype in SCALED:
        for symmetric in (True, False) if dtype.is_integer else (True,):
            scale, zero = weight_grid(w, WeightQuant(type=dtype, symmetric=symmetric, clip=clip), (4,))
            codes = round_to_nearest(w, scale, zero, dtype, (4,))
            assert dequantize_weight(codes, scale, zero, dtype, (4,)).isfinite().all()


# What holds for any partition.


@given(
    st.sampled_from(SCALED),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["amax", "mse"]),
    st.integers(0, 2**31),
)
def test_a_partition_is_its_parts(dtype, columns, symmetric, clip, seed) -> None:
    w = torch.randn(3, sum(columns), generator=torch.Generator().manual_seed(seed))
    quant = WeightQuant(type=dtype, symmetric=symmetric or not dtype.is_integer, clip=clip)
    importance = torch.rand(sum(columns), generator=torch.Generator().manual_seed(seed + 1))

    def back(part: torch.Tensor, sizes: list[int], weight: torch.Tensor) -> torch.Tensor:
        scale, zero = weight_grid(part, quant, sizes, importance=weight)
        return dequantize_weight(round_to_nearest(part, scale, zero, dtype, sizes), scale, zero, dtype, sizes)

    parts = zip(w.split(columns, -1), columns, importance.split(columns), strict=True)
    assert torch.equal(back(w, columns, importance), torch.cat([back(p, [n], i) for p, n, i in parts], -1))
