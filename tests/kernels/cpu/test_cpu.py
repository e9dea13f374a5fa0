"""The C++ kernels on every instruction set that this machine has, against float64."""

import numpy as np
import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels.base import Operands, Product, product_of
from hfquant.kernels.op import linear
from tests.kernels.products import (
    FLOAT_BLOCK,
    FLOAT_LIMIT,
    NAMES,
    WIDEST,
    Spec,
    bits_equal,
    kernel,
    odd_formats,
    sample,
)

__all__ = ["kernel", "odd_formats"]

INPUTS = ("token", "tensor", "static", "float")
#: Kinds of columns: segments and size of groups.
COLUMNS = {
    "1": ((1,), 0),
    "2": ((2,), 0),
    "31": ((31,), 0),
    "64": ((64,), 0),
    "129": ((129,), 0),
    "1000": ((1000,), 0),
    "16s": ((64,), 16),
    "16s, short last": ((203,), 16),
    "32s": ((512,), 32),
    "32s, odd": ((333,), 32),
    "48s": ((240,), 48),
    "48s, short last": ((250,), 48),
    "64s": ((320,), 64),
    "128s": ((640,), 128),
    "128s, short last": ((700,), 128),
    "192s": ((700,), 192),
    "one group": ((100,), 128),
    "segments": ((13, 11), 0),
    "segments of vectors": ((128, 256, 128), 0),
    "segments of one": ((1, 1, 5), 0),
    "16s in segments": ((64, 32), 16),
    "32s in uneven segments": ((50, 7, 96), 32),
    "64s in segments": ((128, 192), 64),
    "128s in segments": ((256, 384), 128),
}
TOKENS = (1, 2, 3, 7, 8, 9, 64)


