"""A real denoiser end to end: a `datasets` object, the running pipeline, a set on disk, a quantized model."""

import datasets
import pytest
import torch

import hfquant
from hfquant.calibration import (
    BaseSampler,
    NormalSampler,
    UniformSampler,
    calibration_batches,
    generate_calibrate_set,
    load_calibrate_set,
)
from hfquant.demo import load_digits_pipeline
from tests.calibration.test_recorder import identical

CONFIG = {
    "default": {
        "weight_quant": {"type": "int8", "axis": -1},
        "input_quant": {"type": "int8", "axis": None},
        "opt": {"type": "default"},
        "calib": {"type": "amax"},
    }
}


def noise_error(model, reference, inputs) -> float:
    with torch.no_grad():
        expected, got = (m(**inputs).sample for m in (reference, model))
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "sampler", [UniformSampler(4), NormalSampler(0.4, 4), BaseSampler(4)], ids=lambda s: type(s).__name__
)
def test_from_dataset_to_quantized_denoiser(tmp_path, sampler):
    pipe = load_digits_pipeline()
    labels = datasets.Dataset.from_dict({"label": [i % 10 for i in range(12)]})
    source = {"dataset": labels, "column": "label", "batch_size": 4, "samples": 12}
    made = generate_calibrate_set(
        pipe,
        sampler,
        calibration_batches(source),
        "transformer",
        tmp_path,
        chunk_size=5,
        num_inference_steps=8,
        guidance_scale=2.0,
    )
    assert len(made) == 3 * 4
    stored = load_calibrate_set(tmp_path)
    assert identical(list(stored), list(made))
    assert all(sample["hidden_states"].shape == (8, 1, 8, 8) for sample in stored), "guidance doubles the batch of 4"
    steps = len({sample["timestep"][0].item() for sample in stored})
    assert steps == 4 if type(sampler) is BaseSampler else steps > 4

    reference = load_digits_pipeline().transformer
    held_out = generate_calibrate_set(pipe, UniformSampler(8, seed=1), [[1, 5]], "transformer", num_inference_steps=8)
    loader = calibration_batches(tmp_path, batch_size=4)
    hfquant.quantize(pipe.transformer, loader, CONFIG)
    errors = [noise_error(pipe.transformer, reference, sample) for sample in held_out]
    assert 0 < max(errors) < 0.2
    assert pipe([3], num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_inputs_of_a_block_feed_the_block():
    """Inputs recorded in front of one block are used to quantize that block."""
    pipe = load_digits_pipeline()
    block = pipe.transformer.transformer_blocks[1]
    calibset = generate_calibrate_set(pipe, UniformSampler(3), [[0, 1], [2, 3]], block, num_inference_steps=6)
    with torch.no_grad():
        before = [block(**sample) for sample in calibset]
        hfquant.quantize(block, calibset.get_dataloader(batch_size=2), CONFIG)
        after = [block(**sample) for sample in calibset]
    for x, y in zip(before, after, strict=True):
        assert 0 < (x - y).norm() / x.norm() < 0.05
