"""Error handling that all commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn errors from bad input into one line on stderr and exit code 1; any other error is a bug and propagates."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        typer.echo(f"Error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None
