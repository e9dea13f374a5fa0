"""`hfquant compare`: how much one model or pipeline differs from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_folder, console, print_json, print_table


def compare(
    reference: Annotated[str, typer.Argument(help="Folder or hub id of the reference.")],
    other: Annotated[str, typer.Argument(help="Folder or hub id to compare with it, usually quantized.")],
    data: options.ComparisonData = None,
    column: Annotated[list[str] | None, typer.Option(help="Column of the dataset.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of text windows (default: 16) or images (default: one per prompt).")
    ] = None,
    seqlen: options.WindowLength = 512,
    prompt: options.Prompts = None,
    arg: options.CallArguments = None,
    seed: Annotated[int, typer.Option(help="Seed for the noise of pipelines and the order of the data.")] = 0,
    images: Annotated[Path | None, typer.Option(help="Folder for the pairs of images, as PNG.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Compare two models on the same inputs, or two pipelines on the same prompts and the same noise.

    Language models: perplexity, KL divergence and top-1 agreement. Pipelines: PSNR and SSIM of the images; LPIPS, CLIP
    score and FID if the weights that they need are available.
    """
    call = options.call_arguments(arg or ())
    with command(debug, trust_remote_code):
        if images is not None:
            check_folder(images, "--images")
        from hfquant.integrations.hub import load
        from hfquant.report.gather import Inputs, compared

        options.check_no_set("--data", data)
        pair = [load(name, dtype, device) for name in (reference, other)]
        inputs = Inputs(data, options.columns(column or ()), samples, seqlen, prompt or (), call, seed, windows=16)
        found = compared(pair[0], pair[1], inputs)
        if images is not None:
            from hfquant.report.images import PipelineComparison, save_pairs

            if not isinstance(found, PipelineComparison):
                raise ValueError("--images: only pipelines make images")
            save_pairs(found, images)
    _print(found, as_json)


def _print(found: Any, as_json: bool) -> None:
    left_out, changes = getattr(found, "left_out", {}), getattr(found, "changes", ())
    if as_json:
        content: dict[str, Any] = {
            figure.name: {"value": figure.value, "error": figure.error, "unit": figure.unit, "better": figure.better}
            for figure in found.figures
        }
        print_json({"figures": content, "left_out": left_out})
        return
    print_table(("figure", "", "better"), [(f.name, str(f), f.better) for f in found.figures])
    for name, why in left_out.items():
        console().print(f"- {name} left out: {why}")
    if changes:
        rows = [
            (repr(c.context[-40:]), f"{c.reference[0]!r} {c.reference[1]:.0%}", f"{c.other[0]!r} {c.other[1]:.0%}")
            for c in changes[:5]
        ]
        print_table(("after", "reference", "other"), rows, title="Next tokens that differ most")
