"""Perceptual image metrics: LPIPS, CLIP score and FID through torchmetrics, if their weights are available."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hfquant.report.quality import Figure, standard_error

#: Model of the CLIP score, the default of torchmetrics.
CLIP = "openai/clip-vit-large-patch14"
#: Minimum image side in pixels for AlexNet's layers.
_LPIPS_SIDE = 32
#: With fewer images, FID depends more on their number than on their content.
_FID_IMAGES = 100

Pairs = Sequence[tuple[Tensor, Tensor]]


def perceptual_figures(pairs: Pairs, prompts: Sequence[str | None]) -> tuple[list[Figure], dict[str, str]]:
    """Return the metrics that need other models' weights, and the reason for each one that is missing.

    Args:
        pairs: (reference, other) images, [3, H, W] from 0 to 1; sizes may differ between pairs.
        prompts: prompt of each pair; None for no prompt.
    """
    metrics: dict[str, Callable[[], list[Figure]]] = {
        "LPIPS": lambda: _lpips(pairs),
        "CLIP score": lambda: _clip_score(pairs, prompts),
        "FID": lambda: _fid(pairs),
    }
    figures: list[Figure] = []
    left_out = {}
    for name, metric in metrics.items():
        try:
            figures += metric()
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            # The other metrics are still useful without this one.
            left_out[name] = " ".join(str(error).split())[:200]
    return figures, left_out


def _lpips(pairs: Pairs) -> list[Figure]:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    if (side := min(min(a.shape[-2:]) for a, _ in pairs)) < _LPIPS_SIDE:
        raise ValueError(f"requires images of at least {_LPIPS_SIDE} pixels per side, got {side}")
    each = [
        learned_perceptual_image_patch_similarity(b[None], a[None], net_type="alex", normalize=True) for a, b in pairs
    ]
    return [_mean("LPIPS", each, "lower")]


def _clip_score(pairs: Pairs, prompts: Sequence[str | None]) -> list[Figure]:
    from torchmetrics.functional.multimodal import clip_score

    texts = [text for text in prompts if text is not None]
    if len(texts) < len(pairs):
        raise ValueError("requires a prompt for each image")
    clip = _clip()

    def scores(which: int) -> list[Tensor]:
        images = [(pair[which] * 255).round().byte() for pair in pairs]
        return [clip_score(i, text, lambda: clip) for i, text in zip(images, texts, strict=True)]

    return [_mean("CLIP score", scores(1)), _mean("CLIP score of the reference", scores(0))]


def _clip() -> Any:
    """Return CLIP and its processor from the cache only: a 1.7 GB download should not start unasked."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(CLIP, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(CLIP, local_files_only=True)
    except OSError as error:
        raise OSError(f"CLIP weights are not in the cache; download them with: hf download {CLIP}") from error

    def pooled(features: Callable[..., Any]) -> Callable[..., Tensor]:
        return torch.no_grad()(lambda *inputs: features(*inputs).pooler_output)

    # torchmetrics 1.9 expects features to be tensors, as they were before transformers 5.
    adapted = SimpleNamespace(
        config=model.config,
        get_image_features=pooled(model.get_image_features),
        get_text_features=pooled(model.get_text_features),
    )
    adapted.to = lambda device: (model.to(device), adapted)[1]
    return adapted, processor


def _fid(pairs: Pairs) -> list[Figure]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    if len(pairs) < _FID_IMAGES:
        raise ValueError(f"requires at least {_FID_IMAGES} images to be meaningful")
    metric = FrechetInceptionDistance(normalize=True)
    for a, b in pairs:  # one by one: all images in Inception at once may not fit in memory
        metric.update(a[None], real=True)
        metric.update(b[None], real=False)
    return [Figure("FID", metric.compute().item(), better="lower")]


def _mean(name: str, each: Sequence[Tensor], better: str = "higher") -> Figure:
    values = torch.stack([value.detach().cpu() for value in each])
    return Figure(name, values.mean().item(), standard_error(values), better=better)
