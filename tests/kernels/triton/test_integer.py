"""Products of integer codes: all layers against float64, extreme codes bit for bit against the reference."""

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels import reference
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.triton import integer
from hfquant.layer_config import InputQuant, WeightQuant
from tests.kernels.triton.layers import DEVICE, INPUTS, TOKENS, run_layer
from tests.nn.linear_cases import Case, assert_close, cases, forward_by_hand, layer_of, some_input

pytest.importorskip("triton")


@pytest.mark.parametrize("quant", INPUTS)
@pytest.mark.parametrize("number", range(len(cases("int8"))), ids=list(cases("int8")))
def test_layers(number, quant) -> None:
    # Each layer runs in every format and with every number of tokens, under some of the input formats.
    turn = list(INPUTS).index(quant)
    form, tokens = (
        ("int4", "int8", "int6", "int3", "int5", "int2")[(number + turn) % 6],
        TOKENS[(number // 3 + turn) % 3],
    )
    plan = list(cases(form).values())[number].plan(INPUTS[quant], True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens)
    assert integer.refuses(layer.product) == ""
    assert_close(run_layer(integer.run, layer, x), *forward_by_hand(plan, tensors, x))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tokens", [1, 3, 20, 70])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_groups_of_a_wide_layer(group, tokens) -> None:
    case = Case(WeightQuant(type="int4", group_size=group, symmetric=tokens == 3), inputs=(640,), outputs=(70,))
    plan = case.plan(INPUTS["token"], True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens, features=640)
    assert_close(run_layer(integer.run, layer, x), *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", TOKENS)
def test_dtypes(tokens, dtype) -> None:
    plan = cases("int4")["all at once"].plan(INPUTS["token"], True)
    layer, tensors = layer_of(plan, dtype=dtype)
    x = some_input(tokens).to(dtype)
    y = run_layer(integer.run, layer, x)
    assert y.dtype == dtype
    expected, size = forward_by_hand(plan, tensors, x)
    assert_close(y, expected, size * (1 + torch.finfo(dtype).eps / 2e-6))


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(3, 4)])
def test_input_that_is_not_contiguous(rows) -> None:
    layer, _ = layer_of(cases("int8")["dual"].plan(INPUTS["token"], True))
    x = some_input(9)
    wide = torch.cat([x, x], 1)[rows]
    expected = run_layer(integer.run, layer, x[rows].contiguous())
    assert torch.equal(run_layer(integer.run, layer, wide[:, : x.shape[1]]), expected)
    assert torch.equal(run_layer(integer.run, layer, x.T.contiguous().T[rows]), expected)


def extreme(shape: tuple[int, int], low: int, high: int, kind: str) -> torch.Tensor:
    codes = torch.randint(low, high + 1, shape, dtype=torch.int16)
    if kind != "random":
        codes[:] = high
        codes[1::3] = low
    if kind == "alternating":
        codes[:, 1::2] = low
    return codes


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("tokens", "kind"), [(1, "equal"), (1, "random"), (19, "equal"), (19, "alternating")])
@pytest.mark.parametrize(
    ("weight", "dual", "columns"),
    [
        ("int8", False, 8192), ("int8", True, 8192), ("int8", True, 517),
        ("int4", False, 8191), ("int4", True, 4096), ("int6", True, 1),
        ("int2", False, 8191), ("int3", True, 517), ("int5", True, 2048),
    ],
)  # fmt: skip
def test_sums_are_exact(tokens, weight, dual, columns, kind) -> None:
    """If scales are powers of two, only the sum is rounded, so results equal the reference bit for bit."""
    form, out = FORMATS[weight], 18
    half = 2 ** (form.bits - 1)
    rule = InputRule(FORMATS["int8"], False, False, (columns,), (dual,))
    product = Product(form, (columns,), (columns,), rule)
    codes = extreme((out, columns), -half, half - 1, kind).to(torch.int8)
    zero = extreme((out, 1), -half, half - 1, kind).to(torch.int8) if kind != "equal" else None
    x = extreme((tokens, columns), -127, 127, kind).float()
    scale = torch.exp2(torch.randint(-9, 3, (out, 1)).float())
    operands = Operands(
        form.pack(codes), scale, zero_point=None if zero is None else form.pack(zero), bias=None,
        input_scale=torch.ones(1), input_scale_neg=torch.full((1,), 2.0**-8) if dual else None,
    )  # fmt: skip
    expected = reference.run(x, operands, product)
    operands = Operands(*[None if t is None else t.to(DEVICE) for t in operands])
    assert integer.refuses(product) == ""
    assert torch.equal(integer.run(x.to(DEVICE), operands, product).cpu(), expected)


@pytest.mark.parametrize("quant", INPUTS)
@pytest.mark.parametrize("name", ["dual", "all at once", "short groups of segments"])
def test_what_is_not_finite_comes_out_as_nan(name, quant) -> None:
    layer, _ = layer_of(cases("int4")[name].plan(INPUTS[quant], True))
    x = some_input(5)
    clean = run_layer(integer.run, layer, x)
    x[2, 3], x[3, 11], x[4, 23] = float("nan"), float("inf"), -float("inf")
    y = run_layer(integer.run, layer, x)
    assert y[2:].isnan().all()
    if quant == "tensor":
        assert y.isnan().all()
    else:
        assert torch.equal(y[:2], clean[:2])


def test_refusals() -> None:
    def why(weight: str, form: str | None, columns: int = 64) -> str:
        rule = form and InputRule(FORMATS[form], True, True, (columns,), (False,))
        return integer.refuses(Product(FORMATS[weight], (columns,), (columns,), rule or None))

    assert why("int8", "int8") == why("int4", "int6", 65536) == ""
    assert why("int8", None) == "the input is not quantized"
    assert why("int8", "fp8e4m3") == "the input is fp8e4m3, not integers"
    assert why("int16", "int8") == "the weight is int16, not integers of up to 8 bits"
    assert why("int8", "int16") == "codes of int16 are not one byte"
    assert why("int8", "int8", 70000) == "sums over 70000 columns may not fit 32 bits"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 700])
@pytest.mark.parametrize("name", ["channel", "group", "svd", "dual"])
def test_on_a_device_large_and_with_each_tile(name, tokens) -> None:
    case = {
        "channel": Case(WeightQuant(type="int8"), inputs=(1152,), outputs=(1152,)),
        "group": Case(WeightQuant(type="int4", group_size=64, symmetric=False), inputs=(1152,), outputs=(1152,)),
        "svd": Case(WeightQuant(type="int8"), cases("int8")["svd"].opt, inputs=(1152,), outputs=(1152,)),
        "dual": Case(WeightQuant(type="int8"), inputs=(1152, 640), outputs=(1150,), dual=(True, False)),
    }[name]
    plan = case.plan(InputQuant(type="int8", axis=-1, dynamic=True), True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens, features=plan.in_features)
    assert_close(run_layer(integer.run, layer, x), *forward_by_hand(plan, tensors, x))
