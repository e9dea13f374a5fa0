"""`python -m hfquant.demo`: what calibration and the affiner do for the embedded denoiser.

For each row: quantize, save, reload from disk, generate from the same noise as full precision, and compare. It writes
the pipelines, an image grid and the report page of the best row to a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from rich.progress import track

from hfquant import PRESETS
from hfquant.demo import DigitsPipeline
from hfquant.demo.measure import Result, drawing, measure, speeds
from hfquant.demo.rows import AFFINER, DEFAULT_ROWS, FULL_PRECISION, folder_of, is_known, read_row, write_row
from hfquant.demo.show import best_of, draw_grid, table, write_page


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of `python -m hfquant.demo`."""
    parser = argparse.ArgumentParser(prog="python -m hfquant.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pipelines, picture and page")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument(
        "--presets",
        type=partial(str.split, sep=","),
        default=list(DEFAULT_ROWS),
        help=f"comma-separated, each alone or followed by {AFFINER}, from {', '.join(PRESETS)}",
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.presets if not is_known(name)]:
        parser.error(f"unknown presets {', '.join(unknown)}; available: {', '.join(PRESETS)}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    diffusers.utils.logging.disable_progress_bar()  # one bar per load would drown out ours
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to parallelize, and waiting threads would count as CPU time
    try:
        run(args.out, args.presets, args.steps)
    finally:
        torch.set_num_threads(threads)


def run(out: Path, rows: Sequence[str], steps: int) -> None:
    """Create, measure and show the rows, full precision first."""
    console = Console(highlight=False, soft_wrap=True)
    labels = list(range(10)) * 3
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    pipes: list[DigitsPipeline] = []
    for row in track([FULL_PRECISION, *rows], "Quantizing and drawing", console=Console(stderr=True), transient=True):
        write_row(row, out, steps)
        pipes.append(read_row(row, out))
        reference = results[0].images if results else None
        results.append(measure(row, pipes[-1], folder_of(row, out), labels, steps, reference))
    full, *others = [drawing(pipe, steps) for pipe in pipes]
    measured = speeds(full, others)

    picture = out / "grid.png"
    draw_grid(results, labels, picture)
    best = best_of(results[1:])
    page = write_page(best, measured[results.index(best) - 1], results[0], labels, out)
    console.print(table(results, measured))
    noisy = " ~: noisy, the machine is busy." if any(speed.noisy for speed in measured) else ""
    console.print(
        f"\n{len(labels)} images of 8x8 pixels, {steps} steps, the same noise; calibrated on other noise.\n"
        "bits: bits per weight, all tensors of the linears. MB: the denoiser on disk, with its affiner.\n"
        "PSNR: against the full-precision images. recognized: by a classifier trained on real digits.\n"
        f"speed: CPU time of full precision over the row's, one thread, median of interleaved repeats.{noisy}\n\n"
        f"Picture  {picture}\nReport   {page} ({best.name})\n\n"
        f"Next, quantize the full-precision pipeline yourself, {folder_of(FULL_PRECISION, out)}:\n"
        f"  hfquant quantize {folder_of(FULL_PRECISION, out)} --preset w8a8-dynamic --out digits-w8a8\n"
        f"  hfquant compare {folder_of(FULL_PRECISION, out)} digits-w8a8 --arg 'class_labels=[1, 2, 3]'",
        markup=False,
    )


if __name__ == "__main__":
    main()
