"""Activations to codes: dynamic or calibrated scales, per tensor or per token, segments, dual scale."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS, InputRule, NumberFormat, expand_columns
from hfquant.formats.inputs import dual_exponent, segment_of
from tests import oracle
from tests.formats.format_cases import ALL, CASTS, INTEGERS, SCALED, name

SEGMENTS = [(12,), (4, 4, 4), (1, 7, 4)]
values = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


def static(form: NumberFormat) -> InputRule:
    return InputRule(form, dynamic=False, per_token=False, segments=(), dual=())


def dynamic(form: NumberFormat, axis: int | None = -1) -> InputRule:
    return InputRule(form, dynamic=True, per_token=axis is not None, segments=(), dual=())


def rule(quant: InputRule, segments: Sequence[int], dual: Sequence[bool]) -> InputRule:
    return replace(quant, segments=tuple(segments), dual=tuple(dual))


def scales(form: NumberFormat, low: torch.Tensor, high: torch.Tensor, dual: Sequence[bool]) -> Any:
    return rule(static(form), (), dual).scales(low, high)


def quantized(x, quant, segments=None, dual=None, scale=None, scale_neg=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the codes, and the float64 values that they represent."""
    segments = segments or (x.shape[-1],)
    codes, steps = rule(quant, segments, dual or (False,) * len(segments)).quantize(x, scale, scale_neg)
    assert codes.dtype == torch.float32
    assert codes.shape == x.shape
    return codes, codes.double() * (1 if steps is None else expand_columns(steps, segments).double())


# Against the oracle.


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("form", ALL, ids=name)
def test_dynamic_against_oracle(form, dual, axis, segments, shape) -> None:
    x = F.silu(torch.randn(shape) * 3)
    flags = tuple(dual and i % 2 == 0 for i in range(len(segments)))
    _, got = quantized(x, dynamic(form, axis), segments, flags)
    expected, _ = oracle.activation(
        x.numpy(), form.name, axis, segments, flags if form.is_integer else (False,) * len(segments)
    )
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_static_uses_the_given_scales(form, segments) -> None:
    x = torch.randn(4, 12) * 5
    scale = torch.rand(len(segments)) + 0.1
    _, got = quantized(x, static(form), segments, scale=scale)
    start = 0
    for size, s in zip(segments, scale.numpy(), strict=True):
        part = x[:, start : start + size].numpy()
        np.testing.assert_array_equal(
            got[:, start : start + size].numpy(), oracle.codes_of(part, s, form.name) * np.float64(s)
        )
        start += size


def test_static_overflow_saturates() -> None:
    x = torch.tensor([[1e30, -1e30, 300.0, -300.0]])
    for form in SCALED:
        codes, _ = quantized(x, static(form), scale=torch.tensor([1e-3]))
        assert codes.abs().max() == form.qmax


@pytest.mark.parametrize("form", CASTS, ids=name)
def test_casts_have_no_scale(form) -> None:
    x = torch.randn(3, 12)
    codes, steps = rule(static(form), (12,), (False,)).quantize(x)
    assert steps is None
    np.testing.assert_array_equal(codes.numpy(), oracle.codes_of(x.numpy(), None, form.name))


def test_the_input_is_left_as_it_is() -> None:
    x = torch.randn(3, 12)
    before = x.clone()
    for form in ALL:
        rule(dynamic(form), (12,), (True,)).quantize(x)
    assert torch.equal(x, before)


# DualScale.

RATIOS = [
    (-1.0, 1.0), (-1.0, 2.0), (-1.0, 1.9999999), (-0.5, 0.9999999), (-0.278, 5.0), (-0.17, 30.0), (-3.0, 1.0),
    (0.0, 4.0), (-4.0, 0.0), (0.0, 0.0), (1.0, 2.0), (-2.0, -1.0), (-1e-30, 1e30), (-1e-40, 1e3), (-1e-45, 3e38),
    (-1e30, 1e-30), (-1e-40, 1e-40), (-0.0, 1.0), (-1e-38, 3e-36), (-1e-38, 1e-37), (-1e-38, 5e-37),
]  # fmt: skip


