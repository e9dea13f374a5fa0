"""Pipelines of every kind: inputs of their denoisers recorded, components quantized and saved, an affiner fitted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, MultiControlNetModel, PipelineQuantizationConfig
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker
from torch import nn

import hfquant
from hfquant import HfQuantConfig
from hfquant.affiner import BlockwiseAffiner
from hfquant.calibration import BaseSampler, generate_calibrate_set
from hfquant.nn.kinds import layers_in
from hfquant.nn.modules import quant_layers
from tests.integrations import tiny_pipelines
from tests.integrations.small_models import sqnr
from tests.integrations.tiny_pipelines import CASES, batches, reloaded, rows, run

STATIC = {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}}
#: A few kinds run always; the rest are marked slow, being so many.
FAST = ("flux-controlnet", "sd-img2img", "ip-adapter", "wan", "cogvideox")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_at_each_step_is_recorded_as_it_is_called(name):
    case = CASES[name]
    pipe = case.build()
    for part in case.parts:
        model = getattr(pipe, part)
        seen: list[Any] = []
        handle = model.register_forward_hook(
            lambda module, args, kwargs, out, seen=seen: seen.append(out), with_kwargs=True
        )
        found = generate_calibrate_set(pipe, BaseSampler(None), batches(case, 1), part, **case.call)
        handle.remove()
        assert len(found) > 0
        with torch.no_grad():
            # A first run may only find out the number of steps.
            for sample, out in zip(found, seen[-len(found) :], strict=True):
                again = model(**sample) if isinstance(sample, dict) else model(*sample)
                for ours, theirs in zip(tensors(again), tensors(out), strict=True):
                    assert torch.equal(ours, theirs)


def tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_quantized_by_static_scales_and_saved(name, tmp_path):
    case = CASES[name]
    exact = run(case.build(), case)
    pipe = case.build()
    known = {part: layers_in(getattr(pipe, part)).keys() for part in case.parts}
    hfquant.quantize_pipeline(pipe, batches(case, 2), STATIC, case.parts, **case.call)
    for part in case.parts:
        layers = quant_layers(getattr(pipe, part))
        skipped = getattr(pipe, part).config["quantization_config"].skipped
        assert layers.keys() | skipped.keys() >= known[part]
        assert len(layers) > len(skipped)
        assert all(layer.plan.static_input for layer in layers.values())
    y = run(pipe, case)
    assert y.isfinite().all()
    assert sqnr(exact, y) > 8
    if name != "ip-adapter":  # diffusers does not save adapters with a model
        assert torch.equal(run(reloaded(pipe, tmp_path), case), y)


@pytest.mark.parametrize("name", NAMES)
def test_an_affiner_finds_what_was_changed(name, tmp_path):
    """The denoiser outputs of one of two identical pipelines are scaled, and the fitted maps undo the scaling."""
    case = CASES[name]
    real, quant = case.build(), case.build()
    exact = run(real, case)
    for part in case.parts:
        if part != "controlnet":
            getattr(quant, part).register_forward_hook(scaled)
    config = {
        "solver": {"blocksize": None, "lambda1": 0.0, "lambda2": 0.0, "alpha": 1.0},
        "stepper": {"batch_size": 1},
        "extra_args": case.call,
    }
    affiner = hfquant.load_affiner(config, rows(case, 2), real, quant)
    scales = torch.stack([scale for scale, _ in affiner.prediction.table.values()])
    assert torch.allclose(scales, torch.full_like(scales, 1.25), rtol=1e-3)
    affiner.save_pretrained(tmp_path)
    changed = run(quant, case)
    assert sqnr(exact, changed) < 35
    with BlockwiseAffiner.from_pretrained(tmp_path).attach(quant):
        assert sqnr(exact, run(quant, case)) > 40
    assert torch.equal(run(quant, case), changed)


def scaled(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] * 0.8, *output[1:])
    output.sample = output.sample * 0.8
    return output


@pytest.mark.slow
def test_several_controlnets(tmp_path):
    case = CASES["sd-controlnet"]

    def twice(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [item | {"image": [item["image"], 1 - item["image"]]} for item in items]

    def image(pipe: Any) -> torch.Tensor:
        (batch,) = twice(batches(case, 1, seed=61))
        with torch.no_grad():
            return pipe(**batch, **case.call, generator=torch.Generator().manual_seed(62))[0]

    pipe = case.build()
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, case.build().controlnet])
    with pytest.raises(ValueError, match="one by one"):
        hfquant.quantize(pipe.controlnet, None, "w8a16")
    assert not quant_layers(pipe.controlnet)
    exact = image(pipe)
    hfquant.quantize_pipeline(pipe, twice(batches(case, 2)), STATIC, case.parts, **case.call)
    first, second = pipe.controlnet.nets
    assert len(quant_layers(first)) == len(quant_layers(second)) > 0
    assert all(layer.plan.static_input for net in (first, second) for layer in quant_layers(net).values())
    y = image(pipe)
    assert sqnr(exact, y) > 8
    pipe.save_pretrained(tmp_path)
    nets = MultiControlNetModel.from_pretrained(str(tmp_path / "controlnet"))
    assert torch.equal(image(reloaded(pipe, tmp_path, controlnet=nets)), y)


def test_an_adapter_is_loaded_before_its_model_is_quantized_or_after():
    """Quantizing keeps diffusers' record of the adapter; one that is loaded afterwards stays in float."""
    case = CASES["ip-adapter"]
    exact = run(case.build(), case)
    pipe = case.build()
    hfquant.quantize_pipeline(pipe, None, "w8a16")
    assert any("to_k_ip" in name for name in quant_layers(pipe.unet))
    assert sqnr(exact, run(pipe, case)) > 40
    plain = hfquant.dequantize(pipe.unet)
    assert plain.config.encoder_hid_dim_type == "ip_image_proj"
    assert sqnr(exact, run(pipe, case)) > 40
    pipe = tiny_pipelines.stable_diffusion("StableDiffusionPipeline")
    hfquant.quantize_pipeline(pipe, None, "w8a16")
    tiny_pipelines.with_ip_adapter(pipe)
    assert not any("to_k_ip" in name for name in quant_layers(pipe.unet))
    assert sqnr(exact, run(pipe, case)) > 40


def test_errors_and_warnings_name_what_to_do(tmp_path, caplog):
    case = CASES["sd-img2img"]
    pipe = case.build()
    pipe.save_pretrained(tmp_path)
    lacking = {name: None for name, part in pipe.components.items() if part is None}

    def load(**mapping: HfQuantConfig) -> Any:
        config = PipelineQuantizationConfig(quant_mapping=mapping)
        return DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config, **lacking)

    for config in (HfQuantConfig("w8a8"), HfQuantConfig("w4a16-gptq", calibration=["a prompt"])):
        with pytest.raises(ValueError, match="quantize_pipeline"):
            load(unet=config)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        loaded = load(unett=HfQuantConfig("w8a16"))
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not quant_layers(loaded.unet)
    assert "unett" in caplog.text
    with pytest.raises(ValueError, match=r"'unett'.*it has \['vae', 'unet'\]"):
        hfquant.quantize_pipeline(loaded, None, "w8a16", ["unett"])


def test_a_model_without_a_config_is_saved_as_by_diffusers_alone(tmp_path: Path):
    """DeepFloyd IF has one in its pipelines."""
    watermarker = IFWatermarker()
    watermarker.watermark_image.fill_(0.5)
    watermarker.save_pretrained(tmp_path)
    assert torch.equal(IFWatermarker.from_pretrained(tmp_path).watermark_image, watermarker.watermark_image)
