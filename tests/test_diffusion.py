"""quantize_pipeline on the real digits denoiser: from a dataset to a folder that loads in one call."""

from pathlib import Path

import datasets
import pytest
import torch

from hfquant import quantize_pipeline
from hfquant.demo import DigitsPipeline, load_digits_pipeline
from hfquant.nn.linear import quant_linears

STATIC = {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}}


def draw(pipe: DigitsPipeline) -> torch.Tensor:
    latents = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=list(range(5)), num_inference_steps=4, latents=latents, output_type="pt").images


def test_from_a_dataset_to_a_saved_pipeline(tmp_path: Path) -> None:
    digits = datasets.Dataset.from_dict({"label": list(range(10))})
    rows = {"dataset": digits, "column": {"class_labels": "label"}, "samples": 10, "batch_size": 2}
    pipe = load_digits_pipeline()
    exact = draw(pipe)
    assert quantize_pipeline(pipe, rows, STATIC, num_inference_steps=4) is pipe
    layers = quant_linears(pipe.transformer)
    assert layers
    assert all(layer.plan.static_input for layer in layers.values())
    images = draw(pipe)
    assert 0 < (images - exact).square().mean() < 1e-3
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(DigitsPipeline.from_pretrained(tmp_path)), images)


def test_bad_components_and_data_leave_the_pipeline_alone() -> None:
    pipe = load_digits_pipeline()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=r"components: .*'vae'.*it has \['transformer'\]"):
        quantize_pipeline(pipe, None, "w8a16", components=["vae"])
    with pytest.raises(TypeError):
        quantize_pipeline(pipe, [{"no_such_argument": 3}], STATIC)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    quantize_pipeline(pipe, None, "w8a16")
    assert quant_linears(pipe.transformer)
