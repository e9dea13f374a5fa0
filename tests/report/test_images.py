"""Images of two pipelines from equal noise."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from PIL import Image

from hfquant.demo import load_digits_pipeline
from hfquant.report.images import compare_pipelines, save_pairs
from hfquant.report.quality import MissingArguments, NothingToCompare
from tests.calibration.tiny_modular import Denoise, Encode, tiny_modular


class Painter:
    """A pipeline whose images are noise from its generator plus a constant."""

    def __init__(self, offset: float = 0.0, side: int = 24, frames: int = 0) -> None:
        self.offset, self.side, self.frames = offset, side, frames

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str) -> SimpleNamespace:
        shape = (1, self.frames, 3) if self.frames else (1, 3)
        picture = torch.rand(*shape, self.side, self.side, generator=generator) * 0.8 + self.offset
        return SimpleNamespace(**{"frames" if self.frames else "images": picture})


def test_psnr_is_that_of_the_formula():
    found = compare_pipelines(Painter(), Painter(0.1), [{"prompt": "a"}, {"prompt": "b"}])
    assert found.figures[0].name == "PSNR"
    assert found.figures[0].value == pytest.approx(20, abs=1e-3)
    assert found.figures[1].name == "SSIM"
    assert 0.5 < found.figures[1].value < 1
    assert len(found.images) == 2
    assert not found.images[0][0].equal(found.images[1][0])


def test_equal_pipelines():
    found = compare_pipelines(Painter(), Painter(), [{"prompt": "a"}])
    assert found.figures[0].value == math.inf
    assert found.figures[1].value == pytest.approx(1)


def test_a_pipeline_that_passes_its_arguments_on():
    class Wrapped(Painter):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert compare_pipelines(Wrapped(), Painter(), [{"prompt": "a"}]).figures[0].value == math.inf


class Paint(ModularPipelineBlocks):
    @property
    def inputs(self):
        return [InputParam("latents", required=True), InputParam("output_type", default="pil")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        assert block.output_type == "pt"
        block.images = block.latents[:, :1].sigmoid()
        self.set_block_state(state, block)
        return components, state


def test_modular_pipelines():
    """Not what their blocks pass on, such as embeddings of the prompt, is compared."""
    pipe, other = tiny_modular(Encode, Denoise, Paint), tiny_modular(Encode, Denoise, Paint)
    other.unet.conv_out.weight.data.mul_(1.1)
    call = {"prompt": "a", "num_inference_steps": 2}
    assert compare_pipelines(pipe, pipe, [call]).figures[0].value == math.inf
    assert 10 < compare_pipelines(pipe, other, [call]).figures[0].value < 100
    with pytest.raises(MissingArguments, match="requires prompt: pass --arg prompt=VALUE"):
        compare_pipelines(pipe, other, [{}])


def test_what_cannot_be_had_is_named():
    left = compare_pipelines(Painter(), Painter(), [{"prompt": "a"}]).left_out
    assert set(left) == {"LPIPS", "CLIP score", "FID"}
    assert all(left.values())


def test_a_video_is_its_middle_frame():
    found = compare_pipelines(Painter(frames=5), Painter(0.1, frames=5), [{"prompt": "a"}])
    frames = torch.rand(1, 5, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.8
    assert found.images[0][0].equal(frames[0, 2])


def test_the_digits_pipeline(tmp_path):
    pipe = load_digits_pipeline()
    found = compare_pipelines(pipe, pipe, [{"class_labels": [1, 2], "num_inference_steps": 2}])
    assert [image.shape for image, _ in found.images] == [(3, 8, 8)] * 2
    save_pairs(found, tmp_path / "pairs")
    names = sorted(path.name for path in (tmp_path / "pairs").iterdir())
    assert names == ["0-other.png", "0-reference.png", "1-other.png", "1-reference.png"]
    stored = np.asarray(Image.open(tmp_path / "pairs" / "1-reference.png")) / 255
    assert np.abs(stored - found.images[1][0].movedim(0, -1).numpy()).max() <= 0.5 / 255 + 1e-6


class Player:
    """A pipeline whose output is noise from its generator plus noise of its own; it takes no output type."""

    def __init__(self, field: str, noise: float = 0.0) -> None:
        self.field, self.noise = field, noise

    def __call__(self, prompt: str, generator: torch.Generator) -> SimpleNamespace:
        signal = torch.randn(2, 1, 4000, generator=generator)
        signal += self.noise * torch.randn(2, 1, 4000, generator=generator)
        return SimpleNamespace(**{self.field: signal.numpy() if self.noise else signal})


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("audios", "audio"),
        ("prediction", "predictions"),
        ("image_embeds", "image embeddings"),
        ("image_embeddings", "image embeddings"),
    ],
)
def test_audio_and_embeddings_have_a_signal_to_noise_ratio(field, words, tmp_path):
    found = compare_pipelines(Player(field), Player(field, 0.1), [{"prompt": "a"}, {"prompt": "b"}])
    figures = {figure.name: figure for figure in found.figures}
    assert set(figures) == {f"SQNR of {words}", f"cosine similarity of {words}"}
    assert figures[f"SQNR of {words}"].value == pytest.approx(20, abs=0.3)
    assert figures[f"SQNR of {words}"].unit == "dB"
    assert figures[f"cosine similarity of {words}"].value == pytest.approx(1 / math.sqrt(1.01), abs=1e-3)
    assert found.images == ()
    assert found.left_out == {}
    with pytest.raises(ValueError, match="make no images"):
        save_pairs(found, tmp_path / "pairs")
    same = compare_pipelines(Player(field), Player(field), [{"prompt": "a"}])
    assert same.figures[0].value == math.inf


def test_audio_needs_no_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert compare_pipelines(Player("audios"), Player("audios", 0.1), [{"prompt": "a"}]).figures
    with pytest.raises(ImportError, match="comparing pipelines requires torchmetrics"):
        compare_pipelines(Painter(), Painter(), [{"prompt": "a"}])


def test_bad_calls():
    with pytest.raises(ValueError, match="no calls"):
        compare_pipelines(Painter(), Painter(), [])
    with pytest.raises(ValueError, match="differ in shape"):
        compare_pipelines(Painter(), Painter(side=16), [{"prompt": "a"}])
    with pytest.raises(NothingToCompare, match="returns no images, frames, audio or embeddings"):
        compare_pipelines(lambda **call: SimpleNamespace(), Painter(), [{"prompt": "a"}])
