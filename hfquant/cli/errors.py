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
        text = _unreadable(error) or str(error)
        typer.echo(f"Error: {' '.join(text.split()) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None


def _unreadable(error: Exception) -> str:
    """Return why a file that is there cannot be read; "" if the error does not call such a file missing.

    safetensors calls every file missing that it fails to open.
    """
    file = str(error).partition("No such file or directory: ")[2].strip("'")
    if isinstance(error, FileNotFoundError) and file:
        try:
            open(file, "rb").close()
        except FileNotFoundError:
            pass
        except OSError as why:
            return f"{file} cannot be read: {why.strerror}"
    return ""
