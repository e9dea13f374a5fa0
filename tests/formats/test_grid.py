"""The weight grid: which extremes determine each scale, and rounding to the grid."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS, GridRule, NumberFormat, split_columns
from tests import oracle
from tests.formats.format_cases import CASTS, INTEGERS, SCALED, name

INT4 = FORMATS["int4"]
COLUMNS = {"channel": (12,), "group": (4, 4, 4), "segments": (5, 7), "unit": (1,) * 12, "short": (5, 5, 2)}
ROWS = {"each": None, "tensor": (6,), "blocks": (1, 2, 3)}
#: 4304 columns in groups of 64: the last group has 16.
SHORT = split_columns((4304,), 64)


def blocks(rows, columns):
    """Yield every block that shares a scale as (rows, column index, columns), with slices."""
    for r0, r1 in pairwise(accumulate(rows or (1,) * 6, initial=0)):
        for g, (c0, c1) in enumerate(pairwise(accumulate(columns, initial=0))):
            yield slice(r0, r1), g, slice(c0, c1)


def weights() -> torch.Tensor:
    w = torch.randn(6, 12) * torch.logspace(-2, 2, 6)[:, None]
    w[2, 3], w[4] = 1e3, 0.0
    return w


def check_symmetric(w: torch.Tensor, form: NumberFormat, columns, rows) -> None:
    grid = GridRule(form, columns, rows).fit(w)
    assert grid.zero_point is None
    assert (grid.format, grid.columns) == (form, columns)
    assert grid.scale.shape == (len(w), len(columns))
    assert grid.scale.dtype == torch.float32
    codes = grid.quantize(w)
    back = grid.dequantize(codes)
    assert codes.shape == back.shape == w.shape
    assert codes.dtype == form.code_dtype
    assert torch.equal(grid.round(w), back)
    for r, g, c in blocks(rows or (1,) * len(w), columns):
        part = w[r, c].numpy()
        s = oracle.scale_of(np.abs(part).max(), form.name)
        assert (grid.scale[r, g] == s.item()).all()
        expected = (oracle.codes_of(part, s, form.name) * np.float64(s)).astype(np.float32)
        np.testing.assert_array_equal(back[r, c].numpy(), expected)


def check_asymmetric(w: torch.Tensor, form: NumberFormat, columns, rows) -> None:
    grid = GridRule(form, columns, rows, symmetric=False).fit(w)
    scale, zero = grid.scale, grid.zero_point
    assert scale.shape == zero.shape == (len(w), len(columns))
    assert zero.dtype == form.code_dtype
    codes = grid.quantize(w)
    back = grid.dequantize(codes)
    assert torch.equal(grid.round(w), back)
    levels, half = 2**form.bits - 1, 2 ** (form.bits - 1)
    for r, g, c in blocks(rows or (1,) * len(w), columns):
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


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_symmetric_grid_against_oracle(form, columns, rows) -> None:
    check_symmetric(weights(), form, COLUMNS[columns], ROWS[rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_asymmetric_grid_against_oracle(form, columns, rows) -> None:
    w = weights() + 0.5
    w[4] = 0.0
    check_asymmetric(w, form, COLUMNS[columns], ROWS[rows])


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_a_short_last_group_against_oracle(form) -> None:
    assert SHORT == (64,) * 67 + (16,)
    w = torch.randn(3, 4304) * torch.logspace(-2, 2, 4304)
    check_symmetric(w, form, SHORT, None)
    check_symmetric(w, form, SHORT, (1, 2))
    if form.is_integer:
        check_asymmetric(w + 0.5, form, SHORT, None)


@pytest.mark.parametrize("form", CASTS, ids=name)
def test_casts_have_no_grid(form) -> None:
    w = weights()
    for columns in ((12,), (5, 7)):
        grid = GridRule(form, columns).fit(w)
        assert grid.scale is grid.zero_point is None
        expected = oracle.codes_of(w.numpy(), None, form.name)
        np.testing.assert_array_equal(grid.dequantize(grid.quantize(w)).numpy(), expected)
        np.testing.assert_array_equal(grid.round(w).numpy(), expected)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype(source) -> None:
    w = torch.randn(6, 12).to(source)
    for form in SCALED:
        a, b = (GridRule(form, (4, 4, 4)).fit(v) for v in (w, w.float()))
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.quantize(w), a.quantize(w.float()))


@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("columns", [(12,), (4, 4, 4), (5, 5, 2), (1,) * 12])
def test_strided_weights(columns, clip) -> None:
    for w in (weights().T.contiguous().T, torch.randn(6, 24)[:, ::2], torch.randn(12, 13)[::2, 1:]):
        assert not w.is_contiguous()
        for form in SCALED:
            for symmetric in (True, False) if form.is_integer else (True,):
                rule = GridRule(form, columns, None, symmetric, clip)
                grid, same = rule.fit(w), rule.fit(w.contiguous())
                assert torch.equal(grid.scale, same.scale)
                codes = grid.quantize(w)
                assert torch.equal(codes, grid.quantize(w.contiguous()))
                assert torch.equal(grid.round(w), grid.dequantize(codes.T.contiguous().T))


@pytest.mark.parametrize("columns", [(4, 4, 4), (5, 5, 2)])
def test_rows_of_another_grid_and_a_column_of_its_own(columns) -> None:
    w, rows = weights() + 0.5, torch.tensor([True, False, False, True, True, False])
    for symmetric in (True, False):
        rule = GridRule(INT4, columns, symmetric=symmetric)
        one, other = rule.fit(w), rule.fit(w * 3)
        mixed = one.where(rows, other)
        for i, chosen in enumerate(rows.tolist()):
            theirs = other if chosen else one
            assert torch.equal(mixed.scale[i], theirs.scale[i])
            assert symmetric or torch.equal(mixed.zero_point[i], theirs.zero_point[i])
        inner = one.groups(slice(1, 3))
        assert inner.columns == columns[1:]
        assert torch.equal(inner.scale, one.scale[:, 1:])
        assert symmetric or torch.equal(inner.zero_point, one.zero_point[:, 1:])
        for g in range(3):
            scale, zero_point = one.column(g)
            assert torch.equal(scale, one.scale[:, g])
            assert (zero_point is None) if symmetric else torch.equal(zero_point, one.zero_point[:, g])
    cast = GridRule(FORMATS["fp16"], columns).fit(w)
    assert cast.where(rows, cast) == cast


@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_all_zero_weights(form, rows, symmetric, clip) -> None:
    w = torch.zeros(6, 12)
    grid = GridRule(form, (4, 4, 4), ROWS[rows], symmetric, clip).fit(w)
    assert (grid.scale == 1).all()
    assert grid.zero_point is None or (grid.zero_point == -(2 ** (form.bits - 1))).all()
    assert (grid.dequantize(grid.quantize(w)) == 0).all()


@pytest.mark.parametrize("clip", ["amax", "mse"])
def test_huge_weights_stay_finite(clip) -> None:
    w = torch.tensor([[1e30, -2e30, 1e-30, 0.0], [3.4e38, -3.4e38, 1.0, 1e38]])
    for form in SCALED:
        for symmetric in (True, False) if form.is_integer else (True,):
            grid = GridRule(form, (4,), None, symmetric, clip).fit(w)
            assert grid.dequantize(grid.quantize(w)).isfinite().all()


# Properties that hold for any partition.


@given(
    st.sampled_from(SCALED),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["amax", "mse"]),
    st.integers(0, 2**31),
)
def test_a_partition_is_its_parts(form, columns, symmetric, clip, seed) -> None:
    w = torch.randn(3, sum(columns), generator=torch.Generator().manual_seed(seed))
    importance = torch.rand(sum(columns), generator=torch.Generator().manual_seed(seed + 1))

    def back(part: torch.Tensor, sizes: list[int], weight: torch.Tensor) -> torch.Tensor:
        rule = GridRule(form, tuple(sizes), None, symmetric or not form.is_integer, clip)
        grid = rule.fit(part, weight)
        return grid.dequantize(grid.quantize(part))

    parts = zip(w.split(columns, -1), columns, importance.split(columns), strict=True)
    assert torch.equal(back(w, columns, importance), torch.cat([back(p, [n], i) for p, n, i in parts], -1))


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_by_chance_a_weight_is_kept_on_average(form: NumberFormat) -> None:
    w = weights()
    grid = GridRule(form, (5, 5, 2)).fit(w)
    step = grid.spacing(w)
    draws = [torch.full_like(w, (i + 0.5) / 64) for i in range(64)]
    rounded = torch.stack([grid.dequantize(grid.quantize_stochastic(w, draw)) for draw in draws])
    assert ((rounded - w).abs() <= step * 1.001).all()
    assert ((rounded.double().mean(0) - w).abs() <= step * (1 / 64 + 1e-3)).all()
    kept = grid.round(w)
    assert torch.equal(grid.dequantize(grid.quantize_stochastic(kept, draws[7])), kept)
