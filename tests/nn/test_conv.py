"""Quantized convolutions against float64: unfolded by hand, quantized by hand, multiplied."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMPConv1d
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

import hfquant
from hfquant.kernels import dequantize
from hfquant.kernels.table import pick
from hfquant.nn import conv as conv_file
from hfquant.nn.conv import QuantConv, quantized_class
from hfquant.nn.kinds import find_kind, kind_of, refusal
from hfquant.observe import observe

WEIGHTS = {"opt": {"type": "default"}, "input_quant": None, "weight_quant": {"type": "int8", "axis": -1}}
DYNAMIC = {**WEIGHTS, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}}
CONVS = {
    "2d": (lambda: nn.Conv2d(8, 10, 3, padding=1), (2, 8, 7, 6)),
    "1x1": (lambda: nn.Conv2d(8, 10, 1, bias=False), (2, 8, 5, 4)),
    "1x1, strided": (lambda: nn.Conv2d(8, 10, 1, stride=2), (2, 8, 5, 4)),
    "reflect": (lambda: nn.Conv2d(8, 10, (3, 2), (1, 2), (2, 1), (2, 1), padding_mode="reflect"), (1, 8, 9, 7)),
    "replicate": (lambda: nn.Conv1d(8, 10, 4, 3, 2, padding_mode="replicate"), (2, 8, 11)),
    "same": (lambda: nn.Conv1d(8, 10, 4, padding="same", dilation=2), (2, 8, 11)),
    "valid": (lambda: nn.Conv2d(8, 10, 2, padding="valid"), (1, 8, 5, 4)),
    "circular": (lambda: nn.Conv3d(8, 10, (2, 3, 1), padding=(1, 1, 0), padding_mode="circular"), (1, 8, 4, 5, 3)),
    "3d": (lambda: nn.Conv3d(8, 10, 2, 2), (2, 8, 4, 6, 5)),
}  # fmt: skip


def quantized(conv: nn.Module, config, data=None) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(conv)).eval()
    hfquant.quantize(model, data, {"default": config, "0": {"enable": True}})
    return model[0]


def rounded(values: Tensor, dim: int) -> Tensor:
    """Quantize to INT8 and back, with one scale per slice along ``dim``, in float64."""
    amax = values.abs().amax(dim, keepdim=True)
    scale = torch.where(amax > 0, amax / 127, torch.ones_like(amax)).float().double()
    return torch.round(values / scale).clamp(-127, 127) * scale


def oracle(conv: nn.Module, x: Tensor, inputs: bool) -> Tensor:
    """Return the convolution with INT8 weights per channel and, if asked, INT8 inputs per window."""
    weight = rounded(conv.weight.detach().double().flatten(1), 1).view(conv.weight.shape)
    n, bias = len(conv.kernel_size), 0 if conv.bias is None else conv.bias.detach().double()
    if isinstance(conv.padding, str):
        total = [
            d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
        ]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x.double(), [p for pair in pads[::-1] for p in pair], mode)
    outs = [
        (s - (k - 1) * d - 1) // t + 1
        for s, k, d, t in zip(x.shape[2:], conv.kernel_size, conv.dilation, conv.stride, strict=True)
    ]
    y = x.new_zeros(len(x), len(weight), *outs)
    for at in itertools.product(*map(range, outs)):
        window = x[(slice(None), slice(None), *(slice(a * t, a * t + (k - 1) * d + 1, d) for a, t, k, d in
                    zip(at, conv.stride, conv.kernel_size, conv.dilation, strict=True)))].flatten(1)  # fmt: skip
        window = rounded(window, 1) if inputs else window
        y[(slice(None), slice(None), *at)] = window @ weight.flatten(1).T + bias
    assert y.dim() == n + 2
    return y


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("inputs", [False, True], ids=["weight-only", "w8a8"])
@torch.no_grad()
def test_against_float64(case, inputs) -> None:
    make, shape = CONVS[case]
    conv, x = make(), torch.randn(shape)
    layer = quantized(conv, DYNAMIC if inputs else WEIGHTS)
    expected = oracle(conv, x, inputs)
    for real in (False, True):
        layer.real_quant = real
        y = layer(x)
        assert y.shape == conv(x).shape
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if len(shape) > 3:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        y = layer(x.contiguous(memory_format=last))
        # As for torch's own convolution, padding loses the memory format in some modes.
        as_torch = conv(x.contiguous(memory_format=last)).is_contiguous(memory_format=last)
        assert y.is_contiguous(memory_format=last) or not as_torch
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), y[0].contiguous(), rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("config", [WEIGHTS, DYNAMIC], ids=["weight-only", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(config, dtype) -> None:
    conv, x = nn.Conv2d(16, 24, 3, padding=1), torch.randn(2, 16, 9, 9)
    y = quantized(conv, config)(x)
    half = quantized(conv.to(dtype), config)
    assert half.bias.dtype == dtype
    found = half(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - y).norm() < (0.02 if dtype == torch.bfloat16 else 0.005) * y.norm()


@pytest.mark.parametrize("type_", ["int4", "int8"])
@torch.no_grad()
def test_groups_run_along_the_input_channels(type_) -> None:
    conv = nn.Conv2d(16, 6, (3, 2))
    layer = quantized(conv, {**WEIGHTS, "weight_quant": {"type": type_, "group_size": 8, "scale": "float32"}})
    qmax = 7 if type_ == "int4" else 127
    groups = conv.weight.detach().double().view(6, 2, 8, 3, 2)
    scale = (groups.abs().amax(2, keepdim=True) / qmax).float().double()
    expected = (torch.round(groups / scale).clamp(-qmax, qmax) * scale).view(6, 16, 3, 2)
    torch.testing.assert_close(layer.to_float(torch.float64).weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert layer.weight_scale.shape == (6, 2 * 3 * 2)
    assert layer.weight.nbytes == 6 * 96 // (2 if type_ == "int4" else 1)


@pytest.mark.parametrize(("type_", "at_least"), [("int8", 45.0), ("int4", 19.0)])
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_weights_as_good_as_the_bits_promise(type_, at_least, kernel) -> None:
    conv, x = nn.Conv2d(64, 96, kernel, padding=kernel // 2), torch.randn(1, 64, 12, 12)
    nn.init.normal_(conv.weight)
    config = {**WEIGHTS, "weight_quant": {"type": type_, "group_size": 64, "scale": "float32"}}
    layer, exact = quantized(conv, config), conv(x)
    sqnr = -20 * torch.log10((layer(x) - exact).norm() / exact.norm())
    # Gaussian weights: 6.02 dB per bit, less the crest factor of 64 values; measured 46.5 and 20.
    assert sqnr > at_least - 4


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "config",
    [
        WEIGHTS,
        DYNAMIC,
        {**DYNAMIC, "opt": {"type": "svd", "low_rank": 3}},
        {**WEIGHTS, "opt": {"type": "svd", "low_rank": 3}, "weight_quant": {"type": "int4", "group_size": 8}},
        {**WEIGHTS, "opt": {"type": "smooth"}, "weight_quant": {"type": "int4", "group_size": 8, "symmetric": False}},
    ],
)
@torch.no_grad()
def test_blocks_and_tiles_change_nothing(config, monkeypatch) -> None:
    conv, x = nn.Conv2d(8, 10, 3, padding=1, stride=2), torch.randn(3, 8, 9, 10)
    layer = quantized(conv, config, [x])
    whole = layer(x)
    calls = []
    multiply = QuantConv.multiply
    monkeypatch.setattr(QuantConv, "multiply", lambda self, rows: calls.append(rows.numel()) or multiply(self, rows))
    monkeypatch.setattr(conv_file, "TILE", 500)
    monkeypatch.setattr(conv_file, "BLOCK", 200)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)
    if config["input_quant"]:
        assert len(calls) >= 15
        assert max(calls) <= 500
    else:
        assert len(list(layer._blocks(torch.float32))) == 5
    # Both also equal the convolution of the dequantized float module.
    if not config["input_quant"]:
        torch.testing.assert_close(layer.to_float(torch.float32)(x), whole, rtol=1e-4, atol=1e-4)


def test_a_dynamic_scale_a_tensor_becomes_one_a_row() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(6, 6))
    found = hfquant.plan(model, {"default": {**DYNAMIC, "input_quant": {"type": "int8", "dynamic": True}}})
    assert [p.config.input_quant.axis for p in found.layers.values()] == [-1, None]


def test_what_stays_in_float_unless_asked() -> None:
    model = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(4, 320, 3),
            "conv_out": nn.Conv2d(320, 4, 3),
            "patches": nn.Conv3d(16, 48, (1, 2, 2), stride=(1, 2, 2)),
            "down": nn.Conv2d(64, 128, 2, stride=2),
            "inner": nn.Conv2d(8, 16, 3),
            "narrow": nn.Conv2d(320, 80, 1),
        }
    )
    assert list(hfquant.plan(model, "w8a16").layers) == ["down", "inner", "narrow"]
    everything = {"default": {**WEIGHTS, "include": ["edge_convs"]}}
    assert hfquant.plan(model, everything).layers.keys() == model.keys()
    one = {"default": WEIGHTS, "conv_in": {"enable": True}}
    assert list(hfquant.plan(model, one).layers) == ["conv_in", "down", "inner", "narrow"]


# Calibration.


@torch.no_grad()
def test_statistics_are_those_of_the_windows() -> None:
    conv, x = nn.Conv2d(3, 4, 3, padding=1, stride=2), torch.randn(2, 3, 9, 8)
    model = nn.Sequential(conv)
    stats = observe(model, {"0": conv}, [x, x + 1], {"0": ("hessian",)})["0"]
    rows = []
    for batch in (x, x + 1):
        # F.unfold orders values by [channels, positions].
        unfolded = F.unfold(batch.double(), 3, padding=1, stride=2).view(2, 3, 9, -1)
        rows.append(unfolded.permute(0, 3, 2, 1).reshape(-1, 27))
    every = torch.cat(rows)
    assert stats.count == len(every)
    torch.testing.assert_close(stats.hessian.double(), every.T @ every / len(every), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.high, every.amax(0).float())
    assert torch.equal(stats.low, every.amin(0).float())
    assert "_conv_forward" not in vars(conv)


@torch.no_grad()
def test_of_many_windows_some_are_drawn_and_no_value_is_missed(monkeypatch) -> None:
    monkeypatch.setattr(conv_file, "ROWS", 400)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 64, 64)
    x[1, 2, 17, 40] = 50.0
    x[0, 0, 3, 3] = -60.0
    model = nn.Sequential(conv)
    found = [observe(model, {"0": conv}, [x], {"0": ("hessian",)})["0"] for _ in range(2)]
    assert found[0].count == 400
    assert torch.equal(found[0].hessian, found[1].hessian)
    assert found[0].high.max() == 50
    assert found[0].low.min() == -60
    assert torch.equal(found[0].high, x.amax((0, 2, 3)).repeat(9))
    # Without the two outliers, the sample's second moments match those of all windows.
    x = x.clamp(-4, 4)
    stats = observe(model, {"0": conv}, [x] * 40, {"0": ("hessian",)})["0"]
    every = F.unfold(x, 3, padding=1).view(2, 3, 9, -1).permute(0, 3, 2, 1).reshape(-1, 27)
    exact = every.T @ every / len(every)
    assert (stats.hessian - exact).norm() < 0.05 * exact.norm()
    layer = quantized(conv, {**WEIGHTS, "input_quant": {"type": "int8"}}, [x * 3])
    torch.testing.assert_close(layer.input_scale, torch.tensor([12.0 / 127]))


@torch.no_grad()
def test_gptq_and_smooth_pay_on_convolutions() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    # Neighboring pixels and channels are correlated, and one channel is large.
    base = F.avg_pool2d(torch.randn(6, 4, 20, 20), 3, 1)
    x = torch.einsum("bchw,dc->bdhw", base, torch.randn(32, 4)) + 0.05 * torch.randn(6, 32, 18, 18)
    x[:, 5] *= 30
    calibration, held_out = list(x[:4].split(1)), x[4:]
    exact = conv(held_out)

    def error(config) -> float:
        layer = quantized(conv, {**WEIGHTS, **config}, calibration)
        return ((layer(held_out) - exact).norm() / exact.norm()).item()

    int4 = {"weight_quant": {"type": "int4", "group_size": 32}}
    assert error({**int4, "calib": {"type": "gptq"}}) < 0.7 * error(int4)
    w8a8 = {"input_quant": {"type": "int8"}}
    assert error({**w8a8, "opt": {"type": "smooth"}}) < 0.7 * error(w8a8)


def test_nan_in_calibration_is_named() -> None:
    x = torch.randn(1, 8, 5, 5)
    x[0, 0, 1, 1] = torch.nan
    with pytest.raises(hfquant.CalibrationError, match=r"layer '0': 9 of 648 inputs are NaN or Inf"):
        quantized(nn.Conv2d(8, 8, 3, padding=1), {**WEIGHTS, "input_quant": {"type": "int8"}}, [x[..., :3, :3]])


# Subclasses.


@torch.no_grad()
def test_causal_convolutions_keep_their_cache() -> None:
    """Wan's convolution pads with earlier frames itself, and its autoencoder counts such layers by class."""
    conv, x = WanCausalConv3d(8, 8, 3, padding=1), torch.randn(1, 8, 4, 5, 5)
    cache = torch.randn(1, 8, 2, 5, 5)
    layer = quantized(conv, WEIGHTS)
    assert isinstance(layer, WanCausalConv3d)
    float_again = layer.to_float(torch.float32)
    assert type(float_again) is WanCausalConv3d
    for kwargs in ({}, {"cache_x": cache}):
        torch.testing.assert_close(layer(x, **kwargs), float_again(x, **kwargs), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), layer(x, cache))
    # Calibration sees what is convolved, including the cache.
    found = observe(nn.Sequential(conv), {"0": conv}, [x], {"0": ()})["0"]
    assert found.count == 4 * 25


