"""What QuantLinear computes, against float64: every format, every plan, fake and real."""

import numpy as np
import pytest
import torch
from torch import nn

import hfquant.nn.linear
from hfquant import QuantLinear, formats
from hfquant.config import DType, InputQuant, WeightQuant
from tests.nn.linear_cases import (
    IN,
    OUT,
    Case,
    assert_close,
    cases,
    forward_by_hand,
    layer_of,
    random_tensors,
    some_input,
    weight_by_hand,
)

INPUTS = [
    None,
    *[InputQuant(type=d, axis=a, dynamic=y) for d in DType for a, y in ((None, False), (None, True), (-1, True))],
]


def refuse(*args, **kwargs):
    raise AssertionError("the real path used dequantized weights")


@pytest.mark.parametrize("case", cases(DType.INT8))
@pytest.mark.parametrize("dtype", DType)
def test_fake_and_real_against_oracle(dtype, case, monkeypatch) -> None:
    x = some_input(3)
    for quant in INPUTS:
        plan = cases(dtype)[case].plan(quant)
        layer, tensors = layer_of(plan)
        expected, size = forward_by_hand(plan, tensors, x)
        fake = layer(x)
        assert_close(fake, expected, size)
        layer.real_quant = True
        with monkeypatch.context() as patch:
            patch.setattr(QuantLinear, "dequantize", refuse)
            patch.setattr(hfquant.nn.linear, "dequantize_weight", refuse)
            patch.setattr(formats, "dequantize", refuse)
            real = layer(x)
        assert_close(real, expected, size)
        assert real.dtype == fake.dtype == torch.float32


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(lead, real) -> None:
    for case in cases(DType.INT4).values():
        for quant in (None, InputQuant(dynamic=True), InputQuant(dynamic=True, axis=-1), InputQuant()):
            plan = case.plan(quant, real)
            layer, tensors = layer_of(plan)
            x = some_input(*lead)
            y = layer(x)
            assert y.shape == (*lead, OUT)
            if x.numel():
                assert_close(y, *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("sizes", [(7, 5), (1, 1), (1, 5), (5, 1), (33, 3)])
def test_odd_sizes(sizes, dtype, real) -> None:
    case = Case(WeightQuant(type=dtype), inputs=sizes[:1], outputs=sizes[1:])
    for quant in (None, InputQuant(dynamic=True, axis=-1)):
        plan = case.plan(quant, real)
        layer, tensors = layer_of(plan, bias=False)
        x = some_input(4, features=sizes[0])
        assert_close(layer(x), *forward_by_hand(plan, tensors, x))
        assert layer.bias is None


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_input_dtypes(dtype, real) -> None:
    for case in cases(DType.INT8).values():
        plan = case.plan(InputQuant(dynamic=True, axis=-1), real)
        layer, _ = layer_of(plan)
        x = some_input(4).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        # Computed in float32 and rounded once.
        assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("real", [False, True])
def test_strided_inputs_and_autocast(real) -> None:
    plan = cases(DType.INT8)["all at once"].plan(InputQuant(dynamic=True), real)
    layer, _ = layer_of(plan)
    x = some_input(5, 4).transpose(0, 1)
    assert not x.is_contiguous()
    expected = layer(x.contiguous())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[:, ::2]), layer(x[:, ::2].contiguous()), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(torch.zeros(()).expand(3, IN)), layer(torch.zeros(3, IN)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.contiguous()), expected)


@pytest.mark.parametrize("real", [False, True])
def test_extreme_codes(real) -> None:
    """Full-range codes on both sides: where saturating 16-bit sums go wrong."""
    for dtype, wide in ((DType.INT8, 512), (DType.INT4, 512), (DType.INT6, 100), (DType.INT16, 300)):
        limit = int(formats.qmax(dtype))
        for dual in ((True,), (False,)):
            case = Case(WeightQuant(type=dtype), inputs=(wide,), outputs=(2,), dual=dual)
            plan = case.plan(InputQuant(type=dtype, axis=-1, dynamic=True), real)
            tensors = random_tensors(plan)
            tensors["weight"] = torch.stack([torch.full((wide,), limit), torch.full((wide,), -limit)]).to(
                formats.code_dtype(dtype)
            )
            tensors["weight_scale"] = torch.ones(2, 1)
            x = torch.full((1, wide), float(limit))
            y = QuantLinear.from_tensors(plan, tensors, None)(x)
            assert y.tolist() == [[float(np.float32(limit * limit * wide)), float(np.float32(-limit * limit * wide))]]


def test_real_does_not_overflow_where_fake_does_not() -> None:
    plan = Case(WeightQuant(type=DType.INT8)).plan(None)
    tensors = random_tensors(plan)
    tensors["weight"].fill_(127)
    tensors["weight_scale"].fill_(1e-4)
    layer = QuantLinear.from_tensors(plan, tensors, None)
    x = torch.full((1, IN), 1e37)
    fake = layer(x)
    layer.real_quant = True
    assert fake.isfinite().all()
    torch.testing.assert_close(layer(x), fake, rtol=1e-6, atol=0)


def test_zeros_and_bad_tokens() -> None:
    for dtype in DType:
        for quant in (InputQuant(type=d, axis=-1, dynamic=True) for d in DType):
            for real in (False, True):
                layer, _ = layer_of(cases(dtype)["dual"].plan(quant, real), bias=False)
                x = some_input(3)
                clean = layer(x)
                assert (layer(torch.zeros(2, IN)) == 0).all()
                x[1, 3] = torch.nan
                y = layer(x)
                assert y[1].isnan().all()
                assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("case", cases(DType.INT8))
def test_effective_weight_and_to_linear(dtype, case) -> None:
    plan = cases(dtype)[case].plan(None)
    layer, tensors = layer_of(plan)
    w = weight_by_hand(plan, tensors)
    np.testing.assert_allclose(layer.dequantize().numpy(), w, rtol=2e-7)
    start = 0
    for i, rows in enumerate(plan.row_groups):
        block = slice(start, start + rows)
        if "smooth" in tensors:
            w[block] /= tensors["smooth"].reshape(-1, IN)[i].double().numpy()
        if plan.rank:
            w[block] += (
                tensors["svd_up"][block].double().numpy() @ tensors["svd_down"].view(-1, 3, IN)[i].double().numpy()
            )
        start += rows
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    np.testing.assert_allclose(layer.effective_weight().numpy(), w, rtol=1e-6, atol=1e-7)
    linear = layer.to_linear(torch.float32)
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    x = some_input(4)
    y, size = forward_by_hand(plan, tensors, x)
    assert_close(linear(x), y, size * 2)
    half = layer.to_linear(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert layer.to_linear(torch.float32).bias.data_ptr() != 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer_of(plan, bias=False)[0].to_linear(torch.float32).bias is None


def test_errors_of_forward() -> None:
    for real in (False, True):
        for quant in (None, InputQuant(dynamic=True)):
            layer, _ = layer_of(Case(WeightQuant()).plan(quant, real))
            with pytest.raises(TypeError, match=r"QuantLinear\(24, 10\) got an input of torch.int8"):
                layer(torch.zeros(2, IN, dtype=torch.int8))
            for wrong in (torch.zeros(2, IN + 1), torch.zeros(2, IN - 1), torch.zeros(2, 1), torch.zeros(())):
                with pytest.raises(ValueError, match=r"QuantLinear\(24, 10\) got an input of shape"):
                    layer(wrong)
