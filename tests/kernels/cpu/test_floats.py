"""The C++ kernels beyond integer codes: weight-only products, other formats, and inputs such as NaN."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hfquant.algorithms import Identity
from hfquant.algorithms.low_rank import LowRank
from hfquant.formats import FORMATS, FloatFormat, InputRule
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.op import linear
from hfquant.kernels.table import KERNELS, obstacle
from hfquant.layer_config import InputQuant, WeightQuant
from tests import oracle
from tests.kernels.products import FLOAT_BLOCK, FLOAT_LIMIT, Spec, bits_equal, identity, kernel, sample
from tests.nn.linear_cases import Case, assert_close, cases, forward_by_hand, layer_of, some_input

__all__ = ["kernel"]

#: With this many tokens, several panels of floats run at once; twice as many exceed what is processed together.
MANY = 512

# Weight-only products: floats as 16-bit integers.


def float_error(x: torch.Tensor, spec: Spec) -> float:
    """Return the largest output error relative to the norms of its token and its row."""
    made = sample(spec, 1)
    product, operands = made.product, made.operands._replace(bias=None)
    weight = operands.grid(product).dequantize(operands.codes(product)).double()
    y = linear(x, operands, product, True).double()
    norms = x.double().norm(dim=1)[:, None] * weight.norm(dim=1)
    return float(((y - x.double() @ weight.T).abs() / norms.clamp(min=1e-300)).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
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
    """All errors add up: 127 values just below half a step beside one outlier, times weights of one sign."""
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


# NaN, infinities and extreme values.

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
                bias = torch.zeros(spec.out) if operands.bias is None else operands.bias
                expected, size = values.double() @ weight.T + bias, values.double().abs() @ weight.abs().T + bias.abs()
                assert y.isfinite().all(), (spec, value)
                share = 3e-5 if spec.input == "float" else 3e-7
                assert ((y.double() - expected).abs() <= share * size + 1e-38).all(), (spec, value)


def test_denormal_inputs_beside_others(kernel) -> None:
    rule = InputRule(FORMATS["int8"], True, True, (64,), (False,))
    operands, product = identity(64, (64,), rule)
    for scale in (1e-45, 1e-42, 1e-38, 1e-37, 1e-36):
        x = torch.randn(9, 64) * scale
        values, found = rule.quantize(x)
        assert bits_equal(linear(x, operands, product, True), values * found)


# Layers of every plan, with arbitrary scales: sums of floats differ in their last bits.


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", FORMATS)
def test_layers_against_float64(kernel, dtype) -> None:
    static, token = InputQuant(), InputQuant(dynamic=True, axis=-1)
    for name, case in cases(dtype).items():
        for quant in (static, token, InputQuant(dynamic=True), InputQuant(type="int4", dynamic=True), None):
            plan = case.plan(quant, real=True)
            layer, tensors = layer_of(plan)
            if obstacle(KERNELS[kernel], layer.product, "cpu"):
                assert (dtype, plan.config.weight_quant.symmetric) == ("int16", False), name
                continue
            for tokens in (1, 3, 12):
                x = some_input(tokens)
                expected, size = forward_by_hand(plan, tensors, x)
                y = layer(x)
                if quant is None and dtype in ("int4", "int6", "int8"):
                    error = np.linalg.norm(y.double().numpy() - expected, axis=-1)
                    assert (error <= 1e-4 * np.linalg.norm(expected, axis=-1)).all(), name
                else:
                    assert_close(y, expected, size)


@pytest.mark.parametrize("dtype", ["fp8e4m3", "fp8e5m2", "fp16", "bf16", "int16"])
def test_every_code_of_other_formats(kernel, dtype) -> None:
    """Each code times one, including NaN and infinities: the output is the code's value."""
    form = FORMATS[dtype]
    if form.is_integer:
        codes = torch.arange(-(2**15), 2**15).to(torch.int16)
        values = codes.double()
    else:
        values = torch.from_numpy(oracle.decode(dtype))
        codes = torch.from_numpy(np.arange(len(values)).astype(f"u{form.code_dtype.itemsize}")).view(form.code_dtype)
    for tokens, step in ((1, 1), (9, 1), (MANY, 1 if len(codes) == 256 else 31)):
        part = codes[::step, None].contiguous()
        scale = torch.ones(len(part), 1) if form.has_scale else None
        y = linear(torch.ones(tokens, 1), Operands(part, scale), Product(form, (1,), (1,), None), True)
        np.testing.assert_array_equal(y, values[::step].float().expand(tokens, -1))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("weight", "inputs"), [("fp8e4m3", "fp8e4m3"), ("fp8e5m2", "fp8e4m3"), ("fp8e4m3", None), ("fp16", None)]
)
def test_many_tokens_in_panels(kernel, weight, inputs) -> None:
    """Rows, tokens and columns that are no multiple of any panel, tile or piece, against float64."""
    if inputs:
        quant, branch, dtype = InputQuant(type="fp8e4m3", dynamic=True, axis=-1), LowRank(low_rank=5), torch.float32
    else:
        quant, branch, dtype = None, Identity(), torch.bfloat16
    group = 48 if FORMATS[weight].has_scale else None
    case = Case(WeightQuant(type=weight, group_size=group), branch, inputs=(600, 101), outputs=(601,))
    plan = case.plan(quant, real=True)
    layer, tensors = layer_of(plan)
    x = some_input(2 * MANY + 9, features=701).to(dtype)
    expected, size = forward_by_hand(plan, tensors, x.float())
    with torch.inference_mode():
        nested = layer(x.view(1, 2 * MANY + 9, -1))[0]
    for y in (layer(x), nested):
        if dtype == torch.float32:
            assert_close(y, expected, size)
        else:
            assert np.abs(y.double().numpy() - expected).max() <= 2**-8 * np.abs(expected).max()


