"""Images of two pipelines from equal noise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hfquant.demo import load_digits_pipeline
from hfquant.report.images import compare_pipelines, save_pairs


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


def test_bad_calls():
    with pytest.raises(ValueError, match="no calls"):
        compare_pipelines(Painter(), Painter(), [])
    with pytest.raises(ValueError, match="differ in shape"):
        compare_pipelines(Painter(), Painter(side=16), [{"prompt": "a"}])
    with pytest.raises(ValueError, match="neither images nor frames"):
        compare_pipelines(lambda **call: SimpleNamespace(), Painter(), [{"prompt": "a"}])
