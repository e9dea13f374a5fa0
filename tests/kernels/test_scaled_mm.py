"""torch._scaled_mm against float64; the CPU's sums are exact, while a device's tensor cores round them."""

import sys

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels import scaled_mm
from hfquant.kernels.base import Product
from hfquant.layer_config import InputQuant, WeightQuant
from tests.kernels.triton.layers import run_layer
from tests.nn.linear_cases import PLAIN, SMOOTH, SVD, Case, assert_close, forward_by_hand, layer_of, some_input

PAIRS = [("fp8e4m3", "fp8e4m3"), ("fp8e4m3", "fp8e5m2"), ("fp8e5m2", "fp8e4m3")]
MODES = {"token": {"axis": -1, "dynamic": True}, "tensor": {"dynamic": True}, "static": {}}
CASES = {
    "plain": (PLAIN, (48,), (32,)),
    "segments": (PLAIN, (16, 32), (32,)),
    "smooth": (SMOOTH, (48,), (16, 32)),
    "svd": (SVD, (48,), (16, 32)),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch) -> str:
    monkeypatch.setattr("tests.kernels.triton.layers.DEVICE", request.param)
    return request.param


def plan_of(name: str, weight: str, form: str, mode: str):
    opt, inputs, outputs = CASES[name]
    return Case(WeightQuant(type=weight), opt, inputs, outputs).plan(InputQuant(type=form, **MODES[mode]), True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weight", "form"), PAIRS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_layers(tokens, name, weight, form, mode, device) -> None:
    plan = plan_of(name, weight, form, mode)
    layer, tensors = layer_of(plan)
    x = some_input(tokens, features=48)
    assert scaled_mm.refuses(layer.product) == ""
    expected, size = forward_by_hand(plan, tensors, x)
    # Tensor cores align the products of a step to the largest one, and keep 14 bits.
    assert_close(run_layer(scaled_mm.run, layer, x), expected, size * (1 if device == "cpu" else 2.0**-13 / 2e-6))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, pair, name, mode, device) -> None:
    plan = plan_of(name, *pair, mode)
    layer, tensors = layer_of(plan, dtype=dtype)
    at_once = dtype == torch.bfloat16 and name != "segments" and pair[0] == "fp8e4m3"
    assert scaled_mm.scales_in_product(torch.empty(0, dtype=dtype), layer.product) == (
        at_once and sys.platform != "win32"
    )
    x = some_input(5, features=48).to(dtype)
    y = run_layer(scaled_mm.run, layer, x)
    assert y.dtype == dtype
    expected, size = forward_by_hand(plan, tensors, x)
    assert_close(y, expected, size * (1 + torch.finfo(dtype).eps / 2e-6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["fp8e4m3", "fp8e5m2"])
@pytest.mark.parametrize(("name", "dtype"), [("segments", torch.float32), ("plain", torch.bfloat16)])
def test_what_is_not_finite_comes_out_as_nan(name, dtype, form, mode, bad, device) -> None:
    layer, _ = layer_of(plan_of(name, "fp8e4m3", form, mode), dtype=dtype)
    x = some_input(5, features=48).to(dtype)
    clean = run_layer(scaled_mm.run, layer, x)
    x[3, 20] = bad
    y = run_layer(scaled_mm.run, layer, x)
    assert y[3].isnan().all()
    assert y.isnan().all() if mode == "tensor" else torch.equal(y[:3], clean[:3])


def test_refusals() -> None:
    def why(weight: str, form: str | None, segments=(64,), columns=None) -> str:
        rule = InputRule(FORMATS[form], True, True, segments, (False,) * len(segments)) if form else None
        return scaled_mm.refuses(Product(FORMATS[weight], columns or segments, segments, rule))

    assert all(why(*pair) == "" for pair in PAIRS)
    assert why("fp8e4m3", None) == "the input is not quantized"
    assert why("int8", "fp8e4m3") == "the weight is int8, not FP8"
    assert why("fp8e4m3", "int8") == "the input is int8, not FP8"
    assert why("fp8e5m2", "fp8e5m2") == "cuBLAS does not multiply E5M2 by E5M2"
    assert why("fp8e4m3", "fp8e4m3", columns=(32, 32)) == "the weight has several scales per row and segment"
    assert why("fp8e4m3", "fp8e4m3", (16, 24)) == "segments [16, 24] are not all multiples of 16"


def test_missing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scaled_mm.missing() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert scaled_mm.missing() == "it needs compute capability 8.9, this device has 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert scaled_mm.missing() == ""
