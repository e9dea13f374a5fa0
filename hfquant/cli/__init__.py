"""The command line, with one file per command.

Each command imports what it needs when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hfquant.cli.calibrate import calibrate
from hfquant.cli.compare import compare
from hfquant.cli.demo import demo
from hfquant.cli.distill import distill
from hfquant.cli.export import export
from hfquant.cli.inspect import inspect
from hfquant.cli.kernels import kernels
from hfquant.cli.plan import plan
from hfquant.cli.quantize import quantize
from hfquant.cli.recipe import recipe
from hfquant.cli.report import report

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Calibrated post-training quantization for transformers and diffusers models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hfquant import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options that precede a command."""


for command in (quantize, plan, calibrate, distill, inspect, compare, report, export, kernels, demo):
    app.command()(command)
app.add_typer(recipe, name="recipe")
