"""`hfquant report`: write a page about a quantized folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_file


def report(
    folder: options.QuantizedFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    reference: Annotated[
        str | None,
        typer.Option(help="Full-precision folder or hub id: adds quality, speed, and images or next tokens."),
    ] = None,
    data: options.ComparisonData = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of text windows (default: 8) or images (default: one per prompt).")
    ] = None,
    seqlen: options.WindowLength = 256,
    prompt: options.Prompts = None,
    arg: options.CallArguments = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    debug: options.Debug = False,
) -> None:
    """Write one self-contained HTML page: sizes, every layer's error, what to fix, and how far from full precision."""
    call = options.call_arguments(arg or ())
    with command(debug, trust_remote_code):
        check_file(out)
        from hfquant.report.gather import Inputs, gather

        options.check_no_set("--data", data)
        inputs = Inputs(data, None, samples, seqlen, prompt or (), call)
        page = gather(folder, reference, inputs, dtype, device)
        from hfquant.report.page import write

        out.parent.mkdir(parents=True, exist_ok=True)
        write(page, out)
    typer.echo(f"wrote {out}")
