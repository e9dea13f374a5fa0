"""QuantLinear against a float64 oracle: every format, every plan, fake and real, and what PyTorch does to modules."""

import copy
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

import hfquant.linear
from hfquant import QuantLinear, formats, set_real_quant
from hfquant.config import DType, InputQuant, LayerConfig, OptConfig, Optimum, WeightQuant
from hfquant.linear import quant_linears, replace_modules
from hfquant.planner import LayerPlan

IN, OUT = 24, 10
INPUTS = [
    None,
    *[InputQuant(type=d, axis=a, dynamic=y) for d in DType for a, y in ((None, False), (None, True), (-1, True))],
]


PLAIN, SMOOTH = OptConfig(type=Optimum.DEFAULT), OptConfig(type=Optimum.SMOOTH)
SVD = OptConfig(type=Optimum.SVD, low_rank=3)


@dataclass
class Case:
    """A plan, short of its input format."""

    weight: WeightQuant
    opt: OptConfig = PLAIN
    inputs: tuple[int, ...] = (IN,)
    outputs: tuple[int, ...] = (OUT,)
    dual: tuple[bool, ...] = ()

    def plan(self, quant: InputQuant | None = None, real: bool = False) -> LayerPlan:
        config = LayerConfig(weight_quant=self.weight, input_quant=quant, opt=self.opt, real_quant=real)
        dual = self.dual if quant and quant.type.is_integer and quant.type.bits < 16 else ()
        return LayerPlan(
            config, sum(self.inputs), sum(self.outputs), self.inputs, self.outputs, dual or (False,) * len(self.inputs)
        )


def cases(dtype: DType) -> dict[str, Case]:
    channel, zero = WeightQuant(type=dtype), {"symmetric": not dtype.is_integer}
    group = {"group_size": 4} if dtype.is_scaled else {}
    return {
        "channel": Case(channel),
        "group": Case(WeightQuant(type=dtype, **group)),
        "input segments": Case(channel, inputs=(5, 8, 11)),
        "dual": Case(channel, inputs=(9, 15), dual=(True, False)),
        "asymmetric": Case(WeightQuant(type=dtype, **zero, **group)),
        "smooth": Case(channel, SMOOTH),
        "output segments": Case(channel, SMOOTH, outputs=(3, 7)),
        "svd": Case(channel, SVD),
        "all at once": Case(WeightQuant(type=dtype, **zero, **group), SVD, (8, 16), (3, 7), (True, True)),
    }