@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_exponent_against_exact_arithmetic(form) -> None:
    low, high = torch.tensor(RATIOS).unbind(-1)
    expected = [oracle.exponent_of(a, b, form.name) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    assert dual_exponent(low, high, form).tolist() == expected
    assert max(expected) == 15 - (form.bits - 1)


@given(st.sampled_from(INTEGERS), values, values)
def test_exponent_property(form, a, b) -> None:
    low, high = min(a, b), max(a, b)
    assert dual_exponent(torch.tensor(low), torch.tensor(high), form).item() == oracle.exponent_of(low, high, form.name)


@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_static_scales(form) -> None:
    low, high = torch.tensor(RATIOS).unbind(-1)
    pos, neg = scales(form, low, high, [True] * len(RATIOS))
    assert pos.dtype == neg.dtype == torch.float32
    assert pos.tolist() == [
        oracle.scale_of(max(-a, b), form.name) for a, b in zip(low.tolist(), high.tolist(), strict=True)
    ]
    ratio = pos.double() / neg.double()
    assert ((ratio.log2() % 1) == 0).all()
    assert (ratio <= 2 ** (15 - (form.bits - 1))).all()
    assert (neg >= 2.0**-126).all()
    # The negative side is covered.
    assert (neg.double() * form.qmax >= -low.double() * (1 - 1e-6)).all()
    # Without dual scale, both sides share one scale; the choice is made segment by segment.
    same, other = scales(form, low, high, [False] * len(RATIOS))
    assert torch.equal(same, other)
    first = [i == 4 for i in range(len(RATIOS))]
    pos, neg = scales(form, low, high, first)
    assert (pos != neg).tolist() == [f and form.name != "int16" for f in first]


@given(
    st.sampled_from(INTEGERS),
    st.lists(values, min_size=1, max_size=16),
    st.sampled_from(["none", "silu", "gelu", "shrink"]),
    st.sampled_from([None, -1]),
)
def test_dual_error_is_never_above_single(form, xs, activation, axis) -> None:
    x = torch.tensor([xs, xs[::-1]], dtype=torch.float32)
    match activation:
        case "silu" | "gelu":
            x = getattr(F, activation)(x.clamp(-100, 100))
        case "shrink":
            x = torch.where(x < 0, x * 1e-3, x)
    _, a = quantized(x, dynamic(form, axis))
    dual, b = quantized(x, dynamic(form, axis), dual=(True,))
    exact = x.double()
    slack = exact.abs() * 2.0**-22  # both round the quotient to float32
    assert ((b - exact).abs() <= (a - exact).abs() + slack).all()
    assert (dual == dual.round()).all()
    assert dual.abs().max() < 2**15


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("form", [form for form in INTEGERS if 3 <= form.bits <= 8], ids=name)
def test_dual_pays_after_activations(form, axis, activation) -> None:
    x = activation(torch.randn(64, 32) * 2)
    _, single = quantized(x, dynamic(form, axis))
    _, dual = quantized(x, dynamic(form, axis), dual=(True,))
    negative = x < 0
    assert ((dual - x) ** 2)[negative].sum() < 0.5 * ((single - x) ** 2)[negative].sum()
    assert torch.equal(dual[~negative], single[~negative])


@pytest.mark.parametrize("form", INTEGERS, ids=name)
def test_static_dual_is_what_dynamic_gives_on_the_calibration_data(form) -> None:
    x = F.gelu(torch.randn(16, 12) * 4)
    segments, dual = (5, 7), (True, False)
    low = torch.stack([p.min() for p in x.split(segments, -1)])
    high = torch.stack([p.max() for p in x.split(segments, -1)])
    pos, neg = scales(form, low, high, dual)
    a, _ = quantized(x, static(form), segments, dual, pos, neg)
    b, _ = quantized(x, dynamic(form, None), segments, dual)
    assert torch.equal(a, b)


def test_codes_at_the_extremes_fit_16_bits() -> None:
    for form in INTEGERS:
        codes, _ = quantized(torch.tensor([[100.0, -1e-9, 1e-9, -1e-3]]), dynamic(form), dual=(True,))
        assert codes.abs().max() == form.qmax * 2 ** (15 - (form.bits - 1)) < 2**15


def test_dual_changes_nothing_for_fp8() -> None:
    x = F.silu(torch.randn(4, 12))
    for form in (FORMATS["fp8e4m3"], FORMATS["fp8e5m2"]):
        for quant in (dynamic(form), static(form)):
            scale = None if quant.dynamic else torch.tensor([0.01])
            assert torch.equal(
                quantized(x, quant, dual=(True,), scale=scale, scale_neg=scale)[0], quantized(x, quant, scale=scale)[0]
            )


# Adversarial data.


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_zeros_stay_zeros(form, axis) -> None:
    x = torch.zeros(3, 12)
    x[1] = torch.randn(12)
    for dual in ((False, False), (True, True)):
        codes, got = quantized(x, dynamic(form, axis), (5, 7), dual)
        assert (got[[0, 2]] == 0).all()
        assert codes.isfinite().all()
        assert (quantized(torch.zeros(2, 12), dynamic(form, axis), (5, 7), dual)[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 12), (0,), (2, 0, 12)])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("form", ALL, ids=name)
