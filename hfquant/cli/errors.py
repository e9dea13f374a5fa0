"""What every command makes of bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn what bad input raises into one line on stderr and exit code 1; anything else is a bug, and shows as one."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        typer.echo(f"Error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None
