"""What all commands share while they run: how errors are shown, log lines, and whether a model's code may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer

from hfquant.console import log_shown
from hfquant.remote_code import remote_code


@contextmanager
def command(debug: bool, trust_remote_code: bool = False, log: bool = False) -> Iterator[None]:
    """Run a command: errors from bad input become one line on stderr and exit code 1; others are bugs and propagate.

    Args:
        debug: let errors from bad input propagate too, for their traceback.
        trust_remote_code: whether models may run code of their own.
        log: whether to show this package's INFO lines.
    """
    try:
        with log_shown() if log else nullcontext(), remote_code(trust_remote_code):
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
