"""LPIPS, CLIP score and FID when they can run: on small models defined here, passed the way torchmetrics expects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image
import torchmetrics.image.fid
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from hfquant.report import perceptual
from hfquant.report.perceptual import perceptual_figures

SIDE = 32
WORDS = ["<start>", "<end>", "<unk>", "a", "red", "blue", "house"]


def images(count: int, sides: tuple[int, ...] = (SIDE,), noise: float = 0.1) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for i in range(count):
        a = torch.rand(3, sides[i % len(sides)], SIDE)
        pairs.append((a, (a + noise * torch.randn_like(a)).clamp(0, 1)))
    return pairs


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CLIP with random weights and a word-level tokenizer, in place of the large one."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<end>", eos_token="<end>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(tmp_path)
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(pixels, tokenizer).save_pretrained(tmp_path)
    monkeypatch.setattr(perceptual, "CLIP", str(tmp_path))
    return tmp_path


def test_clip_score_is_the_cosine_of_image_and_prompt(clip):
    pairs, prompts = images(3), ["a red house", "blue", "a house a house a house a house a house"]
    figures, left_out = perceptual_figures(pairs, prompts)
    assert set(left_out) == {"LPIPS", "FID"}
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for figure, which in zip(figures, (1, 0), strict=True):
        scores = []
        for pair, prompt in zip(pairs, prompts, strict=True):
            picture = (pair[which] * 255).round().byte()
            # CLIP's text model has eight positions here.
            words = processor(text=[prompt], return_tensors="pt")["input_ids"][:, :8]
            with torch.no_grad():
                seen = model.get_image_features(**processor(images=[picture], return_tensors="pt")).pooler_output
                read = model.get_text_features(words).pooler_output
            a, b = seen.double().numpy()[0], read.double().numpy()[0]
            scores.append(max(100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0))
        assert figure.value == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-4)
        assert figure.error == pytest.approx(np.std(scores, ddof=1) / 3**0.5, rel=1e-3, abs=1e-4)
    assert [figure.name for figure in figures] == ["CLIP score", "CLIP score of the reference"]


def test_clip_score_needs_prompts_and_weights(clip, monkeypatch):
    pairs = images(2)
    assert "a prompt for each image" in perceptual_figures(pairs, ["a house", None])[1]["CLIP score"]
    monkeypatch.setattr(perceptual, "CLIP", "me/clip")
    assert "download them with: hf download me/clip" in perceptual_figures(pairs, ["a", "a"])[1]["CLIP score"]


class Colours(nn.Module):
    """Features of an image: mean and standard deviation of each color."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return torch.cat([flat.mean(-1), flat.std(-1)], dim=1)


def test_fid_is_the_distance_of_two_gaussians(monkeypatch):
    distance: Any = torchmetrics.image.fid.FrechetInceptionDistance
    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", partial(distance, feature=Colours()))
    pairs = images(120, (SIDE, 40), noise=0.3)
    figures, left_out = perceptual_figures(pairs, [None] * 120)
    assert "FID" not in left_out
    (found,) = figures
    features = [np.stack([Colours()(pair[which][None])[0].double().numpy() for pair in pairs]) for which in (0, 1)]
    (m0, m1), (c0, c1) = [f.mean(0) for f in features], [np.cov(f, rowvar=False) for f in features]
    # The trace of the square root of a product of two covariances, in its symmetric form.
    values, vectors = np.linalg.eigh(c0)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c1 @ root)).sum()
    assert found.value == pytest.approx(np.square(m0 - m1).sum() + np.trace(c0) + np.trace(c1) - 2 * cross, rel=1e-3)
    assert (found.name, found.better) == ("FID", "lower")


def test_fid_of_few_images_is_left_out():
    assert "at least 100 images" in perceptual_figures(images(3), [None] * 3)[1]["FID"]


def stand_in(seen: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Callable[..., Tensor]:
    def distance(one: Tensor, other: Tensor, **options: Any) -> Tensor:
        seen.append((one, other, options))
        return (one - other).abs().mean()

    return distance


def test_lpips_is_the_mean_of_the_pairs(monkeypatch):
    """Its network needs torchvision, so this only checks how it is called."""
    seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    name = "learned_perceptual_image_patch_similarity"
    monkeypatch.setattr(torchmetrics.functional.image, name, stand_in(seen), raising=False)
    pairs = images(3, (SIDE, 48))
    figures, _ = perceptual_figures(pairs, [None] * 3)
    differences = [(a - b).abs().mean().item() for a, b in pairs]
    assert figures[0].value == pytest.approx(np.mean(differences), rel=1e-5)
    assert figures[0].error == pytest.approx(np.std(differences, ddof=1) / 3**0.5, rel=1e-4)
    assert (figures[0].name, figures[0].better) == ("LPIPS", "lower")
    for (a, b), (one, other, options) in zip(pairs, seen, strict=True):
        assert one.equal(b[None])
        assert other.equal(a[None])
        assert options == {"net_type": "alex", "normalize": True}


def test_images_too_small_for_lpips(monkeypatch):
    small = [(torch.rand(3, 8, 8), torch.rand(3, 8, 8))]
    name = "learned_perceptual_image_patch_similarity"
    monkeypatch.setattr(torchmetrics.functional.image, name, stand_in([]), raising=False)
    assert "at least 32 pixels per side, got 8" in perceptual_figures(small, [None])[1]["LPIPS"]


def test_a_metric_that_fails_leaves_the_others(monkeypatch):
    def fails(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of memory\nat once")

    monkeypatch.setattr(
        torchmetrics.functional.image, "learned_perceptual_image_patch_similarity", fails, raising=False
    )
    assert perceptual_figures(images(1), [None])[1]["LPIPS"] == "out of memory at once"
