"""`python -m hfquant.demo`: what each preset does to the embedded denoiser, as a table and a picture.

For each preset: quantize, save, load again from disk, sample from the same noise as full precision, compare.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import PipelineQuantizationConfig
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from hfquant import PRESETS, HfQuantConfig, QuantLinear, quantize
from hfquant.demo import DigitsPipeline, load_digits_pipeline
from hfquant.demo.classifier import agreement

FULL_PRECISION = "full precision"
DEFAULT_PRESETS = ("w8a16", "w8a8-dynamic", "fp8-dynamic", "fp8", "w6a16", "w4a16", "w4a8-dynamic")
SEED, CALIBRATION_SEED = 0, 1


@dataclass
class Result:
    """One row of the table. `images` are `[N, 8, 8]` float32 in [0, 1], what the row's pipeline drew."""

    name: str
    bits: float
    megabytes: float
    psnr: float
    agreement: float
    images: np.ndarray


def load_quantized(preset: str) -> DigitsPipeline:
    """The embedded pipeline with its denoiser quantized: while loading, or after it where the preset needs data."""
    config = HfQuantConfig(preset)
    if not config.needs_data:
        return load_digits_pipeline(
            quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config})
        )
    pipe = load_digits_pipeline()
    quantize(pipe.transformer, record_inputs(pipe), config)
    return pipe


def record_inputs(pipe: DigitsPipeline, steps: int = 10) -> list[dict[str, Any]]:
    """What the denoiser is given while it draws each digit twice, one dict of keyword arguments a step.

    The noise is not the one that presets are judged on.
    """
    batches: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe.set_progress_bar_config(desc="calibration data", leave=False)
    try:
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        pipe(list(range(10)) * 2, num_inference_steps=steps, generator=generator, output_type="pt")
    finally:
        handle.remove()
    return batches


def bits_per_weight(model: nn.Module) -> float:
    """Bytes of all tensors of the quantized linears (scales and biases too) in bits a weight.

    A model without quantized linears is counted by its plain ones.
    """
    linears: list[nn.Linear] = [m for m in model.modules() if isinstance(m, QuantLinear)]
    linears = linears or [m for m in model.modules() if isinstance(m, nn.Linear)]
    stored = sum(t.nbytes for m in linears for t in m.state_dict().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in linears)


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all images, data range 1."""
    error = float(np.mean((images.astype(np.float64) - reference) ** 2))
    return 10 * float(np.log10(1 / error)) if error else float("inf")


def save_and_measure(
    name: str, pipe: DigitsPipeline, out: Path, labels: list[int], steps: int, reference: np.ndarray | None
) -> Result:
    """Saves the pipeline, loads it again and samples with what was loaded, always from the same noise."""
    folder = out / name.replace(" ", "-")
    pipe.save_pretrained(folder)
    pipe = DigitsPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(desc=name, leave=False)
    generator = torch.Generator().manual_seed(SEED)
    (images,) = pipe(labels, num_inference_steps=steps, generator=generator, output_type="np", return_dict=False)
    images = images[..., 0]
    return Result(
        name,
        bits_per_weight(pipe.transformer),
        sum(file.stat().st_size for file in (folder / "transformer").iterdir()) / 1e6,
        float("inf") if reference is None else psnr(images, reference),
        agreement(images, labels),
        images,
    )


def format_table(results: Sequence[Result]) -> str:
    """The results as lines of aligned text."""
    width = max(len(r.name) for r in results)
    lines = [f"{'preset':<{width}}  bits/weight  disk (MB)  PSNR (dB)  agreement"]
    for r in results:
        ratio = "-" if np.isinf(r.psnr) else f"{r.psnr:.1f}"
        lines.append(f"{r.name:<{width}}  {r.bits:11.2f}  {r.megabytes:9.2f}  {ratio:>9}  {r.agreement:9.1%}")
    return "\n".join(lines)


def draw_grid(results: Sequence[Result], labels: list[int], path: Path) -> None:
    """Writes a PNG: a row for each result, a column for each digit, the first image drawn of it."""
    columns = sorted(set(labels))
    figure = Figure(figsize=(7, 0.66 * len(results) + 0.3), layout="constrained")
    axes = figure.subplots(len(results), len(columns), squeeze=False)
    for row, result in zip(axes, results, strict=True):
        for axis, digit in zip(row, columns, strict=True):
            axis.imshow(result.images[labels.index(digit)], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        figures = f"{result.bits:.1f} bits" + ("" if np.isinf(result.psnr) else f", {result.psnr:.1f} dB")
        row[0].set_ylabel(f"{result.name}\n{figures}", rotation=0, ha="right", va="center")
    for axis, digit in zip(axes[0], columns, strict=True):
        axis.set_title(str(digit))
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m hfquant.demo`."""
    parser = argparse.ArgumentParser(prog="python -m hfquant.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for checkpoints and the picture")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument(
        "--presets",
        type=partial(str.split, sep=","),
        default=list(DEFAULT_PRESETS),
        help=f"comma-separated, from {', '.join(PRESETS)}",
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.presets if name not in PRESETS]:
        parser.error(f"unknown presets {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    diffusers.utils.logging.disable_progress_bar()  # one bar for each load would bury ours

    labels = list(range(10)) * 10
    args.out.mkdir(parents=True, exist_ok=True)
    full = save_and_measure(FULL_PRECISION, load_digits_pipeline(), args.out, labels, args.steps, None)
    results = [full] + [
        save_and_measure(preset, load_quantized(preset), args.out, labels, args.steps, full.images)
        for preset in tqdm(args.presets, desc="presets")
    ]

    picture = args.out / "grid.png"
    draw_grid(results, labels, picture)
    print(
        f"\n{format_table(results)}\n\n"
        f"{len(labels)} images of 8x8 pixels, {args.steps} steps, equal noise.\n"
        "bits/weight: all tensors of the quantized linears, scales and biases too.\n"
        "PSNR: final images against full precision (float32), data range 1.\n"
        "agreement: how often a classifier of real digits reads the digit asked for.\n"
        f"Picture: {picture}"
    )


if __name__ == "__main__":
    main()
