"""Compare two pipelines on the same noise: images side by side, and how similar they, or audio, are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hfquant.denoisers import call_making, call_parameters
from hfquant.integrations.self_made_runs import PICTURE_ARGUMENTS
from hfquant.report.perceptual import perceptual_figures
from hfquant.report.quality import Figure, MissingArguments, NothingToCompare, compare_signals, standard_error

_PICTURES = ("images", "frames")
#: Arguments that every call gets from here.
_OWN_ARGUMENTS = ("generator", "output_type")


@dataclass(frozen=True)
class PipelineComparison:
    """Result of comparing two pipelines on the same noise.

    Attributes:
        figures: averages over the images, audio or embeddings.
        images: (reference, other) pairs, [3, H, W] from 0 to 1; for a video, its middle frame. None of other outputs.
        left_out: metrics that could not be computed here -> the reason.
    """

    figures: tuple[Figure, ...]
    images: tuple[tuple[Tensor, Tensor], ...]
    left_out: dict[str, str]


def compare_pipelines(
    reference: Any, other: Any, calls: Sequence[Mapping[str, Any]], seed: int = 0
) -> PipelineComparison:
    """Run two pipelines on the same calls and the same noise, and compare what they make.

    Images: PSNR and SSIM (Wang et al., 2004) through torchmetrics; LPIPS, CLIP score and FID if their requirements are
    met. Audio and embeddings: signal-to-noise ratio and cosine similarity.

    Args:
        reference: a diffusers pipeline.
        other: the pipeline compared.
        calls: keyword arguments of each call.
        seed: seed of the noise; call i runs with seed + i.

    Raises:
        ValueError: there are no calls, or the outputs differ in size.
        NothingToCompare: the pipelines return none of the above.
        MissingArguments: a call lacks arguments that they require.
        ImportError: torchmetrics is not installed.
    """
    if not calls:
        raise ValueError("nothing to compare: no calls given")
    for pipe, call in product((reference, other), calls):
        check_arguments(pipe, call)
    pairs: list[tuple[Tensor, Tensor]] = []
    prompts: list[str | None] = []
    what = ""
    for i, call in enumerate(calls):
        (what, a), (_, b) = (_made(pipe, call, seed + i) for pipe in (reference, other))
        if a.shape != b.shape:
            raise ValueError(f"the {what} differ in shape: {list(a.shape)} vs. {list(b.shape)}")
        if what in _PICTURES:
            _metrics()  # if it is missing, say so before the other calls
        pairs += zip(a, b, strict=True)
        prompts += _prompts(call, len(a))
    if what not in _PICTURES:
        return PipelineComparison(compare_signals(pairs, what), (), {})
    more, left_out = perceptual_figures(pairs, prompts)
    return PipelineComparison((*_picture_figures(pairs), *more), tuple(pairs), left_out)


def check_arguments(pipe: Any, call: Mapping[str, Any]) -> None:
    """Check that a call has all arguments that a pipeline requires.

    Raises:
        MissingArguments: names them.
    """
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    takes = call_parameters(pipe).values()
    required = [p.name for p in takes if p.default is p.empty and p.kind in named]
    if missing := [name for name in required if name not in (*call, *_OWN_ARGUMENTS)]:
        options = " ".join(f"--arg {name}={'FILE' if name in PICTURE_ARGUMENTS else 'VALUE'}" for name in missing)
        raise MissingArguments(
            f"{type(pipe).__name__} requires {' and '.join(missing)}: pass {options} on the command line, or a call "
            "that has it"
        )


def _metrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )
    except ImportError as error:
        raise ImportError('comparing pipelines requires torchmetrics: pip install "hfquant[compare]"') from error
    return peak_signal_noise_ratio, structural_similarity_index_measure


def _picture_figures(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Figure]:
    peak_signal_noise_ratio, structural_similarity = _metrics()
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    for a, b in pairs:
        equal = a.equal(b)
        psnr.append(torch.tensor(math.inf) if equal else peak_signal_noise_ratio(b[None], a[None], data_range=1.0))
        # SSIM's Gaussian window spans 11 pixels; smaller images get a flat window.
        side = min(a.shape[-2:])
        window: dict[str, Any] = (
            {} if side >= 16 else {"gaussian_kernel": False, "kernel_size": max(side // 2 - 1 + side // 2 % 2, 1)}
        )
        ssim.append(structural_similarity(b[None], a[None], data_range=1.0, **window))
    return [
        Figure("PSNR", torch.stack(psnr).mean().item(), standard_error(torch.stack(psnr)), "dB"),
        Figure("SSIM", torch.stack(ssim).mean().item(), standard_error(torch.stack(ssim))),
    ]


def _made(pipe: Any, call: Mapping[str, Any], seed: int) -> tuple[str, Tensor]:
    """Return what a call makes, in words, and its samples [samples, ...]."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    takes = call_parameters(pipe)
    if "output_type" in takes or any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        options["output_type"] = "pt"
    what, found = call_making(pipe, **{**options, **call})
    if not what:
        raise NothingToCompare(f"{type(pipe).__name__} returns no images, frames, audio or embeddings")
    values = found if isinstance(found, Tensor) else torch.stack([torch.as_tensor(value) for value in found])
    values = values.detach().float().cpu()
    return what, _as_pictures(values) if what in _PICTURES else values


def _as_pictures(images: Tensor) -> Tensor:
    """Return images as [images, 3, H, W] from 0 to 1; for a video, its middle frame."""
    if images.dim() == 5:
        images = images[:, images.shape[1] // 2]
    if images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        images = images.movedim(-1, 1)
    return images.expand(-1, 3, -1, -1).clamp(0, 1).contiguous()


def _prompts(call: Mapping[str, Any], count: int) -> list[str | None]:
    """Return the prompt of each image of a call, whose images are grouped by prompt; None for no prompt."""
    prompt = call.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or count % len(texts):
        return [None] * count
    return [text for text in texts for _ in range(count // len(texts))]


def save_pairs(found: PipelineComparison, folder: Path) -> None:
    """Write each pair of images as 0-reference.png, 0-other.png, and so on.

    Raises:
        ValueError: there are none.
    """
    if not found.images:
        raise ValueError("the pipelines make no images")
    folder.mkdir(parents=True, exist_ok=True)
    for i, pair in enumerate(found.images):
        for name, image in zip(("reference", "other"), pair, strict=True):
            picture(image).save(folder / f"{i}-{name}.png")


def picture(image: Tensor) -> Image.Image:
    """Return [3, H, W] from 0 to 1 as a PIL image."""
    return Image.fromarray((image.movedim(0, -1) * 255).round().byte().numpy())
