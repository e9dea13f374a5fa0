"""The output of the demo: a table, an image grid, and the report page of the best row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from hfquant import BlockwiseAffiner
from hfquant.demo.measure import Result, Speed
from hfquant.demo.rows import data_of, folder_of
from hfquant.report.gather import machine
from hfquant.report.images import PipelineComparison
from hfquant.report.page import Report, write
from hfquant.report.quality import Figure as Measured
from hfquant.report.stored import read_folder


def table(results: Sequence[Result], measured: Sequence[Speed]) -> Table:
    """Return the rows as a console table; the first is full precision, which has no speed of its own."""
    shown = Table("preset", "data", box=None, pad_edge=False)
    for head in ("bits", "MB", "PSNR, dB", "recognized", "speed"):
        shown.add_column(head, justify="right", no_wrap=True)
    for result, speed in zip(results, (None, *measured), strict=True):
        shown.add_row(
            result.name,
            data_of(result.name) if speed else "-",
            f"{result.bits:.2f}",
            f"{result.megabytes:.2f}",
            "-" if np.isinf(result.psnr) else f"{result.psnr:.1f}",
            f"{result.agreement:.0%}",
            "1.00 x" if speed is None else f"{'~' if speed.noisy else ''}{speed.ratio:.2f} x",
        )
    return shown


def draw_grid(results: Sequence[Result], labels: list[int], path: Path) -> None:
    """Write a PNG with a row for each result and a column for each digit, showing the first image of that digit."""
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


def best_of(results: Sequence[Result]) -> Result:
    """Return the row for the report page: of the rows that use the most data, the one closest to full precision."""
    learned = ("none", "calibrated", "affiner")
    return max(results, key=lambda result: (learned.index(data_of(result.name)), result.psnr))


def write_page(result: Result, speed: Speed, full: Result, labels: list[int], out: Path) -> Path:
    """Write the report page of a row, with one pair of images per digit, and return its path."""
    folder = folder_of(result.name, out)
    affiner = folder / "affiner"
    first = [labels.index(digit) for digit in sorted(set(labels))]
    pairs = tuple(tuple(torch.from_numpy(x.images[i]).expand(3, 8, 8) for x in (full, result)) for i in first)
    figures = (
        Measured("PSNR", result.psnr, unit="dB"),
        Measured("digits that a classifier reads right", 100 * result.agreement, unit="%"),
    )
    report = Report(
        result.name,
        read_folder(folder)[1],
        PipelineComparison(figures, pairs, {}),  # type: ignore[arg-type]  # pairs of two
        [("one call of the pipeline, CPU time", *speed.seconds)],
        machine(torch.device("cpu")),
        BlockwiseAffiner.from_pretrained(affiner) if affiner.is_dir() else None,
        images=len(pairs),
    )
    path = out / "report.html"
    write(report, path)
    return path