def random_tensors(plan: LayerPlan, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors as a solver could have made them, but random: codes over their whole range, unpacked."""
    made = {name: torch.rand(shape) + 0.5 for name, (shape, _) in plan.tensors(dtype).items()}
    weight, shape = plan.config.weight_quant, (plan.out_features, plan.in_features)
    half = 2 ** (weight.type.bits - 1)
    if weight.type.is_integer:
        low = -half if not weight.symmetric else 1 - half
        made["weight"] = torch.randint(low, half, shape).to(formats.code_dtype(weight.type))
    else:
        made["weight"] = formats.quantize(torch.randn(shape), torch.full((1,), 0.01), weight.type)
    if "weight_scale" in made:
        made["weight_scale"] /= formats.qmax(weight.type)
    if "weight_zero_point" in made:
        zero = torch.randint(-half, half, made["weight_zero_point"].shape)
        made["weight_zero_point"] = zero.to(formats.code_dtype(weight.type))
    if "input_scale" in made:
        made["input_scale"] *= 2 / formats.qmax(plan.config.input_quant.type)
    if "input_scale_neg" in made:
        flags = torch.tensor(plan.dual * len(plan.row_groups))
        made["input_scale_neg"] = torch.where(flags, made["input_scale"] / 8, made["input_scale"])
    for name in ("svd_down", "svd_up"):
        if name in made:
            made[name] = ((made[name] - 1) / 4).to(dtype)
    return made


def layer_of(plan: LayerPlan, bias: bool = True, dtype: torch.dtype = torch.float32):
    """A QuantLinear, and the tensors it was made of."""
    tensors = random_tensors(plan, dtype)
    vector = nn.Parameter(torch.randn(plan.out_features, dtype=dtype)) if bias else None
    return QuantLinear.from_tensors(plan, tensors, vector), tensors | ({"bias": vector.data} if bias else {})


def some_input(*lead: int, features: int = IN) -> torch.Tensor:
    x = torch.nn.functional.silu(torch.randn(*lead, features) * 2)
    if x.numel():
        x[..., 0] *= 8
    return x


def weight_by_hand(plan: LayerPlan, tensors) -> np.ndarray:
    """The smoothed weight in float64."""
    dtype = plan.config.weight_quant.type
    codes = tensors["weight"].numpy()
    if not dtype.is_integer:
        values = oracle.decode(dtype.value)[codes.view(f"u{codes.itemsize}")]
        if not dtype.is_scaled:
            return values
    else:
        values = codes.astype(np.float64)
    group = np.repeat(np.arange(len(plan.columns)), plan.columns)
    if "weight_zero_point" in tensors:
        values = values - tensors["weight_zero_point"].numpy()[:, group]
    return values * tensors["weight_scale"].double().numpy()[:, group]


def forward_by_hand(plan: LayerPlan, tensors, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The layer in float64 and, for tolerances, the same with every sign made positive."""
    x = x.float().numpy()
    w = weight_by_hand(plan, tensors)
    y, size, start = [], [], 0
    quant, segments = plan.config.input_quant, plan.input_segments
    for i, rows in enumerate(plan.row_groups):
        xs = x
        if "smooth" in tensors:
            xs = x / tensors["smooth"].reshape(-1, plan.in_features)[i].numpy()
        if quant is None:
            values = xs.astype(np.float64)
        elif quant.dynamic or not quant.type.is_scaled:
            values, _ = oracle.activation(xs, quant.type.value, quant.axis, segments, plan.dual)
        else:
            column = np.repeat(np.arange(len(segments)), segments)
            scale = tensors["input_scale"].reshape(-1, len(segments))[i].numpy()[column]
            if "input_scale_neg" in tensors:
                negative = tensors["input_scale_neg"].reshape(-1, len(segments))[i].numpy()[column]
                scale = np.where(xs < 0, negative, scale)
            values = oracle.codes_of(xs, scale, quant.type.value) * scale.astype(np.float64)
        block = slice(start, start + rows)
        part, bound = values @ w[block].T, np.abs(values) @ np.abs(w[block]).T
        if plan.rank:
            down = tensors["svd_down"].double().numpy().reshape(-1, plan.rank, plan.in_features)[i]
            up = tensors["svd_up"].double().numpy()[block]
            part = part + x.astype(np.float64) @ down.T @ up.T
            bound = bound + np.abs(x.astype(np.float64)) @ np.abs(down).T @ np.abs(up).T
        y.append(part)
        size.append(bound)
        start += rows
    y, size = np.concatenate(y, -1), np.concatenate(size, -1)
    if "bias" in tensors:
        y, size = y + tensors["bias"].double().numpy(), size + tensors["bias"].abs().double().numpy()
    return y, size


def assert_close(y: torch.Tensor, expected: np.ndarray, size: np.ndarray) -> None:
    error = np.abs(y.double().numpy() - expected)
    assert (error <= 2e-6 * size + 1e-30).all(), (error / size).max()


def refuse(*args, **kwargs):
    raise AssertionError("the real path used dequantized weights")


# The product.


@pytest.mark.parametrize("case", cases(DType.INT8))
@pytest.mark.parametrize("dtype", DType)
def test_fake_and_real_against_oracle(dtype, case, monkeypatch) -> None:
    x = some_input(3)
    for quant in INPUTS:
        plan = cases(dtype)[case].plan(quant)
        layer, tensors = layer_of(plan)
        expected, size = forward_by_hand(plan, tensors, x)
        fake = layer(x)
        assert_close(fake, expected, size)
        layer.real_quant = True
        with monkeypatch.context() as patch:
            patch.setattr(QuantLinear, "dequantize", refuse)
            patch.setattr(hfquant.linear, "dequantize_weight", refuse)
            patch.setattr(formats, "dequantize", refuse)
            real = layer(x)
        assert_close(real, expected, size)
        assert real.dtype == fake.dtype == torch.float32


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(lead, real) -> None:
    for case in cases(DType.INT4).values():
        for quant in (None, InputQuant(dynamic=True), InputQuant(dynamic=True, axis=-1), InputQuant()):
            plan = case.plan(quant, real)
            layer, tensors = layer_of(plan)
            x = some_input(*lead)
            y = layer(x)
            assert y.shape == (*lead, OUT)
            if x.numel():
                assert_close(y, *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("sizes", [(7, 5), (1, 1), (1, 5), (5, 1), (33, 3)])
def test_odd_sizes(sizes, dtype, real) -> None:
    case = Case(WeightQuant(type=dtype), inputs=sizes[:1], outputs=sizes[1:])
    for quant in (None, InputQuant(dynamic=True, axis=-1)):
        plan = case.plan(quant, real)
        layer, tensors = layer_of(plan, bias=False)
        x = some_input(4, features=sizes[0])
        assert_close(layer(x), *forward_by_hand(plan, tensors, x))
        assert layer.bias is None


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_input_dtypes(dtype, real) -> None:
    for case in cases(DType.INT8).values():
        plan = case.plan(InputQuant(dynamic=True, axis=-1), real)
        layer, _ = layer_of(plan)
        x = some_input(4).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        # Computed in float32 and rounded once.
        assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("real", [False, True])
def test_strided_inputs_and_autocast(real) -> None:
    plan = cases(DType.INT8)["all at once"].plan(InputQuant(dynamic=True), real)
    layer, _ = layer_of(plan)
    x = some_input(5, 4).transpose(0, 1)
    assert not x.is_contiguous()
    expected = layer(x.contiguous())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[:, ::2]), layer(x[:, ::2].contiguous()), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(torch.zeros(()).expand(3, IN)), layer(torch.zeros(3, IN)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.contiguous()), expected)


