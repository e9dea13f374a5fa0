"""Measurements of a row: bits, bytes, and images and CPU time compared with full precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hfquant.demo import DigitsPipeline
from hfquant.demo.classifier import agreement

SEED = 0

#: Relative spread above which a speed is called noisy.
NOISY = 0.2


@dataclass(frozen=True)
class Speed:
    """Speed of a row as a multiple of full precision.

    Attributes:
        ratio: median over the repeats.
        spread: interquartile range of the repeats.
        seconds: median CPU seconds per run, of full precision and of the row.
    """

    ratio: float
    spread: float
    seconds: tuple[float, float]

    @property
    def noisy(self) -> bool:
        """Whether the repeats differ so much that the median means little."""
        return self.spread > NOISY * self.ratio


@dataclass(frozen=True)
class Result:
    """One row of the table, without its speed. `images` are the generated images, `[N, 8, 8]` float32 in [0, 1]."""

    name: str
    bits: float
    megabytes: float
    psnr: float
    agreement: float
    images: np.ndarray


def measure(
    name: str, pipe: DigitsPipeline, folder: Path, labels: list[int], steps: int, reference: np.ndarray | None
) -> Result:
    """Generate with a pipeline, always from the same noise, and compare with the images of full precision.

    Args:
        name: name of the row.
        pipe: as loaded from `folder`.
        folder: folder that the row was saved to.
        labels: digits to generate.
        steps: denoising steps.
        reference: `[N, 8, 8]`, the images of full precision; None for full precision itself.
    """
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    (images,) = pipe(labels, num_inference_steps=steps, generator=generator, output_type="np", return_dict=False)
    images = images[..., 0]
    parts = [part for name in ("transformer", "affiner") if (part := folder / name).is_dir()]
    return Result(
        name,
        bits_per_weight(pipe.transformer),
        sum(file.stat().st_size for part in parts for file in part.iterdir()) / 1e6,
        float("inf") if reference is None else psnr(images, reference),
        agreement(images, labels),
        images,
    )


def bits_per_weight(model: nn.Module) -> float:
    """Return the size of all tensors of the linears (including scales and biases) in bits per weight."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    stored = sum(t.nbytes for m in linears for t in m.state_dict().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in linears)


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels of all images, with a data range of 1."""
    error = float(np.mean((images.astype(np.float64) - reference) ** 2))
    return 10 * float(np.log10(1 / error)) if error else float("inf")


def drawing(pipe: DigitsPipeline, steps: int) -> Callable[[], object]:
    """Return the run that measures a pipeline's speed: each digit once, with the given number of steps."""
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        list(range(10)), num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED), output_type="np"
    )


def speeds(reference: Callable[[], object], runs: Sequence[Callable[[], object]], repeats: int = 5) -> list[Speed]:
    """Measure how many times as fast as a reference each run is.

    All runs take turns, so a machine that slows down slows them all alike, and each repeat has its own ratio. CPU time
    of all threads is measured, which other load on the machine barely affects.

    Args:
        reference: run to compare with.
        runs: runs to measure, each already run once.
        repeats: number of turns.
    """
    turns = [[_cpu_seconds(run) for run in (reference, *runs)] for _ in range(repeats)]
    found = []
    for i in range(1, len(runs) + 1):
        ratios = [turn[0] / turn[i] for turn in turns]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
        seconds = statistics.median(turn[0] for turn in turns), statistics.median(turn[i] for turn in turns)
        found.append(Speed(statistics.median(ratios), high - low, seconds))
    return found


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
