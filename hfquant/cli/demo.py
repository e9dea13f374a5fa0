"""`hfquant demo`: quantize the embedded digits pipeline in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_folder


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the image, the report page and the quantized pipelines.")
    ] = Path("demo_out"),
    debug: options.Debug = False,
) -> None:
    """Quantize a small diffusion pipeline that ships with hfquant, with and without data, and compare the results."""
    with command(debug):
        check_folder(out)
        try:
            import matplotlib  # noqa: F401
            import sklearn  # noqa: F401
        except ImportError as error:
            raise ImportError(f'the demo needs {error.name}: pip install "hfquant[demo]"') from error
        from hfquant.demo.__main__ import main

        main(["--out", str(out)])