@pytest.mark.parametrize("real", [False, True])
def test_extreme_codes(real) -> None:
    """Full-range codes on both sides: where saturating 16-bit sums go wrong."""
    for dtype, wide in ((DType.INT8, 512), (DType.INT4, 512), (DType.INT6, 100), (DType.INT16, 300)):
        limit = int(formats.qmax(dtype))
        for dual in ((True,), (False,)):
            case = Case(WeightQuant(type=dtype), inputs=(wide,), outputs=(2,), dual=dual)
            plan = case.plan(InputQuant(type=dtype, axis=-1, dynamic=True), real)
            tensors = random_tensors(plan)
            tensors["weight"] = torch.stack([torch.full((wide,), limit), torch.full((wide,), -limit)]).to(
                formats.code_dtype(dtype)
            )
            tensors["weight_scale"] = torch.ones(2, 1)
            x = torch.full((1, wide), float(limit))
            y = QuantLinear.from_tensors(plan, tensors, None)(x)
            assert y.tolist() == [[float(np.float32(limit * limit * wide)), float(np.float32(-limit * limit * wide))]]


def test_real_does_not_overflow_where_fake_does_not() -> None:
    plan = Case(WeightQuant(type=DType.INT8)).plan(None)
    tensors = random_tensors(plan)
    tensors["weight"].fill_(127)
    tensors["weight_scale"].fill_(1e-4)
    layer = QuantLinear.from_tensors(plan, tensors, None)
    x = torch.full((1, IN), 1e37)
    fake = layer(x)
    layer.real_quant = True
    assert fake.isfinite().all()
    torch.testing.assert_close(layer(x), fake, rtol=1e-6, atol=0)


def test_zeros_and_bad_tokens() -> None:
    for dtype in DType:
        for quant in (InputQuant(type=d, axis=-1, dynamic=True) for d in DType):
            for real in (False, True):
                layer, _ = layer_of(cases(dtype)["dual"].plan(quant, real), bias=False)
                x = some_input(3)
                clean = layer(x)
                assert (layer(torch.zeros(2, IN)) == 0).all()
                x[1, 3] = torch.nan
                y = layer(x)
                assert y[1].isnan().all()
                assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("case", cases(DType.INT8))
def test_effective_weight_and_to_linear(dtype, case) -> None:
    plan = cases(dtype)[case].plan(None)
    layer, tensors = layer_of(plan)
    w = weight_by_hand(plan, tensors)
    np.testing.assert_allclose(layer.dequantize().numpy(), w, rtol=2e-7)
    start = 0
    for i, rows in enumerate(plan.row_groups):
        block = slice(start, start + rows)
        if "smooth" in tensors:
            w[block] /= tensors["smooth"].reshape(-1, IN)[i].double().numpy()
        if plan.rank:
            w[block] += (
                tensors["svd_up"][block].double().numpy() @ tensors["svd_down"].view(-1, 3, IN)[i].double().numpy()
            )
        start += rows
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    np.testing.assert_allclose(layer.effective_weight().numpy(), w, rtol=1e-6, atol=1e-7)
    linear = layer.to_linear(torch.float32)
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    x = some_input(4)
    y, size = forward_by_hand(plan, tensors, x)
    assert_close(linear(x), y, size * 2)
    half = layer.to_linear(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert layer.to_linear(torch.float32).bias.data_ptr() != 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer_of(plan, bias=False)[0].to_linear(torch.float32).bias is None


def test_errors_of_forward() -> None:
    for real in (False, True):
        for quant in (None, InputQuant(dynamic=True)):
            layer, _ = layer_of(Case(WeightQuant()).plan(quant, real))
            with pytest.raises(TypeError, match=r"QuantLinear\(24, 10\) got an input of torch.int8"):
                layer(torch.zeros(2, IN, dtype=torch.int8))
            for wrong in (torch.zeros(2, IN + 1), torch.zeros(2, IN - 1), torch.zeros(2, 1), torch.zeros(())):
                with pytest.raises(ValueError, match=r"QuantLinear\(24, 10\) got an input of shape"):
                    layer(wrong)


# The module.


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
