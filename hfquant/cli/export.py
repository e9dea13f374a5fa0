"""`hfquant export`: write a quantized model in another program's format."""

from __future__ import annotations

from typing import Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_empty, staged


def export(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model quantized with hfquant.")],
    out: options.NewFolder,
    form: Annotated[
        str, typer.Option("--format", help="compressed-tensors, or nunchaku-lite for a pipeline component.")
    ] = "compressed-tensors",
    component: Annotated[
        str | None, typer.Option(help="Pipeline component to export; default: the main denoiser.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round layers again if the format cannot express them as they are.")
    ] = False,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    debug: options.Debug = False,
) -> None:
    """Write a quantized model so that transformers, vLLM or diffusers load it without hfquant."""
    with command(debug, trust_remote_code):
        check_empty(out)
        from hfquant.denoisers import denoiser_name, is_pipeline
        from hfquant.exporters import export as write
        from hfquant.integrations.hub import load

        loaded = load(model, dtype)
        if is_pipeline(loaded):
            name = component or denoiser_name(loaded)
            if name not in loaded.components:
                raise ValueError(f"--component: {model} has no {name!r}; it has {', '.join(loaded.components)}")
            loaded = loaded.components[name]
        with staged(out) as folder:
            write(loaded, folder, format=form, requantize=requantize)
    typer.echo(f"wrote {out}")
