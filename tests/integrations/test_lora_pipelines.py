"""Adapters of diffusers pipelines on quantized denoisers: load, fuse, save, swap, unload, and ones that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import hfquant
from hfquant.integrations.adapters import LoraQuantLinear
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.lora_pipelines import PIPELINES, denoiser_of, pipeline
from tests.integrations.small_models import denoiser_inputs, outputs, sqnr

FILE = "pytorch_lora_weights.safetensors"
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapter_file(folder: Path, name: str, seed: int = 0, rank: int = 4, targets: Any = None) -> Path:
    """Save an adapter made on the float denoiser, the way its pipeline does."""
    pipe = pipeline(name)
    model = denoiser_of(pipe)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=6, target_modules=targets or PROJECTIONS, init_lora_weights=False))
    tensors = get_peft_model_state_dict(model)
    role = "unet" if hasattr(pipe, "unet") else "transformer"
    type(pipe).save_lora_weights(folder, **{f"{role}_lora_layers": {k: v * 0.3 for k, v in tensors.items()}})
    return folder


def quantized(name: str, preset: str | dict[str, Any] = "w4a16") -> tuple[DiffusionPipeline, nn.Module]:
    pipe = pipeline(name)
    hfquant.quantize(denoiser_of(pipe), None, preset)
    return pipe, denoiser_of(pipe)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's tensors, under their names without an adapter."""
    found = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    return {k: v.clone() for k, v in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PIPELINES)
def test_load_fuse_and_unload(name: str, tmp_path: Path) -> None:
    adapter_file(tmp_path, name)
    pipe, model = quantized(name)
    assert quant_layers(model)
    inputs = denoiser_inputs(model)
    plain, state = outputs(model, inputs), state_of(model)
    # The same adapter on plain linears with the same weights.
    reference = pipeline(name, hfquant.dequantize(copy.deepcopy(model)))
    reference.load_lora_weights(tmp_path, adapter_name="style")
    expected = outputs(denoiser_of(reference), inputs)
    assert sqnr(expected, plain) < 60

    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert {type(m) for m in model.modules() if hasattr(m, "base_layer")} == {LoraQuantLinear}
    adapted = outputs(model, inputs)
    assert sqnr(expected, adapted) > 70
    assert_equal(state_of(model), state)

    pipe.fuse_lora()
    reference.fuse_lora()
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraQuantLinear)]
    for layer in layers:
        merged = model.get_submodule(layer).base_layer.effective_weight()
        assert sqnr(denoiser_of(reference).get_submodule(layer).base_layer.weight, merged) > 14, layer
    assert outputs(model, inputs).isfinite().all()
    assert state_of(model).keys() == state.keys()
    pipe.unfuse_lora()
    assert torch.equal(outputs(model, inputs), adapted)

    pipe.unload_lora_weights()
    assert torch.equal(outputs(model, inputs), plain)
    assert_equal(dict(model.state_dict()), state)


@pytest.mark.parametrize("preset", ["fp8-dynamic", "w4a8-dynamic"])
def test_flux_of_other_formats(preset: str, tmp_path: Path) -> None:
    adapter_file(tmp_path, "flux", targets="all-linear")
    config = copy.deepcopy(hfquant.PRESETS[preset])
    config["default"]["float_share"] = 0.0  # unmerging does not restore a float layer bit for bit
    pipe, model = quantized("flux", config)
    inputs = denoiser_inputs(model)
    plain, state = outputs(model, inputs), state_of(model)
    pipe.load_lora_weights(tmp_path)
    adapted = outputs(model, inputs)
    pipe.fuse_lora(safe_fusing=True)
    # The adapter changes less than rounding does, but its change is preserved.
    change, found = (adapted - plain).double(), (outputs(model, inputs) - plain).double()
    assert 0.6 < float((found * change).sum() / change.square().sum()) < 1.4
    pipe.unfuse_lora()
    assert torch.equal(outputs(model, inputs), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(outputs(model, inputs), plain)
    assert_equal(dict(model.state_dict()), state)


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_an_adapter_trained_on_codes_is_saved_and_loads_on_the_float_model(name: str, tmp_path: Path) -> None:
    _, model = quantized(name, "w8a8-dynamic")
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False), "mine")
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    tensors = load_file(tmp_path / FILE)
    assert tensors
    assert all(value.is_floating_point() and "lora_" in key for key, value in tensors.items())
    other = PIPELINES[name][1]()
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="mine", weight_name=FILE, use_safetensors=True)
    assert_equal(get_peft_model_state_dict(other, adapter_name="mine"), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoders_take_their_part_of_an_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = pipeline("sd")
    encoder = small_models.clip_text()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    encoder.add_adapter(config)
    denoiser_of(pipe).add_adapter(LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(encoder))
    type(pipe).save_lora_weights(
        tmp_path, get_peft_model_state_dict(denoiser_of(pipe)), text_encoder_lora_layers=layers
    )
    pipe, model = quantized("sd")
    encoder = pipe.text_encoder = hfquant.quantize(small_models.clip_text().to(dtype), None, "w4a16")
    inputs = small_models.inputs_of(encoder)
    plain, state = outputs(encoder, inputs), state_of(encoder)
    pipe.load_lora_weights(tmp_path)
    assert sum(isinstance(m, LoraQuantLinear) for m in encoder.modules()) == 4
    adapted = outputs(encoder, inputs)
    assert not torch.equal(adapted, plain)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(outputs(encoder, inputs), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(outputs(encoder, inputs), plain)
    assert_equal(dict(encoder.state_dict()), state)
    assert not any(isinstance(m, LoraQuantLinear) for m in model.modules())


def test_several_adapters_are_weighted_and_deleted(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        adapter_file(tmp_path / name, "flux", seed=i)
    pipe, model = quantized("flux")
    inputs = denoiser_inputs(model)
    plain, state = outputs(model, inputs), state_of(model)
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    only_a = outputs(model, inputs)
    pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.0, 0.0])
    assert sqnr(plain, outputs(model, inputs)) > 100
    pipe.set_adapters(["a", "b"], [0.5, 0.7])
    both = outputs(model, inputs)
    pipe.fuse_lora(adapter_names=["a", "b"])
    pipe.unfuse_lora()
    assert torch.equal(outputs(model, inputs), both)
    pipe.delete_adapters("b")
    pipe.set_adapters("a", 1.0)
    assert torch.equal(outputs(model, inputs), only_a)
    pipe.disable_lora()
    assert torch.equal(outputs(model, inputs), plain)
    pipe.unload_lora_weights()
    assert_equal(dict(model.state_dict()), state)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)])
