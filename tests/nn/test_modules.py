"""Quantized modules in a model: inserted, removed, switched, counted, along with accelerate's hooks."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

import hfquant
from hfquant import QuantLinear, set_real_quant
from hfquant.layer_config import InputQuant, WeightQuant
from hfquant.nn.modules import dequantized, log_share, quant_layers, quant_modules
from hfquant.replacing import replace_modules
from tests.nn.linear_cases import IN, OUT, Case, layer_of, some_input


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, IN)
        self.b = self.a
        self.c = nn.Sequential(self.a, nn.GELU(), nn.Linear(IN, OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def quantized_twin(linear: nn.Linear) -> QuantLinear:
    case = Case(WeightQuant(type="int8"), inputs=(linear.in_features,), outputs=(linear.out_features,))
    return layer_of(case.plan(InputQuant(dynamic=True, axis=-1)))[0]


def test_replace_modules_everywhere() -> None:
    model = Shared().train()
    model.a.eval()
    old, last = model.a, model.c[2]
    new, new_last = quantized_twin(old), quantized_twin(last)
    replace_modules(model, {old: new, last: new_last})
    assert model.a is model.b is model.c[0] is new
    assert model.c[2] is new_last
    assert not new.training
    assert new_last.training
    assert quant_layers(model) == {"a": new, "c.2": new_last}


class Listed(nn.Module):
    """Runs modules from a plain list and a tuple, like MaskFormer's convolutions, and also registers them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, IN), nn.Linear(IN, OUT)
        self.layers, self.ends = [self.first, nn.GELU()], (self.last,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.ends):
            x = layer(x)
        return x


def test_modules_in_plain_lists_are_replaced_and_put_back() -> None:
    model = Listed()
    x = some_input(3)
    plain = model(x)
    hfquant.quantize(model, None, {"default": {"opt": {"type": "default"}, "input_quant": None}})
    assert model.layers[0] is model.first
    assert model.ends[0] is model.last
    assert isinstance(model.first, QuantLinear)
    assert isinstance(model.last, QuantLinear)
    assert 0 < (model(x) - plain).norm() < 0.1 * plain.norm()
    restored = dequantized(model, torch.float32)
    assert type(restored.layers[0]) is nn.Linear
    assert restored.layers[0] is restored.first


def test_a_failure_leaves_plain_lists_as_they_were() -> None:
    model = Listed()
    first, weight = model.first, model.first.weight
    with torch.no_grad():
        model.last.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        hfquant.quantize(model, None, "w8a16")
    assert model.layers[0] is model.first is first
    assert model.first.weight is weight


def test_set_real_quant() -> None:
    model = Shared()
    with pytest.raises(ValueError, match="Shared has no quantized layer"):
        set_real_quant(model)
    replace_modules(model, {m: quantized_twin(m) for m in (model.a, model.c[2])})
    x = some_input(3)
    fake = model(x)
    set_real_quant(model)
    assert all(layer.real_quant for layer in quant_layers(model).values())
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5)
    set_real_quant(model, False)
    assert torch.equal(model(x), fake)


def offloaded(how: str, model: nn.Module, folder) -> None:
    match how:
        case "cpu_offload":
            cpu_offload(model, execution_device=torch.device("cpu"))
        case "cpu_offload buffers":
            cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        case "device_map":
            dispatch_model(
                model, {"0": "cpu", "2": "disk", "3": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
            )


@pytest.mark.parametrize("how", ["cpu_offload", "cpu_offload buffers", "device_map"])
def test_accelerate_hooks_move_along(how, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(IN, IN), nn.GELU(), nn.Linear(IN, IN), nn.Sequential(nn.Linear(IN, OUT)))
    new = [quantized_twin(m) for m in (model[0], model[2], model[3][0])]
    plain = nn.Sequential(copy.deepcopy(new[0]), nn.GELU(), copy.deepcopy(new[1]), copy.deepcopy(new[2]))
    x = some_input(3)
    offloaded(how, model, tmp_path)
    old = [model[0], model[2], model[3][0]]
    assert model[2].weight.is_meta
    y = model(x)
    replace_modules(model, dict(zip(old, new, strict=True)))
    assert model[2].weight.is_meta
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))
    assert model[2].weight.is_meta
    # And back, as a caller does after a failure.
    replace_modules(model, dict(zip(new, old, strict=True)))
    assert torch.equal(model(x), y)


