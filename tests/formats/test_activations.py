"""Activations to codes: scales from the data or from calibration, tensors and tokens, segments, dual scale."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hfquant.activations import dual_exponent, quantize_input, static_scales
from hfquant.config import DType, InputQuant
from hfquant.formats import expand_columns, qmax
from tests import oracle

SCALED = [d for d in DType if d.is_scaled]
INTEGERS = [d for d in DType if d.is_integer]
SEGMENTS = [(12,), (4, 4, 4), (1, 7, 4)]
values = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


def quantized(x, quant, segments=None, dual=None, scale=None, scale_neg=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the codes, and what they stand for in float64."""
    segments = segments or (x.shape[-1],)
    codes, steps = quantize_input(x, quant, segments, dual or (False,) * len(segments), scale, scale_neg)
    assert codes.dtype == torch.float32
    assert codes.shape == x.shape
    return codes, codes.double() * (1 if steps is None else expand_columns(steps, segments).double())


def dynamic(dtype: DType, axis: int | None = -1) -> InputQuant:
    return InputQuant(type=dtype, axis=axis, dynamic=True)


# Against the oracle.


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("dtype", DType)
def test_dynamic_against_oracle(dtype, dual, axis, segments, shape) -> None:
    x = F.silu(torch.randn(shape) * 3)
    flags = tuple(dual and i % 2 == 0 for i in range(len(segments)))
    _, got = quantized(x, dynamic(dtype, axis), segments, flags)
    expected, _ = oracle.activation(
        x.numpy(), dtype.value, axis, segments, flags if dtype.is_integer else (False,) * len(segments)
    )
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("dtype", SCALED)
def test_static_uses_the_given_scales(dtype, segments) -> None:
    x = torch.randn(4, 12) * 5
    scale = torch.rand(len(segments)) + 0.1
    _, got = quantized(x, InputQuant(type=dtype), segments, scale=scale)
    start = 0
    for size, s in zip(segments, scale.numpy(), strict=True):
        part = x[:, start : start + size].numpy()
        np.testing.assert_array_equal(
            got[:, start : start + size].numpy(), oracle.codes_of(part, s, dtype.value) * np.float64(s)
        )
        start += size


def test_static_overflow_saturates() -> None:
    x = torch.tensor([[1e30, -1e30, 300.0, -300.0]])
    for dtype in SCALED:
        codes, _ = quantized(x, InputQuant(type=dtype), scale=torch.tensor([1e-3]))
        assert codes.abs().max() == qmax(dtype)


@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_casts_have_no_scale(dtype) -> None:
    x = torch.randn(3, 12)
    codes, steps = quantize_input(x, InputQuant(type=dtype), (12,), (False,))
    assert steps is None
    np.testing.assert_array_equal(codes.numpy(), oracle.codes_of(x.numpy(), None, dtype.value))


def test_the_input_is_left_as_it_is() -> None:
    x = torch.randn(3, 12)
    before = x.clone()
    for dtype in DType:
        quantize_input(x, dynamic(dtype), (12,), (True,))
    assert torch.equal(x, before)


# DualScale.

