"""QuantLinear: its results against float64 in every format, plan and mode, and its behavior as a module."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hfquant import QuantLinear
from hfquant.formats import FORMATS, Grid, NumberFormat
from hfquant.layer_config import InputQuant, WeightQuant
from tests.nn.linear_cases import (
    IN,
    OUT,
    Case,
    assert_close,
    cases,
    forward_by_hand,
    layer_of,
    random_tensors,
    rank,
    some_input,
    weight_by_hand,
)

INPUTS = [
    None,
    *[InputQuant(type=d, axis=a, dynamic=y) for d in FORMATS for a, y in ((None, False), (None, True), (-1, True))],
]


def refuse(*args, **kwargs):
    raise AssertionError("the real path used dequantized weights")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", cases("int8"))
@pytest.mark.parametrize("dtype", FORMATS)
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
            patch.setenv("HFQUANT_KERNEL", "reference")
            patch.setattr(QuantLinear, "dequantize", refuse)
            patch.setattr(Grid, "dequantize", refuse)
            patch.setattr(NumberFormat, "dequantize", refuse)
            real = layer(x)
        assert_close(real, expected, size)
        assert real.dtype == fake.dtype == torch.float32


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(lead, real) -> None:
    for case in cases("int4").values():
        for quant in (None, InputQuant(dynamic=True), InputQuant(dynamic=True, axis=-1), InputQuant()):
            plan = case.plan(quant, real)
            layer, tensors = layer_of(plan)
            x = some_input(*lead)
            y = layer(x)
            assert y.shape == (*lead, OUT)
            if x.numel():
                assert_close(y, *forward_by_hand(plan, tensors, x))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
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
    for case in cases("int8").values():
        plan = case.plan(InputQuant(dynamic=True, axis=-1), real)
        layer, _ = layer_of(plan)
        x = some_input(4).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        # Computed in float32 and rounded once.
        assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("real", [False, True])
def test_models_of_float64(real) -> None:
    """Bias and low-rank branch are of the model's dtype."""
    for case in cases("int8").values():
        layer, _ = layer_of(case.plan(InputQuant(dynamic=True, axis=-1), real))
        x = some_input(4)
        y = layer(x)
        assert layer.double().bias.dtype == torch.float64
        torch.testing.assert_close(layer(x.double()).float(), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("real", [False, True])
def test_strided_inputs_and_autocast(real) -> None:
    plan = cases("int8")["all at once"].plan(InputQuant(dynamic=True), real)
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
    """Full-range codes on both sides, where saturating 16-bit sums go wrong."""
    for dtype, wide in (("int8", 512), ("int4", 512), ("int6", 100), ("int16", 300)):
        limit = int(FORMATS[dtype].qmax)
        for dual in ((True,), (False,)):
            case = Case(WeightQuant(type=dtype), inputs=(wide,), outputs=(2,), dual=dual)
            plan = case.plan(InputQuant(type=dtype, axis=-1, dynamic=True), real)
            tensors = random_tensors(plan)
            tensors["weight"] = torch.stack([torch.full((wide,), limit), torch.full((wide,), -limit)]).to(
                FORMATS[dtype].code_dtype
            )
            tensors["weight_scale"] = torch.ones(2, 1)
            x = torch.full((1, wide), float(limit))
            y = QuantLinear.from_tensors(plan, tensors, None)(x)
            assert y.tolist() == [[float(np.float32(limit * limit * wide)), float(np.float32(-limit * limit * wide))]]


def test_real_does_not_overflow_where_fake_does_not() -> None:
    plan = Case(WeightQuant(type="int8")).plan(None)
    tensors = random_tensors(plan)
    tensors["weight"].fill_(127)
    tensors["weight_scale"].fill_(1e-4)
    layer = QuantLinear.from_tensors(plan, tensors, None)
    x = torch.full((1, IN), 1e37)
    fake = layer(x)
    layer.real_quant = True
    assert fake.isfinite().all()
    torch.testing.assert_close(layer(x), fake, rtol=2e-5, atol=0)


def test_zeros_and_bad_tokens() -> None:
    for dtype in FORMATS:
        for quant in (InputQuant(type=d, axis=-1, dynamic=True) for d in FORMATS):
            for real in (False, True):
                layer, _ = layer_of(cases(dtype)["dual"].plan(quant, real), bias=False)
                x = some_input(3)
                clean = layer(x)
                assert (layer(torch.zeros(2, IN)) == 0).all()
                x[1, 3] = torch.nan
                y = layer(x)
                assert y[1].isnan().all()
                assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", cases("int8"))
def test_effective_weight_and_to_float(dtype, case) -> None:
    plan = cases(dtype)[case].plan(None)
    layer, tensors = layer_of(plan)
    w = weight_by_hand(plan, tensors)
    np.testing.assert_allclose(layer.dequantize().numpy(), w, rtol=2e-7)
    start = 0
    for i, rows in enumerate(plan.row_groups):
        block = slice(start, start + rows)
        if "smooth" in tensors:
            w[block] /= tensors["smooth"].reshape(-1, IN)[i].double().numpy()
        if rank(plan):
            w[block] += (
                tensors["svd_up"][block].double().numpy() @ tensors["svd_down"].view(-1, 3, IN)[i].double().numpy()
            )
        start += rows
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    np.testing.assert_allclose(layer.effective_weight().numpy(), w, rtol=1e-6, atol=1e-7)
    linear = layer.to_float(torch.float32)
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    x = some_input(4)
    y, size = forward_by_hand(plan, tensors, x)
    assert_close(linear(x), y, size * 2)
    half = layer.to_float(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert layer.to_float(torch.float32).bias.data_ptr() != 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer_of(plan, bias=False)[0].to_float(torch.float32).bias is None


def test_errors_of_forward() -> None:
    for real in (False, True):
        for quant in (None, InputQuant(dynamic=True)):
            layer, _ = layer_of(Case(WeightQuant()).plan(quant, real))
            with pytest.raises(TypeError, match=r"QuantLinear\(24, 10\) got an input of torch.int8"):
                layer(torch.zeros(2, IN, dtype=torch.int8))
            for wrong in (torch.zeros(2, IN + 1), torch.zeros(2, IN - 1), torch.zeros(2, 1), torch.zeros(())):
                with pytest.raises(ValueError, match=r"QuantLinear\(24, 10\) got an input of shape"):
                    layer(wrong)


# As a module: tensors, casts, copies, compiling, loading.


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", cases("int8"))
def test_tensors_are_as_planned(dtype, case) -> None:
    for quant in (None, InputQuant(), InputQuant(type="fp8e4m3")):
        plan = cases(dtype)[case].plan(quant)
        layer, _ = layer_of(plan, dtype=torch.bfloat16)
        spec = {n: (shape, kind or torch.bfloat16) for n, (shape, kind) in plan.tensors().items()}
        spec["bias"] = (OUT,), torch.bfloat16
        assert {n: (tuple(t.shape), t.dtype) for n, t in layer.state_dict().items()} == spec
        bits = plan.config.weight_quant.format.bits
        assert layer.weight.shape == (OUT, -(-IN * bits // 8) if bits < 8 else IN)
        assert layer.weight.dtype in (torch.int8, torch.int16)
        assert layer.weight.nbytes == OUT * IN * bits / 8
        # No flat tensors that could be sliced wrongly, and none without a dimension.
        assert all(t.dim() == 2 for n, t in layer.state_dict().items() if n.startswith("weight") or n.startswith("svd"))
        assert all(t.dim() >= 1 for t in layer.state_dict().values())
        assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
        assert not any(p.requires_grad for p in layer.parameters())
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (IN, OUT)


def test_as_many_parameters_as_the_float_layer() -> None:
    layer, _ = layer_of(Case(WeightQuant(type="int8")).plan(InputQuant()))
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in nn.Linear(IN, OUT).parameters())


@pytest.mark.parametrize("case", cases("int8"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_move_only_the_models_floats(dtype, case) -> None:
    for weight in ("int4", "int16", "fp8e4m3"):
        plan = cases(weight)[case].plan(InputQuant(type="int8"))
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
            if not rank(plan):
                bias = before["bias"].to(dtype).float()
                expected = layer(x) - bias
                layer.bias = None
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_half_float_double_methods() -> None:
    layer, _ = layer_of(cases("int8")["all at once"].plan(InputQuant()))
    for method, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        getattr(layer, method)()
        assert layer.svd_down.dtype == layer.bias.dtype == dtype
        assert layer.weight_scale_row.dtype == layer.smooth.dtype == layer.input_scale.dtype == torch.float32
        assert layer.weight_scale.dtype == torch.uint8


@pytest.mark.parametrize("real", [False, True])
def test_state_dict_deepcopy_and_meta(real) -> None:
    x = some_input(3)
    for dtype in FORMATS:
        for case in cases(dtype).values():
            plan = case.plan(InputQuant(type="int8"), real)
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


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_bias_that_learns_has_a_gradient(requires_grad, real) -> None:
    """As peft's `bias="lora_only"` has it, whether or not the input needs one."""
    for case in cases("int8").values():
        layer, _ = layer_of(case.plan(InputQuant(dynamic=True, axis=-1), real))
        x = some_input(4)
        y = layer(x)
        layer.bias.requires_grad_(True)
        found = layer(x.clone().requires_grad_(requires_grad))
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-4)
        found.square().sum().backward()
        torch.testing.assert_close(layer.bias.grad, (2 * y).sum(0), rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("real", [False, True])
def test_forward_mode_differentiation_is_refused(real) -> None:
    """Kernels would drop the tangent."""
    layer, _ = layer_of(Case(WeightQuant(type="int8")).plan(InputQuant(), real))
    x = some_input(3)
    for _ in range(2):  # the second call goes directly to a kernel
        layer(x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(layer)(x)
    with torch.autograd.forward_ad.dual_level():
        layer(x)  # no tangent


def test_gradients_reach_the_input() -> None:
    """An adapter in front of a quantized linear must be able to train."""
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
        layer, _ = layer_of(cases("int4")[case].plan(quant, real))
        x = some_input(3)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


def test_set_tensor() -> None:
    plan = cases("int4")["all at once"].plan(InputQuant())
    layer, tensors = layer_of(plan)
    x = some_input(3)
    y = layer(x)
    other = QuantLinear(plan, device="meta")
    packed = layer.weight.data
    for codes in (tensors["weight"], packed, packed[None], tensors["weight"][None]):
        for name, value in {**layer.state_dict(), "weight": codes}.items():
            other.set_tensor(name, value)
        assert torch.equal(other(x), y)
    # The model's dtype is accepted, whatever it is.
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
        "weight_scale_row": [layer.weight_scale_row.half(), layer.weight_scale_row.flatten()],
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
        with pytest.raises(ValueError, match=f"no tensor '{name}'; available: weight, .*weight_scale"):
            layer.set_tensor(name, torch.zeros(1))
    plain, _ = layer_of(Case(WeightQuant()).plan(None), bias=False)
    for name in ("bias", "smooth", "input_scale"):
        with pytest.raises(ValueError, match=f"no tensor '{name}'"):
            plain.set_tensor(name, torch.zeros(OUT))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_codes_in_the_shape_they_have_on_disk_run() -> None:
    layer, _ = layer_of(Case(WeightQuant(type="int6")).plan(None))
    x = some_input(2)
    y = layer(x)
    layer.weight = nn.Parameter(layer.weight.data[None], requires_grad=False)
    assert torch.equal(layer(x), y)


def test_repr_says_what_it_is() -> None:
    text = repr(layer_of(cases("int4")["all at once"].plan(InputQuant(dynamic=True)))[0])
    for word in ("in_features=24", "out_features=10", "bias=True", "weight=int4", "group_size=4", "input=int8 dynamic",
                 "input_segments=[8, 16]", "output_segments=[3, 7]", "dual", "rank=3"):  # fmt: skip
        assert word in text
    assert "dual" not in repr(layer_of(Case(WeightQuant()).plan(None))[0])


def test_reset_parameters_is_harmless() -> None:
    layer, _ = layer_of(Case(WeightQuant()).plan(None))
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", FORMATS)
def test_codes_go_to_disk_and_back(dtype) -> None:
    """Stored with rank 3, which no plain linear accepts; FP8 as uint8, which INT8 layers refuse, and vice versa."""
    case = Case(WeightQuant(type=dtype))
    layer, tensors = layer_of(case.plan(None), bias=False)
    stored = layer.codes_on_disk()
    assert stored.shape == (1, *layer.weight.shape)
    assert stored.dtype == FORMATS[dtype].disk_dtype == (torch.uint8 if "fp8" in dtype else layer.weight.dtype)
    assert not stored.is_floating_point()
    x = some_input(3)
    for codes in (stored, stored[0]):
        other = QuantLinear(case.plan(None), bias=False, device="meta")
        for name, value in {**layer.state_dict(), "weight": codes}.items():
            other.set_tensor(name, value)
        assert other.weight.dtype == layer.weight.dtype
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.codes(), tensors["weight"])
        assert torch.equal(other(x), layer(x))
    # The layer also runs with weights as stored on disk, since offloaded weights come straight from there.
    layer_on_disk = copy.deepcopy(layer)
    layer_on_disk.weight = nn.Parameter(stored, requires_grad=False)
    assert torch.equal(layer_on_disk(x), layer(x))
    for wrong in {torch.uint8, torch.int8, torch.int16} - {layer.weight.dtype, FORMATS[dtype].disk_dtype}:
        with pytest.raises(ValueError, match=r"tensor 'weight': expected shape .* got "):
            layer.set_tensor("weight", stored.to(wrong))


def test_floats_in_the_place_of_codes_are_refused() -> None:
    layer, _ = layer_of(cases("int8")["channel"].plan())
    layer.weight.data = layer.effective_weight()
    with pytest.raises(
        TypeError, match=r"out_features=10, bias=True\) has a weight of torch.float32 in the place of torch.int8"
    ):
        layer(torch.randn(2, IN))
