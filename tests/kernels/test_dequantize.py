"""The float product in blocks, and its gradient, against float64."""

import numpy as np
import pytest
import torch

from hfquant.formats import FORMATS
from hfquant.kernels import dequantize
from hfquant.kernels.base import Operands
from hfquant.layer_config import InputQuant
from tests.nn.linear_cases import Case, assert_close, cases, forward_by_hand, layer_of, some_input, weight_by_hand


@pytest.mark.parametrize("dtype", FORMATS)
def test_blocks_are_the_weight(dtype, monkeypatch) -> None:
    for case in ("channel", "group", "asymmetric", "float32 scales"):
        plan = Case(cases(dtype)[case].weight, outputs=(70,)).plan()
        layer, tensors = layer_of(plan)
        expected = weight_by_hand(plan, tensors)
        for block in (1, 24 * 33, 24 * 70, 1 << 19):
            monkeypatch.setattr(dequantize, "BLOCK", block)
            parts = list(dequantize.blocks(layer.operands(0, slice(None)), layer.product))
            assert [rows.start for rows, _ in parts] == [0, *(rows.stop for rows, _ in parts[:-1])]
            assert parts[-1][0].stop == 70
            assert len(parts) == -(-70 // max(block // 24, 16))
            np.testing.assert_allclose(torch.cat([weight for _, weight in parts]), expected, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 1 << 19])
@pytest.mark.parametrize("dtype", ["int4", "int8", "fp8e4m3"])
def test_product_in_blocks(dtype, block, monkeypatch) -> None:
    monkeypatch.setattr(dequantize, "BLOCK", block)
    for case in cases(dtype).values():
        case = Case(case.weight, case.opt, case.inputs, (30, 40) if len(case.outputs) > 1 else (70,), case.dual)
        for quant in (None, InputQuant(), InputQuant(dynamic=True, axis=-1)):
            plan = case.plan(quant)
            layer, tensors = layer_of(plan)
            for tokens in (1, 5):
                x = some_input(tokens)
                assert_close(layer(x), *forward_by_hand(plan, tensors, x))


class Elsewhere(torch.Tensor):
    """A tensor that seems to be on another device than the CPU."""

    is_cpu = False


def test_halves_elsewhere_are_multiplied_as_they_are(monkeypatch) -> None:
    """Except where that would lose what the formats keep."""
    multiplied = []
    blocks = dequantize.blocks

    def noting(*arguments):
        for rows, weight in blocks(*arguments):
            weight.to = lambda dtype, w=weight: multiplied.append(dtype) or torch.Tensor.to(w, dtype)
            yield rows, weight

    monkeypatch.setattr(dequantize, "blocks", noting)
    wide, half, brain = torch.float32, torch.float16, torch.bfloat16
    token, eight = InputQuant(dynamic=True, axis=-1), InputQuant(type="fp8e4m3", dynamic=True, axis=-1)
    tensor, static = InputQuant(type="fp8e5m2", dynamic=True), InputQuant(type="fp8e4m3")
    expected = {
        ("int4", None, half): half, ("int4", None, brain): brain, ("int4", None, wide): wide,
        ("int4", token, half): half, ("int4", token, brain): wide,
        ("fp8e4m3", eight, brain): brain, ("int4", tensor, brain): brain, ("fp8e5m2", static, brain): brain,
        ("fp8e4m3", eight, half): half, ("fp16", eight, brain): wide, ("fp8e4m3", None, brain): brain,
        ("int16", None, half): wide, ("int16", None, brain): wide,
        ("fp16", None, half): half, ("fp16", None, brain): wide, ("bf16", None, brain): brain,
    }  # fmt: skip
    for (form, quant, dtype), product_dtype in expected.items():
        layer, _ = layer_of(cases(form)["channel"].plan(quant))
        operands = layer.operands(0, slice(None))
        x = some_input(5).to(dtype)
        exact = dequantize.run(x, operands, layer.product).double()
        multiplied.clear()
        found = dequantize.run(x.as_subclass(Elsewhere), operands, layer.product).as_subclass(torch.Tensor)
        assert found.dtype == dtype
        assert set(multiplied) == {product_dtype}, (form, quant, dtype)
        assert (found.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
        divided = operands._replace(divisor=torch.full((layer.in_features,), 0.5))
        multiplied.clear()
        dequantize.run(x.as_subclass(Elsewhere), divided, layer.product)
        # A divided input may not fit float16.
        assert set(multiplied) == {product_dtype if product_dtype == brain else wide}


def test_no_copy_of_the_whole_weight_is_made(monkeypatch) -> None:
    layer, _ = layer_of(Case(cases("int4")["channel"].weight, inputs=(512,), outputs=(4096,)).plan())
    sizes = []
    blocks = dequantize.blocks

    def noting(*arguments):
        for rows, weight in blocks(*arguments):
            sizes.append(weight.numel())
            yield rows, weight

    monkeypatch.setattr(dequantize, "blocks", noting)
    layer(torch.randn(3, 512))
    assert sum(sizes) == 512 * 4096
    assert max(sizes) <= dequantize.BLOCK


@pytest.mark.parametrize("block", [1, 1 << 19])
@pytest.mark.parametrize("dtype", ["int4", "int8", "fp8e5m2"])
def test_gradient_is_that_of_the_effective_weight(dtype, block, monkeypatch) -> None:
    monkeypatch.setattr(dequantize, "BLOCK", block)
    for name, case in cases(dtype).items():
        if len(case.outputs) > 1:
            continue
        plan = case.plan(InputQuant(dynamic=True))
        layer, tensors = layer_of(plan)
        grad = torch.randn(5, 10)
        operands = layer.operands(0, slice(None))
        weight = weight_by_hand(plan, tensors)
        if "smooth" in tensors:
            weight = weight / tensors["smooth"].double().numpy().reshape(1, -1)
        if operands.divisor is not None and "smooth" not in tensors:
            weight = weight / operands.divisor.double().numpy()
        if operands.down is not None:
            weight = weight + operands.up.double().numpy() @ operands.down.double().numpy()
        expected = grad.double().numpy() @ weight
        found = dequantize.gradient(grad, operands, layer.product)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 19])
