"""Output of commands: folders that are written completely or not at all, tables and JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def check_folder(folder: Path, option: str = "--out") -> None:
    """Check that files can be written in a folder, before the work that makes them. It need not exist; none is left.

    Args:
        folder: the folder.
        option: the option that names it.

    Raises:
        OSError: no file can be written there, or the folder cannot be created.
    """
    folder = folder.resolve()
    place = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise type(error)(f"{option}: nothing can be written in {place}: {error.strerror}") from error


def check_file(file: Path, option: str = "--out") -> None:
    """Check that a file can be written, as :func:`check_folder` does; one that exists is left as it is."""
    if os.path.isdir(file):
        raise IsADirectoryError(f"{option}: {file} is a folder; pass the name of a file")
    if not os.path.exists(file):
        check_folder(file.parent, option)
    elif not os.access(file, os.W_OK):
        raise PermissionError(f"{option}: {file} cannot be written: {os.strerror(errno.EACCES)}")


def check_empty(out: Path) -> None:
    """Check that the folder of `--out` can be written by :func:`staged`.

    Raises:
        FileExistsError: it is not empty, or is a file.
        OSError: neither it nor a folder beside it can be written.
    """
    check_folder(beside(out, "partial").parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        state = "is not empty" if out.is_dir() else "is a file"
        raise FileExistsError(f"{out} {state}; choose another --out, or remove it first")
    check_folder(out)


def beside(out: Path, purpose: str) -> Path:
    """Return the hidden folder beside `out` that serves a purpose until `out` is complete."""
    out = out.resolve()
    return out.with_name(f".{out.name}.{purpose}")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder of the same name to write to, which becomes `out` at the end, or is removed if anything fails."""
    check_empty(out)
    out, partial = out.resolve(), beside(out, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder = partial / out.name  # a model card names the folder that it is in
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.exists():  # it may be the current folder, or one that is mounted, which cannot be replaced
            for path in folder.iterdir():
                shutil.move(path, out)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def console() -> Console:
    """Return a console that prints text verbatim."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a JSON document; NaN and infinities, which JSON does not have, become null."""
    typer.echo(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print aligned columns, folded to the width of a terminal; elsewhere at full width."""
    from rich.table import Column, Table

    table = Table(*(Column(title, overflow="fold") for title in head), title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    out = console()
    if not out.is_terminal:
        out.width = max(out.width, out.measure(table, options=out.options.update(max_width=10_000)).maximum)
    out.print(table)
