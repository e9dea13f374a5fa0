"""Number formats against the oracle: every code, adversarial values, and what must hold for any value."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant import formats
from hfquant.config import DType
from tests import oracle

ALL = list(DType)
SCALED = [d for d in DType if d.is_scaled]
INTEGERS = [d for d in DType if d.is_integer]
CASTS = [d for d in DType if not d.is_scaled]
MAX = torch.finfo(torch.float32).max
SCALES = [2.0**-126, 1e-30, 2.0**-20, 1 / 3, 1.0, 7.77, 1e30]

values = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))
dtypes = st.sampled_from(SCALED)


def all_codes(dtype: DType) -> torch.Tensor:
    """Every code that quantize can give, unpacked, as stored."""
    if dtype.is_integer:
        limit = int(formats.qmax(dtype))
        return torch.arange(-limit, limit + 1).to(formats.code_dtype(dtype))
    bits = np.flatnonzero(np.isfinite(oracle.decode(dtype.value)))
    return torch.from_numpy(bits.astype(f"uint{dtype.bits}")).view(formats.code_dtype(dtype))


def code_values(codes: torch.Tensor, dtype: DType) -> np.ndarray:
    """By the oracle: what stored codes spell."""
    array = codes.numpy()
    return (
        array.astype(np.float64) if dtype.is_integer else oracle.decode(dtype.value)[array.view(f"u{array.itemsize}")]
    )


def adversarial() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.cat(
        [
            torch.randn(512, generator=generator),
            torch.randn(64, generator=generator) * 1e-3,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -3e-39, 2.0**-126, 1e-20, 1e30, -1e30, MAX, -MAX]),
            torch.arange(-200, 200) / 2 + 0.0,
        ]
    )


@pytest.mark.parametrize("dtype", ALL)
def test_facts(dtype) -> None:
    assert formats.qmax(dtype) == oracle.largest(dtype.value)
    assert formats.code_dtype(dtype).itemsize * 8 == max(dtype.bits, 8)
    assert not formats.code_dtype(dtype).is_floating_point


@pytest.mark.parametrize("dtype", [d for d in DType if not d.is_integer])
def test_every_bit_pattern_is_read_right(dtype) -> None:
    codes = torch.arange(2**dtype.bits).to(torch.int32).to(formats.code_dtype(dtype))
    for out in (torch.float32, torch.float64):
        got = formats.code_values(codes, dtype, out=out)
        assert got.dtype == out
        np.testing.assert_array_equal(got.numpy(), oracle.decode(dtype.value)[codes.numpy().view(f"u{codes.itemsize}")])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", SCALED)
def test_round_trip_of_all_codes(dtype, scale) -> None:
    codes = all_codes(dtype)
    scale = torch.tensor(scale)
    x = formats.dequantize(codes, scale, dtype)
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), (code_values(codes, dtype) * scale.double().numpy()).astype(np.float32))
    again = formats.quantize(x, scale, dtype)
    assert again.dtype == codes.dtype
    assert torch.equal(again, codes)


@pytest.mark.parametrize("zero", ["low", "middle", "high"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_round_trip_of_all_codes_asymmetric(dtype, scale, zero) -> None:
    half = 2 ** (dtype.bits - 1)
    codes = torch.arange(-half, half).to(formats.code_dtype(dtype))
    zero_point = torch.tensor({"low": -half, "middle": 3, "high": half - 1}[zero]).to(formats.code_dtype(dtype))
    x = formats.dequantize(codes, torch.tensor(scale), dtype, zero_point)
    steps = codes.numpy().astype(np.float64) - int(zero_point)
    np.testing.assert_array_equal(x.numpy(), (steps * np.float64(np.float32(scale))).astype(np.float32))
    assert torch.equal(formats.quantize(x, torch.tensor(scale), dtype, zero_point), codes)


@pytest.mark.parametrize("dtype", CASTS)
def test_casts_round_trip_and_saturate(dtype) -> None:
    codes = all_codes(dtype)
    x = formats.dequantize(codes, None, dtype)
    np.testing.assert_array_equal(x.numpy(), code_values(codes, dtype))
    assert torch.equal(formats.quantize(x, None, dtype), codes)
    x = torch.cat([adversarial(), torch.tensor([torch.inf, -torch.inf])])
    expected = oracle.codes_of(x.numpy(), None, dtype.value)
    np.testing.assert_array_equal(formats.fake_quantize(x, None, dtype).numpy(), expected)
    np.testing.assert_array_equal(formats.dequantize(formats.quantize(x, None, dtype), None, dtype).numpy(), expected)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", SCALED)
def test_quantize_against_oracle(dtype, scale, source) -> None:
    x = adversarial().to(source)
    x = x[x.isfinite()]
    expected = oracle.codes_of(x.float().numpy(), np.float32(scale), dtype.value)
    codes = formats.quantize(x, torch.tensor(scale), dtype)
    assert codes.dtype == formats.code_dtype(dtype)
    np.testing.assert_array_equal(code_values(codes, dtype), expected)
    fake = formats.fake_quantize(x, torch.tensor(scale), dtype)
    assert fake.dtype == torch.float32
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(fake.numpy(), (expected * np.float64(np.float32(scale))).astype(np.float32))
    assert torch.equal(fake, formats.dequantize(codes, torch.tensor(scale), dtype))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_half_to_even(dtype) -> None:
    limit = int(formats.qmax(dtype))
    x = torch.arange(-limit, limit) + 0.5
    codes = formats.quantize(x, torch.ones(()), dtype)
    assert (codes % 2 == 0).all()
    assert ((codes - x).abs() == 0.5).all()


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("shape", ["tensor", "channel", "group"])
def test_scales_per_tensor_channel_and_group(dtype, shape) -> None:
    x = torch.randn(6, 12) * torch.logspace(-3, 3, 6)[:, None]
    sizes = (3, 3, 3, 3) if shape == "group" else (12,)
    amax = formats.amax_columns(x, sizes)
    if shape == "tensor":
        amax = amax.amax().expand(6, 1)
    scale = formats.scale_from_amax(amax, dtype)
    fake = formats.fake_quantize(x, formats.expand_columns(scale, sizes), dtype)
    array, width = x.numpy(), 12 // len(sizes)
    for row in range(6):
        for g in range(len(sizes)):
            block = array[row, g * width : (g + 1) * width]
            s = oracle.scale_of(np.abs(array if shape == "tensor" else block).max(), dtype.value)
            assert scale[row, g].item() == s
            expected = (oracle.codes_of(block, s, dtype.value) * np.float64(s)).astype(np.float32)
            np.testing.assert_array_equal(fake[row, g * width : (g + 1) * width].numpy(), expected)


# Scales.


@pytest.mark.parametrize("dtype", SCALED)
def test_scale_from_amax(dtype) -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-36, 0.1, 1.0, 448.0, 3e4, 1e30])
    scale = formats.scale_from_amax(amax, dtype)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [oracle.scale_of(a, dtype.value) for a in amax.tolist()]
    assert formats.scale_from_amax(amax.bfloat16(), dtype).dtype == torch.float32
    assert torch.finfo(torch.float32).smallest_normal == formats.MIN_SCALE


@pytest.mark.parametrize("dtype", SCALED)
def test_the_largest_floats_stay_finite(dtype) -> None:
    for amax in (MAX, np.nextafter(np.float32(MAX), np.float32(0)).item(), MAX / 2, 3e38):
        x = torch.tensor([amax, -amax])
        scale = formats.scale_from_amax(torch.tensor(amax), dtype)
        for fake in (
            formats.fake_quantize(x, scale, dtype),
            formats.dequantize(formats.quantize(x, scale, dtype), scale, dtype),
        ):
            assert fake.isfinite().all()
            assert torch.allclose(fake.double(), x.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", SCALED)
def test_nan_and_inf_are_never_hidden(dtype) -> None:
    scale = formats.scale_from_amax(torch.tensor([torch.nan, torch.inf, 1.0]), dtype)
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2].isfinite()
    assert formats.fake_quantize(torch.tensor([torch.nan]), torch.ones(1), dtype).isnan().all()
    assert formats.fake_quantize(torch.tensor([1.0, torch.inf]), scale[1:2], dtype).isnan()[1]


@pytest.mark.parametrize("dtype", SCALED)
def test_static_overflow_saturates(dtype) -> None:
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 2 * formats.qmax(dtype)])
    limit = formats.qmax(dtype)
    assert formats.fake_quantize(x, torch.ones(()), dtype).tolist() == [limit, -limit, limit, -limit, limit]
    codes = formats.quantize(x, torch.ones(()), dtype)
    assert formats.dequantize(codes, torch.ones(()), dtype).tolist() == [limit, -limit, limit, -limit, limit]


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
@pytest.mark.parametrize("dtype", INTEGERS)
def test_asymmetric_ranges(dtype, low, high) -> None:
    levels, half = 2**dtype.bits - 1, 2 ** (dtype.bits - 1)
    scale, zero = formats.scale_from_range(torch.tensor(low), torch.tensor(high), dtype)
    assert zero.dtype == formats.code_dtype(dtype)
    widened = max(high, 0.0) - min(low, 0.0)
    assert scale.item() == pytest.approx(widened / levels, rel=2e-7)
    assert -half <= zero.item() <= half - 1
    assert zero.item() + half == np.rint(np.float32(-min(low, 0.0)) / scale.numpy())
    x = torch.cat([torch.linspace(low, high, 997), torch.zeros(1)])
    codes = formats.quantize(x, scale, dtype, zero)
    fake = formats.dequantize(codes, scale, dtype, zero)
    assert fake[-1] == 0
    error = (fake.double() - x.double()).abs()
    assert error.max() <= scale.double() * 0.5 * (1 + levels * 2.0**-22)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_asymmetric_corner_cases(dtype) -> None:
    half = 2 ** (dtype.bits - 1)
    scale, zero = formats.scale_from_range(torch.zeros(2), torch.zeros(2), dtype)
    assert scale.tolist() == [1.0, 1.0]
    assert zero.tolist() == [-half, -half]
    tiny = torch.tensor([1e-45, 1e-40])
    scale, _ = formats.scale_from_range(-tiny, tiny, dtype)
    assert (scale == formats.MIN_SCALE).all()
    x = torch.tensor([-MAX, 0.0, MAX])
    for low, high in ((-MAX, MAX), (0.0, MAX), (-MAX, 0.0), (-MAX / 3, MAX)):
        scale, zero = formats.scale_from_range(torch.tensor(low), torch.tensor(high), dtype)
        fake = formats.dequantize(formats.quantize(x.clamp(low, high), scale, dtype, zero), scale, dtype, zero)
        assert fake.isfinite().all()
        assert fake[1] == 0
        assert ((fake.double() - x.clamp(low, high).double()).abs() <= 3 * scale.double()).all()
    scale, _ = formats.scale_from_range(torch.tensor(torch.nan), torch.tensor(1.0), dtype)
    assert scale.isnan()


# What holds for any value.


@given(dtypes, st.lists(values, min_size=1, max_size=20))
def test_error_is_at_most_half_a_step(dtype, xs) -> None:
    x = torch.tensor(xs, dtype=torch.float32)
    scale = formats.scale_from_amax(x.abs().max(), dtype)
    assert scale >= formats.MIN_SCALE
    exact, fake = x.double(), formats.fake_quantize(x, scale, dtype).double()
    if dtype.is_integer:
        step = scale.double().expand_as(exact)
    else:  # relative to the value, absolute where FP8 is subnormal
        mantissa, least = (3, -9) if dtype is DType.FP8E4M3 else (2, -16)
        step = torch.maximum(exact.abs() * 2.0**-mantissa, scale.double() * 2.0**least)
    assert ((fake - exact).abs() <= step / 2 + exact.abs() * 2.0**-22).all()


@given(dtypes, st.lists(values, min_size=1, max_size=20), st.sampled_from(SCALES))
def test_idempotent_odd_and_monotone(dtype, xs, scale) -> None:
    x, scale = torch.tensor(xs, dtype=torch.float32), torch.tensor(scale)
    fake = formats.fake_quantize(x, scale, dtype)
    assert torch.equal(formats.fake_quantize(fake, scale, dtype), fake)
    assert torch.equal(formats.fake_quantize(-x, scale, dtype), -fake)
    assert (formats.fake_quantize(x.sort().values, scale, dtype).diff() >= 0).all()


@given(st.sampled_from(INTEGERS), st.lists(values, min_size=1, max_size=20))
def test_asymmetric_error_is_at_most_half_a_step(dtype, xs) -> None:
    x = torch.tensor(xs, dtype=torch.float32)
    scale, zero = formats.scale_from_range(x.min(), x.max(), dtype)
    fake = formats.dequantize(formats.quantize(x, scale, dtype, zero), scale, dtype, zero)
    bound = scale.double() / 2 + (x.max().clamp(min=0).double() - x.min().clamp(max=0).double()) * 2.0**-21
    assert ((fake.double() - x.double()).abs() <= bound).all()


# Column blocks.


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1, 7, 4), (5, 7)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_column_blocks(sizes, lead) -> None:
    x = torch.randn(*lead, 12).bfloat16()
    low, high = formats.range_columns(x, sizes)
    amax = formats.amax_columns(x, sizes)
    total = formats.sum_columns(x.float(), sizes)
    wide = formats.expand_columns(amax, sizes)
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
