"""Integer weights with a float input, all layers against float64."""

import pytest
import torch

from hfquant.formats import FORMATS
from hfquant.kernels.base import Product
from hfquant.kernels.triton import weight_only
from hfquant.layer_config import WeightQuant
from tests.kernels.triton.layers import INPUTS, TOKENS, run_layer
from tests.nn.linear_cases import Case, assert_close, cases, forward_by_hand, layer_of, some_input

pytest.importorskip("triton")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["int2", "int3", "int4", "int5", "int6", "int8"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", cases("int8"))
def test_layers(name, tokens, form) -> None:
    plan = cases(form)[name].plan(None, True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens)
    assert weight_only.refuses(layer.product) == ""
    assert_close(run_layer(weight_only.run, layer, x), *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["asymmetric", "all at once", "input segments"])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_dtypes(form, name, dtype) -> None:
    plan = cases(form)[name].plan(None, True)
    layer, tensors = layer_of(plan, dtype=dtype)
    for tokens in TOKENS:
        x = some_input(tokens).to(dtype)
        y = run_layer(weight_only.run, layer, x)
        assert y.dtype == dtype
        expected, size = forward_by_hand(plan, tensors, x)
        assert_close(y, expected, size * (1 + torch.finfo(dtype).eps / 2e-6))


@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize(
    ("form", "group"), [("int4", 16), ("int4", 64), ("int4", 128), ("int3", 64), ("int6", 128), ("int7", 32)]
)
def test_groups_of_a_wide_layer(form, group, tokens) -> None:
    case = Case(WeightQuant(type=form, group_size=group, symmetric=False), inputs=(384,), outputs=(70,))
    plan = case.plan(None, True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens, features=384)
    assert_close(run_layer(weight_only.run, layer, x), *forward_by_hand(plan, tensors, x))


def test_input_that_is_not_contiguous() -> None:
    layer, _ = layer_of(cases("int4")["asymmetric"].plan(None, True))
    x = some_input(9)
    expected = run_layer(weight_only.run, layer, x[::2].contiguous())
    assert torch.equal(run_layer(weight_only.run, layer, torch.cat([x, x], 1)[::2, : x.shape[1]]), expected)
    assert torch.equal(run_layer(weight_only.run, layer, x.T.contiguous().T[::2]), expected)


@pytest.mark.parametrize("tokens", [2, 7])
def test_nan_stays_with_its_token(tokens) -> None:
    layer, _ = layer_of(cases("int4")["asymmetric"].plan(None, True))
    x = some_input(tokens)
    x[1, 5] = float("nan")
    y = run_layer(weight_only.run, layer, x)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    x[1, 5] = float("inf")
    assert not run_layer(weight_only.run, layer, x)[1].isfinite().any()


def test_refusals() -> None:
    def why(weight: str) -> str:
        return weight_only.refuses(Product(FORMATS[weight], (64,), (64,), None))

    assert why("int2") == why("int3") == why("int4") == why("int5") == why("int6") == why("int8") == ""
    assert why("fp8e4m3") == "the weight is fp8e4m3, not integers of up to 8 bits"
    assert why("int16") == "the weight is int16, not integers of up to 8 bits"
    layer, _ = layer_of(cases("int8")["channel"].plan(INPUTS["token"], True))
    assert weight_only.refuses(layer.product) == "the input is quantized"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 700])
def test_on_a_device_large_and_with_each_tile(tokens, dtype) -> None:
    case = Case(WeightQuant(type="int4", group_size=64, symmetric=False), inputs=(1152,), outputs=(1150,))
    plan = case.plan(None, True)
    layer, tensors = layer_of(plan, dtype=dtype)
    x = some_input(tokens, features=1152).to(dtype)
    expected, size = forward_by_hand(plan, tensors, x)
    assert_close(run_layer(weight_only.run, layer, x), expected, size * (1 + torch.finfo(dtype).eps / 2e-6))
