"""A product as an object and as text, and what it derives from its tensors."""

import json
import pickle

import numpy as np
import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels.base import Operands, Product, product_of
from hfquant.layer_config import InputQuant
from tests.kernels.products import Spec, sample
from tests.nn.linear_cases import cases, layer_of

INT8 = FORMATS["int8"]
PRODUCT = Product(INT8, (16, 16, 8), (32, 8), InputRule(INT8, True, True, (32, 8), (True, False)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("quant", [None, InputQuant(), InputQuant(dynamic=True), InputQuant(dynamic=True, axis=-1)])
def test_text_and_back(dtype, quant) -> None:
    for name, case in cases(dtype).items():
        product = layer_of(case.plan(quant))[0].product
        again = product_of(product.key)
        # Flags are omitted if all are off.
        assert (again, again.key, again.in_features) == (product, product.key, 24), name
        assert product_of(product.key) is again


def test_text_is_short_where_there_are_many_groups() -> None:
    product = Product(INT8, (32,) * 4096, (131072,), None)
    assert len(product.key) < 100
    assert product_of(product.key).columns == product.columns


def broken(**changes: object) -> str:
    return json.dumps({k: v for k, v in (json.loads(PRODUCT.key) | changes).items() if v != "left out"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "int8",
        "[" * 20000,
        broken(weight="int9"),
        broken(weight="left out"),
        broken(weight=None),
        broken(weight=["int8"]),
        broken(input="int9"),
        broken(input=8),
        broken(dynamic="left out"),
        broken(per_token="left out"),
        broken(columns="left out"),
        broken(columns=[]),
        broken(columns=[16, 16, 8]),
        broken(columns=[[16, 2]]),
        broken(columns=[[40, 1]]),
        broken(columns=[[16, 2], [8, 2]]),
        broken(columns=[[16, 2], [-8, -1]]),
        broken(columns=[[0, 5], [16, 2], [8, 1]]),
        broken(columns=[[8, 3], [16, 1]]),
        broken(columns=[[16, 2, 1], [8, 1]]),
        broken(columns=[["x", 2], [8, 1]]),
        broken(columns=[[1, 10**15]]),
        broken(columns=[[16, float("inf")], [8, 1]]),
        broken(segments="left out"),
        broken(segments=[]),
        broken(segments=[40, 0]),
        broken(segments=[48, -8]),
        broken(segments=[20, 20]),
        broken(segments=40),
        broken(segments=[32, float("nan")]),
        broken(dual=[True]),
        broken(dual=[True, True, True]),
        broken(dual=True),
    ],
)
def test_any_other_text_is_refused(text) -> None:
    with pytest.raises(ValueError, match="not a quantized product"):
        product_of(text)


def test_rows_of_operands() -> None:
    layer, _ = layer_of(cases("int4")["all at once"].plan(InputQuant()))
    operands = layer.operands(1, slice(3, 10))
    part = operands.rows(slice(2, 5))
    for name in ("weight", "scale", "scale_row", "zero_point", "up", "bias"):
        assert torch.equal(getattr(part, name), getattr(operands, name)[2:5])
    for name in ("input_scale", "input_scale_neg", "divisor", "down"):
        assert getattr(part, name) is getattr(operands, name)
    assert Operands(operands.weight).rows(slice(0, 1)).scale is None


def test_codes_and_grid_of_operands() -> None:
    for case in ("asymmetric", "float32 scales", "group", "channel"):
        layer, tensors = layer_of(cases("int6")[case].plan(None))
        operands = layer.operands(0, slice(None))
        assert torch.equal(operands.codes(layer.product), tensors["weight"])
        assert torch.equal(operands.grid(layer.product).dequantize(tensors["weight"]), layer.dequantize())


def test_the_float_branch_acts_on_the_raw_input() -> None:
    made = sample(Spec(8, (64,), 32, "static"), 5)
    x, down, up, bias = torch.randn(5, 64), torch.randn(3, 64), torch.randn(37, 3), torch.randn(37)
    operands = Operands(made.operands.weight, divisor=torch.rand(64) + 0.5, down=down.half(), up=up, bias=bias.half())
    expected = x.double() @ down.half().double().T @ up.double().T + bias.half().double()
    y = torch.randn(5, 37)
    np.testing.assert_allclose(operands.added(x, y), expected + y.double(), rtol=1e-5, atol=1e-5)
    assert operands._replace(down=None, up=None, bias=None).added(x, y) is y
    values, scale = operands.quantized_input(x, Product(INT8, (64,), (64,), None))
    assert scale is None
    assert torch.equal(values, x / operands.divisor)


def test_hash_is_that_of_equal_products_in_every_process() -> None:
    again = pickle.loads(pickle.dumps(PRODUCT))
    assert again is not PRODUCT
    assert again == PRODUCT
    assert hash(again) == hash(PRODUCT) == hash(product_of(PRODUCT.key))
    # A hash that was stored would be one of another process.
    assert not any(value == hash(PRODUCT) for value in vars(PRODUCT).values())