def test_dequantized() -> None:
    model = Shared()
    replace_modules(model, {m: quantized_twin(m) for m in (model.a, model.c[2])})
    before = {name: layer.effective_weight() for name, layer in quant_layers(model).items()}
    assert dequantized(model, torch.bfloat16) is model
    assert quant_layers(model) == {}
    assert model.a is model.b is model.c[0]
    for name, weight in before.items():
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert linear.weight.requires_grad
        assert torch.equal(linear.weight, weight.bfloat16())


@pytest.mark.parametrize("config", ["w8a16", "w8a8-gptq"])
def test_hooks_stay_with_their_layer(config: str) -> None:
    """There and back; their handles still remove them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(8, 32)
    plain = model(x)
    before = model[0].register_forward_pre_hook(lambda _m, args, kwargs: ((-args[0],), kwargs), with_kwargs=True)
    after = model[2].register_forward_hook(lambda _m, _x, y: 3 * y)
    hooked = model(x)
    hfquant.quantize(model, [x], config)
    late = model[2].register_forward_hook(lambda _m, _x, y: y + 1)
    assert (model(x) - 1 - hooked).norm() < 0.05 * hooked.norm()
    hfquant.dequantize(model)
    assert (model(x) - 1 - hooked).norm() < 0.05 * hooked.norm()
    for handle in (before, after, late):
        handle.remove()
    assert (model(x) - plain).norm() < 0.05 * plain.norm()
    seen = []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    hfquant.quantize(model, [x], config)
    model(x.requires_grad_()).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantized_layers_have_the_dtype_that_they_had(dtype: torch.dtype) -> None:
    """A quantized layer without a bias has no parameter that tells it."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Conv2d(32, 32, 1, bias=False), nn.LayerNorm(32)).to(dtype)
    model[2].float()
    hfquant.quantize(model, None, {"default": {"opt": {"type": "default"}, "input_quant": None}})
    assert len(quant_modules(model)) == 2
    hfquant.dequantize(model)
    assert [p.dtype for p in model.parameters()] == [dtype, dtype, torch.float32, torch.float32]


def test_dequantized_layers_have_the_dtype_that_the_model_was_cast_to() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32))
    hfquant.quantize(model, None, {"default": {"opt": {"type": "default"}, "input_quant": None}})
    hfquant.dequantize(copy.deepcopy(model).bfloat16())
    model[0].bfloat16()
    hfquant.dequantize(model)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_share_that_was_quantized(caplog) -> None:
    """Embeddings, vectors and uncounted modules are left out of the share."""
    model = nn.ModuleDict({"a": nn.Linear(IN, IN), "b": nn.Linear(IN, OUT), "embed": nn.Embedding(999, IN)})
    model["head"] = nn.Linear(IN, 999)
    replace_modules(model, {model["a"]: quantized_twin(model["a"])})
    with caplog.at_level(logging.INFO, "hfquant"):
        log_share(model)
        log_share(model, ["head"])
        replace_modules(model, {model["b"]: quantized_twin(model["b"])})
        log_share(model, ["head"])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "1 layer quantized, 2 % of the parameters in matrices; the largest left: head.weight, b.weight"),
        ("WARNING", "1 layer quantized, 71 % of the parameters in matrices; the largest left: b.weight"),
        ("INFO", "2 layers quantized, 100 % of the parameters in matrices"),
    ]
