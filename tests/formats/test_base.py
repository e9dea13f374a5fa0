"""Requirements of every number format, checked against the oracle: every code, adversarial values, random values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.config import ConfigError, QuantRules
from hfquant.formats import FORMATS, MIN_SCALE, amax_columns, expand_columns, number_format
from tests import oracle
from tests.formats.format_cases import ALL, MAX, SCALED, SCALES, adversarial, all_codes, code_values, name, values


@pytest.mark.parametrize("form", ALL, ids=name)
def test_facts(form) -> None:
    assert form.qmax == oracle.largest(form.name)
    assert form.code_dtype.itemsize * 8 == max(form.bits, 8)
    assert not form.code_dtype.is_floating_point


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_round_trip_of_all_codes(form, scale) -> None:
    codes = all_codes(form)
    scale = torch.tensor(scale)
    x = form.dequantize(codes, scale)
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), (code_values(codes, form) * scale.double().numpy()).astype(np.float32))
    again = form.quantize(x, scale)
    assert again.dtype == codes.dtype
    assert torch.equal(again, codes)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_quantize_against_oracle(form, scale, source) -> None:
    x = adversarial().to(source)
    x = x[x.isfinite()]
    expected = oracle.codes_of(x.float().numpy(), np.float32(scale), form.name)
    codes = form.quantize(x, torch.tensor(scale))
    assert codes.dtype == form.code_dtype
    np.testing.assert_array_equal(code_values(codes, form), expected)
    fake = form.round(x, torch.tensor(scale))
    assert fake.dtype == torch.float32
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(fake.numpy(), (expected * np.float64(np.float32(scale))).astype(np.float32))
    assert torch.equal(fake, form.dequantize(codes, torch.tensor(scale)))


@pytest.mark.parametrize("form", SCALED, ids=name)
@pytest.mark.parametrize("shape", ["tensor", "channel", "group"])
def test_scales_per_tensor_channel_and_group(form, shape) -> None:
    x = torch.randn(6, 12) * torch.logspace(-3, 3, 6)[:, None]
    sizes = (3, 3, 3, 3) if shape == "group" else (12,)
    amax = amax_columns(x, sizes)
    if shape == "tensor":
        amax = amax.amax().expand(6, 1)
    scale = form.scale_from_amax(amax)
    fake = form.round(x, expand_columns(scale, sizes))
    array, width = x.numpy(), 12 // len(sizes)
    for row in range(6):
        for g in range(len(sizes)):
            block = array[row, g * width : (g + 1) * width]
            s = oracle.scale_of(np.abs(array if shape == "tensor" else block).max(), form.name)
            assert scale[row, g].item() == s
            expected = (oracle.codes_of(block, s, form.name) * np.float64(s)).astype(np.float32)
            np.testing.assert_array_equal(fake[row, g * width : (g + 1) * width].numpy(), expected)


# Scales.


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_scale_from_amax(form) -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-36, 0.1, 1.0, 448.0, 3e4, 1e30])
    scale = form.scale_from_amax(amax)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [oracle.scale_of(a, form.name) for a in amax.tolist()]
    assert form.scale_from_amax(amax.bfloat16()).dtype == torch.float32
    assert torch.finfo(torch.float32).smallest_normal == MIN_SCALE


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_the_largest_floats_stay_finite(form) -> None:
    for amax in (MAX, np.nextafter(np.float32(MAX), np.float32(0)).item(), MAX / 2, 3e38):
        x = torch.tensor([amax, -amax])
        scale = form.scale_from_amax(torch.tensor(amax))
        for fake in (
            form.round(x, scale),
            form.dequantize(form.quantize(x, scale), scale),
        ):
            assert fake.isfinite().all()
            assert torch.allclose(fake.double(), x.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_nan_and_inf_are_never_hidden(form) -> None:
    scale = form.scale_from_amax(torch.tensor([torch.nan, torch.inf, 1.0]))
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2].isfinite()
    assert form.round(torch.tensor([torch.nan]), torch.ones(1)).isnan().all()
    assert form.round(torch.tensor([1.0, torch.inf]), scale[1:2]).isnan()[1]


@pytest.mark.parametrize("form", SCALED, ids=name)
def test_static_overflow_saturates(form) -> None:
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 2 * form.qmax])
    limit = form.qmax
    assert form.round(x, torch.ones(())).tolist() == [limit, -limit, limit, -limit, limit]
    codes = form.quantize(x, torch.ones(()))
    assert form.dequantize(codes, torch.ones(())).tolist() == [limit, -limit, limit, -limit, limit]


# Properties that hold for any value.


@given(st.sampled_from(SCALED), st.lists(values, min_size=1, max_size=20))
def test_error_is_at_most_half_a_step(form, xs) -> None:
    x = torch.tensor(xs, dtype=torch.float32)
    scale = form.scale_from_amax(x.abs().max())
    assert scale >= MIN_SCALE
    exact, fake = x.double(), form.round(x, scale).double()
    if form.is_integer:
        step = scale.double().expand_as(exact)
    else:  # relative to the value, absolute where FP8 is subnormal
        mantissa, least = (3, -9) if form.name == "fp8e4m3" else (2, -16)
        step = torch.maximum(exact.abs() * 2.0**-mantissa, scale.double() * 2.0**least)
    assert ((fake - exact).abs() <= step / 2 + exact.abs() * 2.0**-22).all()


@given(st.sampled_from(SCALED), st.lists(values, min_size=1, max_size=20), st.sampled_from(SCALES))
def test_idempotent_odd_and_monotone(form, xs, scale) -> None:
    x, scale = torch.tensor(xs, dtype=torch.float32), torch.tensor(scale)
    fake = form.round(x, scale)
    assert torch.equal(form.round(fake, scale), fake)
    assert torch.equal(form.round(-x, scale), -fake)
    assert (form.round(x.sort().values, scale).diff() >= 0).all()


# The table of formats.


@pytest.mark.parametrize("form", ALL, ids=name)
def test_a_format_is_found_by_its_name(form) -> None:
    assert number_format(form.name) is FORMATS[form.name] is form


@pytest.mark.parametrize("unknown", ["int9", "INT4", "", "fp32"])
def test_an_unknown_name_says_what_there_is(unknown) -> None:
    listed = f"unknown number format '{unknown}'; available: {', '.join(FORMATS)}"
    with pytest.raises(ConfigError) as error:
        number_format(unknown)
    assert str(error.value) == listed
    if unknown != "INT4":  # names in configs are case-insensitive
        with pytest.raises(ConfigError) as error:
            QuantRules({"default": {"weight_quant": {"type": unknown}}})
        assert listed in str(error.value)


@pytest.mark.parametrize("form", ALL, ids=name)
def test_codes_as_kept_in_memory_and_on_disk(form) -> None:
    codes = all_codes(form)[-37:].repeat(3, 1) if form.bits > 5 else all_codes(form).repeat(3, 1)
    packed, columns = form.pack(codes), codes.shape[-1]
    assert packed.dtype == form.code_dtype
    assert packed.shape == (3, form.packed_width(columns))
    assert packed.nbytes == 3 * -(-columns * form.bits // 8)
    assert torch.equal(form.unpack(packed, columns), codes)
    assert form.disk_dtype.itemsize == form.code_dtype.itemsize
    # An 8-bit float must not be mistaken for an 8-bit integer.
    assert (form.disk_dtype == torch.uint8) == form.name.startswith("fp8")