def test_gradient_in_bfloat16(block, fast, monkeypatch) -> None:
    monkeypatch.setattr(dequantize, "BLOCK", block)
    monkeypatch.setattr("hfquant.kernels.cpu.multiplies_bfloat16", lambda: fast)
    for name, case in cases("int4").items():
        layer, _ = layer_of(case.plan())
        operands = layer.operands(0, slice(None))
        grad = torch.randn(5, len(operands.weight)).bfloat16()
        exact = dequantize.gradient(grad.float(), operands, layer.product).double()
        found = dequantize.gradient(grad, operands, layer.product)
        assert found.dtype == torch.bfloat16
        # Without bfloat16 products, only the result is rounded.
        error, eps = float((found.double() - exact).norm() / exact.norm()), torch.finfo(torch.bfloat16).eps
        assert error < (eps if fast else eps / 4), name
        assert error > eps / 100, name


def test_products_of_the_backward_pass_take_the_dtype_that_a_device_is_fast_at(monkeypatch) -> None:
    halves, wides = [torch.bfloat16, torch.float16], [torch.float32, torch.float64]
    for fast in (False, True):
        monkeypatch.setattr("hfquant.kernels.cpu.multiplies_bfloat16", lambda fast=fast: fast)
        found = {dtype: dequantize.gradient_dtype(torch.ones(1, dtype=dtype)) for dtype in halves + wides}
        expected = dict.fromkeys(found, torch.float32) | ({torch.bfloat16: torch.bfloat16} if fast else {})
        assert found == expected
        elsewhere = [dequantize.gradient_dtype(torch.ones(1, dtype=dtype, device="meta")) for dtype in halves + wides]
        assert elsewhere == [*halves, torch.float32, torch.float32]


def test_blocks_are_larger_where_a_call_costs_more_than_the_cache() -> None:
    assert dequantize.DEVICE_BLOCK > dequantize.BLOCK
    layer, _ = layer_of(Case(cases("int8")["channel"].weight, inputs=(1024,), outputs=(2048,)).plan())
    operands = layer.operands(0, slice(None))
    away = Operands(*(None if tensor is None else tensor.to("meta") for tensor in operands))
    assert len(list(dequantize.blocks(operands, layer.product))) == 4
    assert len(list(dequantize.blocks(away, layer.product))) == 1
