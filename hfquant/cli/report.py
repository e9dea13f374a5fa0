"""`hfquant report`: one page about a quantized folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import errors_in_one_line


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write.")] = Path("report.html"),
    reference: Annotated[
        str | None,
        typer.Option(help="Folder or hub id in full precision: adds quality, speed, and pictures or next tokens."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text or dataset to compare language models on; default: Python's own manual.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text, or images.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt of a pipeline, repeated for several.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of a pipeline's call; JSON or a string.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    debug: options.Debug = False,
) -> None:
    """Write one self-contained HTML page: sizes, every layer's error, what to mend, and how far from full precision."""
    call = {key: options.parsed(value) for key, value in options.pairs("--arg", arg or ()).items()}
    with errors_in_one_line(debug):
        from hfquant.report.gather import Inputs, gather

        inputs = Inputs(data, None, samples, seqlen, prompt or (), call)
        page = gather(folder, reference, inputs, dtype, device)
        from hfquant.report.page import write

        out.parent.mkdir(parents=True, exist_ok=True)
        write(page, out)
    typer.echo(f"wrote {out}")
