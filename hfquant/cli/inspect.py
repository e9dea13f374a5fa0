"""`hfquant inspect`: show the contents of a quantized folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import console, print_json, print_table
from hfquant.console import size


def inspect(
    folder: options.QuantizedFolder,
    layers: Annotated[bool, typer.Option("--layers/--summary", help="Print every layer, or only totals.")] = True,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Show the bits, bytes, formats and error of every quantized layer, and what stayed in full precision and why."""
    with command(debug, trust_remote_code):
        from hfquant.report.stored import read_folder

        models = read_folder(folder)[1]
    if as_json:
        print_json({name: model.to_dict() for name, model in models.items()})
        return
    for name, model in models.items():
        print_table(
            (f"{name}: {model.kind}", ""),
            [
                ("layers", str(len(model.layers))),
                ("bits per weight", f"{model.bits:.2f}, scales included"),
                ("size", f"{size(model.bytes)} of {size(model.full_bytes)} in full precision"),
            ],
        )
        if layers:
            print_table(("layer", "out x in", "weight", "input", "method", "bits", "size", "SQNR"), _rows(model))
        for layer, why in model.skipped.items():
            console().print(f"- {layer} in full precision: {why}")


def _rows(model: Any) -> list[tuple[str, ...]]:
    return [
        (
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.weight,
            layer.input,
            layer.method,
            f"{layer.bits:.2f}",
            size(layer.bytes),
            "-" if layer.sqnr is None else f"{layer.sqnr:.1f} dB",
        )
        for layer in model.layers
    ]