def test_hot_swap(ranks: tuple[int, int], tmp_path: Path) -> None:
    for i, rank in enumerate(ranks):
        adapter_file(tmp_path / str(i), "flux", seed=i, rank=rank)
    pipe, model = quantized("flux")
    inputs = denoiser_inputs(model)
    plain, state = outputs(model, inputs), state_of(model)
    pipe.load_lora_weights(tmp_path / "1", adapter_name="style")
    second = outputs(model, inputs)
    pipe.unload_lora_weights()

    if ranks[0] != ranks[1]:
        pipe.enable_lora_hotswap(target_rank=max(ranks))
    pipe.load_lora_weights(tmp_path / "0", adapter_name="style")
    layers = [m for m in model.modules() if isinstance(m, LoraQuantLinear)]
    assert sqnr(second, outputs(model, inputs)) < 60
    pipe.load_lora_weights(tmp_path / "1", adapter_name="style", hotswap=True)
    assert [m for m in model.modules() if isinstance(m, LoraQuantLinear)] == layers
    torch.testing.assert_close(outputs(model, inputs), second, rtol=1e-5, atol=1e-6)
    pipe.unload_lora_weights()
    assert torch.equal(outputs(model, inputs), plain)
    assert_equal(dict(model.state_dict()), state)


def test_control_adapters_widen_the_quantized_input_layer(tmp_path: Path) -> None:
    """FLUX's control adapters need twice the channels, so diffusers puts a wider, plain linear in the layer's place."""
    pipe, model = quantized("flux")
    inputs, channels = denoiser_inputs(model), model.config.in_channels
    layer = model.x_embedder
    weight = layer.effective_weight()
    assert not layer.weight.is_floating_point()
    down, up = torch.randn(4, 2 * channels), torch.randn(layer.out_features, 4)
    lora = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    pipe.load_lora_weights(lora, adapter_name="control")
    wide = model.x_embedder.base_layer
    assert wide.weight.is_floating_point()
    assert torch.equal(wide.weight[:, :channels], weight)
    assert not wide.weight[:, channels:].any()
    assert model.config.in_channels == 2 * channels
    x = torch.cat([inputs["hidden_states"]] * 2, -1)
    assert outputs(model, {**inputs, "hidden_states": x}).isfinite().all()


def test_adapters_of_fewer_features_are_padded_as_on_the_float_model() -> None:
    """FLUX Fill has more input channels than FLUX, so FLUX's adapters are padded."""
    pipe, model = quantized("flux")
    columns, rows = model.x_embedder.in_features - 5, model.x_embedder.out_features
    lora = {"lora_A": torch.randn(4, columns), "lora_B": torch.randn(rows, 4)}
    reference = pipeline("flux", hfquant.dequantize(copy.deepcopy(model)))
    for each in (reference, pipe):
        each.load_lora_weights({f"transformer.x_embedder.{k}.weight": v for k, v in lora.items()})
    inputs = denoiser_inputs(model)
    assert sqnr(outputs(denoiser_of(reference), inputs), outputs(model, inputs)) > 70


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_adapters_that_do_not_fit_are_refused_and_nothing_is_lost(name: str, tmp_path: Path) -> None:
    pipe, model = quantized(name)
    inputs = denoiser_inputs(model)
    plain, state = outputs(model, inputs), state_of(model)
    where = "transformer.transformer_blocks.0.attn.to_q"

    def adapter(columns: int, rows: int, at: str = where) -> dict[str, Tensor]:
        return {f"{at}.lora_A.weight": torch.randn(4, columns), f"{at}.lora_B.weight": torch.randn(rows, 4)}

    # FLUX's loader pads an adapter that has too few features.
    for wrong in [adapter(36, 24), *([adapter(20, 36)] if name == "sd3" else [])]:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*attn\.to_q.*36"):
            pipe.load_lora_weights(wrong, adapter_name="wrong")
        pipe.unload_lora_weights()
        assert torch.equal(outputs(model, inputs), plain)
        assert_equal(dict(model.state_dict()), state)
    with pytest.raises(ValueError, match="other_blocks"):
        pipe.load_lora_weights(adapter(36, 36, "transformer.other_blocks.0.to_q"), adapter_name="other")
    pipe.unload_lora_weights()
    assert torch.equal(outputs(model, inputs), plain)
    assert_equal(dict(model.state_dict()), state)
