"""QuantLinear as a module: its tensors, casts, copies, compiling, loading, and taking a linear's place in a model."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from hfquant import QuantLinear, set_real_quant
from hfquant.config import DType, InputQuant, WeightQuant
from hfquant.nn.linear import quant_linears, replace_modules
from tests.nn.linear_cases import IN, OUT, Case, cases, layer_of, some_input


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("case", cases(DType.INT8))
def test_tensors_are_as_planned(dtype, case) -> None:
    for quant in (None, InputQuant(), InputQuant(type=DType.FP8E4M3)):
        plan = cases(dtype)[case].plan(quant)
        layer, _ = layer_of(plan, dtype=torch.bfloat16)
        spec = plan.tensors(torch.bfloat16) | {"bias": ((OUT,), torch.bfloat16)}
        assert {n: (tuple(t.shape), t.dtype) for n, t in layer.state_dict().items()} == spec
        bits = plan.config.weight_quant.type.bits
        assert layer.weight.shape == (OUT, -(-IN * bits // 8) if bits < 8 else IN)
        assert layer.weight.dtype in (torch.int8, torch.int16)
        assert layer.weight.nbytes == OUT * IN * bits / 8
        # Nothing flat to slice wrongly, nothing without a dimension.
        assert all(t.dim() == 2 for n, t in layer.state_dict().items() if n.startswith("weight") or n.startswith("svd"))
        assert all(t.dim() >= 1 for t in layer.state_dict().values())
        assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
        assert not any(p.requires_grad for p in layer.parameters())
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (IN, OUT)


def test_as_many_parameters_as_the_float_layer() -> None:
    layer, _ = layer_of(Case(WeightQuant(type=DType.INT8)).plan(InputQuant()))
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in nn.Linear(IN, OUT).parameters())


@pytest.mark.parametrize("case", cases(DType.INT8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_move_only_the_models_floats(dtype, case) -> None:
    for weight in (DType.INT4, DType.INT16, DType.FP8E4M3):
        plan = cases(weight)[case].plan(InputQuant(type=DType.INT8))
        for cast in (lambda m: m.to(dtype), lambda m: m.type(dtype), lambda m: nn.Sequential(m).to(dtype)[0]):
            layer, _ = layer_of(plan)
            x = some_input(3)
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            cast(layer)
            for name, tensor in layer.state_dict().items():
                if name in ("bias", "svd_down", "svd_up"):
                    assert tensor.dtype == dtype
                else:
                    assert tensor.dtype == before[name].dtype
                    assert torch.equal(tensor, before[name])
            if not plan.rank:
                bias = before["bias"].to(dtype).float()
                expected = layer(x) - bias
                layer.bias = None
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_half_float_double_methods() -> None:
    layer, _ = layer_of(cases(DType.INT8)["all at once"].plan(InputQuant()))
    for method, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        getattr(layer, method)()
        assert layer.svd_down.dtype == layer.bias.dtype == dtype
        assert layer.weight_scale.dtype == layer.smooth.dtype == layer.input_scale.dtype == torch.float32


@pytest.mark.parametrize("real", [False, True])
def test_state_dict_deepcopy_and_meta(real) -> None:
    x = some_input(3)
    for dtype in DType:
        for case in cases(dtype).values():
            plan = case.plan(InputQuant(type=DType.INT8), real)
            layer, _ = layer_of(plan)
            y = layer(x)
            twin = copy.deepcopy(layer)
            assert torch.equal(twin(x), y)
            twin.weight.data.zero_()
            assert torch.equal(layer(x), y)
            empty = QuantLinear(plan, device="meta")
            assert all(t.is_meta for t in empty.state_dict().values())
            shape = empty(x.to("meta")).shape
            assert shape == y.shape
            assigned = copy.deepcopy(empty)
            assigned.load_state_dict(layer.state_dict(), assign=True)
            assert torch.equal(assigned(x), y)
            copied = empty.to_empty(device="cpu")
            copied.load_state_dict(layer.state_dict())
            assert torch.equal(copied(x), y)
            assert not any(p.requires_grad for p in [*assigned.parameters(), *copied.parameters()])


def test_gradients_reach_the_input() -> None:
    """An adapter before a quantized linear must be able to train."""
    layer, _ = layer_of(Case(WeightQuant()).plan(None))
    for real in (False, True):
        layer.real_quant = real
        x = some_input(3).requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, IN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("case", ["channel", "all at once"])
def test_compiles_whole(case, real) -> None:
    torch._dynamo.reset()
    for quant in (None, InputQuant(axis=-1, dynamic=True)):
        layer, _ = layer_of(cases(DType.INT4)[case].plan(quant, real))
        x = some_input(3)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


def test_set_tensor() -> None:
    plan = cases(DType.INT4)["all at once"].plan(InputQuant())
    layer, tensors = layer_of(plan)
    x = some_input(3)
    y = layer(x)
    other = QuantLinear(plan, device="meta")
    packed = layer.weight.data
    for codes in (tensors["weight"], packed, packed[None], tensors["weight"][None]):
        for name, value in {**layer.state_dict(), "weight": codes}.items():
            other.set_tensor(name, value)
        assert torch.equal(other(x), y)
    # The model's dtype is whatever it is.
    other.set_tensor("svd_up", layer.svd_up.bfloat16())
    other.set_tensor("bias", layer.bias.double())
    wrong = {
        "weight": [
            packed[:, :-1],
            packed[:-1],
            packed.float(),
            tensors["weight"].float(),
            packed.short(),
            packed[None, None],
        ],
        "weight_scale": [layer.weight_scale.bfloat16(), layer.weight_scale[:, :-1], layer.weight_scale.flatten()],
        "weight_zero_point": [layer.weight_zero_point.float()],
        "input_scale": [layer.input_scale[:1], layer.input_scale.half()],
        "bias": [torch.zeros(OUT + 1), torch.zeros(OUT, dtype=torch.int8)],
        "svd_down": [layer.svd_down.T, layer.svd_down.to(torch.int32)],
    }
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"tensor '{name}': expected shape .* got "):
                layer.set_tensor(name, value)
    for name in ("qweight", "plan", "weight_zero"):
        with pytest.raises(ValueError, match=f"no tensor '{name}'; there are weight, .*weight_scale"):
            layer.set_tensor(name, torch.zeros(1))
    plain, _ = layer_of(Case(WeightQuant()).plan(None), bias=False)
    for name in ("bias", "smooth", "input_scale"):
        with pytest.raises(ValueError, match=f"no tensor '{name}'"):
            plain.set_tensor(name, torch.zeros(OUT))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_codes_in_the_shape_they_have_on_disk_run() -> None:
    layer, _ = layer_of(Case(WeightQuant(type=DType.INT6)).plan(None))
    x = some_input(2)
    y = layer(x)
    layer.weight = nn.Parameter(layer.weight.data[None], requires_grad=False)
    assert torch.equal(layer(x), y)


def test_repr_says_what_it_is() -> None:
    text = repr(layer_of(cases(DType.INT4)["all at once"].plan(InputQuant(dynamic=True)))[0])
    for word in ("in_features=24", "out_features=10", "bias=True", "weight=int4", "group_size=4", "input=int8 dynamic",
                 "input_segments=[8, 16]", "output_segments=[3, 7]", "dual", "rank=3"):  # fmt: skip
        assert word in text
    assert "dual" not in repr(layer_of(Case(WeightQuant()).plan(None))[0])


def test_reset_parameters_is_harmless() -> None:
    layer, _ = layer_of(Case(WeightQuant()).plan(None))
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)


# The modules around it.


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, IN)
        self.b = self.a
        self.c = nn.Sequential(self.a, nn.GELU(), nn.Linear(IN, OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def quantized_twin(linear: nn.Linear) -> QuantLinear:
    case = Case(WeightQuant(type=DType.INT8), inputs=(linear.in_features,), outputs=(linear.out_features,))
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
    assert quant_linears(model) == {"a": new, "c.2": new_last}


def test_set_real_quant() -> None:
    model = Shared()
    with pytest.raises(ValueError, match="Shared has no quantized linear"):
        set_real_quant(model)
    replace_modules(model, {m: quantized_twin(m) for m in (model.a, model.c[2])})
    x = some_input(3)
    fake = model(x)
    set_real_quant(model)
    assert all(layer.real_quant for layer in quant_linears(model).values())
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
    # And back, as a failing caller would.
    replace_modules(model, dict(zip(new, old, strict=True)))
    assert torch.equal(model(x), y)
