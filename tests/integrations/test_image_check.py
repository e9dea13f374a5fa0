"""The image that shows the effect of quantization on a pipeline."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from hfquant import HfQuantConfig, ptq, quantize_pipeline
from hfquant.demo.pipeline import DigitsPipeline
from hfquant.guard import Mends
from hfquant.integrations.image_check import compare, picture
from tests.calibration.tiny_models import tiny_dit, tiny_pipeline
from tests.calibration.tiny_modular import Decode, Denoise, Encode, tiny_modular

DATA = [{"class_labels": [3]}, {"class_labels": [5]}]


def image(seed: int = 0) -> Tensor:
    return torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_is_that_of_the_mean_squared_error(caplog):
    right, drawn = image(), image() + 0.01 * image(1)
    spread = float(right.max() - right.min())
    expected = 10 * math.log10(spread**2 / np.square(right.numpy() - drawn.numpy()).mean())
    with caplog.at_level(logging.INFO, "hfquant"):
        assert compare("P", right, drawn) == pytest.approx(expected, abs=1e-9)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", f"P: PSNR of the quantized pipeline's image against full precision: {expected:.1f} dB")
    ]
    assert compare("P", right, right) == math.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: torch.zeros_like(x), "its image is black once quantized"),
        (lambda x: torch.full_like(x, 0.5), "its image is of one color once quantized"),
        (lambda x: x.index_fill(1, torch.tensor([2]), math.nan), "24 of 192 values of its image are NaN or Inf"),
        (lambda x: 1 - x, "image against full precision: "),
    ],
)
def test_images_that_are_spoiled_are_warned_of(spoil, message, caplog):
    with caplog.at_level(logging.WARNING, "hfquant"):
        compare("P", image(), spoil(image()))
    assert message in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: torch.zeros_like(x), "its output is silent (zero) once quantized"),
        (lambda x: torch.full_like(x, 0.5), "its output is constant once quantized"),
        (lambda x: x.index_fill(2, torch.tensor([2]), math.nan), "2 of 64 values of its output are NaN or Inf"),
        (lambda x: -x, "output against full precision: "),
    ],
)
def test_audio_that_is_spoiled_is_warned_of(spoil, message, caplog):
    audio = torch.linspace(-1, 1, 64, dtype=torch.float64).sin().view(1, 2, 32)
    with caplog.at_level(logging.WARNING, "hfquant"):
        compare("P", audio, spoil(audio))
    assert message in caplog.text


@pytest.mark.parametrize("field", ["audios", "image_embeds"])
def test_audio_and_embeddings_are_checked(field):
    class Pipe:
        components: ClassVar[dict[str, Any]] = {}

        def __call__(self, prompt: str, output_type: str = "pt") -> SimpleNamespace:
            return SimpleNamespace(**{field: np.full((1, 2, 3), len(prompt))})

    found = picture(Pipe(), {"prompt": "abc"}, {})
    assert found is not None
    assert found.equal(torch.full((1, 2, 3), 3.0, dtype=torch.float64))


def test_nothing_to_compare_is_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "hfquant"):
        assert compare("P", None, image()) is None
        assert compare("P", image()[:, :4], image()) is None
        assert compare("P", torch.full((2,), math.nan), torch.full((2,), math.nan)) is None
        compare("P", torch.zeros(2), torch.zeros(2))
    assert not caplog.records


def test_a_picture_is_decoded_and_repeats():
    pipe = DigitsPipeline(tiny_dit(), DDIMScheduler())
    state = torch.get_rng_state()
    first = picture(pipe, DATA[0], {"num_inference_steps": 2, "output_type": "pil"})
    assert first is not None
    assert first.shape == (1, 8, 8, 1)
    assert torch.equal(torch.get_rng_state(), state)
    again = picture(pipe, [DATA[0]], {"num_inference_steps": 2})
    assert torch.equal(first, again)
    assert picture(tiny_pipeline(DDIMScheduler()), ["a prompt"], {"num_inference_steps": 2}).shape == (1, 2, 8, 8)


def test_the_picture_of_a_modular_pipeline_is_what_its_last_block_makes():
    """Its call returns everything that its blocks have passed on, text embeddings among them."""
    arguments = {"num_inference_steps": 2, "output_type": "pil", "output": "prompt_embeds"}
    drawn = picture(tiny_modular(Encode, Denoise, Decode), ["a prompt"], arguments)
    assert drawn.shape == (1, 8, 8, 2)
    latents = picture(tiny_modular(), {"prompt": "a prompt"}, {"num_inference_steps": 2})
    assert torch.equal(drawn, latents.movedim(1, -1))


def test_a_pipeline_that_draws_nothing_is_let_be(caplog):
    pipe = DigitsPipeline(tiny_dit(), DDIMScheduler())
    with caplog.at_level(logging.INFO, "hfquant"):
        assert picture(pipe, {"class_labels": [99]}, {}) is None
    assert "DigitsPipeline cannot generate an image to check (ValueError" in caplog.text


@pytest.mark.parametrize("on", [True, False])
def test_a_quantized_pipeline_whose_image_is_spoiled(on, monkeypatch, caplog):
    """The layer guard, patched to leave layers alone, misses this fault."""
    solve = ptq.solve

    def spoiling(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        solution.tensors["weight_scale"][0] = float("nan")
        return solution

    monkeypatch.setattr(ptq, "solve", spoiling)
    monkeypatch.setattr(ptq, "mend", lambda *_: Mends())
    pipe = DigitsPipeline(tiny_dit(), DDIMScheduler())
    with caplog.at_level(logging.WARNING, "hfquant"):
        quantize_pipeline(pipe, DATA, HfQuantConfig("w8a8", guard=on), num_inference_steps=2)
    assert ("values of its image are NaN or Inf once quantized" in caplog.text) == on


def test_a_generator_given_draws_the_same_twice_and_is_left_as_it_was():
    pipe = DigitsPipeline(tiny_dit(), DDIMScheduler())
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    batch = {"class_labels": [3], "generator": [generator], "num_inference_steps": 2}
    first, second = (picture(pipe, batch, {}) for _ in range(2))
    assert first is not None
    assert torch.equal(first, second)
    assert torch.equal(generator.get_state(), before)