def test_which_subclasses_leave_their_weight_to_torch() -> None:
    assert kind_of(CogVideoXSafeConv3d(8, 8, 3)) is QuantConv
    for other in (MMAudioMPConv1d(8, 8, 3), WeightStandardizedConv2d(8, 8, 3)):
        assert find_kind(other) is None
        assert f"whose class, {type(other).__name__}, uses the weight directly" in refusal(other)

    class Scaled(nn.Conv2d):
        def forward(self, input):
            return self._conv_forward(input, *(w * 2 for w in [self.weight]), self.bias)

    class Hidden(nn.Conv2d):
        def forward(self, input):
            return super().forward(input)

        def helper(self):
            return [self.weight for _ in range(2)]

    class Other(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    assert all(find_kind(kind(8, 8, 3)) is None for kind in (Scaled, Hidden, Other))


# As a module.


def test_it_is_a_convolution_and_no_linear() -> None:
    layer = quantized(nn.Conv2d(8, 10, 3, stride=2, padding=1), WEIGHTS)
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer, nn.Linear)
    assert type(layer) is quantized_class(nn.Conv2d)
    assert (layer.in_channels, layer.out_channels, layer.stride, layer.groups) == (8, 10, (2, 2), 1)
    assert layer.weight.shape == (10, 72, 1, 1)
    assert layer.codes_on_disk().shape == (1, 10, 72, 1, 1)
    assert "8, 10, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=True, weight=int8" in repr(layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Conv2d(8, 10, 3).load_state_dict({"weight": layer.codes_on_disk(), "bias": layer.bias})
    with pytest.raises(TypeError, match=r"QuantConv2d got an input of torch.int8: code that casts to `conv.weight"):
        layer(torch.zeros(1, 8, 4, 4, dtype=torch.int8))


@torch.no_grad()
def test_copies_and_pickles() -> None:
    layer, x = quantized(nn.Conv2d(8, 10, 3), DYNAMIC), torch.randn(1, 8, 6, 6)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
        assert type(other.to_float(torch.float32)) is nn.Conv2d


def test_gradients_are_those_of_the_effective_weight() -> None:
    conv, x = nn.Conv2d(8, 10, 3, padding=1), torch.randn(2, 8, 6, 6)
    for config in (WEIGHTS, DYNAMIC):
        layer = quantized(conv, config)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn(2, 10, 6, 6)
        (layer(ours) * weights).sum().backward()
        (layer.to_float(torch.float32)(theirs) * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [WEIGHTS, DYNAMIC], ids=["weight-only", "w8a8"])
def test_an_adapter_on_a_convolution_trains(config) -> None:
    """peft chooses its convolutions by the class of the adapted one."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1)), torch.randn(2, 8, 6, 6)
    hfquant.quantize(model, None, {"default": config})
    before = model(x).detach()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), model)
    torch.testing.assert_close(model(x), before)
    adapters = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert [tuple(p.shape) for p in adapters.values()] == [(2, 8, 3, 3), (8, 2, 1, 1), (2, 8, 1, 1), (8, 2, 1, 1)]
    (model(x) ** 2).sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("config", [WEIGHTS, DYNAMIC], ids=["weight-only", "w8a8"])
@torch.no_grad()
def test_compiled_whole(config) -> None:
    layer, x = quantized(nn.Conv2d(8, 10, 3, padding=1), config), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_alone_on_kernels_and_in_torchs_convolution_agree(case, dtype, monkeypatch) -> None:
    """Convolutions are unfolded if one of hfquant's kernels is faster; the result is equal up to output rounding."""
    make, shape = CONVS[case]
    conv, x = make(), torch.randn(shape)
    layer = quantized(conv, WEIGHTS | {"real_quant": True})
    layer, x = layer.to(dtype), x.to(dtype)
    results = []
    for unfolds in (True, False):
        monkeypatch.setattr(QuantConv, "_unfolds", lambda self, x, unfolds=unfolds: unfolds)
        results.append([layer(x), layer(x[0]), layer(x[:0])])
    exact = oracle(conv, x, False)
    # The input and the output are rounded once each, and on one of the two paths the weight is too.
    tolerance = 3 * torch.finfo(dtype).eps
    for found in results:
        assert all(y.dtype == dtype and y.is_contiguous() for y in found)
        assert (found[0].double() - exact).norm() <= tolerance * exact.norm()
        assert found[2].shape == (0, *found[0].shape[1:])
        torch.testing.assert_close(found[1], found[0][0], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_weights_alone_are_unfolded_where_that_is_faster(monkeypatch) -> None:
    """In half precision with enough output channels; not for fakes, gradients, or if there is no kernel."""
    config = WEIGHTS | {"real_quant": True}
    layer, small = (quantized(nn.Conv2d(32, out, 3, padding=1), config) for out in (192, 191))
    x = torch.randn(1, 32, 8, 8, dtype=torch.bfloat16)
    # Without a suitable hfquant kernel, the machine uses torch's convolution.
    there = pick(layer.product, "cpu", torch.bfloat16, 64, 192) is not dequantize.KERNEL
    assert layer._unfolds(x) == layer._unfolds(x.half()) == there
    assert not layer._unfolds(x.float())
    assert not small._unfolds(x)
    with torch.enable_grad():
        assert not layer._unfolds(x.clone().requires_grad_())
    monkeypatch.setenv("HFQUANT_KERNEL", "dequantize")
    assert not layer._unfolds(x)
    monkeypatch.setenv("HFQUANT_KERNEL", "reference")
    assert layer._unfolds(x)
    layer.real_quant = False
    assert not layer._unfolds(x)
    assert quantized(nn.Conv2d(32, 32, 3), DYNAMIC)._unfolds(x.float())
