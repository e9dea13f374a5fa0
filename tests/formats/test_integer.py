"""Integer formats: rounding, zero points and packed codes, against the oracle and Python's integers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import MIN_SCALE, NumberFormat
from hfquant.formats.integer import IntegerFormat
from tests.formats.format_cases import INTEGERS, MAX, SCALES, name, values


def scale_and_zero(form: NumberFormat, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = form.scale_from_range(low, high)
    return scale, form.zero_point(low, scale)


@pytest.mark.parametrize("zero", ["low", "middle", "high"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_round_trip_of_all_codes_asymmetric(form, scale, zero) -> None:
    half = 2 ** (form.bits - 1)
    codes = torch.arange(-half, half).to(form.code_dtype)
    zero_point = torch.tensor({"low": -half, "middle": 3, "high": half - 1}[zero]).to(form.code_dtype)
    x = form.dequantize(codes, torch.tensor(scale), zero_point)
    steps = codes.numpy().astype(np.float64) - int(zero_point)
    np.testing.assert_array_equal(x.numpy(), (steps * np.float64(np.float32(scale))).astype(np.float32))
    assert torch.equal(form.quantize(x, torch.tensor(scale), zero_point), codes)


@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_half_to_even(form) -> None:
    limit = int(form.qmax)
    x = torch.arange(-limit, limit) + 0.5
    codes = form.quantize(x, torch.ones(()))
    assert (codes % 2 == 0).all()
    assert ((codes - x).abs() == 0.5).all()


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1.0, 2.0),
        (0.5, 3.0),
        (-3.0, -0.5),
        (0.0, 7.0),
        (-7.0, 0.0),
        (-1e-3, 1e3),
        (-1e30, 1e28),
        (2.5, 2.5),
        (-4.0, -4.0),
    ],
)
@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_asymmetric_ranges(form, low, high) -> None:
    levels, half = 2**form.bits - 1, 2 ** (form.bits - 1)
    scale, zero = scale_and_zero(form, torch.tensor(low), torch.tensor(high))
    assert zero.dtype == form.code_dtype
    widened = max(high, 0.0) - min(low, 0.0)
    assert scale.item() == pytest.approx(widened / levels, rel=2e-7)
    assert -half <= zero.item() <= half - 1
    assert zero.item() + half == np.rint(np.float32(-min(low, 0.0)) / scale.numpy())
    x = torch.cat([torch.linspace(low, high, 997), torch.zeros(1)])
    codes = form.quantize(x, scale, zero)
    fake = form.dequantize(codes, scale, zero)
    assert fake[-1] == 0
    error = (fake.double() - x.double()).abs()
    assert error.max() <= scale.double() * 0.5 * (1 + levels * 2.0**-22)


@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_asymmetric_corner_cases(form) -> None:
    half = 2 ** (form.bits - 1)
    scale, zero = scale_and_zero(form, torch.zeros(2), torch.zeros(2))
    assert scale.tolist() == [1.0, 1.0]
    assert zero.tolist() == [-half, -half]
    tiny = torch.tensor([1e-45, 1e-40])
    scale = form.scale_from_range(-tiny, tiny)
    assert (scale == MIN_SCALE).all()
    x = torch.tensor([-MAX, 0.0, MAX])
    for low, high in ((-MAX, MAX), (0.0, MAX), (-MAX, 0.0), (-MAX / 3, MAX)):
        scale, zero = scale_and_zero(form, torch.tensor(low), torch.tensor(high))
        fake = form.dequantize(form.quantize(x.clamp(low, high), scale, zero), scale, zero)
        assert fake.isfinite().all()
        assert fake[1] == 0
        assert ((fake.double() - x.clamp(low, high).double()).abs() <= 3 * scale.double()).all()
    scale = form.scale_from_range(torch.tensor(torch.nan), torch.tensor(1.0))
    assert scale.isnan()


@given(st.sampled_from(INTEGERS), st.lists(values, min_size=1, max_size=20))
def test_asymmetric_error_is_at_most_half_a_step(form, xs) -> None:
    x = torch.tensor(xs, dtype=torch.float32)
    scale, zero = scale_and_zero(form, x.min(), x.max())
    fake = form.dequantize(form.quantize(x, scale, zero), scale, zero)
    bound = scale.double() / 2 + (x.max().clamp(min=0).double() - x.min().clamp(max=0).double()) * 2.0**-21
    assert ((fake.double() - x.double()).abs() <= bound).all()


def test_a_width_is_one_line() -> None:
    """Every width from 2 bits up: a format declares only its width for rounding, saturation and packing to work."""
    for bits in range(2, 17):
        form = IntegerFormat(f"int{bits}", bits, torch.int8 if bits <= 8 else torch.int16)
        limit = 2 ** (bits - 1) - 1
        assert (form.qmax, form.max_dual_exponent) == (limit, 16 - bits)
        x = torch.randn(3, 29) * limit
        codes = form.quantize(x, torch.ones(3, 1))
        np.testing.assert_array_equal(codes.numpy(), np.clip(np.rint(x.numpy()), -limit, limit))
        packed = form.pack(codes)
        assert packed.shape == (3, form.packed_width(29)) == (3, -(-29 * bits // 8) if bits < 8 else 29)
        assert torch.equal(form.unpack(packed, 29), codes)
