"""Inputs that kernels divide and rotate themselves, against the same operations done beforehand.

Divisors are powers of two and inputs are small integers, so blocks whose size is a power of four are exact in float32,
in any order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfquant.formats import FORMATS, InputRule
from hfquant.formats.rotation import rotated
from hfquant.kernels import reference
from hfquant.kernels.base import Operands, Product, product_of
from hfquant.kernels.op import linear
from tests.kernels.products import kernel

__all__ = ["kernel"]

#: Widths with blocks of 64, 16, 4 and a leftover channel, and widths on either side of a vector.
WIDTHS = [85, 64, 320, 16, 5, 1]


def whole_numbers(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randint(-50, 51, (tokens, width), generator=generator).to(dtype)


def divisor_of(width: int) -> Tensor:
    return torch.exp2(torch.arange(width) % 5 - 2.0)


def product_with(form: str, inputs: str | None, width: int, rotation: int) -> Product:
    rule = None if inputs is None else InputRule(FORMATS[inputs], True, True, (width,), (False,))
    return Product(FORMATS[form], (width,), (width,), rule, rotation=rotation)


def identity(form: str, width: int) -> Operands:
    codes = FORMATS[form].quantize(torch.eye(width), torch.ones(width, 1) if FORMATS[form].has_scale else None)
    scale = torch.ones(width, 1) if FORMATS[form].has_scale else None
    return Operands(FORMATS[form].pack(codes), scale, divisor=divisor_of(width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("inputs", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_rotated_input(kernel: str, inputs: str, dtype: torch.dtype, width: int) -> None:
    for rotation in (64, 16, 4):
        product = product_with("int8", inputs, width, rotation)
        for tokens in (1, 9, 300):
            x, operands = whole_numbers(tokens, width, dtype), identity("int8", width)
            exact = rotated(x.double() / operands.divisor, rotation)
            assert torch.equal(exact.float().double(), exact)
            assert product.input is not None
            values, scale = product.input.quantize(exact.float())
            assert scale is not None
            found = linear(x, operands, product, True)
            assert torch.equal(found, (values * scale).to(dtype))
            assert torch.equal(found, reference.run(x, operands, product))


@pytest.mark.parametrize("form", ["int8", "int4", "fp8e4m3", "fp16", "int16"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 2e-4), (torch.bfloat16, 2**-8)])
def test_floats_are_rotated(kernel: str, form: str, width: int, dtype: torch.dtype, share: float) -> None:
    for tokens in (1, 9, 600):
        x, operands = whole_numbers(tokens, width, dtype), identity(form, width)
        exact = rotated(x.double() / operands.divisor, 64)
        found = linear(x, operands, product_with(form, None, width, 64), True).double()
        assert (found - exact).abs().max() <= share * exact.abs().max()


@pytest.mark.parametrize("inputs", ["fp8e4m3", "fp16"])
def test_other_inputs_are_rotated_once(kernel: str, inputs: str) -> None:
    x, operands = whole_numbers(9, 85), identity("fp8e4m3", 85)
    product = product_with("fp8e4m3", inputs, 85, 16)
    expected = reference.run(x, operands, product)
    torch.testing.assert_close(linear(x, operands, product, True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", [2, 8, 32, 128, 4096])
def test_any_power_of_two(kernel: str, rotation: int) -> None:
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    product, operands = product_with("int8", None, 300, rotation), identity("int8", 300)
    exact = rotated(x.double() / operands.divisor, rotation)
    found = linear(x, operands, product, True)
    assert (found.double() - exact).norm() < 1e-4 * exact.norm()


def test_nan_and_infinity_stay_in_their_tokens(kernel: str) -> None:
    x, operands = whole_numbers(9, 85), identity("int8", 85)
    x[2, 3], x[5, 70], x[7, 84] = torch.nan, torch.inf, -torch.inf
    for inputs in ("int8", None):
        found = linear(x, operands, product_with("int8", inputs, 85, 16), True)
        bad = torch.tensor([2, 5, 7])
        assert found[[i for i in range(9) if i not in bad]].isfinite().all()
        assert found[bad].isnan().any(1).all()
        assert not (inputs == "int8" and found[bad].isfinite().any())


def test_the_product_as_text_says_so() -> None:
    product = product_with("int8", "int8", 64, 32)
    assert product_of(product.key) == product
    assert product.unrotated == replace(product, rotation=0) == product_of(product.unrotated.key)
    assert product.unrotated.unrotated is product.unrotated
    for size in (3, -2, 8192):
        with pytest.raises(ValueError, match=f"blocks of {size} channels cannot be rotated"):
            product_of(product.key.replace('"rotation":32', f'"rotation":{size}'))


@pytest.mark.parametrize("largest", [1e3, 1e18, 1e30])
def test_quotients_are_those_of_a_division(kernel: str, largest: float) -> None:
    """For many tokens, kernels use reciprocals, with the bits of a division; odd widths end in a plain division."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = 333, 500
    product, operands = product_with("fp16", None, width, 0), identity("fp16", width)
    for _ in range(3):
        powers = torch.rand(width, generator=generator, dtype=torch.float64) * 2 - 1
        divisor = (largest**powers).float()
        x = torch.randn(tokens, width, generator=generator)
        # Quotients as close as possible to the midpoint of two floats: their numerators are products.
        near = (torch.rand(tokens, width, generator=generator) + 1) * divisor
        for given in (x, near, near.nextafter(torch.tensor(torch.inf))):
            found = linear(given, operands._replace(divisor=divisor), product, True)
            assert torch.equal(found, given / divisor)


def test_infinite_quotients_are_no_numbers(kernel: str) -> None:
    operands = identity("int8", 64)._replace(divisor=torch.full((64,), 0.25))
    x = whole_numbers(9, 64)
    expected = linear(x, operands, product_with("int8", "int8", 64, 0), True)
    x[2, 5], x[4, 0], x[7, 63] = torch.inf, torch.nan, 3e38
    found = linear(x, operands, product_with("int8", "int8", 64, 0), True)
    bad = torch.tensor([2, 4, 7])
    assert found[bad].isnan().all()
    kept = torch.tensor([0, 1, 3, 5, 6, 8])
    assert torch.equal(found[kept], expected[kept])