def test_empty(form, axis, shape) -> None:
    x = torch.zeros(shape)
    segments = (5, 7) if shape[-1] else (0,)
    codes, _ = quantized(x, dynamic(form, axis), segments, (True,) * len(segments))
    assert codes.shape == x.shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_a_static_scale_makes_no_number_of_nan_and_infinity(form, bad) -> None:
    for dual in (False, True):
        x, scales = torch.tensor([[1.0, bad, -2.0]]), (torch.tensor([0.5]), torch.tensor([0.25]) if dual else None)
        codes, _ = rule(static(form), (3,), (dual,)).quantize(x, *scales)
        assert codes.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_a_bad_token_spoils_itself_alone(form, dual, bad) -> None:
    x = torch.randn(3, 12)
    _, clean = quantized(x, dynamic(form), dual=(dual,))
    x[1, 4] = bad
    _, got = quantized(x, dynamic(form), dual=(dual,))
    assert not got[1, 4].isfinite()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not quantized(x, dynamic(form, None), dual=(dual,))[1][1, 4].isfinite()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("form", SCALED, ids=name)
def test_tiny_huge_and_outliers(form, dual) -> None:
    m = torch.finfo(torch.float32).max
    x = torch.tensor(
        [[m, -m, 1.0], [1e-45, -1e-45, 0.0], [1e-38, -1e-40, 1e-39], [1e4, -1e-3, 1e-3], [3e38, -1e-45, 0]]
    )
    codes, got = quantized(x, dynamic(form), dual=(dual,))
    assert got.isfinite().all()
    assert (codes * expand_columns(rule(dynamic(form), (3,), (dual,)).quantize(x)[1], (3,))).isfinite().all()
    expected, _ = oracle.activation(x.numpy()[3:4], form.name, -1, (3,), (dual and form.is_integer,))
    np.testing.assert_array_equal(got[3:4].numpy(), expected)
    if form.is_integer:
        assert (codes == codes.round()).all()
        assert codes.abs().max() < 2**15 + (form.name == "int16")
        scale = rule(dynamic(form), (3,), (False,)).quantize(x)[1].double()
        assert ((got - x.double()).abs() <= scale / 2 + x.double().abs() * 2e-6).all()


# Rules.


@pytest.mark.parametrize("form", ALL, ids=name)
def test_only_formats_with_a_scale_can_be_static(form) -> None:
    assert not dynamic(form).static
    assert static(form).static == form.has_scale


@pytest.mark.parametrize(
    ("columns", "segments", "expected"),
    [
        ((12,), (12,), [0]),
        ((4, 4, 4), (12,), [0, 0, 0]),
        ((4, 1, 4, 4), (5, 8), [0, 0, 1, 1]),
        ((64, 64, 16, 64, 8), (144, 72), [0, 0, 0, 1, 1]),
        ((1, 2, 9), (1, 2, 9), [0, 1, 2]),
    ],
    ids=str,
)
def test_the_segment_of_each_block_of_columns(columns, segments, expected) -> None:
    assert segment_of(columns, segments) == expected
