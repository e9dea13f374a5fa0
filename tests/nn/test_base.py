"""load_state_dict of quantized modules."""

import copy

import pytest
import torch
from torch import nn

import hfquant
from hfquant.nn.modules import quant_modules
from tests.integrations.small_models import mixtral


def floats() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.Conv2d(32, 32, 3), nn.Embedding(40, 64))


def quantized(preset: str) -> nn.Module:
    rule = hfquant.PRESETS[preset]["default"]
    return hfquant.quantize(floats(), None, {"default": {**rule, "float_share": 0, "include": ["embeddings"]}})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("preset", ["w8a16", "w8a8-dynamic", "fp8-dynamic", "w4a16"])
def test_float_weights_are_refused_and_change_no_quantized_layer(preset: str, assign: bool, strict: bool) -> None:
    model = quantized(preset)
    assert len(quant_modules(model)) >= 3
    before = copy.deepcopy(model.state_dict())
    other = {name: torch.randn_like(tensor) for name, tensor in floats().state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"dtype mismatch for 0\.weight \(torch\.float32 instead of torch\."
    ) as error:
        model.load_state_dict(other, strict=strict, assign=assign)
    assert all(f"{name}.weight" in str(error.value) for name in quant_modules(model))
    for name, tensor in model.state_dict().items():
        if name.startswith("1."):
            assert torch.equal(tensor, other[name])  # as torch does when sizes differ
        else:
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("preset", ["w8a16", "fp8-dynamic", "w4a16"])
def test_codes_are_loaded(preset: str) -> None:
    model, other = quantized(preset), quantized(preset)
    for tensor in other.state_dict().values():
        tensor.view(torch.uint8).bitwise_xor_(1)
    model.load_state_dict(other.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), other.state_dict()[name].view(torch.uint8)), name


def test_scales_in_another_precision_are_cast() -> None:
    model, other = quantized("w8a16"), quantized("w8a16")
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in other.state_dict().items()}
    model.load_state_dict(cast)
    assert torch.equal(model[0].weight_scale, cast["0.weight_scale"].float())
    assert model[0].weight_scale.dtype == torch.float32


def test_codes_as_they_are_on_disk_are_refused() -> None:
    model = quantized("fp8-dynamic")
    codes = {"0.weight": model[0].codes_on_disk()[0]}
    with pytest.raises(RuntimeError, match=r"0\.weight \(torch\.uint8 instead of torch\.int8\).* with from_pretrained"):
        model.load_state_dict(codes, strict=False)


def test_what_a_state_dict_lacks_is_left() -> None:
    model = quantized("w8a16")
    before = copy.deepcopy(model.state_dict())
    other = {"0.bias": torch.ones(48)}
    model.load_state_dict(other, strict=False)
    assert torch.equal(model[0].bias, other["0.bias"])
    assert torch.equal(model[0].weight, before["0.weight"])


def test_float_experts_are_refused() -> None:
    model = hfquant.quantize(mixtral(), None, "w8a16")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"dtype mismatch for [\w.]*experts\.gate_up_proj"):
        model.load_state_dict(mixtral().state_dict(), strict=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if "experts" in name)
