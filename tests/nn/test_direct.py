"""Direct calls: the same outputs as the long way, and none once something has changed."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from hfquant import QuantLinear
from hfquant.algorithms import Identity
from hfquant.algorithms.hadamard import Hadamard
from hfquant.formats import FORMATS
from hfquant.kernels.table import KERNELS, obstacle
from hfquant.layer_config import InputQuant, WeightQuant
from tests.nn.linear_cases import IN, OUT, Case, cases, layer_of, some_input

TOKEN = InputQuant(type="int8", axis=-1, dynamic=True)


@pytest.fixture(autouse=True)
def kernels_in_cpp() -> None:
    plan = cases("int8")["channel"].plan(TOKEN, real=True)
    layer, _ = layer_of(plan)
    assert not obstacle(KERNELS["scalar"], layer.product, "cpu")


def made(case: Case | None = None, quant: InputQuant | None = TOKEN) -> QuantLinear:
    layer, _ = layer_of((case or cases("int8")["channel"]).plan(quant, real=True))
    return layer


def is_direct(layer: QuantLinear) -> bool:
    return layer._direct is not None and layer._direct.op is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", cases("int8"))
@pytest.mark.parametrize("form", ["int8", "int4", "fp8e4m3"])
def test_outputs_are_those_of_the_long_way(form: str, name: str, dtype: torch.dtype) -> None:
    case = cases(form)[name]
    for quant in (None, TOKEN, InputQuant(type="int8"), InputQuant(type="fp8e4m3", axis=-1, dynamic=True)):
        layer = made(case, quant).to(dtype)
        for lead in ((), (1,), (3, 5)):
            x = some_input(*lead).to(dtype)
            assert torch.equal(layer(x), layer.multiply(x))
        # FP8 with integer inputs is quantized by torch, and integers with FP8 inputs have no kernel in C++.
        mixed = quant is not None and (form == "fp8e4m3") != (quant.type == "fp8e4m3")
        assert is_direct(layer) == (len(layer.plan.row_groups) == 1 and not mixed)


@pytest.mark.parametrize("quant", [None, TOKEN])
def test_rotation_is_the_kernels(quant: InputQuant | None) -> None:
    layer = made(Case(WeightQuant(type="int4", group_size=4, symmetric=False), Hadamard(block_size=8)), quant)
    x = some_input(4)
    assert torch.equal(layer(x), layer.multiply(x))
    assert is_direct(layer)


def test_other_tensors_count_at_once() -> None:
    layer = made(cases("int4")["float32 scales"], None)
    x = some_input(3)
    first = layer(x)
    layer.set_tensor("weight_scale", layer.weight_scale * 2)
    layer.bias = nn.Parameter(torch.zeros(OUT))
    second = layer(x)
    assert is_direct(layer)
    assert torch.equal(second, layer.multiply(x))
    assert not torch.allclose(second, first)
    layer.bias = None
    assert torch.equal(layer(x), second)


def test_no_tensor_is_kept() -> None:
    layer = made()
    layer(some_input(2))
    assert is_direct(layer)
    last = [weakref.ref(tensor) for tensor in (*layer._parameters.values(), *layer._buffers.values())]
    layer.to_empty(device="meta")
    layer.weight, layer.bias = nn.Parameter(layer.weight.data, requires_grad=False), None
    gc.collect()
    assert not any(ref() is not None and not ref().is_meta for ref in last)


def test_settings_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(quant=None), some_input(2)
    layer(x)
    assert is_direct(layer)
    monkeypatch.setenv("HFQUANT_KERNEL", "absent")
    with pytest.raises(ValueError, match="HFQUANT_KERNEL=absent"):
        layer(x)
    monkeypatch.setenv("HFQUANT_KERNEL", "reference")
    forced = layer(x)
    assert not is_direct(layer)
    monkeypatch.delenv("HFQUANT_KERNEL")
    assert (layer(x) - forced).norm() < 1e-4 * forced.norm()
    assert is_direct(layer)
    layer.real_quant = False
    layer(x)
    assert not is_direct(layer)


def test_inputs_that_need_more_take_the_long_way() -> None:
    layer = made()
    x = some_input(4, 2)
    expected = layer(x)
    assert is_direct(layer)
    strided = torch.stack((x, x), -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided), expected)
    learning = x.clone().requires_grad_()
    layer(learning).sum().backward()
    assert learning.grad is not None
    assert learning.grad.any()
    assert torch.equal(layer(x.double()), expected.double())
    assert not is_direct(layer)
    assert layer(x[:0]).shape == (0, 2, OUT)


def test_wrong_inputs_and_weights_are_refused_after_a_direct_call() -> None:
    layer = made()
    layer(some_input(2))
    assert is_direct(layer)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 23\)"):
        layer(some_input(2)[:, 1:])
    with pytest.raises(TypeError, match=r"got an input of torch.int64"):
        layer(some_input(2).long())
    layer(some_input(2))
    layer.weight.data = torch.ones(OUT, IN)
    with pytest.raises(TypeError, match="something wrote floats to it"):
        layer(some_input(2))


def test_a_transform_of_ones_own_is_asked() -> None:
    class Doubled(Identity):
        def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
            return 2 * x

    layer, x = made(quant=None), some_input(2)
    plain = layer(x) - layer.bias
    layer._transform, layer._direct = Doubled(), None
    assert (layer(x) - layer.bias - 2 * plain).norm() < 1e-4 * plain.norm()


def test_copies_and_pickles_have_their_own() -> None:
    layer, x = made(), some_input(2)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert twin._direct is None
    twin.set_tensor("weight_scale", twin.weight_scale * 3)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_weights_with_float_inputs_is_direct(name: str) -> None:
    layer = made(cases(name)["channel"], None)
    layer(some_input(2))
    assert is_direct(layer)