def assert_exact(spec: Spec, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    made = sample(spec, tokens, dtype, seed)
    y = linear(made.x, made.operands, made.product, True)
    assert bits_equal(y, made.expected), (spec, tokens, dtype, (y.double() - made.expected.double()).abs().max())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_integer_parts_are_exact(kernel, odd_formats, bits, columns) -> None:
    segments, group = COLUMNS[columns]
    for i, tokens in enumerate(TOKENS):
        # Every pair of options and every option at every number of tokens comes up over bits and columns.
        turn = i + bits + list(COLUMNS).index(columns)
        for inputs in INPUTS:
            dual = 3 if inputs != "float" and turn % 3 == 0 and bits < 7 else 0
            spec = Spec(bits, segments, group, inputs, bool(turn % 2), bool(turn // 2 % 2), dual)
            assert_exact(spec, tokens, seed=turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_float_types_are_rounded_once(kernel, dtype) -> None:
    for bits in (4, 6, 8):
        for inputs in ("token", "tensor", "static"):
            for segments, group in (((96,), 0), ((96,), 16), ((70, 33), 32)):
                for tokens in (1, 5, 33):
                    assert_exact(Spec(bits, segments, group, inputs, out=50), tokens, dtype, tokens)


@pytest.mark.parametrize("input_bits", [4, 6])
def test_inputs_of_fewer_bits(kernel, input_bits) -> None:
    for inputs in ("token", "tensor", "static"):
        for dual in (0, 3):
            for segments, group in (((96,), 0), ((256,), 32), ((70, 33), 32)):
                for tokens in (1, 6, 20):
                    assert_exact(Spec(4, segments, group, inputs, dual=dual, input_bits=input_bits), tokens)


@pytest.mark.parametrize("out", [1, 2, 3, 4, 5, 15, 17, 47, 49, 101, 1000])
def test_any_number_of_rows(kernel, out) -> None:
    for bits in (4, 6, 8):
        for tokens in (1, 7, 11):
            assert_exact(Spec(bits, (200,), 0, "token", out=out), tokens)
            assert_exact(Spec(bits, (192,), 64, "token", True, True, out=out), tokens)
            assert_exact(Spec(bits, (192,), 32, "float", True, out=out), tokens)


@pytest.mark.parametrize("width", [511, 1024, 2047, 4096, 8191, 8192])
def test_wide_products(kernel, width) -> None:
    for bits in (4, 6, 8):
        for tokens in (1, 3, 17):
            assert_exact(Spec(bits, (width,), 0, "token", bits == 6), tokens)
            assert_exact(Spec(bits, (width,), 0, "static", bits == 4), tokens)
            assert_exact(Spec(bits, (width,), 128, "token", bits == 8), tokens)
            assert_exact(Spec(bits, (width,), 64, "float", True, True), tokens)


@pytest.mark.parametrize("tokens", [100, 257, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_tokens(kernel, tokens) -> None:
    for bits in (4, 8):
        assert_exact(Spec(bits, (640,), 0, "token", out=65), tokens)
        assert_exact(Spec(bits, (321,), 32, "tensor", True, out=65), tokens)
        assert_exact(Spec(bits, (320,), 64, "float", out=65), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_every_width(kernel, odd_formats, bits) -> None:
    for width in [*range(1, 300), *range(1000, 8193, 799)]:
        for inputs in ("token", "float"):
            for tokens in (1, 9):
                assert_exact(Spec(bits, (width,), 0, inputs, bool(width % 2), out=9), tokens, seed=width)
                assert_exact(Spec(bits, (width,), 16, inputs, not width % 2, out=9), tokens, seed=width)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 64, 300])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_every_combination(kernel, odd_formats, bits, columns, tokens) -> None:
    segments, group = COLUMNS[columns]
    for inputs in INPUTS:
        for asymmetric in (False, True):
            for two_level in (False, True):
                for dual in (0, 3) if inputs != "float" and bits < 7 else (0,):
                    spec = Spec(bits, segments, group, inputs, asymmetric, two_level, dual)
                    assert_exact(spec, tokens, seed=tokens)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_sums_do_not_overflow(kernel, bits, tokens) -> None:
    """The largest magnitudes there are, beyond what 32 bits hold: sums are cut, and both halves are equal floats."""
    half = 2 ** (bits - 1)
    for width in (WIDEST, 2 * WIDEST):
        for code, zero in ((-half, half - 1), (half - 1, -half)):
            spec = Spec(bits, (width,), 0, "token", asymmetric=True, out=3)
            made = sample(spec, tokens)
            fill, shift = (torch.full((3, width), code).to(torch.int8), torch.full((3, 1), zero).to(torch.int8))
            form = made.product.weight
            operands = Operands(form.pack(fill), torch.ones(3, 1), zero_point=form.pack(shift))
            for sign in (1, -1):
                y = linear(torch.full((tokens, width), 127.0 * sign), operands, made.product, True)
                assert (y == float(127 * sign * (code - zero) * width)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_long_codes_do_not_overflow(kernel, bits) -> None:
    """Input codes of 16 bits at their limits against weights at theirs: 127 * 2^8 where scales are dual, and floats."""
    half = 2 ** (bits - 1)
    for inputs, value in (("token", 127.0 * 2**8), ("float", float(FLOAT_LIMIT))):
        for width in (128, 512):
            spec = Spec(bits, (width,), 0, inputs, asymmetric=True, dual=0 if inputs == "float" else 8, out=3)
            product = spec.product()
            form = product.weight
            fill = torch.full((3, width), -half).to(torch.int8)
            zero = form.pack(torch.full((3, 1), half - 1).to(torch.int8))
            operands = Operands(form.pack(fill), torch.ones(3, 1), zero_point=zero)
            for tokens in (1, 9):
                y = linear(torch.full((tokens, width), value), operands, product, True)
                exact = value * -(2 * half - 1) * width
                # The integer parts are exact, sums of them are floats: within an ulp for each of a row's 128s.
                assert ((y.double() - exact).abs() <= abs(exact) * 2**-23).all()


# How inputs come.


def test_strided_and_nested_inputs(kernel) -> None:
    for spec in (Spec(8, (96,)), Spec(4, (96,), 32, "tensor", True), Spec(6, (96,), 0, "float")):
        made = sample(spec, 24)
        x, expected = made.x, made.expected

        def run(x, made=made):
            return linear(x, made.operands, made.product, True)

        assert bits_equal(run(x.view(2, 3, 4, 96)), expected.view(2, 3, 4, -1))
        assert bits_equal(run(x.T.contiguous().T), expected)
        assert bits_equal(run(x.view(4, 6, 96).transpose(0, 1)), expected.view(4, 6, -1).transpose(0, 1))
        padded = torch.full((24, 200), torch.nan)
        padded[:, 3:195:2] = x
        assert bits_equal(run(padded[:, 3:195:2]), expected)
        assert bits_equal(run(padded.unflatten(0, (2, 12))[:, :, 3:195:2]), expected.view(2, 12, -1))
        assert bits_equal(run(x[:1].expand(5, 96)), expected[:1].expand(5, -1))
        if spec.input != "tensor":
            assert bits_equal(run(x[::2]), expected[::2])
            assert bits_equal(run(x[5]), expected[5])
        for lead in ((0,), (0, 3), (2, 0, 3)):
            assert run(x.new_zeros(*lead, 96)).shape == (*lead, spec.out)


def identity(width: int, segments: tuple[int, ...], rule: InputRule) -> tuple[Operands, Product]:
    """The product that gives back a quantized input."""
    product = Product(FORMATS["int8"], segments, segments, rule)
    return Operands(torch.eye(width, dtype=torch.int8), torch.ones(width, len(segments))), product


def near_ties(scale: torch.Tensor, limit: int) -> torch.Tensor:
    """Inputs [3, 2 limit + 6] halfway between two codes times ``scale``, and one ulp beside that."""
    middle = (torch.arange(-limit - 3, limit + 3) + 0.5) * scale
    away = torch.full_like(middle, torch.inf)
    return torch.stack([middle, middle.nextafter(away), middle.nextafter(-away)])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_the_input_are_those_of_its_rule(kernel, bits) -> None:
    form = FORMATS[f"int{bits}"]
    limit = int(form.qmax)
    width = 2 * limit + 6
    for scale in [1.0, 1 / 3, 0.1, 7.77e-5, 1e-30, 3e30, 2.0**-126, *torch.rand(20).tolist()]:
        x = near_ties(torch.tensor(scale), limit)
        x = torch.cat([x, torch.randn(3, width) * scale * limit / 2])
        static = InputRule(form, False, False, (width,), (False,))
        for rule, given in ((static, torch.tensor([scale])), (InputRule(form, True, True, (width,), (False,)), None)):
            if given is None:
                x = torch.cat([x.clamp(-limit * scale, limit * scale), torch.full((len(x), 1), limit * scale)], 1)[
                    :, -width:
                ]
            operands, product = identity(width, (width,), rule)
            operands = operands._replace(input_scale=given)
            values, found = rule.quantize(x, given)
            assert bits_equal(linear(x, operands, product, True), values * found), (scale, rule)
            assert bits_equal(linear(x.repeat(2, 1), operands, product, True), (values * found).repeat(2, 1))


@pytest.mark.parametrize("dynamic", ["token", "tensor", "static"])
def test_codes_of_dual_scales_and_segments(kernel, dynamic) -> None:
    form, segments = FORMATS["int8"], (100, 31, 69)
    for dual in ((True, True, True), (True, False, True), (False, False, False)):
        rule = InputRule(form, dynamic != "static", dynamic == "token", segments, dual)
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.nn.functional.silu(torch.randn(12, 200) * 4) * 10.0 ** torch.randint(-9, 9, (1,))
            x[3] = x[3].abs()
            x[4] = -x[4].abs()
            x[5, :100] = 0
            given = torch.tensor([0.03, 0.02, 0.05]) * x.abs().max() / 10
            fine = torch.where(torch.tensor(dual), given / 2.0 ** torch.tensor([0, 3, 8]), given)
            scales = (given, fine if any(dual) else None) if dynamic == "static" else (None, None)
            operands, product = identity(200, segments, rule)
            operands = operands._replace(input_scale=scales[0], input_scale_neg=scales[1])
            values, found = rule.quantize(x, *scales)
            expected = values * torch.repeat_interleave(found, torch.tensor(segments), -1)
            assert bits_equal(linear(x, operands, product, True), expected), (dual, seed)
            if dynamic != "tensor":
                assert bits_equal(linear(x[:5], operands, product, True), expected[:5])


# Weight-only products: floats as integers of 16 bits.


def float_error(x: torch.Tensor, spec: Spec) -> float:
    """Largest error of an output as a share of the norms of its token and its row."""
    made = sample(spec, 1)
    product, operands = made.product, made.operands._replace(bias=None)
    weight = operands.grid(product).dequantize(operands.codes(product)).double()
    y = linear(x, operands, product, True).double()
    norms = x.double().norm(dim=1)[:, None] * weight.norm(dim=1)
    return float(((y - x.double() @ weight.T).abs() / norms.clamp(min=1e-300)).max())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weight_only_error(kernel, bits) -> None:
    for spec in (Spec(bits, (1000,), 0, "float"), Spec(bits, (1000,), 64, "float", True, True)):
        for seed in range(6):
            torch.manual_seed(seed)
            x = torch.randn(11, 1000)
            x[1] *= 10.0 ** torch.randint(-20, 20, (1000,))
            x[2, seed * 100] = 1e6
            x[3, ::128] = 1e4
            x[4] = torch.where(torch.rand(1000) < 0.1, 1e3, 1e-3)
            x[5] *= 1e-30
            x[6] *= 1e30
            x[7] = x[7].exp() ** 4
            x[8, ::2] = 0
            for tokens in (x, x[:5], x[5:9]):
                assert float_error(tokens, spec) < 1e-4


def test_weight_only_error_at_its_worst(kernel) -> None:
    """All that is lost adds up: 127 values just below half a step beside one outlier, times weights of one sign."""
    step = 1 / FLOAT_LIMIT
    x = torch.full((1, FLOAT_BLOCK), 0.499 * step)
    x[0, 0] = 1
    product = Spec(8, (FLOAT_BLOCK,), 0, "float", out=1).product()
    operands = Operands(torch.full((1, FLOAT_BLOCK), 127, dtype=torch.int8), torch.ones(1, 1))
    lost = float((x.double().sum() * 127 - linear(x, operands, product, True).double()).abs())
    share = lost / (float(x.double().norm()) * 127 * FLOAT_BLOCK**0.5)
    assert share <= 0.5 * FLOAT_BLOCK**0.5 * step


def test_zeros_stay_zero_beside_outliers(kernel) -> None:
    made = sample(Spec(4, (512,), 32, "float", True), 9)
    operands = made.operands._replace(bias=None)
    assert not linear(torch.zeros(9, 512), operands, made.product, True).any()
    x = torch.zeros(9, 512)
    x[:, 200] = 1e5
    weight = operands.grid(made.product).dequantize(operands.codes(made.product))
    np.testing.assert_allclose(linear(x, operands, made.product, True), (1e5 * weight[:, 200]).expand(9, -1), rtol=1e-6)


# What is not a number, or hardly one.

KINDS = [
    Spec(8, (200,)),
    Spec(8, (200,), 0, "static"),
    Spec(4, (256,), 32, "token", True, True),
    Spec(4, (50, 70), 32, "static", True),
    Spec(6, (64, 128), 0, "token", dual=3),
    Spec(4, (200,), 0, "static", dual=3),
    Spec(8, (300,), 0, "float"),
    Spec(4, (256,), 64, "float", True, True),
]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_that_is_no_number_spoils_itself_alone(kernel, bad, dtype) -> None:
    for spec in KINDS:
        for tokens in (3, 12):
            made = sample(spec, tokens)
            x = (made.x / 100).to(dtype)
            clean = linear(x, made.operands, made.product, True)
            assert clean.isfinite().all()
            for column in (0, 1, x.shape[1] // 2, x.shape[1] - 1):
                spoiled = x.clone()
                spoiled[1, column] = bad
                y = linear(spoiled, made.operands, made.product, True)
                assert y[1].isnan().all(), spec
                others = torch.arange(tokens) != 1
                assert bits_equal(y[others], clean[others]), spec
    made = sample(Spec(8, (64,), 0, "tensor"), 5)
    x = made.x.to(dtype)
    x[1, 3] = bad
    assert linear(x, made.operands, made.product, True).isnan().all()


def test_inputs_at_the_ends_of_float32(kernel) -> None:
    extremes = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 1e-30, 3e38, -3e38, torch.finfo(torch.float32).max]
    for spec in [*KINDS, Spec(8, (64,), 0, "tensor"), Spec(8, (200,), 16, "tensor", dual=8)]:
        made = sample(spec, 1)
        operands = made.operands._replace(scale=made.operands.scale if spec.two_level else made.operands.scale * 2**-14)
        if spec.two_level:
            operands = operands._replace(scale_row=operands.scale_row * 2**-14)
        weight = operands.grid(made.product).dequantize(operands.codes(made.product)).double()
        for value in extremes:
            for tokens in (1, 10):
                x = torch.full((tokens, weight.shape[1]), value)
                x[:, ::3] = 0
                x[:, 1::3] *= -0.5
                y = linear(x, operands, made.product, True)
                values, scale = operands.quantized_input(x, made.product)
                if scale is not None:
                    values = values.double() * torch.repeat_interleave(scale, torch.tensor(spec.segments), -1)
                expected = (
                    values.double() @ weight.T + operands.bias
                    if operands.bias is not None
                    else (values.double() @ weight.T)
                )
                size = values.double().abs() @ weight.abs().T + (
                    operands.bias.abs() if operands.bias is not None else 0
                )
                assert y.isfinite().all(), (spec, value)
                share = 2e-4 if spec.input == "float" else 3e-7
                assert ((y.double() - expected).abs() <= share * size + 1e-38).all(), (spec, value)


def test_denormal_inputs_beside_others(kernel) -> None:
    rule = InputRule(FORMATS["int8"], True, True, (64,), (False,))
    operands, product = identity(64, (64,), rule)
    for scale in (1e-45, 1e-42, 1e-38, 1e-37, 1e-36):
        x = torch.randn(9, 64) * scale
        values, found = rule.quantize(x)
        assert bits_equal(linear(x, operands, product, True), values * found)


def test_every_kernel_gives_the_same(monkeypatch) -> None:
    """Random scales too: sums of floats may differ in their last bits, nothing else."""
    for spec in (Spec(8, (300,)), Spec(4, (256,), 32, "token", True), Spec(6, (70, 90), 0, "static", dual=4)):
        made = sample(spec, 12)
        operands = made.operands._replace(scale=torch.rand_like(made.operands.scale) + 0.5)
        x = torch.nn.functional.silu(torch.randn(12, made.product.in_features) * 3)
        results = []
        for name in (*NAMES, "reference"):
            if name != "reference" and product_missing(name):
                continue
            monkeypatch.setenv("HFQUANT_KERNEL", name)
            results.append(linear(x, operands, product_of(made.product.key), True))
        for y in results[:-1]:
            bound = results[-1].abs().max()
            assert ((y - results[-1]).abs() <= 1e-6 * bound).all()


def product_missing(name: str) -> str:
    from hfquant.kernels import table

    return table.KERNELS[name].missing()
