"""Floating-point formats: every bit pattern against the oracle, casts, and the on-disk form."""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.formats.format_cases import CASTS, FLOATS, adversarial, all_codes, code_values, name


@pytest.mark.parametrize("form", FLOATS, ids=name)
def test_every_bit_pattern_is_read_right(form) -> None:
    codes = torch.arange(2**form.bits).to(torch.int32).to(form.code_dtype)
    for out in (torch.float32, torch.float64):
        got = form.values(codes, dtype=out)
        assert got.dtype == out
        np.testing.assert_array_equal(got.numpy(), oracle.decode(form.name)[codes.numpy().view(f"u{codes.itemsize}")])


@pytest.mark.parametrize("form", CASTS, ids=name)
def test_casts_round_trip_and_saturate(form) -> None:
    codes = all_codes(form)
    x = form.dequantize(codes, None)
    np.testing.assert_array_equal(x.numpy(), code_values(codes, form))
    assert torch.equal(form.quantize(x, None), codes)
    x = torch.cat([adversarial(), torch.tensor([torch.inf, -torch.inf])])
    expected = oracle.codes_of(x.numpy(), None, form.name)
    np.testing.assert_array_equal(form.round(x, None).numpy(), expected)
    np.testing.assert_array_equal(form.dequantize(form.quantize(x, None), None).numpy(), expected)


@pytest.mark.parametrize("form", FLOATS, ids=name)
def test_codes_on_disk_spell_the_floats(form) -> None:
    """Viewing codes as the on-disk dtype and back keeps the bits; torch reads them as the format's own dtype."""
    x = torch.randn(4, 12)
    codes = form.quantize(x, torch.ones(4, 1) if form.has_scale else None)
    stored = codes.view(form.disk_dtype)
    assert not stored.is_floating_point()
    assert torch.equal(stored.view(form.code_dtype), codes)
    np.testing.assert_array_equal(stored.view(form.dtype).float().numpy(), oracle.codes_of(x.numpy(), None, form.name))


@pytest.mark.parametrize("form", FLOATS, ids=name)
def test_floats_have_neither_zero_points_nor_a_second_scale(form) -> None:
    assert form.max_dual_exponent == 0
    assert form.name in form.no_dual_scale
    with pytest.raises(TypeError, match=f"{form.name} has no zero point"):
        form.scale_from_range(torch.zeros(1), torch.ones(1))
    with pytest.raises(TypeError, match=f"{form.name} has no zero point"):
        form.zero_point(torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("form", FLOATS, ids=name)
def test_spacing_is_a_unit_in_the_last_place(form) -> None:
    """Up to the largest value and down to zero, measured on all values of the format."""
    codes = torch.arange(2 ** (form.bits - 1)).to(form.code_dtype)
    values = form.values(codes).double()
    values = values[values.isfinite() & (values <= form.qmax)].unique()
    expected = torch.cat([values.diff(), (values[-1] - values[-2])[None]])
    for sign in (1, -1):
        torch.testing.assert_close(form.spacing(sign * values.float()).double(), expected, rtol=0, atol=0)
