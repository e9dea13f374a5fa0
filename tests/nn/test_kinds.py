"""The table of kinds: which modules can be quantized, by which kind, and why others cannot."""

from __future__ import annotations

import warnings

import accelerate
import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

import hfquant
from hfquant.calibration.batches import CalibrationError
from hfquant.nn.conv import QuantConv
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.kinds import KINDS, find_kind, kind_of, layers_in, matrix_of, refusal, size_of
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_layers


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def old_weight_norm() -> nn.Module:
    module = nn.Conv1d(4, 4, 3)
    weight = module._parameters.pop("weight")
    module.register_parameter("weight_v", weight)
    module.weight = weight.detach()
    return module


def empty() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is nothing to initialize
        return nn.Linear(4, 0)


def with_child() -> nn.Module:
    module = nn.Linear(4, 4)
    module.child = nn.Identity()
    return module


def tiled(module: nn.Conv2d) -> nn.Conv2d:
    """Pad with the opposite edge from left to right, as is often patched into a pipeline's convolutions."""

    def convolve(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), weight, bias)

    module._conv_forward = convolve.__get__(module)
    return module


def doubled(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def hooked(module: nn.Module) -> nn.Module:
    return accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def hooked_by_diffusers(module: nn.Module) -> nn.Module:
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(diffusers.hooks.ModelHook(), "a")
    return module


def no_longer_hooked(module: nn.Module) -> nn.Module:
    accelerate.hooks.remove_hook_from_module(hooked(module))
    assert "forward" in vars(module)
    return module


def no_longer_tiled(module: nn.Conv2d) -> nn.Conv2d:
    module._conv_forward = nn.Conv2d._conv_forward.__get__(module)
    return module


@pytest.mark.parametrize(
    ("module", "kind", "size"),
    [
        (nn.Linear(4, 6), QuantLinear, (4, 6)),
        (FalconLinear(4, 6), QuantLinear, (4, 6)),
        (nn.Conv1d(4, 6, 3), QuantConv, (12, 6)),
        (nn.Conv2d(4, 6, (3, 2)), QuantConv, (24, 6)),
        (nn.Conv3d(4, 6, 2), QuantConv, (32, 6)),
        (nn.Embedding(6, 4), QuantEmbedding, (4, 6)),
        (hooked(nn.Linear(4, 6)), QuantLinear, (4, 6)),
        (hooked_by_diffusers(nn.Linear(4, 6)), QuantLinear, (4, 6)),
        (no_longer_hooked(nn.Conv1d(4, 6, 3)), QuantConv, (12, 6)),
        (no_longer_tiled(nn.Conv2d(4, 6, 3)), QuantConv, (36, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_taken(module, kind, size, device) -> None:
    module = module.to(device)
    assert find_kind(module) is kind_of(module) is kind
    assert size_of(module) == size
    assert refusal(module) == ""
    matrix = matrix_of(module)
    assert tuple(matrix.shape) == size[::-1]
    assert not matrix.requires_grad
    # ``float_weight`` inverts ``matrix`` for any shape.
    weight = torch.arange(float(torch.Size(module.weight.shape).numel())).view(module.weight.shape)
    assert torch.equal(kind.float_weight(kind.matrix(weight), weight.shape), weight)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "a convolution in 2 groups"),
        (nn.ConvTranspose3d(4, 4, 2), "a transposed convolution"),
        (nn.MultiheadAttention(4, 1), "nn.MultiheadAttention reads its projections as raw parameters"),
        (nn.Embedding(4, 4, max_norm=1.0), "an embedding with max_norm, which changes its weight as it runs"),
        (nn.LazyLinear(4), "its weight is computed as it runs"),
        (weight_normed(), "its weight is computed as it runs"),
        (old_weight_norm(), "its weight is computed as it runs"),
        (empty(), "its weight is empty"),
        (with_child(), "Linear has more than a weight and a bias"),
        (doubled(nn.Linear(4, 4)), "its forward is overridden in this one module"),
        (doubled(nn.Embedding(4, 4)), "its forward is overridden in this one module"),
        (tiled(nn.Conv2d(4, 4, 3)), "its _conv_forward is overridden in this one module"),
        (hooked(tiled(nn.Conv2d(4, 4, 3))), "its _conv_forward is overridden in this one module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(module, why) -> None:
    assert find_kind(module) is None
    assert refusal(module) == why
    with pytest.raises(TypeError, match=f"^{type(module).__name__} cannot be quantized: {why}$"):
        kind_of(module)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_an_overridden_layer_runs_as_before(preset) -> None:
    layers = tiled(nn.Conv2d(32, 32, 3)), doubled(nn.Linear(8, 8)), nn.Linear(8, 8)
    model, x = nn.Sequential(*layers), torch.randn(1, 32, 8, 8)
    exact = model(x)
    with pytest.raises(CalibrationError, match="NaN"):
        hfquant.quantize(model, [x, x * torch.nan], "w8a8")
    assert torch.equal(model(x), exact)
    hfquant.quantize(model, [x], preset)
    assert list(quant_layers(model)) == ["2"]
    assert (model(x) - exact).norm() < 0.05 * exact.norm()
    assert [*model][:2] == [*layers][:2]


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.ReLU(), nn.ModuleList([nn.Linear(4, 4)]), nn.GRU(4, 4)])
def test_what_is_no_layer(module) -> None:
    assert find_kind(module) is None
    assert refusal(module) == ""
    with pytest.raises(TypeError, match=f"^{type(module).__name__} cannot be quantized: none of the kinds"):
        kind_of(module)


def test_a_quantized_layer_is_not_taken_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
    assert list(layers_in(model)) == ["0", "1"]
    hfquant.quantize(model, None, "w8a16")
    assert layers_in(model) == {}
    assert len(quant_layers(model)) == 2
    assert all(not any(kind.takes(m) and find_kind(m) for kind in KINDS) for m in model)


@torch.no_grad()
def test_falcon() -> None:
    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    model, ids = FalconForCausalLM(config).eval(), torch.randint(0, 40, (2, 7))
    exact = model(ids).logits
    names = [name for name, m in model.named_modules() if isinstance(m, FalconLinear)]
    hfquant.quantize(model, None, "w8a8-dynamic")
    assert list(quant_layers(model)) == names
    assert (model(ids).logits - exact).norm() < 0.05 * exact.norm()
    hfquant.dequantize(model)
    assert all(type(model.get_submodule(name)) is FalconLinear for name in names)


def test_what_falcon_adds_in_place_may_have_a_gradient() -> None:
    """Falcon adds the residual to a layer's output in place."""
    model = nn.Sequential(nn.Linear(8, 8))
    hfquant.quantize(model, None, "w8a8-dynamic")
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = model(x)
    y += x
    y.sum().backward()
    expected = 1 + model[0].effective_weight().sum(0)
    torch.testing.assert_close(x.grad, expected.expand(2, 3, 8))