@pytest.mark.parametrize("weight", ["fp8e4m3", "fp8e5m2", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_without_a_number_do_not_stay_in_scratch_memory(kernel, weight, dtype) -> None:
    """An odd number of columns is padded; what a layer with NaN left there must not count."""
    form = FORMATS[weight]
    for columns, value in ((8, torch.nan), (7, 1.0)):
        codes = form.quantize(torch.full((40, columns), value), torch.ones(1))
        operands = Operands(codes, torch.ones(40, 1) if form.has_scale else None)
        product = Product(form, (columns,), (columns,), None)
        y = linear(torch.ones(20, columns, dtype=dtype), operands, product, True)
        torch.testing.assert_close(y, torch.full((20, 40), value * columns, dtype=dtype), equal_nan=True)


def test_many_tokens_from_several_threads(kernel) -> None:
    layers = []
    for dtype in ("fp8e4m3", "fp16", "int16"):
        layer, _ = layer_of(Case(WeightQuant(type=dtype), inputs=(300,), outputs=(70,)).plan(None, real=True))
        layers.append((layer, some_input(MANY, features=300)))
    expected = [layer(x) for layer, x in layers]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for y, found in zip(expected, pool.map(lambda pair: pair[0](pair[1]), layers), strict=True):
                torch.testing.assert_close(found, y)


# FP8 inputs, rounded natively, and the low-rank branch.

FP8 = ["fp8e4m3", "fp8e5m2"]


def fp8_identity(dtype: str, rule: InputRule) -> tuple[Operands, Product]:
    """Return the product with FP8 weights that reproduces its quantized input."""
    form, (width,) = FORMATS[dtype], rule.segments
    codes = form.quantize(torch.eye(width), torch.ones(1))
    return Operands(codes, torch.ones(width, 1)), Product(form, rule.segments, rule.segments, rule)


def patterns(form: FloatFormat) -> torch.Tensor:
    """Return every finite bfloat16 and float16, random float32, and values near the midpoints of the format."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = torch.from_numpy(oracle.decode(form.name)).float()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-torch.inf, torch.inf)]
    random = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32).view(torch.float32)
    x = torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float(), random, values, middles, *near])
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_inputs_are_rounded_as_torch_casts_them(kernel, dtype) -> None:
    form = FORMATS[dtype]
    operands, product = fp8_identity(dtype, InputRule(form, False, False, (128,), (False,)))
    operands = operands._replace(input_scale=torch.ones(1))
    x = torch.nn.functional.pad(patterns(form), (0, 127))
    x = x[: len(x) // 128 * 128].view(-1, 128)
    expected = x.clamp(-form.qmax, form.qmax).to(form.dtype).float()
    assert torch.equal(linear(x, operands, product, True), expected)
    for start in range(0, len(x), 97):
        few = slice(start, start + 3)
        assert torch.equal(linear(x[few], operands, product, True), expected[few])


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("kind", ["token", "tensor", "static"])
def test_fp8_inputs_with_scales(kernel, dtype, kind) -> None:
    """Quotients for any scale, including midpoints between two values: results match those of InputRule."""
    form = FORMATS[dtype]
    rule = InputRule(form, kind != "static", kind == "token", (200,), (False,))
    operands, product = fp8_identity(dtype, rule)
    if kind == "static":
        operands = operands._replace(input_scale=torch.tensor([0.0123]))
    for tokens in (1, 5, MANY):
        for scale in (1e-40, 1e-30, 0.3, 1e30):
            x = torch.randn(tokens, 200) * scale
            x[0] = form.snap(x[0] / 0.0123) * 0.0123 if kind == "static" else x[0].bfloat16()
            values, found = rule.quantize(x, operands.input_scale)
            assert torch.equal(linear(x, operands, product, True), values * found), (tokens, scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_fp8_inputs_that_are_no_numbers(kernel, bad) -> None:
    form = FORMATS["fp8e4m3"]
    for dynamic, per_token in ((True, True), (True, False), (False, False)):
        operands, product = fp8_identity("fp8e4m3", InputRule(form, dynamic, per_token, (40,), (False,)))
        operands = operands if dynamic else operands._replace(input_scale=torch.ones(1))
        for tokens in (3, 12, MANY):
            x = torch.randn(tokens, 40)
            clean = linear(x, operands, product, True)
            x[1, 7] = bad
            y = linear(x, operands, product, True)
            shared = dynamic and not per_token
            assert y[1].isnan().all()
            assert y.isnan().all() if shared else torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", ["fp8e4m3", "fp8e5m2", "bf16", "fp16", "int16"])
def test_layers_with_fp8_inputs_against_float64(kernel, dtype) -> None:
    quants = [InputQuant(type="fp8e4m3", dynamic=True, axis=-1), InputQuant(type="fp8e5m2")]
    for case in cases(dtype).values():
        if not case.weight.symmetric:
            continue
        for quant in quants:
            plan = case.plan(quant, real=True)
            layer, tensors = layer_of(plan)
            for tokens in (1, 3, 12):
                x = some_input(tokens)
                expected, size = forward_by_hand(plan, tensors, x)
                assert_close(layer(x), expected, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["int4", "int8", "fp8e4m3"])
def test_branch_of_low_rank(kernel, weight, dtype) -> None:
    """Zero codes leave only the branch, which is computed in float32 from factors in the model's dtype."""
    form = FORMATS[weight]
    for rank, width, out in ((1, 7, 5), (16, 64, 48), (33, 130, 101), (64, 300, 70)):
        rule = None if weight == "fp8e4m3" else InputRule(FORMATS["int8"], True, True, (width,), (False,))
        product = Product(form, (width,), (width,), rule)
        codes = form.pack(torch.zeros(out, width, dtype=torch.int8))
        down, up = torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype)
        operands = Operands(codes, torch.ones(out, 1), divisor=torch.rand(width) + 0.5, down=down, up=up)
        for tokens in (1, 2, 7, 8, 9, 150, MANY):
            x = torch.randn(tokens, width).to(dtype)
            y = linear(x, operands, product, True).double()
            a, b, c = x.double(), down.double(), up.double()
            size = (a.abs() @ b.abs().T) @ c.abs().T
            share = 2e-6 + torch.finfo(dtype).eps * (dtype != torch.float32)
            assert ((y - (a @ b.T) @ c.T).abs() <= share * size).all(), (rank, tokens)
