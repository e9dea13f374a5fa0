"""Integer weights times many bf16 inputs: weights are rounded to bfloat16 if the CPU multiplies that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfquant.algorithms import Identity, Transform
from hfquant.algorithms.low_rank import LowRank
from hfquant.algorithms.smooth import Smooth
from hfquant.kernels.op import linear
from hfquant.layer_config import WeightQuant
from tests.kernels.cpu.test_cpu import COLUMNS
from tests.kernels.products import Spec, bits_equal, kernel, require, sample
from tests.nn.linear_cases import Case, forward_by_hand, layer_of, some_input

__all__ = ["kernel"]

#: At least as many tokens as take bfloat16 products.
TOKENS = (64, 77, 130)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_of_numbers_that_bfloat16_holds_are_exact(bits, columns, monkeypatch) -> None:
    """Nothing is rounded: codes less zero points have at most 8 bits, and scales are powers of two."""
    require("avx512_bf16")
    monkeypatch.setenv("HFQUANT_KERNEL", "avx512_bf16")
    segments, group = COLUMNS[columns]
    for turn, tokens in enumerate(TOKENS):
        for asymmetric in (False, True)[: 2 if bits < 8 else 1]:
            spec = Spec(bits, segments, group, "float", asymmetric, bool(turn % 2), out=37 + 60 * (turn % 2))
            made = sample(spec, tokens, torch.bfloat16, turn)
            y = linear(made.x, made.operands, made.product, True)
            assert bits_equal(y, made.expected), (spec, tokens)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("transform", [Identity(), Smooth(), LowRank(low_rank=5)])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_outputs_are_those_of_weights_and_inputs_in_bfloat16(kernel, bits, transform: Transform) -> None:
    for group, inputs in ((32, (160, 96)), (48, (250,)), (None, (77,))):
        weight = WeightQuant(type=f"int{bits}", group_size=group, symmetric=False)
        layer, tensors = layer_of(Case(weight, transform, inputs, (101,)).plan(None, real=True), dtype=torch.bfloat16)
        for tokens in (8, *TOKENS):
            x = some_input(tokens, features=sum(inputs)).bfloat16()
            expected, size = forward_by_hand(layer.plan, tensors, x.float())
            error = np.abs(layer(x).double().numpy() - expected)
            # The output is rounded, and so are, independently, the factors of each product.
            assert (error <= 2**-8 * np.abs(expected) + 2**-9 * size).all()
            assert error.mean() <= 2**-9 * np.abs(expected).mean() + 2**-11 * size.mean()


@pytest.mark.parametrize("weight", ["int3", "int4", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_nan_and_spoils_no_other_token(kernel, weight, value) -> None:
    layer, _ = layer_of(Case(WeightQuant(type=weight, group_size=16), inputs=(96,)).plan(None, real=True))
    layer = layer.bfloat16()
    x = some_input(70, features=96).bfloat16()
    expected = layer(x)
    x[33, 50] = value
    y = layer(x)
    assert y[33].isnan().all()
    rest = torch.arange(70) != 33
    assert torch.equal(y[rest], expected[rest])