RATIOS = [
    (-1.0, 1.0), (-1.0, 2.0), (-1.0, 1.9999999), (-0.5, 0.9999999), (-0.278, 5.0), (-0.17, 30.0), (-3.0, 1.0),
    (0.0, 4.0), (-4.0, 0.0), (0.0, 0.0), (1.0, 2.0), (-2.0, -1.0), (-1e-30, 1e30), (-1e-40, 1e3), (-1e-45, 3e38),
    (-1e30, 1e-30), (-1e-40, 1e-40), (-0.0, 1.0), (-1e-38, 3e-36), (-1e-38, 1e-37), (-1e-38, 5e-37),
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS)
def test_exponent_against_exact_arithmetic(dtype) -> None:
    low, high = torch.tensor(RATIOS).unbind(-1)
    expected = [oracle.exponent_of(a, b, dtype.value) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    assert dual_exponent(low, high, dtype).tolist() == expected
    assert max(expected) == 15 - (dtype.bits - 1)


@given(st.sampled_from(INTEGERS), values, values)
def test_exponent_property(dtype, a, b) -> None:
    low, high = min(a, b), max(a, b)
    assert dual_exponent(torch.tensor(low), torch.tensor(high), dtype).item() == oracle.exponent_of(
        low, high, dtype.value
    )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_static_scales(dtype) -> None:
    low, high = torch.tensor(RATIOS).unbind(-1)
    pos, neg = static_scales(low, high, dtype, [True] * len(RATIOS))
    assert pos.dtype == neg.dtype == torch.float32
    assert pos.tolist() == [
        oracle.scale_of(max(-a, b), dtype.value) for a, b in zip(low.tolist(), high.tolist(), strict=True)
    ]
    ratio = pos.double() / neg.double()
    assert ((ratio.log2() % 1) == 0).all()
    assert (ratio <= 2 ** (15 - (dtype.bits - 1))).all()
    assert (neg >= 2.0**-126).all()
    # The negative side is covered.
    assert (neg.double() * qmax(dtype) >= -low.double() * (1 - 1e-6)).all()
    # Without dual, and for a single segment among others, both sides are one.
    same, other = static_scales(low, high, dtype, [False] * len(RATIOS))
    assert torch.equal(same, other)
    first = [i == 4 for i in range(len(RATIOS))]
    pos, neg = static_scales(low, high, dtype, first)
    assert (pos != neg).tolist() == [f and dtype is not DType.INT16 for f in first]


@given(
    st.sampled_from(INTEGERS),
    st.lists(values, min_size=1, max_size=16),
    st.sampled_from(["none", "silu", "gelu", "shrink"]),
    st.sampled_from([None, -1]),
)
def test_dual_error_is_never_above_single(dtype, xs, activation, axis) -> None:
    x = torch.tensor([xs, xs[::-1]], dtype=torch.float32)
    match activation:
        case "silu" | "gelu":
            x = getattr(F, activation)(x.clamp(-100, 100))
        case "shrink":
            x = torch.where(x < 0, x * 1e-3, x)
    _, a = quantized(x, dynamic(dtype, axis))
    dual, b = quantized(x, dynamic(dtype, axis), dual=(True,))
    exact = x.double()
    slack = exact.abs() * 2.0**-22  # both round the quotient to float32
    assert ((b - exact).abs() <= (a - exact).abs() + slack).all()
    assert (dual == dual.round()).all()
    assert dual.abs().max() < 2**15


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("dtype", [DType.INT4, DType.INT6, DType.INT8])
def test_dual_pays_after_activations(dtype, axis, activation) -> None:
    x = activation(torch.randn(64, 32) * 2)
    _, single = quantized(x, dynamic(dtype, axis))
    _, dual = quantized(x, dynamic(dtype, axis), dual=(True,))
    negative = x < 0
    assert ((dual - x) ** 2)[negative].sum() < 0.5 * ((single - x) ** 2)[negative].sum()
    assert torch.equal(dual[~negative], single[~negative])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_static_dual_is_what_dynamic_gives_on_the_calibration_data(dtype) -> None:
    x = F.gelu(torch.randn(16, 12) * 4)
    segments, dual = (5, 7), (True, False)
    low = torch.stack([p.min() for p in x.split(segments, -1)])
    high = torch.stack([p.max() for p in x.split(segments, -1)])
    pos, neg = static_scales(low, high, dtype, dual)
    a, _ = quantized(x, InputQuant(type=dtype), segments, dual, pos, neg)
    b, _ = quantized(x, dynamic(dtype, None), segments, dual)
    assert torch.equal(a, b)


def test_codes_at_the_extremes_fit_16_bits() -> None:
    for dtype in INTEGERS:
        codes, _ = quantized(torch.tensor([[100.0, -1e-9, 1e-9, -1e-3]]), dynamic(dtype), dual=(True,))
        assert codes.abs().max() == qmax(dtype) * 2 ** (15 - (dtype.bits - 1)) < 2**15


def test_dual_changes_nothing_for_fp8() -> None:
    x = F.silu(torch.randn(4, 12))
    for dtype in (DType.FP8E4M3, DType.FP8E5M2):
        for quant in (dynamic(dtype), InputQuant(type=dtype)):
            scale = None if quant.dynamic else torch.tensor([0.01])
            assert torch.equal(
                quantized(x, quant, dual=(True,), scale=scale, scale_neg=scale)[0], quantized(x, quant, scale=scale)[0]
            )


# Data that breaks things.


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("dtype", SCALED)
def test_zeros_stay_zeros(dtype, axis) -> None:
    x = torch.zeros(3, 12)
    x[1] = torch.randn(12)
    for dual in ((False, False), (True, True)):
        codes, got = quantized(x, dynamic(dtype, axis), (5, 7), dual)
        assert (got[[0, 2]] == 0).all()
        assert codes.isfinite().all()
        assert (quantized(torch.zeros(2, 12), dynamic(dtype, axis), (5, 7), dual)[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 12), (0,), (2, 0, 12)])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("dtype", DType)
def test_empty(dtype, axis, shape) -> None:
    x = torch.zeros(shape)
    segments = (5, 7) if shape[-1] else (0,)
    codes, _ = quantized(x, dynamic(dtype, axis), segments, (True,) * len(segments))
    assert codes.shape == x.shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("dtype", SCALED)
def test_a_bad_token_spoils_itself_alone(dtype, dual, bad) -> None:
    x = torch.randn(3, 12)
    _, clean = quantized(x, dynamic(dtype), dual=(dual,))
    x[1, 4] = bad
    _, got = quantized(x, dynamic(dtype), dual=(dual,))
    assert not got[1, 4].isfinite()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not quantized(x, dynamic(dtype, None), dual=(dual,))[1][1, 4].isfinite()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("dtype", SCALED)
def test_tiny_huge_and_outliers(dtype, dual) -> None:
    m = torch.finfo(torch.float32).max
    x = torch.tensor(
        [[m, -m, 1.0], [1e-45, -1e-45, 0.0], [1e-38, -1e-40, 1e-39], [1e4, -1e-3, 1e-3], [3e38, -1e-45, 0]]
    )
    codes, got = quantized(x, dynamic(dtype), dual=(dual,))
    assert got.isfinite().all()
    assert (codes * expand_columns(quantize_input(x, dynamic(dtype), (3,), (dual,))[1], (3,))).isfinite().all()
    expected, _ = oracle.activation(x.numpy()[3:4], dtype.value, -1, (3,), (dual and dtype.is_integer,))
    np.testing.assert_array_equal(got[3:4].numpy(), expected)
    if dtype.is_integer:
        assert (codes == codes.round()).all()
        assert codes.abs().max() < 2**15 + (dtype is DType.INT16)
        scale = quantize_input(x, dynamic(dtype), (3,), (False,))[1].double()
        assert ((got - x.double()).abs() <= scale / 2 + x.double().abs() * 2e-6).all()
