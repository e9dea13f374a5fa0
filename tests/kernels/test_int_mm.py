"""torch._int_mm against float64, and extreme codes bit for bit against the reference."""

from itertools import product

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.formats.columns import expand_columns
from hfquant.kernels import int_mm, reference
from hfquant.kernels.base import Operands, Product
from tests.kernels.triton.layers import INPUTS, run_layer
from tests.nn.linear_cases import Case, assert_close, cases, forward_by_hand, layer_of, some_input

NAMES = [name for name, case in cases("int8").items() if not (case.weight.group_size or any(case.dual))]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch) -> str:
    monkeypatch.setattr("tests.kernels.triton.layers.DEVICE", request.param)
    return request.param


@pytest.mark.parametrize("quant", INPUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_layers(tokens, name, quant, device) -> None:
    case = cases("int8")[name]
    if device == "cuda":
        case = Case(case.weight, case.opt, (8, 16) if len(case.inputs) > 1 else case.inputs, (8, 16))
    plan = case.plan(INPUTS[quant], True)
    layer, tensors = layer_of(plan)
    x = some_input(tokens)
    assert (int_mm.refuses_on_cuda if device == "cuda" else int_mm.refuses)(layer.product) == ""
    assert_close(run_layer(int_mm.run, layer, x), *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype) -> None:
    plan = Case(cases("int8")["svd"].weight, cases("int8")["svd"].opt, outputs=(16,)).plan(INPUTS["token"], True)
    layer, tensors = layer_of(plan, dtype=dtype)
    x = some_input(19).to(dtype)
    y = run_layer(int_mm.run, layer, x)
    assert y.dtype == dtype
    expected, size = forward_by_hand(plan, tensors, x)
    assert_close(y, expected, size * (1 + torch.finfo(dtype).eps / 2e-6))


@pytest.mark.parametrize("kind", ["equal", "alternating", "random"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("columns", "out"), [(8, 8), (4096, 24), (8192, 40)])
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_sums_are_exact(tokens, columns, out, zero, kind, device) -> None:
    """Whichever path torch takes: pairs of the largest codes would saturate the 16 bits of some instructions."""
    rule = InputRule(FORMATS["int8"], False, False, (columns,), (False,))
    whole = Product(FORMATS["int8"], (columns,), (columns,), rule)
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
    x = torch.randint(-127, 128, (tokens, columns)).float()
    if kind != "random":
        codes[:], x[:] = -128, 127
    if kind == "alternating":
        codes[:, 1::2], x[:, 1::2] = 127, -127
    point = torch.randint(-128, 128, (out, 1), dtype=torch.int8) if zero else None
    scale = torch.exp2(torch.randint(-9, 3, (out, 1)).float())
    operands = Operands(codes, scale, zero_point=point, input_scale=torch.ones(1))
    expected = reference.run(x, operands, whole)
    operands = Operands(*[None if t is None else t.to(device) for t in operands])
    assert torch.equal(int_mm.run(x.to(device), operands, whole).cpu(), expected)


def test_odd_shapes(device) -> None:
    """torch's own product is not correct for every size (one column, for example, which the kernel refuses)."""
    for tokens, columns, out in product((1, 2, 7, 16, 33), (2, 3, 7, 31, 64, 129), (1, 2, 5, 16, 65)):
        if device == "cuda" and (columns % 8 or out % 8):
            continue
        codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
        x = torch.randint(-127, 128, (tokens, columns)).float()
        rule = InputRule(FORMATS["int8"], False, False, (columns,), (False,))
        operands = Operands(
            codes.to(device), torch.ones(out, 1, device=device), input_scale=torch.ones(1, device=device)
        )
        y = int_mm.run(x.to(device), operands, Product(FORMATS["int8"], (columns,), (columns,), rule))
        assert torch.equal(y.cpu(), (x.double() @ codes.double().T).float()), (tokens, columns, out)


def test_segments_of_odd_sizes(device) -> None:
    """Each segment is a slice of wider matrices, so torch's own product has to handle strides."""
    sizes = (64, 8, 24, 128) if device == "cuda" else (64, 7, 2, 31, 130)
    for tokens, out in product((1, 17, 64), (8, 24, 96) if device == "cuda" else (1, 5, 16, 65)):
        codes = torch.randint(-128, 128, (out, sum(sizes)), dtype=torch.int8)
        x = torch.randint(-127, 128, (tokens, sum(sizes))).float()
        scale, inputs = (
            torch.exp2(torch.randint(-9, 3, (out, len(sizes))).float()),
            torch.exp2(torch.arange(len(sizes))),
        )
        rule = InputRule(FORMATS["int8"], False, False, sizes, (False,) * len(sizes))
        operands = Operands(codes.to(device), scale.to(device), input_scale=inputs.float().to(device))
        values = (x * expand_columns(inputs.float(), sizes)).clone()
        y = int_mm.run(values.to(device), operands, Product(FORMATS["int8"], sizes, sizes, rule))
        expected = values.double() @ (codes.double() * expand_columns(scale, sizes).double()).T
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_blocks_of_tokens(monkeypatch, device) -> None:
    monkeypatch.setattr(int_mm, "BLOCK", 1)
    layer, tensors = layer_of(plan := Case(cases("int8")["smooth"].weight, outputs=(8,)).plan(INPUTS["token"], True))
    x = some_input(53)
    assert_close(run_layer(int_mm.run, layer, x), *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant", INPUTS)
def test_what_is_not_finite_comes_out_as_nan(quant, bad, device) -> None:
    layer, _ = layer_of(Case(cases("int8")["svd"].weight, outputs=(16,)).plan(INPUTS[quant], True))
    x = some_input(5)
    clean = run_layer(int_mm.run, layer, x)
    x[3, 11] = bad
    y = run_layer(int_mm.run, layer, x)
    assert y[3].isnan().all()
    assert y.isnan().all() if quant == "tensor" else torch.equal(y[:3], clean[:3])


def test_refusals() -> None:
    def why(weight: str, form: str | None, columns: tuple[int, ...] = (64,), dual: bool = False) -> str:
        flags = (dual,) * len(columns)
        rule = InputRule(FORMATS[form], True, True, columns, flags) if form else None
        return int_mm.refuses(Product(FORMATS[weight], columns, columns, rule))

    assert why("int8", "int8") == why("int8", "int4") == ""
    assert why("int8", None) == "the input is not quantized"
    assert why("int4", "int8") == "the weight is int4, not int8"
    assert why("fp8e4m3", "int8") == "the weight is fp8e4m3, not int8"
    assert why("int8", "int16") == "the input is int16, not integers of up to 8 bits"
    assert why("int8", "int8", (32, 32)) == ""
    rule = InputRule(FORMATS["int8"], True, True, (64,), (False,))
    grouped = Product(FORMATS["int8"], (32, 32), (64,), rule)
    assert int_mm.refuses(grouped) == "the weight has several scales per row and segment"
    assert why("int8", "int8", (63, 1)) == "torch._int_mm is wrong for one column"
    assert why("int8", "int8", dual=True) == "the input has dual scales, whose codes have 16 bits"
    assert why("int8", "int8", (1,)) == "torch._int_mm is wrong for one column"
    assert why("int8", "int8", (70000,)) == "sums over 70000 columns may not fit 32 bits"
    rule = InputRule(FORMATS["int8"], True, True, (20,), (False,))
    assert int_mm.refuses_on_cuda(Product(FORMATS["int8"], (20,), (20,), rule)) == "20 columns are not a multiple of 8"


def test_missing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert int_mm.missing_on_cpu() == "this CPU has no VNNI"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert int_mm.missing_on_cpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert int_mm.missing_on_cuda() == "there is no CUDA device"
