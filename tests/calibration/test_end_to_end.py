"""From a `datasets` object to a pipeline that another process loads and that generates the same images."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

import hfquant
from hfquant.demo import load_digits_pipeline
from hfquant.nn.modules import quant_layers

STATIC = {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}}

# What a user runs who only knows the folder; nothing from this test module is available.
DRAW = """
import sys
import torch
from safetensors.torch import load_file, save_file
from hfquant import QuantLinear
from hfquant.demo import DigitsPipeline

folder, noise, out = sys.argv[1:]
torch.set_num_threads(1)
pipe = DigitsPipeline.from_pretrained(folder)
given = load_file(noise)
images = pipe(given["labels"], num_inference_steps=4, latents=given["latents"], output_type="pt").images
count = sum(isinstance(module, QuantLinear) for module in pipe.transformer.modules())
save_file({"images": images.contiguous(), "count": torch.tensor(count)}, out)
"""


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": [i % 10 for i in range(20)]})


def streamed() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: ({"label": i % 10} for i in range(20)))


@pytest.mark.parametrize(
    "source", [pytest.param(rows, marks=pytest.mark.slow), streamed], ids=["Dataset", "IterableDataset"]
)
def test_a_new_process_draws_the_same_images(source: Callable[[], object], tmp_path: Path) -> None:
    noise = {"labels": torch.arange(5), "latents": torch.randn(5, 1, 8, 8)}
    save_file(noise, tmp_path / "noise.safetensors")

    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(noise["labels"], num_inference_steps=4, latents=noise["latents"], output_type="pt").images

    exact = draw()
    linears = [name for name, module in pipe.transformer.named_modules() if type(module) is torch.nn.Linear]
    data = {"dataset": source(), "column": {"class_labels": "label"}, "samples": 12, "batch_size": 4}
    hfquant.quantize_pipeline(pipe, data, STATIC, num_inference_steps=4)
    layers = quant_layers(pipe.transformer)
    assert layers.keys() <= set(linears)
    assert len(layers) > 0.8 * len(linears)
    assert all(layer.plan.static_input for layer in layers.values()), "the scales come from the data"
    images = draw()
    assert 0 < (images - exact).square().mean() < 1e-3

    pipe.save_pretrained(tmp_path / "saved")
    stored = load_file(next((tmp_path / "saved" / "transformer").glob("*.safetensors")))
    assert sum(name.endswith(".weight_scale") for name in stored) == len(layers)
    config = json.loads((tmp_path / "saved" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hfquant"

    command = [sys.executable, "-c", DRAW, tmp_path / "saved", tmp_path / "noise.safetensors", tmp_path / "drawn"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = load_file(tmp_path / "drawn")
    assert drawn["count"] == len(layers)
    assert torch.equal(drawn["images"], images)
    assert not torch.equal(drawn["images"], exact)
